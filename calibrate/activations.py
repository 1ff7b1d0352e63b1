"""The residual stream of chosen layers. The only file that knows what layer i is.

Layer i is the output of block i, counted from 0: `hidden_states[i + 1]` of transformers, except for the last block,
whose entry there has passed the final norm. Read by hooks, never from `hidden_states`.
"""

import contextlib
import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from calibrate import models

# The first token is an attention sink (on the default model its norm is a hundred times the median), never read.
SINK_TOKENS = 1


class Batch(NamedTuple):
    """Padded sequences on one device, and which rows of the caller's list they are."""

    rows: list[int]
    inputs: dict[str, Tensor]  # input_ids, attention_mask, position_ids, each [batch, tokens]
    first: Tensor  # [batch], column of each row's first real token


class Tap:
    """Hooks on the blocks of `layers` that record only while asked to.

    Registered once, before the first forward pass, and kept: a hook that is added after compilation does not fire, and
    training runs other passes (reference, generation) that must not be recorded.
    """

    def __init__(self, model: nn.Module, layers: Iterable[int]):
        self.layers = list(layers)
        modules = models.blocks(model)
        models.check_layers(self.layers, len(modules))
        self._on = False
        self._states: dict[int, Tensor] = {}
        self._handles = [modules[layer].register_forward_hook(self._hook(layer)) for layer in self.layers]

    def _hook(self, layer: int) -> Callable:
        def record(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            if self._on:
                assert layer not in self._states, f"layer {layer} ran twice in one recorded pass"
                self._states[layer] = output[0] if isinstance(output, tuple) else output

        return record

    @contextlib.contextmanager
    def recording(self) -> Generator[dict[int, Tensor]]:
        """Collects layer -> [batch, tokens, hidden] of the one forward pass inside; every layer must have run."""
        self._on, self._states = True, {}
        states = self._states
        try:
            yield states
            assert set(states) == set(self.layers), f"hooks fired for {sorted(states)}, expected {self.layers}"
        finally:
            self._on, self._states = False, {}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def collate(rows: list[int], sequences: list[list[int]], device: torch.device, side: str = "right") -> Batch:
    """Pads `sequences[row]` for each of `rows`; positions count real tokens only, so both sides read the same.

    Pads with id 0 under a zero mask: the pad id of many tokenizers is a real token (often the end of the text).
    """
    width = max(len(sequences[row]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    first = torch.zeros(len(rows), dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(sequences[row])
        start = width - length if side == "left" else 0
        ids[index, start : start + length] = torch.tensor(sequences[row])
        mask[index, start : start + length] = 1
        first[index] = start
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return Batch(rows, {name: tensor.to(device) for name, tensor in inputs.items()}, first.to(device))


def token_budget_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows grouped longest first so that no padded batch holds more than `budget` tokens (one row at the least)."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


@torch.no_grad()
def states(
    model: nn.Module,
    sequences: list[list[int]],
    layers: list[int],
    *,
    token_budget: int = 2048,
    side: str = "right",
    description: str | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields (row, hidden states [layers, tokens, hidden] of that row without padding), in batch order.

    Body only, cut after the last layer that is asked for. `description` names a progress bar; None shows none.
    """
    device = next(model.parameters()).device
    body = models.decoder(model)
    tap = Tap(model, layers)
    later = models.blocks(model)[max(layers) + 1 :]
    stop = later[0].register_forward_pre_hook(_stop) if later else None  # where the body does not cut itself
    bar = tqdm(total=len(sequences), desc=description, unit="text", disable=description is None)
    try:
        for rows in token_budget_batches([len(sequence) for sequence in sequences], token_budget):
            batch = collate(rows, sequences, device, side)
            cut = models.cut_after(model, max(layers))
            with cut, tap.recording() as recorded, contextlib.suppress(_Cut):
                body(**batch.inputs, use_cache=False)
            for index, row in enumerate(rows):
                start = int(batch.first[index])
                end = start + len(sequences[row])
                yield row, torch.stack([recorded[layer][index, start:end] for layer in layers])
            bar.update(len(rows))
    finally:
        tap.remove()
        if stop is not None:
            stop.remove()
        bar.close()


class _Cut(Exception):
    """The forward pass has reached the first block that nobody reads."""


def _stop(module: nn.Module, inputs: tuple) -> None:
    raise _Cut


class Branch(NamedTuple):
    """One continuation: states of the whole sequence, and the scores with which its own tokens are predicted."""

    states: Tensor  # [layers, tokens, hidden], of the shared beginning and the continuation
    log_probabilities: Tensor  # [own tokens + 1, vocabulary]: row 0 predicts its first own token; unscored: the last
    shared: int  # tokens that all sequences begin with


@torch.no_grad()
def branched(
    model: nn.Module, sequences: list[list[int]], layers: list[int], unscored: Sequence[list[int]] = ()
) -> list[Branch]:
    """Reads sequences that begin alike; what they share goes through the model once, the rest as padded batches.

    A transcript with ten continuations costs little more than the transcript. Full depth, keys and values kept.

    Args:
        unscored: more sequences, of which only what would follow them is scored: a batch of their own, which spares
            them the vocabulary and the others their padding. Their branches come last.

    Raises:
        ValueError: the model keeps a state that cannot be shared (not a plain attention cache).
    """
    device = next(model.parameters()).device
    every = [*sequences, *unscored]
    shared = next((i for i, tokens in enumerate(zip(*every, strict=False)) if len({*tokens}) > 1), len(every[0]))
    shared = min(shared, min(map(len, every)) - 1)  # at least one token of its own for each
    cache = DynamicCache(config=models.text_config(model))
    tap = Tap(model, layers)
    found = []
    try:
        beginning = torch.tensor([every[0][:shared]], device=device)
        with tap.recording() as recorded:
            first = model(input_ids=beginning, past_key_values=cache, use_cache=True, logits_to_keep=1)
        own_state = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
        if getattr(first, "past_key_values", None) is not cache or own_state:
            raise ValueError(
                f"{type(model).__name__} keeps a state that continuations cannot share; audits need a model whose "
                "layers all have an attention cache"
            )
        common = torch.stack([recorded[layer][0] for layer in layers])
        for part, scored in ((sequences, True), (unscored, False)):
            if not part:
                continue
            batch = collate([*range(len(part))], [sequence[shared:] for sequence in part], device)
            ends = [len(sequence) - shared for sequence in part]
            scores_at = [*range(max(ends))] if scored else sorted({end - 1 for end in ends})
            continued = copy.deepcopy(cache)
            continued.batch_repeat_interleave(len(part))
            with tap.recording() as recorded:
                rest = model(
                    input_ids=batch.inputs["input_ids"], past_key_values=continued, use_cache=True,
                    attention_mask=torch.nn.functional.pad(batch.inputs["attention_mask"], (shared, 0), value=1),
                    position_ids=batch.inputs["position_ids"] + shared,
                    logits_to_keep=torch.tensor(scores_at, device=device),
                ).logits  # fmt: skip
            for row, end in enumerate(ends):
                states = torch.stack([recorded[layer][row, :end] for layer in layers])
                last = rest[row, scores_at.index(end - 1)][None]
                logits = torch.cat([first.logits[0, -1:], rest[row, :end]]) if scored else last
                found.append(Branch(torch.cat([common, states], 1), logits.float().log_softmax(-1), shared))
    finally:
        tap.remove()
    return found


def pooled(
    model: nn.Module,
    sequences: list[list[int]],
    pools: list[list[slice]],
    layers: list[int],
    *,
    token_budget: int = 2048,
    side: str = "right",
    description: str | None = None,
) -> Tensor:
    """Mean hidden state of each pool of each sequence, float64 [sequences, pools, layers, hidden] on the CPU.

    Args:
        pools: for every sequence the same number of token slices; the first token is left out of each.

    Raises:
        ValueError: a pool is empty.
    """
    if len(pools) != len(sequences):
        raise ValueError(
            f"{len(sequences)} sequences but {len(pools)} lists of pools; give one list for each sequence"
        )
    result = None
    for row, hidden in states(model, sequences, layers, token_budget=token_budget, side=side, description=description):
        means = []
        for pool in pools[row]:
            start, stop, _ = pool.indices(hidden.shape[1])
            start = max(start, SINK_TOKENS)
            if stop <= start:
                raise ValueError(
                    f"text {row} has no tokens left in the pool {pool.start}:{pool.stop}; it is too short"
                )
            means.append(hidden[:, start:stop].mean(1, dtype=torch.float64))
        if result is None:
            result = torch.zeros(len(sequences), len(means), len(layers), hidden.shape[2], dtype=torch.float64)
        result[row] = torch.stack(means).cpu()
    assert result is not None, "no sequences"
    return result
