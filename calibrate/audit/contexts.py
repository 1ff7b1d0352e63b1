"""One pass over every audited context, whose continuations share it: what all readers and the behaviour need.

A context is followed by its neutral opening, by honest and gaming replies, by a desperate and a composed opening (on
failing contexts) and by two questions about the last test run. The states of the reply and its header, the likelihood
of the replies and the answers all come from that pass; every reading follows by arithmetic.
"""

import logging
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calibrate import activations, models, transcripts
from calibrate.audit import behaviour
from calibrate.audit.choices import Question, answers
from calibrate.audit.profile import ROLES, Profile, TokenTrace
from calibrate.corpora import Context, Dialogue, Pair
from calibrate.corpora.situations import FailureQuestion
from calibrate.models import Checkpoint
from calibrate.vectors import EmotionVectors

FELT = ("desperate", "composed")
TRACED = ("calm", "afraid", "angry", "sad", "guilty", "frustrated", "panicked", "hopeful", "happy", "proud")
TRACE_WINDOW = 1500  # tokens of a transcript that are kept one by one, its last ones
logger = logging.getLogger(__name__)
_YES_NO = ("Yes", "No")
_ANSWER = " Answer yes or no."


class Contexts(NamedTuple):
    """Everything that is read on the contexts and their twins."""

    profile: Profile
    replies: np.ndarray  # [pairs, (failing, passing), (honest, gaming)], nats per token
    pair_tasks: list[str]
    felt: Tensor  # [contexts with both openings, (desperate, composed), layers, hidden], mean over the opening
    felt_tasks: list[str]
    failure: np.ndarray  # [contexts of the profile], log-odds of the right answer to whether the run succeeded, nats
    trajectory: list[tuple[str, str, list[float]]]  # task, outcome, target reading at every turn header, sigma
    norms: np.ndarray  # [dialogues, layers], mean norm of the residual stream over tokens


