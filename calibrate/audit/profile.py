"""The emotional profile: states at the turn header and over the reply, on failing contexts, twins and neutral text."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calibrate import activations, transcripts
from calibrate.corpora import Context, Dialogue
from calibrate.models import Checkpoint
from calibrate.vectors import EmotionVectors

ROLES = ("header", "reply")
KINDS = ("failing", "passing", "neutral")


class TokenTrace(NamedTuple):
    """Per-token readings of one transcript, in sigma of neutral tokens, mean over the band."""

    text: str
    offsets: list[tuple[int, int]]
    roles: list[str]
    readings: list[float]


class Profile(NamedTuple):
    """Mean states of every audited text; all readings of it follow by arithmetic."""

    ids: list[str]
    kinds: list[str]  # failing, passing or neutral
    tasks: list[str]
    states: Tensor  # [texts, header and reply, layers, hidden], float32
    trace: TokenTrace

    def readings(self, vectors: EmotionVectors, directions: Tensor | None = None) -> dict[str, np.ndarray]:
        """Readings in sigma by role, [texts, concepts, layers], of these or other directions on the vectors' scale."""
        return {
            role: vectors.readings(self.states[:, position], role, directions).numpy()
            for position, role in enumerate(ROLES)
        }

    def rows(self, kind: str) -> list[int]:
        """Rows of one kind, ordered by task, so that twins line up."""
        return sorted((i for i, k in enumerate(self.kinds) if k == kind), key=lambda i: self.tasks[i])

    def by_task(self, kind: str, values: np.ndarray) -> np.ndarray:
        """Values of every text -> means over the contexts of each task, [tasks, ...], in the order of `rows`."""
        rows = self.rows(kind)
        tasks = np.array([self.tasks[row] for row in rows])
        return np.stack([values[rows][tasks == task].mean(0) for task in dict.fromkeys(tasks.tolist())])


def read_profile(
    checkpoint: Checkpoint,
    vectors: EmotionVectors,
    twins: list[tuple[Context, Context]],
    dialogues: list[Dialogue],
    concept: str,
) -> Profile:
    """One pass over all contexts (each followed by the reply that its twin has too) and neutral dialogues.

    The token trace is taken of the first failing context, for `concept`.
    """
    tokenizer = checkpoint.tokenizer
    contexts = [context for twin in twins for context in twin]
    encoded = [transcripts.encode(tokenizer, context.messages, context.reply) for context in contexts]
    encoded += [transcripts.encode(tokenizer, dialogue.messages) for dialogue in dialogues]
    states = torch.zeros(len(encoded), len(ROLES), len(vectors.layers), vectors.hidden_size)
    trace = None
    for row, hidden in activations.states(
        checkpoint.model, [text.ids for text in encoded], vectors.layers, description="reading contexts"
    ):
        for position, role in enumerate(ROLES):
            span = encoded[row].last(role)
            states[row, position] = hidden[:, span.start : span.stop].mean(1, dtype=torch.float64).float().cpu()
        if row == 0:
            trace = _trace(encoded[0], hidden.cpu(), vectors, concept)
    assert trace is not None
    return Profile(
        ids=[context.id for context in contexts] + [dialogue.id for dialogue in dialogues],
        kinds=[context.outcome for context in contexts] + ["neutral"] * len(dialogues),
        tasks=[context.task for context in contexts] + [dialogue.id for dialogue in dialogues],
        states=states,
        trace=trace,
    )


def _trace(encoded: transcripts.Encoded, hidden: Tensor, vectors: EmotionVectors, concept: str) -> TokenTrace:
    at = vectors.positions(vectors.used_band())
    readings = vectors.readings(hidden.transpose(0, 1), "token")[:, vectors.index(concept)][:, at].mean(1)
    roles = [span.role for span in encoded.spans for _ in range(span.start, span.stop)]
    readings[: activations.SINK_TOKENS] = 0.0
    return TokenTrace(encoded.text, encoded.offsets, roles, [round(float(x), 3) for x in readings])
