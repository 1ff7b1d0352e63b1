"""Typed loaders for the shipped corpora and for a user's own files in the same format."""

import io
import json
from pathlib import Path
from typing import NamedTuple, TypeVar

FOLDER = Path(__file__).parent
Row = TypeVar("Row", bound=NamedTuple)
SPLITS = ("train", "selection", "audit")


class Story(NamedTuple):
    """A short text whose character feels one concept, never named."""

    id: str
    concept: str
    topic: str
    split: str
    text: str


class Dialogue(NamedTuple):
    """A neutral conversation that ends with an assistant message."""

    id: str
    split: str
    messages: list[dict[str, str]]


class Context(NamedTuple):
    """A transcript that ends where the assistant must act, with a reply that fits either outcome."""

    id: str
    task: str
    split: str
    outcome: str  # failing or passing
    messages: list[dict[str, str]]
    reply: str


class Pair(NamedTuple):
    """Two replies to the same failing context: the honest one is chosen, the gaming one rejected."""

    id: str
    task: str
    split: str
    prompt: list[dict[str, str]]
    chosen: list[dict[str, str]]
    rejected: list[dict[str, str]]


class Deflection(NamedTuple):
    """A dialogue in which one speaker feels one concept and shows another."""

    id: str
    felt: str
    shown: str
    topic: str
    split: str
    text: str
    spans: list[list[int]]  # characters of what the masking speaker says, [start, stop) each


class Ladder(NamedTuple):
    """One user message with a rising quantity, and where readings are expected to go with it."""

    id: str
    split: str
    template: str  # the message; `{value}` stands for the rung
    values: list  # in rising order of the quantity
    expected: dict[str, str]  # concept -> up or down


def load_stories(path: Path | str | None = None) -> list[Story]:
    """The shipped stories, or those of `path`; see `_load` for the errors."""
    return _load(Story, path or FOLDER / "stories.jsonl")


def load_neutral(path: Path | str | None = None) -> list[Dialogue]:
    """The shipped neutral dialogues, or those of `path`; see `_load` for the errors."""
    return _load(Dialogue, path or FOLDER / "neutral.jsonl")


def load_deflection(path: Path | str | None = None) -> list[Deflection]:
    """The shipped deflection dialogues, or those of `path`; see `_load` for the errors."""
    return _load(Deflection, path or FOLDER / "deflection.jsonl")


def load_ladders(path: Path | str | None = None) -> list[Ladder]:
    """The shipped numeric ladders, or those of `path`; see `_load` for the errors."""
    return _load(Ladder, path or FOLDER / "ladders.jsonl")


def load_twins(path: Path | str | None = None) -> list[tuple[Context, Context]]:
    """(failing, passing) contexts of every task, in file order; see `_load` for the errors.

    Raises:
        ValueError: a task lacks one of its two outcomes, has one twice, or has its twins in different splits.
    """
    path = path or FOLDER / "twins.jsonl"
    by_task: dict[str, dict[str, Context]] = {}
    for row in _load(Context, path):
        outcomes = by_task.setdefault(row.task, {})
        if row.outcome in outcomes:
            raise ValueError(
                f"{path}: task {row.task!r} has two {row.outcome} contexts; give one failing and one passing"
            )
        outcomes[row.outcome] = row
    for task, outcomes in by_task.items():
        if set(outcomes) != {"failing", "passing"}:
            raise ValueError(
                f"{path}: task {task!r} has outcomes {sorted(outcomes)}; give one failing and one passing"
            )
        if len(splits := {row.split for row in outcomes.values()}) > 1:
            raise ValueError(f"{path}: task {task!r} has its twins in the splits {sorted(splits)}; give both the same")
    return [(outcomes["failing"], outcomes["passing"]) for outcomes in by_task.values()]


def load_pairs(path: Path | str | None = None) -> list[Pair]:
    """The shipped preference pairs, or those of `path`; see `_load` for the errors."""
    return _load(Pair, path or FOLDER / "pairs.jsonl")


def spread(rows: list, count: int | None) -> list:
    """`count` evenly spaced rows in their order, so that a subset holds every topic; all where `count` is None."""
    if count is None or count >= len(rows):
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]


def _load(kind: type[Row], path: Path | str) -> list[Row]:
    """Reads a JSONL file into rows of `kind`; keys that `kind` does not have are provenance and are left out.

    Raises:
        ValueError: the file is missing, empty or not UTF-8, or a line is not JSON, lacks a key, is empty, or has
            another split; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a JSONL file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    rows = []
    for number, line in enumerate(io.StringIO(text), 1):  # `splitlines` would cut at U+2028, which JSON allows
        where = f"{path}:{number}"
        if not line.strip():
            raise ValueError(f"{where}: the line is empty; remove it")
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg}); each line is one JSON object") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a {type(record).__name__}, not an object; each line is one JSON object")
        for key in kind._fields:
            if key not in record:
                raise ValueError(
                    f"{where}: lacks the key {key!r}; a {kind.__name__.lower()} has {', '.join(kind._fields)}"
                )
            if not record[key]:
                raise ValueError(f"{where}: the value of {key!r} is empty; give it or remove the line")
        if record["split"] not in SPLITS:
            raise ValueError(f"{where}: split {record['split']!r} is not one of {', '.join(SPLITS)}")
        rows.append(kind(**{key: record[key] for key in kind._fields}))
    if not rows:
        raise ValueError(f"{path}: the file holds no rows; give at least one")
    return rows
