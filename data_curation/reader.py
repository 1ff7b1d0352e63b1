"""Tier 2's reading: windows of text -> pooled residual states of a causal language model."""

import itertools
from typing import Any

import numpy as np
import torch

from calibrate import activations
from calibrate.models import Checkpoint

MAX_TOKENS = 1024  # of a window; 200 English words are about 260
POOLS = ("mean", "first", "middle", "last", "spread", "end", "question")
# Read after the window: the state at its end has seen the whole text and what it is asked about.
QUESTION = "\n\nHow do the people in this text deal with what they feel and with the pressure on them? They"


def read(checkpoint: Checkpoint, texts: list[str], layers: list[int]) -> np.ndarray:
    """Pooled states of every text, float32 [texts, pools, layers, hidden]; pools in the order of `POOLS`.

    Mean over the tokens after the first (an attention sink), means of their thirds, standard deviation over them, the
    text's last token, and the last token of `QUESTION` read after it. Each text is a forward pass of its own: a padded
    batch would move the last bits of a number with its neighbours.
    """
    tokenizer: Any = checkpoint.tokenizer
    question = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    encoded = [tokenizer(text)["input_ids"][:MAX_TOKENS] for text in texts]
    sequences = [ids + question for ids in encoded]
    result = [np.empty(0)] * len(texts)
    for row, hidden in activations.states(checkpoint.model, sequences, layers, token_budget=1):
        result[row] = _pool(hidden.float(), len(encoded[row])).cpu().numpy()
    return np.stack(result)


def _pool(hidden: torch.Tensor, length: int) -> torch.Tensor:
    """[pools, layers, hidden] of states [layers, tokens, hidden] whose first `length` tokens are the text."""
    text = hidden[:, min(activations.SINK_TOKENS, length - 1) : length]
    count = text.shape[1]
    edges = [0, max(1, count // 3), max(1, 2 * count // 3), count]
    thirds = [text[:, min(a, count - 1) : max(b, a + 1)].mean(1) for a, b in itertools.pairwise(edges)]
    return torch.stack([text.mean(1), *thirds, text.std(1, correction=0), text[:, -1], hidden[:, -1]])


def select(states: np.ndarray, settings: dict[str, Any], part: str | None = None) -> np.ndarray:
    """The numbers that the heads weigh, [reads * hidden], of the states [pools, layers, hidden] of one window.

    `settings["reads"]` lists (pool, layer). With `part`, the mean over the window is that over this third of it.
    """
    at = {layer: row for row, layer in enumerate(settings["layers"])}
    pools = [part if part and pool == "mean" else pool for pool, _ in settings["reads"]]
    rows = [states[POOLS.index(pool), at[layer]] for pool, (_, layer) in zip(pools, settings["reads"], strict=True)]
    return np.concatenate(rows)


def emotions(states: np.ndarray, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Readings of the emotions in sigma of neutral text, mean over the vectors' reading layers, float64 [emotions].

    `tensors` hold the neutral mean [layers, hidden] and the directions over sigma [emotions, layers, hidden].
    """
    rows = [settings["layers"].index(layer) for layer in settings["emotion_layers"]]
    centred = states[POOLS.index("mean"), rows].astype(np.float64) - tensors["neutral"]
    return np.array([(centred * direction).sum() for direction in tensors["directions"]]) / len(rows)
