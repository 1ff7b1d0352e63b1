"""Ceilings: the readings above which the hinge pays, from the reference's readings of the same contexts."""

import torch
from torch import Tensor

from calibrate.training import losses
from calibrate.training.readings import ROLES, Reader, Reference, Units

MODES = ("reduce", "prevent", "both")


def quantiles(reference: Reference, passing: list[int], reader: Reader, quantile: float) -> Tensor:
    """That quantile of the reference's readings on the passing twins, sigma, [roles, layers, directions].

    Zero for a role that no context has.
    """
    by_role: list[list[Tensor]] = [[] for _ in ROLES]
    for units in reference.stream(passing):
        values = reader(units)[0]
        for role, found in enumerate(by_role):
            found.append(values[(units.roles[0] == role) & (units.weights[0] > 0)])
    missing = torch.zeros(reader.sigmas.shape[1:])
    rows = [torch.cat(found) for found in by_role]
    return torch.stack([row.quantile(quantile, dim=0) if len(row) else missing for row in rows])


def limits(mode: str, ceilings: Tensor, margin: float, roles: Tensor, reference: Tensor) -> Tensor:
    """The ceiling of each unit, sigma, [rows, units, layers, directions].

    `reduce`: the role's ceiling. `prevent`: the reference's reading of the same unit plus `margin`. `both`: the lower.

    Args:
        ceilings: sigma, [roles, layers, directions].
        margin: sigma.
        roles: [rows, units].
        reference: the reference's readings of the units, sigma, [rows, units, layers, directions].
    """
    if mode == "prevent":
        return reference + margin
    reduce = ceilings.to(reference.device)[roles]
    return reduce if mode == "reduce" else torch.minimum(reduce, reference + margin)


def initial_hinge(reference: Reference, failing: list[int], reader: Reader, ceilings: Tensor, delta: float) -> float:
    """The hinge of the reference itself in mode `reduce`, before any training, sigma^2; `delta` is in sigma."""
    return _hinge([(reader(units), units) for units in reference.stream(failing)], ceilings, delta)


def _hinge(read: list[tuple[Tensor, Units]], ceilings: Tensor, delta: float) -> float:
    terms = [losses.hinge(values, ceilings[units.roles], units.weights, delta) for values, units in read]
    return float(torch.stack(terms).mean())


def matched(
    reference: Reference, failing: list[int], reader: Reader, ceilings: Tensor, delta: float, hinge: float
) -> Tensor:
    """Shifts all ceilings by one constant so that the initial hinge equals `hinge` (bisection, to 1e-6 sigma).

    Args:
        delta: knee of the Huber hinge, sigma.
        hinge: the real arm's initial hinge, sigma^2.

    Raises:
        ValueError: `hinge` is 0, which any high ceiling would meet.
    """
    if hinge <= 0:
        raise ValueError(
            "the real arm's initial hinge is 0: its readings are at or below the ceiling, nothing to match"
        )
    read = [(reader(units), units) for units in reference.stream(failing)]
    low, high = -100.0, 100.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _hinge(read, ceilings + middle, delta) > hinge else (low, middle)
    return ceilings + high
