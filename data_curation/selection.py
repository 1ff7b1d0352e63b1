"""Weights from scores: clipped, exponential, and scaled so that the mix of topics, formats and lengths stays."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

LENGTH_BINS = 4  # quartiles of the number of characters
FEWEST = 20  # scored documents of a cell that is balanced by itself
STEEPEST = 50.0  # of beta * z, so that its exponential stays finite
ALL = "*"


class Corpus(NamedTuple):
    """One entry a document, in any order."""

    regulation: np.ndarray  # [documents], NaN where there is nothing to regulate
    characters: np.ndarray  # [documents]
    topics: list[str]  # names
    topic: np.ndarray  # [documents], places in `topics`
    formats: list[str]
    format: np.ndarray  # [documents]


class Fit(NamedTuple):
    """A table for `weight_of`, and what it does to the corpus."""

    table: dict[str, Any]
    figures: dict[str, Any]
    weights: np.ndarray  # [documents]


def weight_of(table: dict[str, Any], regulation: float | None, topic: str, form: str, characters: int) -> float:
    """`clip(scale * exp(beta * z), floor, cap)`; 1 for a null score."""
    if regulation is None:
        return 1.0
    mean, deviation = table["topics"].get(topic, table["overall"])
    z = (regulation - mean) / deviation if deviation > 0 else 0.0
    key = _key(topic, form, int(np.searchsorted(table["edges"], characters, side="right")))
    scales = table["scales"]
    scale = scales.get(key, scales.get(_key(topic, ALL, ALL), scales.get(_key(ALL, ALL, ALL), 1.0)))
    steep = max(-STEEPEST, min(STEEPEST, table["beta"] * z))
    return min(table["cap"], max(table["floor"], scale * math.exp(steep)))


def check(beta: float, floor: float, cap: float) -> None:
    if not 0 < floor <= 1 <= cap < math.inf or not 0 <= beta < math.inf:
        raise ValueError(f"`floor` {floor:g}, `cap` {cap:g} and `beta` {beta:g}: 0 < floor <= 1 <= cap and 0 <= beta")


def fit_weights(corpus: Corpus, beta: float, floor: float, cap: float) -> Fit:
    """Weights that favour regulated text within each topic and leave the mix of the corpus as it was.

    z is the regulation minus the mean of its topic, over the deviation within the topic, among documents with a
    score (topics of fewer than 20 take those of the corpus). Each cell of topic x format x quarter of length then
    gets the one scale at which its scored documents weigh as many characters as before, inside floor and cap; cells
    of fewer than 20 scored documents are scaled together with the other small ones of their topic, and topics of
    fewer than 20 with one another.

    Returns:
        the table, the weights, and the figures: divergence of the mix (KL of the weighted from the input mix of
        cells, by characters, in nats) before and after scaling, and the effective sample size (sum w)^2 / sum w^2.

    Raises:
        ValueError: floor and cap do not enclose 1, or beta is negative.
    """
    check(beta, floor, cap)
    scored = ~np.isnan(corpus.regulation)
    edges = np.quantile(corpus.characters, np.arange(1, LENGTH_BINS) / LENGTH_BINS) if len(scored) else np.zeros(3)
    length = np.searchsorted(edges, corpus.characters, side="right")
    overall = _moments(corpus.regulation[scored])
    counts = np.bincount(corpus.topic[scored], minlength=len(corpus.topics))
    topics = {}
    for place, inside in enumerate(_groups(corpus.topic[scored], len(corpus.topics))):
        enough = counts[place] >= FEWEST
        topics[corpus.topics[place]] = _moments(corpus.regulation[scored][inside]) if enough else overall
    moments = np.array([topics[topic] for topic in corpus.topics]).reshape(-1, 2)[corpus.topic]  # [documents, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(moments[:, 1] > 0, (corpus.regulation - moments[:, 0]) / moments[:, 1], 0.0)
    raw = np.where(scored, np.exp(np.clip(beta * z, -STEEPEST, STEEPEST)), 1.0)
    cells = (corpus.topic.astype(np.int64) * len(corpus.formats) + corpus.format) * LENGTH_BINS + length
    keys, owner = _cells(corpus, cells, scored)
    scales, weights = {}, np.ones(len(raw))
    for key, inside in zip(keys, _groups(owner, len(keys)), strict=True):
        scales[key] = _scale(raw[inside], corpus.characters[inside], floor, cap)
        weights[inside] = np.clip(scales[key] * raw[inside], floor, cap)
    unscaled = np.where(scored, np.clip(raw, floor, cap), 1.0)
    table: dict[str, Any] = {"beta": beta, "floor": floor, "cap": cap, "overall": overall, "topics": topics}
    table |= {"edges": edges.tolist(), "scales": scales}
    figures = _figures(corpus, cells, unscaled, weights, scored) | {"cells": len(keys)}
    return Fit(table, figures, weights)


def _moments(values: np.ndarray) -> tuple[float, float]:
    return (float(values.mean()), float(values.std())) if len(values) else (0.0, 0.0)


def _groups(places: np.ndarray, number: int) -> list[np.ndarray]:
    """For each place from 0 the entries that hold it."""
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(number + 1))
    return [order[start:stop] for start, stop in pairwise(starts)]


def _key(topic: str, form: str, length: int | str) -> str:
    return f"{topic}\t{form}\t{length}"


def _cells(corpus: Corpus, cells: np.ndarray, scored: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of the cells to be scaled, and for each document the place of its own; -1 where it has no score."""
    present, inverse, counts = np.unique(cells[scored], return_inverse=True, return_counts=True)
    enough = np.bincount(corpus.topic[scored], minlength=len(corpus.topics)) >= FEWEST
    keys: dict[str, int] = {}
    places = []
    for cell, count in zip(present, counts, strict=True):
        topic, form = divmod(int(cell) // LENGTH_BINS, len(corpus.formats))
        key = _key(corpus.topics[topic], corpus.formats[form], int(cell) % LENGTH_BINS)
        if count < FEWEST:
            key = _key(corpus.topics[topic] if enough[topic] else ALL, ALL, ALL)
        places.append(keys.setdefault(key, len(keys)))
    owner = np.full(len(cells), -1)
    owner[scored] = np.array(places, dtype=int)[inverse]
    return list(keys), owner


def _scale(raw: np.ndarray, characters: np.ndarray, floor: float, cap: float) -> float:
    """The scale at which clipped weights keep the characters of their cell, by bisection."""
    target = characters.sum()
    low, high = math.log(floor / raw.max()), math.log(cap / raw.min())
    for _ in range(80):
        middle = (low + high) / 2
        if (np.clip(math.exp(middle) * raw, floor, cap) * characters).sum() < target:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def divergence(cells: np.ndarray, mass: np.ndarray, weighted: np.ndarray) -> float:
    """KL of the weighted mix of cells from the mix as it was, in nats."""
    _, place = np.unique(cells, return_inverse=True)
    before = np.bincount(place, mass) / mass.sum()
    after = np.bincount(place, weighted) / weighted.sum()
    kept = after > 0
    return max(0.0, float((after[kept] * np.log(after[kept] / before[kept])).sum()))


def effective(weights: np.ndarray) -> float:
    """(sum w)^2 / sum w^2: so many documents of equal weight would vary as little."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def _figures(corpus: Corpus, cells, unscaled, weights, scored) -> dict[str, Any]:
    characters = corpus.characters.astype(float)
    if not characters.sum():
        return {"documents": len(weights), "scored": 0}
    histogram = np.histogram(weights[scored], bins=10)
    low, high = corpus.regulation < 0.5, corpus.regulation >= 0.5
    return {
        "documents": len(weights),
        "scored": int(scored.sum()),
        "kl_before": divergence(cells, characters, unscaled * characters),
        "kl_after": divergence(cells, characters, weights * characters),
        "effective_documents": effective(weights),
        "effective_share": effective(weights) / len(weights),
        "characters_before": float(characters.sum()),
        "characters_after": float((weights * characters).sum()),
        "mean_weight_below_half": float(weights[low].mean()) if low.any() else None,
        "mean_weight_above_half": float(weights[high].mean()) if high.any() else None,
        "histogram": {"counts": histogram[0].tolist(), "edges": [round(edge, 4) for edge in histogram[1].tolist()]},
    }
