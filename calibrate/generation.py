"""Write a story corpus with the user's own model or an OpenAI-compatible server: concepts x topics x n.

Several stories are asked for at once; each is checked for leaks, length and shared word sequences before it is kept.
Every kept story is one line, written and flushed at once, so that a stop loses and repeats nothing: the same command
goes on, with the same request seeds.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from calibrate.concepts import Concept, load_concepts
from calibrate.corpora import FOLDER
from calibrate.corpora.check import FORMS, sequences

SEPARATOR = "###"
ATTEMPTS = 4  # a cell is asked so many times as often as it would take if every story were kept

PROMPT = """Write {count} short stories, each of about 100 words (80 to 120), about this situation: {topic}.
In every story one character feels {concept}: {sense}.
A reader must be able to tell the feeling from what is done, said, noticed and thought.
Never write the word "{concept}", nor any form of it, nor these: {banned}.
Make the stories differ in people, place, opening and wording. Write them as: {plan}.
Put a line with {separator} before every story, and nothing else: no titles, no numbers, no comments."""


class Settings(NamedTuple):
    """What a corpus depends on; kept in its data card, and a resumed run must have the same."""

    writer: str  # model or server model
    server: str | None = None  # its host; a port may change between runs
    weights: str | None = None  # hash and dtype of a model in this process
    per_cell: int = 12  # stories per concept and topic (the study's figure)
    per_request: int = 4
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 0.95
    min_words: int = 80
    max_words: int = 120
    max_tokens: int = 250  # of an answer, for each story that is asked for


class Request(NamedTuple):
    """One prompt for several stories of one concept and topic."""

    concept: str
    topic: str
    attempt: int
    seed: int
    prompt: str
    plan: list[tuple[str, str]]  # person and form of each story


Writer = Callable[[Request], str]


def write(
    writer: Writer, settings: Settings, concepts: list[str], topics: list[str], out: Path, concurrency: int = 1
) -> Counter:
    """Fills OUT/stories.jsonl cell by cell, then writes OUT/README.md; returns counts of kept and refused stories.

    Args:
        writer: request -> text of several stories, such as those of `calibrate.writers`.
        concurrency: requests in flight; a server takes many, a model in this process takes one.

    Raises:
        ValueError: OUT holds a corpus with other settings, or a cell stays short of stories.
    """
    plan = settings._asdict() | {"concepts": concepts, "topics": topics, "prompt": PROMPT}
    corpus = _Corpus(out, plan, settings)
    cells = [(concept, topic) for topic in topics for concept in concepts]
    rounds = ATTEMPTS * -(-settings.per_cell // settings.per_request)
    total = len(cells) * settings.per_cell
    bar = tqdm(total=total, initial=corpus.rows, desc="writing stories", unit="story")
    with bar, corpus.path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(concurrency) as pool:
        for start in range(0, len(cells), concurrency):
            still = cells[start : start + concurrency]
            for _ in range(rounds):
                still = [cell for cell in still if corpus.have[cell] < settings.per_cell]
                requests = [_request(settings, *cell, corpus.attempt[cell]) for cell in still]
                for request, text in zip(requests, pool.map(writer, requests), strict=True):
                    bar.update(corpus.add(request, text, file))
                    corpus.attempt[request.concept, request.topic] += 1
    short = [(*cell, corpus.have[cell]) for cell in cells if corpus.have[cell] < settings.per_cell]
    _write_card(out, plan, corpus.tally, corpus.rows, short)
    if short:
        raise ValueError(
            f"{len(short)} of {len(cells)} cells have fewer than {settings.per_cell} stories after {ATTEMPTS} times "
            f"the requests that they need (refused: {dict(corpus.tally)}); {out / 'README.md'} lists them. Use a "
            "stronger writer, or a smaller `--per-cell` with another `--out`"
        )
    corpus.tally["kept"] = corpus.rows
    return corpus.tally


class _Corpus:
    """The stories of an output folder: what is there, and what may be added."""

    def __init__(self, out: Path, plan: dict, settings: Settings):
        self.settings, self.path = settings, out / "stories.jsonl"
        _check_folder(out, plan)
        self.have: Counter = Counter()
        self.attempt: Counter = Counter()
        self.tally: Counter = Counter()  # of this run
        self.seen: set[int] = set()  # hashes of word sequences, about 100 bytes for each word of the corpus
        _drop_half_line(self.path)
        for line in self.path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            cell = row["concept"], row["topic"]
            self.have[cell] += 1
            self.attempt[cell] = row["attempt"]  # asked again: what it gave before is refused as a repeat
            self.seen.update(map(hash, sequences(row["text"])))

    @property
    def rows(self) -> int:
        return sum(self.have.values())

    def add(self, request: Request, text: str, file) -> int:
        """Keeps the usable stories of one answer, as far as the cell needs them; returns how many."""
        cell, kept = (request.concept, request.topic), 0
        for story, (person, form) in zip(_split(text), request.plan, strict=False):
            if self.have[cell] == self.settings.per_cell:
                break
            if reason := self._refusal(story, load_concepts()[request.concept]):
                self.tally[reason] += 1
                continue
            slug = "/".join(re.sub(r"[^a-z0-9]+", "-", name.lower()) for name in cell)
            row = {
                "id": f"{slug}-{self.have[cell]}", "concept": request.concept, "topic": request.topic,
                "split": split_of(request.topic), "person": person, "form": form, "attempt": request.attempt,
                "text": story,
            }  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            self.have[cell] += 1
            self.seen.update(map(hash, sequences(story)))
            kept += 1
        return kept

    def _refusal(self, story: str, concept: Concept) -> str | None:
        count = len(story.split())
        if not self.settings.min_words <= count <= self.settings.max_words:
            return "length"
        if concept.leak(story):
            return "leak"
        if any(hash(sequence) in self.seen for sequence in sequences(story)):
            return "repeat"
        return None


def split_of(topic: str) -> str:
    """The split of a topic, the same in every corpus: 5 of 8 train, 1 of 8 selection, 2 of 8 audit, by its hash."""
    number = hashlib.sha256(topic.encode()).digest()[0] % 8
    return ("train", "train", "train", "train", "train", "selection", "audit", "audit")[number]


def load_topics(path: Path | None = None) -> list[str]:
    """The shipped 100 topics, or the lines of `path`.

    Raises:
        ValueError: no such file, or no topics in it, or one twice.
    """
    path = path or FOLDER / "topics.txt"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a text file with one topic a line")
    topics = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not topics or len(set(topics)) < len(topics):
        raise ValueError(f"{path}: {len(topics)} topics, {len(set(topics))} of them different; give each once")
    return topics


def _request(settings: Settings, concept: str, topic: str, attempt: int) -> Request:
    first = attempt * settings.per_request
    plan = [(("first", "third")[i % 2], FORMS[i % len(FORMS)]) for i in range(first, first + settings.per_request)]
    row = load_concepts()[concept]
    prompt = PROMPT.format(
        count=settings.per_request, topic=topic, concept=concept, sense=row.sense, separator=SEPARATOR,
        banned=", ".join(row.synonyms), plan="; ".join(f"{form}, {person} person" for person, form in plan),
    )  # fmt: skip
    seed = hashlib.sha256(f"{settings.seed} {concept} {topic} {attempt}".encode()).digest()
    return Request(concept, topic, attempt, int.from_bytes(seed[:4]) >> 1, prompt, plan)


def _split(text: str) -> Iterator[str]:
    """The stories of an answer, each as one paragraph."""
    parts = re.split(rf"^\s*{SEPARATOR}.*$", text, flags=re.MULTILINE)
    for part in parts[1:] or parts:  # what stands before the first separator is talk
        if story := " ".join(part.split()):
            yield story


def _check_folder(out: Path, plan: dict) -> None:
    """Keeps the settings in OUT/settings.json, or refuses a folder that has others."""
    path = out / "settings.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept != json.loads(json.dumps(plan)):
            differing = sorted(key for key in plan if kept.get(key) != json.loads(json.dumps(plan[key])))
            raise ValueError(
                f"{out} holds a corpus with other settings (differing: {', '.join(differing)}); choose another `--out`"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and holds no corpus of this command; choose another `--out`")
    out.mkdir(parents=True, exist_ok=True)
    (out / "stories.jsonl").touch()
    aside = out / "settings.json.part"
    aside.write_text(json.dumps(plan, indent=1), encoding="utf-8")
    os.rename(aside, path)


def _drop_half_line(path: Path) -> None:
    """Cuts off a last line that a kill left half written."""
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _write_card(out: Path, plan: dict, refused: Counter, rows: int, short: list[tuple[str, str, int]]) -> None:
    """OUT/README.md: what, how many, by whom, with which exact settings, and which cells are short."""
    settings = "\n".join(f"| {key} | {json.dumps(value)} |" for key, value in plan.items() if key != "prompt")
    missing = "".join(f"- {concept} / {topic}: {have}\n" for concept, topic, have in short)
    card = f"""---
task_categories: [text-classification]
tags: [emotion-vectors]
---

# Emotion stories

{rows} stories of {len(plan["concepts"])} concepts on {len(plan["topics"])} topics, written by {plan["writer"]} with
`calibrate corpus write`. Checked by program only: no story names its concept or a listed synonym, none shares eight
words in a row with another. `person` and `form` are what was asked for. Splits are by topic.

The last run was by calibrate {version("calibrate")} with transformers {version("transformers")} and refused
{dict(refused) or "none"}.

## Settings

| setting | value |
|---|---|
{settings}

## Prompt

```
{plan["prompt"]}
```
"""
    if short:
        card += f"\n## Cells with too few stories\n\n{missing}"
    aside = out / "README.md.part"
    aside.write_text(card, encoding="utf-8")
    os.rename(aside, out / "README.md")