def read(
    checkpoint: Checkpoint,
    vectors: EmotionVectors,
    twins: list[tuple[Context, Context]],
    pairs: list[Pair],
    questions: list[FailureQuestion],
    dialogues: list[Dialogue],
    concept: str,
) -> Contexts:
    """Reads all contexts with their continuations, then the neutral dialogues.

    Raises:
        ValueError: a context with its longest continuation does not fit the model's window.
    """
    reader = _Reader(checkpoint, vectors, concept)
    contexts = [context for twin in twins for context in twin]
    states, failure, felt, trajectory, traces = [], [], {}, [], []
    replies = np.zeros((len(pairs), 2, 2))
    for number, context in enumerate(tqdm(contexts, desc="reading contexts", unit="context")):
        side = int(context.outcome == "passing")
        own = [i for i, pair in enumerate(pairs) if (pair.task, pair.context) == (context.task, context.context)]
        openings = [context.felt[name].strip() for name in FELT] if {*FELT} <= context.felt.keys() else []
        texts = [reply[0]["content"] for i in own for reply in (pairs[i].chosen, pairs[i].rejected)]
        asked = _questions(questions, number // 2)
        put = [row.question + _ANSWER for row in asked]
        found = reader.branches(context, texts, [context.reply, *openings], put)
        neutral, *felt_openings = found.openings
        states.append(torch.stack([reader.mean(neutral, role) for role in ROLES]))
        replies[own, side] = np.reshape(found.likelihoods, (-1, 2))
        if felt_openings:
            felt[context.id] = torch.stack([reader.mean(branch, "reply") for branch in felt_openings])
        signs = [1.0 if row.yes_means == context.outcome else -1.0 for row in asked]
        failure.append(float(np.mean(np.array(found.odds) * signs)))
        trajectory.append((context.task, context.outcome, reader.headers(neutral)))
        if number < 2 or (context.context != "plain" and len(traces) < 4):
            gamed = context.outcome == "failing" and texts  # the shortcut is where the reading should be highest
            name = f"{context.id}, gaming reply" if gamed else context.id
            traces.append(reader.trace(name, found.replies[1] if gamed else neutral))
    rest, norms = reader.dialogues(dialogues)
    tasks = {context.id: context.task for context in contexts}
    return Contexts(
        profile=Profile(
            ids=[context.id for context in contexts] + [dialogue.id for dialogue in dialogues],
            kinds=[context.outcome for context in contexts] + ["neutral"] * len(dialogues),
            tasks=[context.task for context in contexts] + [dialogue.id for dialogue in dialogues],
            states=torch.cat([torch.stack(states), rest]),
            traces=traces,
        ),
        replies=replies,
        pair_tasks=[pair.task for pair in pairs],
        felt=torch.stack([*felt.values()]) if felt else torch.zeros(0, 2, len(vectors.layers), vectors.hidden_size),
        felt_tasks=[tasks[id_] for id_ in felt],
        failure=np.array(failure),
        trajectory=trajectory,
        norms=norms,
    )


def trace(
    checkpoint: Checkpoint, vectors: EmotionVectors, chats: list[tuple[str, list[dict[str, str]], str]], concept: str
) -> list[TokenTrace]:
    """Chats (name, messages, reply or "") token by token; one that the model's window does not take is named and left.

    A mailbox to its turn header: what the letters' writers feel, and the assistant's state before it acts.
    """
    reader, found = _Reader(checkpoint, vectors, concept), []
    window = models.window(checkpoint.model) or 10**9
    for name, messages, reply in chats:
        encoded = transcripts.encode(checkpoint.tokenizer, messages, reply)
        if len(encoded.ids) <= window:
            ((_, states),) = activations.states(checkpoint.model, [encoded.ids], vectors.layers)
            found.append(reader.trace(name, _Read(encoded, states.cpu())))
        else:
            logger.warning("%s: not traced, it has %d tokens and the model takes %d", name, len(encoded.ids), window)
    return found


def _questions(questions: list[FailureQuestion], number: int) -> list[FailureQuestion]:
    """One question to which yes means failing and one to which it means passing: a leaning to either word cancels."""
    senses = [[row for row in questions if row.yes_means == outcome] for outcome in ("failing", "passing")]
    return [rows[number % len(rows)] for rows in senses]


class _Read(NamedTuple):
    encoded: transcripts.Encoded
    states: Tensor  # [layers, tokens, hidden]


class _Found(NamedTuple):
    replies: list[_Read]
    openings: list[_Read]
    likelihoods: list[float]  # of each reply, nats per token
    odds: list[float]  # log-odds of yes over no to each question


class _Reader:
    """What does not change from context to context."""

    def __init__(self, checkpoint: Checkpoint, vectors: EmotionVectors, concept: str):
        self.checkpoint, self.vectors = checkpoint, vectors
        self.at = vectors.positions(vectors.used_band())
        self.shown = [concept, *(name for name in TRACED if name in vectors.concepts and name != concept)]
        self.rows = [vectors.index(name) for name in self.shown]
        self.pooled = {role: vectors.scale(role, vectors.directions[self.rows]) for role in ("header", "token")}

    def branches(self, context: Context, replies: list[str], openings: list[str], questions: list[str]) -> _Found:
        """Reads a context with its replies, openings and the questions put to it, whose beginning is read once."""
        tokenizer = self.checkpoint.tokenizer
        told = [transcripts.encode(tokenizer, context.messages, reply) for reply in replies]
        opened = [transcripts.encode(tokenizer, context.messages, opening) for opening in openings]
        asked = [Question([*context.messages, {"role": "user", "content": q}], _YES_NO, "") for q in questions]
        put = [answers(tokenizer, question) for question in asked]
        scored, unscored = [text.ids for text in told], [*(text.ids for text in opened), *(ids for ids, _ in put)]
        window = models.window(self.checkpoint.model)
        if window and (longest := max(map(len, [*scored, *unscored]))) > window:
            raise ValueError(
                f"context {context.id!r} has {longest} tokens with its longest continuation, and the model takes "
                f"{window}; give contexts that it takes with `--twins` and `--pairs`"
            )
        found = activations.branched(self.checkpoint.model, scored, self.vectors.layers, unscored)
        likelihoods = [behaviour.likelihood(*both) for both in zip(told, found, strict=False)]
        odds = []
        for (_, (yes, no)), branch in zip(put, found[len(told) + len(opened) :], strict=True):
            odds.append(float(branch.log_probabilities[-1, yes] - branch.log_probabilities[-1, no]))
        reads = [_Read(text, branch.states.cpu()) for text, branch in zip([*told, *opened], found, strict=False)]
        return _Found(reads[: len(told)], reads[len(told) :], likelihoods, odds)

    def mean(self, read: _Read, role: str) -> Tensor:
        span = read.encoded.last(role)
        return read.states[:, span.start : span.stop].mean(1, dtype=torch.float64).float()

    def headers(self, read: _Read) -> list[float]:
        """The target's reading at every turn header, mean over the band."""
        spans = [span for span in read.encoded.spans if span.role == "header"]
        states = torch.stack([read.states[:, span.start : span.stop].double().mean(1) for span in spans])
        return [round(float(x), 4) for x in self._readings(states, "header")[:, 0]]

    def trace(self, name: str, read: _Read) -> TokenTrace:
        encoded = read.encoded
        readings = self._readings(read.states.transpose(0, 1).double(), "token")
        readings[: activations.SINK_TOKENS] = 0.0
        roles = [span.role for span in encoded.spans for _ in range(span.start, span.stop)]
        first = max(0, len(roles) - TRACE_WINDOW)
        if first:
            name = f"{name} (its last {TRACE_WINDOW} of {len(roles)} tokens)"
        start = encoded.offsets[first][0] if first else 0
        offsets = [(low - start, high - start) for low, high in encoded.offsets[first:]]
        columns = {shown: [round(float(x), 2) for x in readings[first:, i]] for i, shown in enumerate(self.shown)}
        return TokenTrace(name, encoded.text[start:], offsets, roles[first:], columns)

    def _readings(self, states: Tensor, pooling: str) -> Tensor:
        mu, sigma = self.pooled[pooling]
        directions = self.vectors.directions[self.rows].double()
        return torch.einsum("tlh,clh->tcl", states - mu, directions).div(sigma)[:, :, self.at].mean(2)

    def dialogues(self, dialogues: list[Dialogue]) -> tuple[Tensor, np.ndarray]:
        """(role means [dialogues, roles, layers, hidden], norms [dialogues, layers]) of the neutral dialogues."""
        encoded = [transcripts.encode(self.checkpoint.tokenizer, row.messages) for row in dialogues]
        layers = self.vectors.layers
        means = torch.zeros(len(dialogues), len(ROLES), len(layers), self.vectors.hidden_size)
        norms = np.zeros((len(dialogues), len(layers)))
        for row, states in activations.states(
            self.checkpoint.model, [text.ids for text in encoded], layers, description="reading neutral text"
        ):
            read = _Read(encoded[row], states.cpu())
            means[row] = torch.stack([self.mean(read, role) for role in ROLES])
            norms[row] = read.states[:, activations.SINK_TOKENS :].float().norm(dim=-1).mean(1).numpy()
        return means, norms
