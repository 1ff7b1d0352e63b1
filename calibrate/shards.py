"""Texts -> mean states on disk, shard by shard: resumable, shared among processes, in the memory of one shard.

A shard is `SHARD_TEXTS` texts of one group in their order, read in length-sorted batches of its own, so that its
numbers do not depend on which process reads it or when. A shard that is there is never read again.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from calibrate import activations, models
from calibrate.models import Checkpoint

SHARD_TEXTS = 128  # the unit of resuming and of sharing; 128 stories of 150 tokens are half a minute on two cores
TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}  # padded tokens a batch


class Item(NamedTuple):
    """A tokenised text, the pools to average (each a list of token slices), and tokens to keep one by one."""

    ids: list[int]
    pools: list[list[slice]]
    tokens: list[int] = []


class Group(NamedTuple):
    """Texts that were read, with their states on disk: one kind of text, of one split."""

    folder: Path
    layers: list[int]
    items: list[Item]
    positions: list[int]  # of `layers` among those on disk

    def only(self, layers: list[int]) -> "Group":
        """The same texts at some of the layers."""
        return self._replace(layers=layers, positions=[self.positions[self.layers.index(layer)] for layer in layers])

    def stream(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields (row, pool means float32 [pools, layers, hidden], kept tokens [tokens, layers, hidden])."""
        for shard, start in enumerate(range(0, len(self.items), SHARD_TEXTS)):
            with safe_open(_path(self.folder, shard), framework="pt") as file:
                means, tokens = (file.get_tensor(name)[:, self.positions] for name in ("means", "tokens"))
            mean, token = 0, 0
            for row, item in enumerate(self.items[start : start + SHARD_TEXTS], start):
                yield row, means[mean : mean + len(item.pools)], tokens[token : token + len(item.tokens)]
                mean, token = mean + len(item.pools), token + len(item.tokens)

    def sums(self, groups: list[int], count: int) -> tuple[Tensor, Tensor]:
        """Streaming float64 sums of the first pool by group: (sums [groups, layers, hidden], texts [groups]).

        Args:
            groups: the group of every row; a negative one is left out.
        """
        total, texts = None, torch.zeros(count, dtype=torch.long)
        for row, means, _ in self.stream():
            if total is None:
                total = torch.zeros(count, *means.shape[1:], dtype=torch.float64)
            if groups[row] >= 0:
                total[groups[row]] += means[0]
                texts[groups[row]] += 1
        assert total is not None, "no texts"
        return total, texts


def read(
    checkpoint: Checkpoint, items: dict[str, list[Item]], layers: list[int], folder: Path, side: str = "right"
) -> dict[str, Group]:
    """One pass over every text whose shard is missing; under `accelerate launch` the processes share the shards.

    Args:
        items: texts by name of their group.
        folder: where the shards are kept, the same for all processes (on several machines a shared folder).

    Raises:
        ValueError: a text is longer than the model's window, a pool of a text is empty, or another process's shard is
            not in `folder`.
    """
    from accelerate import PartialState

    window = models.window(checkpoint.model)
    for name, rows in items.items():
        if window and (longest := max((len(item.ids) for item in rows), default=0)) > window:
            raise ValueError(
                f"{name}: a text has {longest} tokens, and the model takes {window}; shorten it, or leave it out"
            )
    state = PartialState()
    groups = {
        name: Group(folder / f"{name}-{_digest(checkpoint, rows, layers)}", layers, rows, list(range(len(layers))))
        for name, rows in items.items()
        if rows
    }
    shards = [(group, shard) for group in groups.values() for shard in range(-(-len(group.items) // SHARD_TEXTS))]
    mine = [(g, s) for index, (g, s) in enumerate(shards) if index % state.num_processes == state.process_index]
    missing = [(g, s) for g, s in mine if not _path(g.folder, s).is_file()]
    texts = sum(len(_slice(group, shard)) for group, shard in missing)
    bar = tqdm(total=texts, desc="reading texts", unit="text", disable=not (missing and state.is_main_process))
    with bar:
        for group, shard in missing:
            _read_shard(checkpoint, group, shard, side, bar)
    state.wait_for_everyone()
    for group, shard in shards:
        if not _path(group.folder, shard).is_file():
            raise ValueError(
                f"{_path(group.folder, shard)}: another process has read it and it is not here; give all processes "
                "the same `--out` on a shared file system"
            )
    return groups


def _read_shard(checkpoint: Checkpoint, group: Group, shard: int, side: str, bar: tqdm) -> None:
    items = _slice(group, shard)
    means: list[Tensor | None] = [None] * len(items)
    tokens: list[Tensor | None] = [None] * len(items)
    budget = TOKEN_BUDGET[next(checkpoint.model.parameters()).device.type]
    sequences = [item.ids for item in items]
    states = activations.states(checkpoint.model, sequences, group.layers, token_budget=budget, side=side)
    for row, hidden in states:
        means[row] = torch.stack([_mean(hidden, pool, items[row].ids) for pool in items[row].pools]).float().cpu()
        tokens[row] = hidden[:, items[row].tokens].transpose(0, 1).float().cpu()
        bar.update()
    group.folder.mkdir(parents=True, exist_ok=True)
    path = _path(group.folder, shard)
    aside = path.with_suffix(f".{os.getpid()}")
    save_file({"means": torch.cat(means), "tokens": torch.cat(tokens)}, aside)  # ty: ignore[invalid-argument-type]
    os.rename(aside, path)


def _mean(hidden: Tensor, pool: list[slice], ids: list[int]) -> Tensor:
    """Mean over the tokens of a pool without the sink token, [layers, hidden], accumulated in float64."""
    total, count = 0.0, 0
    for part in pool:
        start, stop, _ = part.indices(hidden.shape[1])
        start = max(start, activations.SINK_TOKENS)
        if stop > start:
            total, count = total + hidden[:, start:stop].sum(1, dtype=torch.float64), count + stop - start
    if not count:
        raise ValueError(
            f"a text of {len(ids)} tokens has none left in the part {pool} that is averaged; it is too short"
        )
    assert isinstance(total, Tensor)
    return total / count


def _slice(group: Group, shard: int) -> list[Item]:
    return group.items[shard * SHARD_TEXTS : (shard + 1) * SHARD_TEXTS]


def _path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def _digest(checkpoint: Checkpoint, items: list[Item], layers: list[int]) -> str:
    """What the states depend on: weights, their kind and place, the list of blocks, layers, token ids and pools."""
    model = checkpoint.model
    weight = next(model.parameters())
    blocks = getattr(models.decoder(model), "calibrate_blocks", None)
    identity = [checkpoint.weight_hash, checkpoint.adapter_hash, str(weight.dtype), weight.device.type, blocks, layers]
    digest = hashlib.sha256(json.dumps(identity).encode())
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()[:12]
