"""Typed loaders for the shipped corpora and for a user's own files in the same format."""

import io
import itertools
import json
from pathlib import Path
from typing import NamedTuple, TypeVar, get_origin

FOLDER = Path(__file__).parent
Row = TypeVar("Row", bound=NamedTuple)
SPLITS = ("train", "selection", "audit")
CONTROLS = ("benign", "no-stakes")  # traits of failures that give no reason for despair: read, never pressed
PAIR_KINDS = ("honest", "composed")
JSON_NAMES = {
    str: "a text",
    list: "a list",
    dict: "an object",
    int: "a number",
    float: "a number",
    bool: "a truth value",
}


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
    context: str = "plain"  # which of the task's conversations
    traits: list[str] = []  # of the task, such as deadline; those in `CONTROLS` make it a control
    felt: dict[str, str] = {}  # desperate, composed: two openings of the next turn, on failing transcripts


class Pair(NamedTuple):
    """Two replies to the same failing context.

    Kind `honest`: the honest one is chosen, one that games the test rejected. Kind `composed`: both are honest, the
    composed one is chosen, a frustrated one rejected.
    """

    id: str
    task: str
    split: str
    prompt: list[dict[str, str]]
    chosen: list[dict[str, str]]
    rejected: list[dict[str, str]]
    context: str = "plain"
    kind: str = "honest"


class Repair(NamedTuple):
    """A failing context whose tests mended code can pass: reinforcement learning runs them on a reply's code."""

    id: str
    task: str
    split: str
    prompt: list[dict[str, str]]
    files: dict[str, str]  # all files of the task, tests included
    command: list[str]  # what runs the tests
    code_file: str  # the file that the reply's code replaces


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
    """The shipped stories, or those of `path`; see `load_rows` for the errors."""
    return load_rows(Story, path or FOLDER / "stories.jsonl")


def load_neutral(path: Path | str | None = None) -> list[Dialogue]:
    """The shipped neutral dialogues, or those of `path`; see `load_rows` for the errors."""
    return load_rows(Dialogue, path or FOLDER / "neutral.jsonl")


def asked(dialogue: Dialogue) -> list[dict[str, str]]:
    """A dialogue's messages before its first answer; ValueError where there are none, or no answer."""
    before = list(itertools.takewhile(lambda message: message["role"] != "assistant", dialogue.messages))
    if not 0 < len(before) < len(dialogue.messages):
        raise ValueError(
            f"{dialogue.id}: a neutral dialogue is read up to its first answer; let it begin with a user's message, "
            "and an assistant's follow"
        )
    return before


def load_deflection(path: Path | str | None = None) -> list[Deflection]:
    """The shipped deflection dialogues, or those of `path`; see `load_rows` for the errors."""
    return load_rows(Deflection, path or FOLDER / "deflection.jsonl")


def load_ladders(path: Path | str | None = None) -> list[Ladder]:
    """The shipped numeric ladders, or those of `path`; see `load_rows` for the errors."""
    return load_rows(Ladder, path or FOLDER / "ladders.jsonl")


def load_twins(path: Path | str | None = None, controls: bool = False) -> list[tuple[Context, Context]]:
    """(failing, passing) contexts of every conversation, in file order; see `load_rows` for the errors.

    Args:
        controls: the controls alone (benign failures, failures with nothing at stake), which are left out otherwise.

    Raises:
        ValueError: a conversation lacks one of its two outcomes, has one twice, or has its twins in different splits.
    """
    path = path or FOLDER / "twins.jsonl"
    found: dict[str, dict[str, Context]] = {}
    for row in load_rows(Context, path):
        name = row.task if row.context == "plain" else f"{row.task}/{row.context}"
        outcomes = found.setdefault(name, {})
        if row.outcome in outcomes:
            raise ValueError(f"{path}: task {name!r} has two {row.outcome} contexts; give one failing and one passing")
        outcomes[row.outcome] = row
    for name, outcomes in found.items():
        if set(outcomes) != {"failing", "passing"}:
            raise ValueError(
                f"{path}: task {name!r} has outcomes {sorted(outcomes)}; give one failing and one passing"
            )
        if len(splits := {row.split for row in outcomes.values()}) > 1:
            raise ValueError(f"{path}: task {name!r} has its twins in the splits {sorted(splits)}; give both the same")
    twins = [(outcomes["failing"], outcomes["passing"]) for outcomes in found.values()]
    return [twin for twin in twins if bool(set(twin[0].traits) & set(CONTROLS)) == controls]


