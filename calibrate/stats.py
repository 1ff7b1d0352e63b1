"""Intervals and permutation tests. The task is the unit: every array's first axis is tasks, resampled together."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate with its 95 % interval, in the unit of the statistic."""

    estimate: float
    low: float
    high: float

    def above(self, value: float) -> bool:
        """True where the whole interval lies above `value`."""
        return self.low > value


def bootstrap(statistic: Callable[..., float], *arrays: np.ndarray, seed: int = 0) -> Interval:
    """Percentile bootstrap of `statistic(*arrays)` over the first axis, drawn jointly so that pairs stay paired.

    Raises:
        ValueError: the arrays have different lengths, or fewer than two tasks.
    """
    count = len(arrays[0])
    if any(len(array) != count for array in arrays) or count < 2:
        raise ValueError(
            f"a bootstrap needs the same tasks in every array and at least 2; got {[len(a) for a in arrays]}"
        )
    draws = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    values = np.array([statistic(*(array[rows] for array in arrays)) for rows in draws])
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(statistic(*arrays)), float(low), float(high))


def mean(values: np.ndarray, seed: int = 0) -> Interval:
    """Bootstrap of the mean over tasks: `bootstrap(np.mean, values)`, all resamples at once.

    Raises:
        ValueError: fewer than two tasks.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError(f"a bootstrap needs the same tasks in every array and at least 2; got {[len(values)]}")
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def max_statistic(differences: np.ndarray, seed: int = 0) -> np.ndarray:
    """Family-wise p-value of each column's mean being non-zero: sign flips of whole tasks, maximum |t| over columns.

    Args:
        differences: paired differences [tasks, columns].

    Raises:
        ValueError: fewer than two tasks.
    """
    if len(differences) < 2:
        raise ValueError(f"a permutation test needs at least 2 tasks; got {len(differences)}")
    generator = np.random.default_rng(seed)
    signs = generator.choice([-1.0, 1.0], (RESAMPLES, len(differences), 1))
    observed = np.abs(_t(differences))
    largest = np.array([np.abs(_t(differences * flip)).max() for flip in signs])
    return (1 + (largest[:, None] >= observed).sum(0)) / (1 + RESAMPLES)


def _t(differences: np.ndarray) -> np.ndarray:
    spread = differences.std(0, ddof=1) / np.sqrt(len(differences))
    return differences.mean(0) / np.maximum(spread, 1e-12)


def wilson(outcomes: np.ndarray) -> Interval:
    """Share of ones with its 95 % Wilson interval, which has a width at 0 and 1 too.

    Raises:
        ValueError: there are no outcomes.
    """
    count = len(outcomes)
    if not count:
        raise ValueError("a share needs at least one outcome")
    share, z = float(np.mean(outcomes)), 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    width = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return Interval(share, max(0.0, float(middle - width)), min(1.0, float(middle + width)))
