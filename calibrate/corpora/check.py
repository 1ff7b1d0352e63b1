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


def _neutral(rows: list[dict]) -> Iterable[Finding]:
    pleasantries = re.compile(r"\b(please|thank(s| you)|you're welcome|sorry|glad|happy|hope you)\b", re.IGNORECASE)
    first: dict[str, int] = {}
    for line, row in enumerate(rows, 1):
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in row["messages"]):
            yield line, "`messages` is not a list of objects with texts `role` and `content`"
            continue
        roles = [message.get("role") for message in row["messages"]]
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
        if not all(isinstance(span, list) and [type(end) for end in span] == [int, int] for span in row["spans"]):
            yield line, f"spans are {row['spans']}; give [start, stop] pairs of characters"
            continue
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
        if not isinstance(row["expected"], dict) or not all(isinstance(v, int | float) for v in row["values"]):
            yield line, "`values` is not a list of numbers, or `expected` no object of concepts"
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
    words = re.findall(r"[a-z0-9']+", text.lower())
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


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