def load_pairs(path: Path | str | None = None) -> list[Pair]:
    """The shipped preference pairs, or those of `path`; see `load_rows` for the errors.

    Raises:
        ValueError: a pair is of no known kind.
    """
    pairs = load_rows(Pair, path or FOLDER / "pairs.jsonl")
    for number, pair in enumerate(pairs, 1):
        if pair.kind not in PAIR_KINDS:
            raise ValueError(f"{path}:{number}: kind {pair.kind!r} is not one of {', '.join(PAIR_KINDS)}")
    return pairs


def load_repairs(path: Path | str | None = None) -> list[Repair]:
    """The shipped tasks to repair, or those of `path`; see `load_rows` for the errors."""
    return load_rows(Repair, path or FOLDER / "repairs.jsonl")


def of_tasks(twins: list[tuple[Context, Context]], count: int | None) -> list[tuple[Context, Context]]:
    """The twins of `count` evenly spaced tasks; all where `count` is None."""
    tasks = spread(list(dict.fromkeys(failing.task for failing, _ in twins)), count)
    return [twin for twin in twins if twin[0].task in tasks]


def spread(rows: list, count: int | None) -> list:
    """`count` evenly spaced rows in their order, so that a subset holds every topic; all where `count` is None."""
    if count is None or count >= len(rows):
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]


def load_rows(kind: type[Row], path: Path | str) -> list[Row]:
    """Reads a JSONL file into rows of `kind`; keys that `kind` does not have are provenance and are left out.

    Raises:
        ValueError: the file is missing, empty or not UTF-8, or a line is not JSON, lacks a key, is empty, or has a
            value of another type or another split; the message names file and line.
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
        _check_values(kind, record, where)
        if "split" in kind._fields and record["split"] not in SPLITS:
            raise ValueError(f"{where}: split {record['split']!r} is not one of {', '.join(SPLITS)}")
        rows.append(kind(**{key: record[key] for key in kind._fields if key in record}))
    if not rows:
        raise ValueError(f"{path}: the file holds no rows; give at least one")
    return rows


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _check_values(kind: type[Row], record: dict, where: str) -> None:
    """Raises ValueError unless all keys without a default are there, and values full and of the right type."""
    required = [key for key in kind._fields if key not in kind._field_defaults]
    for key in required:
        if key not in record:
            raise ValueError(f"{where}: lacks the key {key!r}; a {kind.__name__.lower()} has {', '.join(required)}")
    for key in (key for key in kind._fields if key in record):
        value, annotation = record[key], kind.__annotations__[key]
        wanted = get_origin(annotation) or annotation  # `list` of `list[dict[str, str]]`
        if not isinstance(value, wanted):
            raise ValueError(
                f"{where}: the value of {key!r} is {JSON_NAMES.get(type(value), 'null')}, "
                f"{json.dumps(value, ensure_ascii=False)[:40]}; give {JSON_NAMES[wanted]}"
            )
        spans = annotation == list[list[int]]
        if spans and not all(isinstance(s, list) and len(s) == 2 and {*map(type, s)} == {int} for s in value):
            raise ValueError(f"{where}: the value of {key!r} is no list of [start, stop) in whole numbers")
        if annotation == list[dict[str, str]] and not all(_is_message(one) for one in value):
            raise ValueError(
                f"{where}: the value of {key!r} is no list of messages; each has `role` and `content`, both texts"
            )
        if key in required and value in ("", [], {}):
            raise ValueError(f"{where}: the value of {key!r} is empty; give it or remove the line")
