"""The terms of the objective, as pure functions: `task + pressure + anchors + side`, each with its own weight.

Shapes: `readings` [examples, units, layers, directions] in sigma; `weights` [examples, units], zero where padded. A
unit is the turn header as a whole, one reply token or one token of the tool result. Every term takes the weighted mean
over units of each example first, so that a long reply does not dominate, then the mean over layers, directions and
examples.
"""

import torch
from torch import Tensor

# Each with what goes wrong with it; `hinge` is the default, the others are ablations.
SHAPES = {
    "hinge": "one-sided Huber hinge above the ceiling: zero at or below it",
    "absolute": "|reading|: never satisfied; pulls readings that start below zero up",
    "squared": "reading^2: never satisfied, led by outliers; erases the axis, for characters in a story too",
    "change": "squared change against the reference: has no gradient at the start, can only keep, never lower",
    "set-point": "squared distance to the reference minus k sigma: lowers every context alike, a mood offset",
    "cosine": "cosine above zero: satisfied by longer hidden states as well as by lower readings",
}


def hinge(
    readings: Tensor, ceiling: Tensor, weights: Tensor, delta: float = 1.0, floor: Tensor | None = None
) -> Tensor:
    """One-sided Huber hinge, sigma^2: zero with zero gradient at or below the ceiling, bounded slope far above it.

    `huber(max(0, reading - ceiling))` with `huber(x) = x^2 / 2` up to `delta`, `delta (x - delta / 2)` beyond.

    Args:
        ceiling: broadcastable to `readings`; the reading above which the hinge pays, sigma.
        delta: sigma; so many above the ceiling its slope stops growing.
        floor: broadcastable to `readings`, sigma; below it the hinge pays too, so that optimiser momentum cannot carry
            readings far under the ceiling. None: one-sided.
    """
    excess = (readings - ceiling).clamp(min=0)
    if floor is not None:
        excess = excess + (floor - readings).clamp(min=0)
    return mean(torch.where(excess <= delta, 0.5 * excess**2, delta * (excess - 0.5 * delta)), weights)


def absolute(readings: Tensor, weights: Tensor) -> Tensor:
    """Mean |reading|, sigma; an ablation (see `SHAPES`)."""
    return mean(readings.abs(), weights)


def squared_change(readings: Tensor, reference: Tensor | float, weights: Tensor) -> Tensor:
    """Mean squared change against the reference's readings of the same units, in sigma^2.

    The anchor on passing twins (without it the hinge lowers every context alike), and the side term on other emotions.
    As a penalty: with reference 0 the squared reading, with the reference's readings minus k the set-point.
    """
    return mean((readings - reference) ** 2, weights)


def cosine(readings: Tensor, sigma: Tensor, norms: Tensor, weights: Tensor) -> Tensor:
    """Mean of the positive part of the cosine between the centred state and the direction; an ablation.

    Args:
        sigma: broadcastable to `readings`; the unit of the readings, in the model's own units.
        norms: norm of the centred state, [examples, units, layers, 1].
    """
    return mean((readings * sigma / norms.clamp(min=1e-6)).clamp(min=0), weights)


def norm_guard(ratio: Tensor, weights: Tensor, allowed: float = 0.1) -> Tensor:
    """Mean squared excess of the residual-norm ratio over 1 +- `allowed`, [examples, units, layers]; 0 inside.

    Keeps a penalty from being met by shorter or longer states instead of other ones.
    """
    return mean(((ratio - 1).abs() - allowed).clamp(min=0)[..., None] ** 2, weights)


def kl_to_reference(logits: Tensor, tokens: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || tuned) in nats per token over the reference's likeliest tokens, all others taken as one.

    Taking the others together makes it a lower bound of the full KL, and the reference small enough to be stored.

    Args:
        logits: of the tuned model, [positions, vocabulary].
        tokens: ids of the reference's likeliest tokens, [positions, kept].
        reference: their log-probabilities in the reference, [positions, kept].
    """
    own = logits.float().log_softmax(-1).gather(-1, tokens)
    rest, own_rest = _log_rest(reference), _log_rest(own)
    return ((reference.exp() * (reference - own)).sum(-1) + rest.exp() * (rest - own_rest)).mean()


def _log_rest(log_probabilities: Tensor) -> Tensor:
    """Log-probability of everything else; at least 1e-7, so that float32 rounding does not make it infinite."""
    return (1 - log_probabilities.exp().sum(-1)).clamp(min=1e-7).log()


def relative_distance(states: Tensor, reference: Tensor) -> Tensor:
    """Mean over all leading dimensions of `|h - h_ref|^2 / |h_ref|^2`, states [..., hidden]."""
    return ((states - reference).square().sum(-1) / reference.square().sum(-1)).mean()


def mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over units of each example, then mean over layers, directions and examples."""
    shares = weights / weights.sum(1, keepdim=True)
    return (values.mean((2, 3)) * shares).sum(1).mean()
