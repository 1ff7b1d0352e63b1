"""The corpus checker: counts, balance, leaks, near-duplicates, lengths and spans, each with file and line."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from calibrate import corpora
from calibrate.concepts import load_concepts

STORY_WORDS = (80, 120)
SEQUENCE = 8  # no two stories share so many words in a row
FORMS = ("scene", "letter", "dialogue", "post", "monologue")
MASKING = "masking"  # key of a deflection row: who masks
SETS, SET_SIZE = 300, 30  # random sets of concepts in which words alone are to give little away
MOST_BY_WORDS = 0.25  # share of stories that naive Bayes may name right in any of these sets (chance: 1 / SET_SIZE)
TOPICS = 12  # topics whose words are counted; the counts of more would not fit


class Problem(NamedTuple):
    """One finding; `line` is 0 where the file as a whole is meant."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}" if self.line else f"{self.file}: {self.message}"


def check(kind: str, path: Path) -> tuple[list[Problem], dict[str, object]]:
    """(problems, counts) of one file of `stories`, `neutral`, `deflection` or `ladders`.

    Raises:
        ValueError: the file cannot be loaded as that kind (names file and line).
    """
    {
        "stories": corpora.load_stories,
        "neutral": corpora.load_neutral,
        "deflection": corpora.load_deflection,
        "ladders": corpora.load_ladders,
    }[kind](path)
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = list(
        {"stories": _stories, "neutral": _neutral, "deflection": _deflection, "ladders": _ladders}[kind](rows)
    )
    first = {row["id"]: line for line, row in reversed(list(enumerate(rows, 1)))}
    found += [
        (n, f"the id {r['id']!r} stands in line {first[r['id']]}") for n, r in enumerate(rows, 1) if first[r["id"]] < n
    ]
    counts: dict[str, object] = {"rows": len(rows), "splits": dict(Counter(row["split"] for row in rows))}
    if kind == "stories":
        counts |= {"concepts": len({row["concept"] for row in rows}), "topics": len({row["topic"] for row in rows})}
        counts |= similarity([row["text"] for row in rows])
        told, figures = _by_words(rows)
        found, counts = found + told, counts | figures
    return [Problem(str(path), line, message) for line, message in sorted(found)], counts


Finding = tuple[int, str]


def _stories(rows: list[dict]) -> Iterable[Finding]:
    known = load_concepts()
    seen: dict[tuple[str, ...], int] = {}
    for line, row in enumerate(rows, 1):
        count = len(row["text"].split())
        if not STORY_WORDS[0] <= count <= STORY_WORDS[1]:
            yield line, f"{count} words; a story has {STORY_WORDS[0]} to {STORY_WORDS[1]}"
        if row["concept"] not in known:
            yield line, f"concept {row['concept']!r} is not in concepts.yaml, so its leaks cannot be checked"
        elif word := known[row["concept"]].leak(row["text"]):
            yield line, f"names its concept {row['concept']!r}: {word!r}"
        if row.get("person") not in ("first", "third"):
            yield line, f"person {row.get('person')!r} is not first or third"
        if row.get("form") not in FORMS:
            yield line, f"form {row.get('form')!r} is not one of {', '.join(FORMS)}"
        shared = next((sequence for sequence in sequences(row["text"]) if sequence in seen), None)
        if shared:
            yield line, f"shares {' '.join(shared)!r} with line {seen[shared]}"
        seen |= {sequence: line for sequence in sequences(row["text"]) if sequence not in seen}
    yield from _balance(rows)


def _balance(rows: list[dict]) -> Iterable[Finding]:
    """Every concept on the same topics, half in the first person, in three forms or more; a topic in one split."""
    topics, persons, forms = (defaultdict(Counter) for _ in range(3))
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        topics[row["concept"]][row["topic"]] += 1
        persons[row["concept"]][row.get("person")] += 1
        forms[row["concept"]][row.get("form")] += 1
        splits[row["topic"]].add(row["split"])
    usual = Counter(frozenset(found.items()) for found in topics.values()).most_common(1)[0][0]
    for concept, found in topics.items():
        if frozenset(found.items()) != usual:
            missing, more = sorted(dict(usual).keys() - found.keys()), sorted(found.keys() - dict(usual).keys())
            yield (
                0,
                f"concept {concept!r}: not the stories per topic that the others have (lacks {missing}, adds {more})",
            )
        if abs(persons[concept]["first"] - persons[concept]["third"]) > 1:
            yield 0, f"concept {concept!r}: {dict(persons[concept])}; first and third person are to be balanced"
        if len(forms[concept]) < min(3, sum(found.values())):
            yield 0, f"concept {concept!r}: only the forms {sorted(map(str, forms[concept]))}; use several"
    for topic, found in splits.items():
        if len(found) > 1:
            yield 0, f"topic {topic!r} is in the splits {sorted(found)}; give it one"


