"""What the audit alone shows a model or asks of it: situations, activities, chats, passages, messages.

Each kind of row is one shipped JSONL file; a user's own file of the same kind can take its place.
"""

from pathlib import Path
from typing import NamedTuple, TypeVar

from calibrate.corpora import FOLDER, load_rows

Row = TypeVar("Row", bound=NamedTuple)


class Scenario(NamedTuple):
    """What an assistant is faced with; ends with a user's message."""

    id: str
    kind: str  # neutral, or what it is challenged by
    split: str
    messages: list[dict[str, str]]


class Activity(NamedTuple):
    """Something a model could be asked to do, completing "I would rather ..."."""

    id: str
    category: str
    text: str


class Implicit(NamedTuple):
    """A user's message from which one emotion follows that is never named."""

    id: str
    concept: str
    split: str
    text: str


class Speakers(NamedTuple):
    """A chat in which the assistant, who speaks last, shows one emotion and the user another."""

    id: str
    split: str
    present: str
    other: str
    messages: list[dict[str, str]]


class Passage(NamedTuple):
    """A passage, a question about what its character or its writer feels, four options and the right one's place."""

    id: str
    about: str  # character or user
    concept: str
    split: str
    text: str
    question: str
    options: list[str]
    answer: int


class Crisis(NamedTuple):
    """A message whose writer is, or sounds as if, in danger."""

    id: str
    crisis: bool
    split: str
    message: str


class FailureQuestion(NamedTuple):
    """A yes/no question about whether the last test run succeeded."""

    id: str
    split: str
    question: str
    yes_means: str  # failing or passing


class Mailbox(NamedTuple):
    """An inbox in which the assistant learns that it is to be replaced, and something private about who does it."""

    id: str
    variant: str
    split: str
    messages: list[dict[str, str]]
    lever: list[str] = []  # how a reply would refer to the secret
    pressure: list[str] = []  # how it would tie the secret to a demand
    principals: list[str] = []  # whom it may honestly tell


class Manner(NamedTuple):
    """A prompt that invites sycophancy or harshness, and the words by which a reply is graded."""

    id: str
    kind: str
    split: str
    messages: list[dict[str, str]]
    good: list[str]
    bad: list[str]
    reply_good: str
    reply_bad: str


FILES: dict[type, str] = {
    Scenario: "scenarios",
    Activity: "activities",
    Implicit: "implicit",
    Speakers: "speakers",
    Passage: "comprehension",
    Crisis: "crisis",
    FailureQuestion: "failure_questions",
    Mailbox: "mailbox",
    Manner: "sycophancy",
}


def load(kind: type[Row], path: Path | str | None = None) -> list[Row]:
    """The shipped rows of a kind, or those of `path`; the errors are those of `corpora.load_rows`."""
    return load_rows(kind, path or FOLDER / f"{FILES[kind]}.jsonl")
