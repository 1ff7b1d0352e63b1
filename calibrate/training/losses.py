"""The terms of the objective, as pure functions: `task + hinge + anchor + side`, each with its own weight.

Shapes: `readings` [examples, units, layers, directions] in sigma; `weights` [examples, units], zero where padded. A
unit is the turn header as a whole or one reply token. Every term takes the weighted mean over units of each example
first, so that a long reply does not dominate, then the mean over layers, directions and examples.
"""

import torch
from torch import Tensor


def hinge(
    readings: Tensor, ceiling: Tensor, weights: Tensor, delta: float = 1.0, floor: Tensor | None = None
) -> Tensor:
    """One-sided Huber hinge: zero with zero gradient at or below the ceiling, bounded slope far above it.

    `huber(max(0, reading - ceiling))` with `huber(x) = x^2 / 2` up to `delta`, `delta (x - delta / 2)` beyond.

    Args:
        ceiling: broadcastable to `readings`; the reading above which the hinge pays.
        floor: broadcastable to `readings`; below it the hinge pays too, so that optimiser momentum cannot carry
            readings far under the ceiling. None: one-sided.
    """
    excess = (readings - ceiling).clamp(min=0)
    if floor is not None:
        excess = excess + (floor - readings).clamp(min=0)
    return _mean(torch.where(excess <= delta, 0.5 * excess**2, delta * (excess - 0.5 * delta)), weights)


def squared_change(readings: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
    """Mean squared change against the reference's readings of the same units, in sigma^2.

    The anchor on passing twins (without it the hinge lowers every context alike), and the side term on other emotions.
    """
    return _mean((readings - reference) ** 2, weights)


def kl_to_reference(log_probabilities: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || tuned) in nats per token, of log-probabilities [tokens, vocabulary]."""
    return torch.nn.functional.kl_div(log_probabilities, reference, log_target=True, reduction="sum") / len(reference)


def relative_distance(states: Tensor, reference: Tensor) -> Tensor:
    """Mean over layers and tokens of `|h - h_ref|^2 / |h_ref|^2`, states [layers, tokens, hidden]."""
    return ((states - reference).square().sum(-1) / reference.square().sum(-1)).mean()


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    shares = weights / weights.sum(1, keepdim=True)
    return (values.mean((2, 3)) * shares).sum(1).mean()