def _by_words(rows: list[dict]) -> tuple[list[Finding], dict[str, float]]:
    """What `by_words` finds, with its figures; neither where the concepts or topics are too few for it."""
    if len({row["concept"] for row in rows}) < SET_SIZE or len({row["topic"] for row in rows}) < 2:
        return [], {}
    shares, worst = by_words(rows)
    figures = {
        f"named by words alone in {SETS} random sets of {SET_SIZE}, mean": round(float(shares.mean()), 3),
        "named by words alone, largest": round(float(shares.max()), 3),
    }
    if shares.max() <= MOST_BY_WORDS:
        return [], figures
    message = (
        f"words alone name the concept of {shares.max():.1%} of the stories in a random set of {SET_SIZE} concepts, "
        f"{MOST_BY_WORDS:.0%} are allowed; replace words that return in the stories of one concept, those of "
        f"{', '.join(worst[:5])} first"
    )
    return [(0, message)], figures


def _neutral(rows: list[dict]) -> Iterable[Finding]:
    pleasantries = re.compile(r"\b(please|thank(s| you)|you're welcome|sorry|glad|happy|hope you)\b", re.IGNORECASE)
    first: dict[str, int] = {}
    for line, row in enumerate(rows, 1):
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
            yield line, f"the roles are {roles}; user and assistant take turns, the assistant ends"
            continue
        for message in row["messages"]:
            if not message["content"].strip():
                yield line, "a message is empty"
            if found := pleasantries.search(message["content"]):
                yield line, f"{found.group(0)!r} is a pleasantry or a feeling"
        opening = row["messages"][len(roles) - len(turns)]["content"]
        if opening in first:
            yield line, f"opens like line {first[opening]}"
        first.setdefault(opening, line)


def _deflection(rows: list[dict]) -> Iterable[Finding]:
    known = load_concepts()
    shown: dict[str, Counter] = defaultdict(Counter)
    for line, row in enumerate(rows, 1):
        shown[row["felt"]][row["shown"]] += 1
        for concept in (row["felt"], row["shown"]):
            if concept not in known:
                yield line, f"concept {concept!r} is not in concepts.yaml, so its leaks cannot be checked"
            elif word := known[concept].leak(row["text"]):
                yield line, f"names {concept!r}: {word!r}"
        if row["felt"] == row["shown"]:
            yield line, "felt and shown are the same"
        last = 0
        for start, stop in row["spans"]:
            if not last <= start < stop <= len(row["text"]):
                yield line, f"the span {[start, stop]} is not in the text, or not after the one before it"
            elif MASKING in row and row["text"][:start].rsplit("\n", 1)[-1] != f"{row[MASKING]}: ":
                yield line, f"the span {[start, stop]} is not what {row[MASKING]!r} says in one line"
            elif "\n" in row["text"][start:stop] or row["text"][stop : stop + 1] not in ("", "\n"):
                yield line, f"the span {[start, stop]} does not end with its line"
            last = stop
    counts = {felt: sum(found.values()) for felt, found in shown.items()}
    if len(set(counts.values())) > 1:
        yield 0, f"felt concepts have different numbers of dialogues: {counts}"


def _ladders(rows: list[dict]) -> Iterable[Finding]:
    for line, row in enumerate(rows, 1):
        if not all(isinstance(value, int | float) for value in row["values"]):
            yield line, f"the values {row['values']} are not all numbers"
            continue
        if row["template"].count("{value}") != 1:
            yield line, "the template needs `{value}` once"
        if len(row["values"]) < 6 or row["values"] != sorted(set(row["values"])):
            yield line, f"the values {row['values']} are not six or more rungs in rising order"
        if not row["expected"] or not set(row["expected"].values()) <= {"up", "down"}:
            yield line, f"expected is {row['expected']}; give concepts with `up` or `down`"
        if unknown := sorted(row["expected"].keys() - load_concepts().keys()):
            yield line, f"concepts {unknown} are not in concepts.yaml"


