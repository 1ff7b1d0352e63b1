"""Whose the change is: short replies of both models, each read by both, so that text and state come apart.

A reply of the tuned model that reads calmer may be calmer text, which the base model reads so too, or the same text
over another state. With the replies of both models there are four readings, and the whole change is the sum of two
parts (`effects.crossed`).
"""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn
from tqdm import tqdm

from calibrate import activations, models, transcripts
from calibrate.audit import agents
from calibrate.corpora import Context
from calibrate.models import Checkpoint
from calibrate.vectors import EmotionVectors

logger = logging.getLogger(__name__)

SETTINGS = agents.Settings(max_new_tokens=48, temperature=0)
BASE, TUNED = False, True


def read(
    checkpoint: Checkpoint,
    vectors: EmotionVectors,
    contexts: list[Context],
    concept: str,
    reference: nn.Module | None = None,
) -> dict[str, Any] | None:
    """Both models answer the contexts, greedily, and read both answers; plain data.

    Args:
        reference: the model before training; by default the same model with its adapter disabled. None is returned
            where there is neither, or where fewer than two contexts have two answers that are not empty.
    """
    if reference is None and not hasattr(checkpoint.model, "disable_adapter"):
        return None
    tokenizer = checkpoint.tokenizer
    window = models.window(checkpoint.model) or 10**9
    room = window - SETTINGS.max_new_tokens
    given, contexts = contexts, [c for c in contexts if len(transcripts.encode(tokenizer, c.messages, "").ids) <= room]
    texts = [transcripts.encode(tokenizer, c.messages, "").text for c in contexts]
    answers = []
    for tuned in (BASE, TUNED):
        with _model(checkpoint, reference, tuned) as model:
            writer, size = checkpoint._replace(model=model), SETTINGS.batch
            batches = [texts[start : start + size] for start in range(0, len(texts), size)]
            done = tqdm(batches, desc=f"writing replies, {'after' if tuned else 'before'}", unit="batch")
            answers.append([reply for batch in done for reply in agents.answer(writer, batch, SETTINGS)])
    told = [
        (c, pair) for c, pair in zip(contexts, zip(*answers, strict=True), strict=True) if all(map(str.strip, pair))
    ]
    if len(told) < len(given):
        left_out = (len(given) - len(told), len(given), len(given) - len(contexts), window)
        logger.warning(
            "replies of both models: %d of %d contexts left out, %d because they do not fit the window of %d tokens, "
            "the others because a reply was empty",
            *left_out,
        )
    if len(told) < 2:
        return None
    readings: list[list[list[float]]] = [[] for _ in told]
    for tuned in (BASE, TUNED):
        with _model(checkpoint, reference, tuned) as model:
            for row, (context, pair) in enumerate(tqdm(told, desc="reading replies of both", unit="context")):
                encoded = [transcripts.encode(tokenizer, context.messages, reply) for reply in pair]
                readings[row].append(_readings(model, vectors, encoded, concept))
    return {
        "unit": "sigma, reply mean, mean over the band: reader before and after, of the text before and after",
        "tasks": [context.task for context, _ in told],
        "replies": [list(pair) for _, pair in told],
        "readings": readings,
    }


@contextmanager
def _model(checkpoint: Checkpoint, reference: nn.Module | None, tuned: bool) -> Generator[Any]:
    """The model after or before training."""
    if tuned or reference is not None:
        yield checkpoint.model if tuned else reference
    else:
        with checkpoint.model.disable_adapter():
            yield checkpoint.model


def _readings(model, vectors: EmotionVectors, encoded: list[transcripts.Encoded], concept: str) -> list[float]:
    """The target's reading over each reply to the same context."""
    at, direction = vectors.positions(vectors.used_band()), vectors.directions[[vectors.index(concept)]]
    found = []
    for text, branch in zip(
        encoded, activations.branched(model, [text.ids for text in encoded], vectors.layers), strict=True
    ):
        span = text.last("reply")
        state = branch.states[:, span.start : span.stop].double().mean(1).cpu()
        found.append(round(float(vectors.readings(state, "reply", direction)[0, at].mean()), 4))
    return found
