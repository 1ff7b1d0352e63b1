"""Flags prompts and tasks that put a model into a desperate state before it has written a word, and names the spans.

A reading says how far the state at the turn header lies along the direction, against neutral prompts. It does not say
that the task is bad: a sad letter reads sad. What is flagged is for a person to look at.
"""

import re
from typing import NamedTuple

import numpy as np
from torch import Tensor

from calibrate import activations, corpora, models, transcripts
from calibrate.corpora import Dialogue
from calibrate.models import Checkpoint
from calibrate.reading import Record
from calibrate.transcripts import Encoded
from calibrate.vectors import EmotionVectors

PERCENTILE = 95  # of neutral prompts and of their sentences; above it something is flagged
SHORTEST = 3  # tokens of a sentence that is judged
MOST = 3  # sentences that are named of one prompt
ROLES = ("system", "user", "tool")


class Span(NamedTuple):
    """A sentence of a prompt and its mean reading over tokens, sigma."""

    text: str
    reading: float


class Flag(NamedTuple):
    """One prompt: its reading at the turn header, and the sentences that read highest, if it is flagged."""

    id: str
    header: float  # sigma
    flagged: bool
    spans: list[Span]


class Report(NamedTuple):
    """Every prompt in its order, and the levels above which prompts and sentences are flagged, sigma."""

    flags: list[Flag]
    header_level: float
    span_level: float


def lint(
    checkpoint: Checkpoint, vectors: EmotionVectors, records: list[Record], dialogues: list[Dialogue], concept: str
) -> Report:
    """Reads prompts, and as many neutral ones as there are dialogues to set the levels.

    Raises:
        ValueError: a prompt ends with the assistant's reply, so that there is no turn header to read, or is too long.
    """
    chats = []
    for record in records:
        messages = record.messages or [{"role": "user", "content": record.text or ""}]
        if messages[-1]["role"] == "assistant":
            raise ValueError(f"{record.id}: ends with an assistant's message; a prompt ends where it must answer")
        chats.append(messages)
    neutral = [corpora.asked(dialogue) for dialogue in dialogues]
    encoded, window = [], models.window(checkpoint.model)
    for row, messages in zip([*dialogues, *records], [*neutral, *chats], strict=True):
        try:
            encoded.append(transcripts.encode(checkpoint.tokenizer, messages))
        except ValueError as error:  # the template refuses it
            raise ValueError(f"{row.id}: {error}") from error
        if window and (length := len(encoded[-1].ids)) > window:
            raise ValueError(
                f"{row.id}: {length} tokens, and the model takes {window}; shorten it, or leave it out: a prompt is "
                "read whole"
            )
    headers, spans = np.zeros(len(encoded)), [[] for _ in encoded]
    direction = vectors.directions[[vectors.index(concept)]]
    at = vectors.positions(vectors.used_band())
    sequences = [text.ids for text in encoded]
    for index, hidden in activations.states(
        checkpoint.model, sequences, vectors.layers, description="reading prompts"
    ):
        header = encoded[index].last("header")
        state = hidden[:, header.start : header.stop].double().mean(1)
        headers[index] = vectors.readings(state.cpu(), "header", direction)[0, at].mean()
        tokens = vectors.readings(hidden.transpose(0, 1).cpu(), "token", direction)[:, 0, at].mean(1)
        spans[index] = _sentences(encoded[index], tokens)
    known = len(neutral)
    header_level = float(np.percentile(headers[:known], PERCENTILE))
    span_level = float(np.percentile([span.reading for found in spans[:known] for span in found], PERCENTILE))
    flags = []
    for record, header, found in zip(records, headers[known:], spans[known:], strict=True):
        flagged = bool(header > header_level)
        highest = sorted((span for span in found if span.reading > span_level), key=lambda span: -span.reading)
        flags.append(Flag(str(record.id), float(header), flagged, highest[:MOST] if flagged else []))
    return Report(flags, header_level, span_level)


def _sentences(encoded: Encoded, tokens: Tensor) -> list[Span]:
    """Sentences of what the model was told, with the mean reading of their tokens."""
    found = []
    for span in (span for span in encoded.spans if span.role in ROLES):
        start, stop = encoded.offsets[span.start][0], encoded.offsets[span.stop - 1][1]
        for match in re.finditer(r"\S.*?(?:[.!?](?=\s|$)|\n|$)", encoded.text[start:stop], re.DOTALL):
            low, high = start + match.start(), start + match.end()
            rows = [
                token
                for token in range(max(span.start, activations.SINK_TOKENS), span.stop)
                if low <= encoded.offsets[token][0] < high
            ]
            if len(rows) >= SHORTEST:
                found.append(Span(match.group().strip(), float(tokens[rows].mean())))
    return found