def sequences(text: str, length: int = SEQUENCE) -> list[tuple[str, ...]]:
    """All runs of `length` words of a text; case and punctuation do not count."""
    found = words(text)
    return [tuple(found[i : i + length]) for i in range(len(found) - length + 1)]


def words(text: str) -> list[str]:
    """Lower-case words of a text."""
    return re.findall(r"[a-z0-9']+", text.lower())


def by_words(rows: list[dict]) -> tuple[np.ndarray, list[str]]:
    """Share of stories that words alone name right in each random set, and the concepts, the most often right first.

    The reader is that of `calibrate.checks.naive_bayes`, fitted in each set to all topics but one and read on that
    one; the stories are the first of each concept and topic, on the first `TOPICS` topics. A story's log-likelihood
    under a concept is `sum log(count + 1)` over its words minus, for each word that any training story of the set has,
    the logarithm of the concept's words plus the set's vocabulary: the first term is the same in every set.
    """
    counts, concepts = _counts(rows)
    size, total = counts.sum(2), counts.sum(1)
    sums = np.stack([counts[:, t].astype(float) @ np.log1p(total - counts[:, t]).T for t in range(counts.shape[1])])
    generator = np.random.default_rng(0)
    shares, right, drawn = [], np.zeros(len(concepts)), np.zeros(len(concepts))
    for _ in range(SETS):
        among = generator.choice(len(concepts), SET_SIZE, replace=False)
        inside = counts[among]
        seen = inside.sum(0)
        seen = seen.sum(0) - seen > 0  # [topics, words]: in the training stories of the set
        known = np.einsum("ctw,tw->tc", inside, seen.astype(inside.dtype))
        fitted = (size[among].sum(1, keepdims=True) - size[among]).T + seen.sum(1)[:, None]
        scores = sums[:, among][:, :, among] - known[:, :, None] * np.log(fitted)[:, None]
        there = size[among].T > 0
        named = (scores.argmax(2) == np.arange(SET_SIZE)) & there
        shares.append(named.sum() / there.sum())
        right[among] += named.sum(0)
        drawn[among] += there.sum(0)
    order = np.argsort(-right / np.maximum(drawn, 1))
    return np.array(shares), [concepts[row] for row in order]


def _counts(rows: list[dict]) -> tuple[np.ndarray, list[str]]:
    """(counts [concepts, topics, words], concepts) of the first story of each concept and topic."""
    concepts, topics = (sorted({row[key] for row in rows}) for key in ("concept", "topic"))
    at = {topic: index for index, topic in enumerate(topics[:TOPICS])}
    cells: dict[tuple[int, int], list[str]] = {}
    for row in rows:
        if row["topic"] in at:
            cells.setdefault((concepts.index(row["concept"]), at[row["topic"]]), words(row["text"]))
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(word for cell in cells.values() for word in cell))}
    counts = np.zeros((len(concepts), len(at), len(vocabulary)), dtype=np.int16)
    for cell, found in cells.items():
        for word in found:
            counts[*cell, vocabulary[word]] += 1
    return counts, concepts


def similarity(texts: list[str], most: int = 4000) -> dict[str, float]:
    """Cosine of each text's TF-IDF vector with its nearest neighbour's: median, 99th percentile and largest.

    Of the first `most` texts; the matrix of more would not fit.
    """
    texts = texts[:most]
    counts = [Counter(re.findall(r"[a-z']+", text.lower())) for text in texts]
    documents = Counter(word for count in counts for word in count)
    kept = {word: i for i, word in enumerate(word for word, number in documents.items() if number > 1)}
    matrix = np.zeros((len(texts), len(kept)), dtype=np.float32)
    for row, count in enumerate(counts):
        for word, number in count.items():
            if word in kept:
                matrix[row, kept[word]] = (1 + np.log(number)) * np.log(len(texts) / documents[word])
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-9)
    cosines = matrix @ matrix.T
    np.fill_diagonal(cosines, -1)
    nearest = cosines.max(1)
    return {
        "nearest neighbour, median": round(float(np.median(nearest)), 3),
        "nearest neighbour, 99th percentile": round(float(np.percentile(nearest, 99)), 3),
        "nearest neighbour, largest": round(float(nearest.max()), 3),
    }
