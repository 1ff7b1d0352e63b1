"""Whether a label can be read from states: by a linear probe, a small network and the nearest neighbours.

Every figure is out of sample (a task's states are read by probes that have not seen the task) and stands beside the
same with labels exchanged within tasks: what is left over that is selectivity (arXiv 1909.03368).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Scores = Callable[[Tensor], np.ndarray]

KINDS = ("linear", "network", "neighbours")
FOLDS = 4
HIDDEN, STEPS, DECAY = 16, 200, 1e-2
NEAREST = 5


class Probe(NamedTuple):
    """Area under the curve for one label by one kind of probe; 0.5 is chance."""

    label: str
    kind: str
    held_out: float
    shuffled: float  # labels exchanged within tasks; held_out - shuffled is the selectivity
    transfer: float | None  # fitted here, read on failing against passing contexts; None where there is no other set


def held_out(
    label: str, positive: Tensor, negative: Tensor, transfer: tuple[Tensor, Tensor] | None = None
) -> list[Probe]:
    """Probes of all kinds for paired states [tasks, hidden]: one row of each side belongs to one task.

    Args:
        transfer: states that should score high and low if the label carries over, [n, hidden] each; centred apart, so
            that a shift between the two sets of texts does not count.
    """
    found = []
    folds = np.arange(len(positive)) % FOLDS
    flip = torch.from_numpy(np.random.default_rng(0).random(len(positive)) < 0.5)[:, None]
    shuffled = torch.where(flip, negative, positive), torch.where(flip, positive, negative)
    labelled = ((positive, negative), shuffled)
    seen = [(above[folds != fold], below[folds != fold]) for above, below in labelled for fold in range(FOLDS)]
    for kind in KINDS:
        scores = _fit(kind, [*seen, (positive, negative)])
        areas = [_held_out(*sides, folds, scores[i * FOLDS :]) for i, sides in enumerate(labelled)]
        carried = None
        if transfer is not None:
            high, low = transfer
            centre = torch.cat([high, low]).mean(0) - torch.cat([positive, negative]).mean(0)
            carried = auroc(scores[-1](high - centre), scores[-1](low - centre))
        found.append(Probe(label, kind, *areas, carried))
    return found


def auroc(above: np.ndarray, below: np.ndarray) -> float:
    """Share of pairs in which a value of `above` is the higher; ties count half."""
    differences = np.asarray(above)[:, None] - np.asarray(below)[None]
    return float((differences > 0).mean() + (differences == 0).mean() / 2)


def _held_out(positive: Tensor, negative: Tensor, folds: np.ndarray, scores: list[Scores]) -> float:
    """Area under the curve of both sides, each fold's rows scored by the probe that has not seen them."""
    found = np.zeros((2, len(positive)))
    for fold in range(FOLDS):
        rows = np.flatnonzero(folds == fold)
        found[:, rows] = [scores[fold](side[rows]) for side in (positive, negative)]
    return auroc(*found)


def _fit(kind: str, sets: list[tuple[Tensor, Tensor]]) -> list[Scores]:
    """For every set of states of both sides, [n, hidden] each, a function from states [m, hidden] to scores [m]."""
    states = [torch.cat(sides).double() for sides in sets]
    truths = [torch.tensor([1.0] * len(above) + [0.0] * len(below)).double() for above, below in sets]
    centres = [rows.mean(0) for rows in states]
    scales = [rows.std(0).clamp(min=1e-6) for rows in states]
    inputs = [(rows - centre) / scale for rows, centre, scale in zip(states, centres, scales, strict=True)]
    if kind == "neighbours":

        def nearest(i: int, rows: Tensor) -> np.ndarray:
            distances = torch.cdist((rows.double() - centres[i]) / scales[i], inputs[i])
            return truths[i][distances.topk(min(NEAREST, len(inputs[i])), largest=False).indices].mean(1).numpy()

        return [partial(nearest, i) for i in range(len(sets))]
    width = inputs[0].shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(width, 1)]
        if kind == "network":
            layers = [torch.nn.Linear(width, HIDDEN), torch.nn.Linear(HIDDEN, 1)]
    # All sets train at once, each with parameters of its own, which AdamW moves as it would alone.
    weights = [layer.weight.detach().T.double().repeat(len(sets), 1, 1).requires_grad_() for layer in layers]
    biases = [layer.bias.detach().double().repeat(len(sets), 1, 1).requires_grad_() for layer in layers]
    padded, truth = pad_sequence(inputs, batch_first=True), pad_sequence(truths, batch_first=True)
    share = pad_sequence([torch.full_like(rows, 1 / len(rows)) for rows in truths], batch_first=True)  # padding: 0
    optimizer = torch.optim.AdamW([*weights, *biases], lr=1e-2, weight_decay=DECAY * 10)
    for _ in range(STEPS):
        optimizer.zero_grad()
        odds = _odds(padded, weights, biases)
        torch.nn.functional.binary_cross_entropy_with_logits(odds, truth, share, reduction="sum").backward()
        optimizer.step()

    @torch.no_grad()
    def score(i: int, rows: Tensor) -> np.ndarray:
        given = ((rows.double() - centres[i]) / scales[i])[None]
        return _odds(given, [w[[i]] for w in weights], [b[[i]] for b in biases])[0].numpy()

    return [partial(score, i) for i in range(len(sets))]


def _odds(inputs: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Log-odds [sets, n] of inputs [sets, n, width], by one linear layer or by two with a rectifier between."""
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        inputs = torch.baddbmm(bias, inputs.relu() if i else inputs, weight)
    return inputs[..., 0]
