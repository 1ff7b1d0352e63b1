"""Tier 2's reading: windows of text -> pooled residual states of a causal language model."""

import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from calibrate import activations
from calibrate.models import Checkpoint
from calibrate.vectors import EmotionVectors
from data_curation import features

MAX_TOKENS = 1024  # of a window; 200 English words are about 260
SHARD = 32  # passages that are kept together
POOLS = ("mean", "first", "middle", "last")


def read(checkpoint: Checkpoint, texts: list[str], layers: list[int]) -> np.ndarray:
    """Pooled states of every text, float32 [texts, pools, layers, hidden]: `POOLS`.

    Means over the tokens after the first (an attention sink), over all and over their thirds. Each text is a forward
    pass of its own: a padded batch would move the last bits of a number with its neighbours.
    """
    tokenizer: Any = checkpoint.tokenizer
    sequences = [tokenizer(text)["input_ids"][:MAX_TOKENS] for text in texts]
    result = [np.empty(0)] * len(texts)
    for row, hidden in activations.states(checkpoint.model, sequences, layers, token_budget=1):
        result[row] = _pool(hidden.float()).cpu().numpy()
    return np.stack(result)


def _pool(hidden: torch.Tensor) -> torch.Tensor:
    """[pools, layers, hidden] of states [layers, tokens, hidden]; a text of one token has that alone."""
    text = hidden[:, min(activations.SINK_TOKENS, hidden.shape[1] - 1) :]
    count = text.shape[1]
    edges = [0, max(1, count // 3), max(1, 2 * count // 3), count]
    thirds = [text[:, min(a, count - 1) : max(b, a + 1)].mean(1) for a, b in itertools.pairwise(edges)]
    return torch.stack([text.mean(1), *thirds])


States = dict[tuple[str, int], np.ndarray]  # pool, layer -> float32 [texts, hidden]


def cached(checkpoint: Checkpoint, texts: list[str], layers: list[int], folder: Path | None) -> States:
    """The states of every text, the mean of its windows by length; kept in `folder`: a stop repeats one shard."""
    identity = [checkpoint.weight_hash, checkpoint.adapter_hash, str(checkpoint.model.dtype), layers, texts]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    parts = []
    for start in tqdm(range(0, len(texts), SHARD), desc="reading passages", unit=f"{SHARD} passages"):
        path = folder / digest / f"{start:06d}.safetensors" if folder else None
        if path and path.is_file():
            parts.append(load_file(path)["states"])
            continue
        parts.append(np.stack([_whole(checkpoint, text, layers) for text in texts[start : start + SHARD]]))
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"states": parts[-1]}, aside := path.with_suffix(f".{os.getpid()}"))
            os.rename(aside, path)
    states = np.concatenate(parts)
    return {(pool, layer): states[:, p, at] for p, pool in enumerate(POOLS) for at, layer in enumerate(layers)}


def _whole(checkpoint: Checkpoint, text: str, layers: list[int]) -> np.ndarray:
    spans = features.windows(text)
    states = read(checkpoint, [text[start:end] for start, end in spans], layers)
    lengths = np.array([end - start for start, end in spans], np.float32)
    return np.einsum("w...,w->...", states, lengths / lengths.sum()).astype(np.float32)


def select(states: np.ndarray, settings: dict[str, Any], part: str | None = None) -> np.ndarray:
    """The numbers that the heads weigh, [reads * hidden], of the states [pools, layers, hidden] of one window.

    `settings["reads"]` lists (pool, layer). With `part`, one of the thirds, every pool is that.
    """
    at = {layer: row for row, layer in enumerate(settings["layers"])}
    return np.concatenate([states[POOLS.index(part or pool), at[layer]] for pool, layer in settings["reads"]])


def emotions(states: np.ndarray, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Readings of the emotions in sigma of neutral text, mean over the vectors' reading layers, float64 [emotions].

    `tensors` hold the neutral mean [layers, hidden] and the directions over sigma [emotions, layers, hidden].
    """
    rows = [settings["layers"].index(layer) for layer in settings["emotion_layers"]]
    centred = states[POOLS.index("mean"), rows].astype(np.float64) - tensors["neutral"]
    return np.array([(centred * direction).sum() for direction in tensors["directions"]]) / len(rows)


def emotion_tensors(vectors: EmotionVectors, emotions: list[str]) -> dict[str, np.ndarray]:
    """What `emotions` needs of the vectors: the neutral mean of text, and the directions over sigma."""
    at = vectors.positions(vectors.reading_layers())
    neutral, sigma = vectors.scale("text")
    rows = [vectors.index(emotion) for emotion in emotions]
    directions = vectors.directions[rows][:, at].double() / sigma[rows][:, at, None]
    return {"neutral": neutral[at].float().numpy(), "directions": directions.float().numpy()}
