"""How alike two passages are: by their words, and by the states that a language model has on reading them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

COMPONENTS = 256  # principal components of the states, and at most a fifth of the passages
# Kernels(rows to fit on) -> (alikeness among them [fit, fit], of every row to them [rows, fit])
Kernels = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Embedding(NamedTuple):
    """States as points whose distance says how alike two windows are; all float32."""

    mean: np.ndarray  # [numbers]
    scale: np.ndarray  # [numbers]
    components: np.ndarray  # [numbers, components]
    points: np.ndarray  # [passages, components], of the passages it was made from
    width: np.ndarray  # [1], median squared distance between them

    def project(self, states: np.ndarray) -> np.ndarray:
        """The points of states [..., numbers], float32 [..., components]."""
        return ((states - self.mean) / self.scale) @ self.components

    def alike(self, point: np.ndarray) -> np.ndarray:
        """exp(-squared distance / width) of one point to every passage, float32 [passages]."""
        return np.exp(-((self.points - point) ** 2).sum(1) / self.width)


def embed(states: np.ndarray) -> Embedding:
    """Principal components of standardised states [passages, numbers], half whitened.

    Half: each component is divided by the fourth root of its variance, so that the many small ones, which tell two
    passages of one kind apart less than the large ones but tell more kinds apart, are heard too. Half-precision
    values, so that what is saved is what was fitted.
    """
    mean, scale = states.mean(0), states.std(0) + np.float32(1e-6)
    centred = ((states - mean) / scale).astype(np.float64)
    variance, vectors = np.linalg.eigh(centred @ centred.T / centred.shape[1])
    count = max(1, min(COMPONENTS, len(states) // 5))
    variance, vectors = np.maximum(variance[::-1][:count], 1e-9), vectors[:, ::-1][:, :count]
    components = centred.T @ vectors * variance**-0.75 / centred.shape[1]
    found = Embedding(mean, scale, _half(components), np.empty(0), np.empty(0))
    points = _half(found.project(states))
    width = np.median(squared_distances(points, points))
    return found._replace(points=points, width=np.array([max(width, 1e-9)], np.float32))


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[len(a), len(b)], float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def words(matrix: Callable[[np.ndarray], np.ndarray]) -> Kernels:
    """Products of word features, where `matrix(rows to fit on)` gives those of all rows [rows, features]."""

    def kernels(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = matrix(chosen)
        across = (values @ values[chosen].T).astype(np.float64)
        return across[chosen], across

    return kernels


def states(values: np.ndarray) -> Kernels:
    """`Embedding.alike` of states [rows, numbers], embedded by the rows fitted on."""

    def kernels(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        embedding = embed(values[chosen])
        distances = squared_distances(embedding.project(values), embedding.points)
        across = np.exp(-distances / embedding.width)
        return across[chosen], across

    return kernels


def together(first: Kernels, second: Kernels) -> Kernels:
    """The sum of two, the second divided by its mean over the rows fitted on, so that both are heard alike."""

    def kernels(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (a, across_a), (b, across_b) = first(chosen), second(chosen)
        mean = np.trace(b) / len(b)
        return a + b / mean, across_a + across_b / mean

    return kernels
