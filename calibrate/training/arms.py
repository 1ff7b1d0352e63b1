"""The arms of a comparison: which direction the hinge presses, and how a control is matched to the real one."""

import torch
from torch import Tensor

from calibrate.training import losses
from calibrate.training.ceilings import UnitReadings, per_unit
from calibrate.vectors import EmotionVectors

ARMS = ("none", "hinge-frozen", "random")


def target_directions(vectors: EmotionVectors, concepts: list[str]) -> Tensor:
    """The directions of `concepts`, [concepts, layers, hidden]."""
    return vectors.directions[[vectors.index(concept) for concept in concepts]]


def random_directions(vectors: EmotionVectors, count: int, seed: int) -> Tensor:
    """`count` random unit directions outside the span of all concepts, [count, layers, hidden].

    Without the projection a random direction can share up to 0.45 of its norm with a real emotion (replication of the
    emotion-concepts study on small models, 2026).
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(count, *vectors.directions.shape[1:], generator=generator)
    for layer in range(draws.shape[1]):
        basis = torch.linalg.qr(vectors.directions[:, layer].T.double()).Q.float()
        draws[:, layer] -= draws[:, layer] @ basis @ basis.T
    return draws / draws.norm(dim=-1, keepdim=True)


def side_directions(vectors: EmotionVectors, targets: Tensor, concepts: list[str]) -> Tensor:
    """The other concepts' directions, orthogonalised against `targets` at every layer, [others, layers, hidden]."""
    others = vectors.directions[[i for i, name in enumerate(vectors.concepts) if name not in concepts]].clone()
    for layer in range(others.shape[1]):
        basis = torch.linalg.qr(targets[:, layer].T.double()).Q.float()
        others[:, layer] -= others[:, layer] @ basis @ basis.T
    return others / others.norm(dim=-1, keepdim=True)


def initial_hinge(failing: UnitReadings, ceilings: Tensor, delta: float) -> float:
    """The hinge of the reference itself, before any training."""
    return float(losses.hinge(failing.values, per_unit(ceilings, failing.values.shape[1]), failing.weights, delta))


def matched_ceilings(failing: UnitReadings, ceilings: Tensor, delta: float, hinge: float) -> Tensor:
    """Shifts all ceilings by one constant so that the initial hinge equals `hinge` (bisection, to 1e-6 sigma).

    Raises:
        ValueError: `hinge` is 0, which any high ceiling would meet.
    """
    if hinge <= 0:
        raise ValueError(
            "the real arm's initial hinge is 0: its readings are at or below the ceiling, nothing to match"
        )
    low, high = -100.0, 100.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if initial_hinge(failing, ceilings + middle, delta) > hinge:
            low = middle
        else:
            high = middle
    return ceilings + high
