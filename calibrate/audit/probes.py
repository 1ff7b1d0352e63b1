"""Whether a label can be read from states: by a linear probe, a small network and the nearest neighbours.

Every figure is out of sample (a task's states are read by probes that have not seen the task) and stands beside the
same with labels exchanged within tasks: what is left over that is selectivity (arXiv 1909.03368).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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
    for kind in KINDS:
        scores = [_by_folds(kind, *sides, folds) for sides in ((positive, negative), shuffled)]
        carried = None
        if transfer is not None:
            high, low = transfer
            centre = torch.cat([high, low]).mean(0) - torch.cat([positive, negative]).mean(0)
            score = _fit(kind, positive, negative)
            carried = auroc(score(high - centre), score(low - centre))
        found.append(Probe(label, kind, auroc(*scores[0]), auroc(*scores[1]), carried))
    return found


def auroc(above: np.ndarray, below: np.ndarray) -> float:
    """Share of pairs in which a value of `above` is the higher; ties count half."""
    differences = np.asarray(above)[:, None] - np.asarray(below)[None]
    return float((differences > 0).mean() + (differences == 0).mean() / 2)


def _by_folds(kind: str, positive: Tensor, negative: Tensor, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Out-of-sample scores of both sides."""
    found = np.zeros((2, len(positive)))
    for fold in range(FOLDS):
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        score = _fit(kind, positive[inside], negative[inside])
        found[0, outside], found[1, outside] = score(positive[outside]), score(negative[outside])
    return found[0], found[1]


def _fit(kind: str, positive: Tensor, negative: Tensor):
    """A function from states [n, hidden] to scores [n]."""
    states = torch.cat([positive, negative]).double()
    truth = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    centre, scale = states.mean(0), states.std(0).clamp(min=1e-6)
    inputs = (states - centre) / scale
    if kind == "neighbours":

        def nearest(rows: Tensor) -> np.ndarray:
            distances = torch.cdist((rows.double() - centre) / scale, inputs)
            return truth[distances.topk(min(NEAREST, len(inputs)), largest=False).indices].mean(1).numpy()

        return nearest
    with torch.random.fork_rng():
        torch.manual_seed(0)
        width = inputs.shape[1]
        layers = [torch.nn.Linear(width, 1)]
        if kind == "network":
            layers = [torch.nn.Linear(width, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 1)]
        model = torch.nn.Sequential(*layers).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=DECAY * 10)
        for _ in range(STEPS):
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(model(inputs)[:, 0], truth).backward()
            optimizer.step()

    @torch.no_grad()
    def score(rows: Tensor) -> np.ndarray:
        return model((rows.double() - centre) / scale)[:, 0].numpy()

    return score
