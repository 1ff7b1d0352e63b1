"""How good scores are: against labelled passages, with intervals by source."""

import importlib.util
from typing import Any, NamedTuple

import numpy as np

from calibrate import stats
from calibrate.stats import Interval
from data_curation.facets import HIGH, LOW

BINS = 5  # of equal mass, for the calibration error


class Labelled(NamedTuple):
    """Labels of passages as arrays of one length; regulation 0 to 1, nan where there is nothing to regulate."""

    cells: np.ndarray
    regulation: np.ndarray
    sources: (
        np.ndarray
    )  # what an interval resamples: the writer, or the event where there are fewer than three writers
    events: np.ndarray  # event or pair
    valence: np.ndarray  # VADER's compound, or nan

    @property
    def note(self) -> str:
        """What an interval is by."""
        return "by event" if np.array_equal(self.sources, self.events) else "by writer"

    @property
    def high(self) -> np.ndarray:
        return np.isin(self.cells, HIGH)

    @property
    def low(self) -> np.ndarray:
        return np.isin(self.cells, LOW)


def labelled(rows: list[dict[str, Any]], valence: np.ndarray | None = None) -> Labelled:
    """The arrays of labelled rows; a missing cell or writer is empty, a null regulation `nan`."""
    regulation = [np.nan if row.get("regulation") is None else row["regulation"] / 10 for row in rows]
    texts = [np.array([str(row.get(name) or "") for row in rows]) for name in ("cell", "writer")]
    events = np.array([str(row.get("pair") or row.get("event") or row["id"]) for row in rows])
    sources = texts[1] if len(set(texts[1])) >= 3 else events  # as the folds
    return Labelled(texts[0], np.array(regulation), sources, events, _or_nan(valence, len(rows)))


def valence(texts: list[str]) -> np.ndarray | None:
    """VADER's compound valence of every text, -1 to 1; None where `vaderSentiment` is not installed."""
    if importlib.util.find_spec("vaderSentiment") is None:
        return None
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    return np.array([analyser.polarity_scores(text)["compound"] for text in texts])


def _or_nan(values: np.ndarray | None, count: int) -> np.ndarray:
    return np.full(count, np.nan) if values is None else np.asarray(values, float)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties at their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def auc(high: np.ndarray, low: np.ndarray) -> float:
    """Share of (high, low) pairs in which the high one scores higher; a tie counts half. nan where one is empty."""
    if not len(high) or not len(low):
        return float("nan")
    total = ranks(np.concatenate([high, low]))[: len(high)].sum()
    return float((total - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; nan where one does not vary."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def calibration_error(score: np.ndarray, label: np.ndarray) -> float:
    """Root mean square gap between score and label over `BINS` bins of equal mass, freed of its sampling noise.

    A bin's squared gap exceeds the true one by the variance of its mean, which is taken off before the root.
    """
    squared = []
    for rows in np.array_split(np.argsort(score, kind="stable"), BINS):
        gap = score[rows] - label[rows]
        squared.append(gap.mean() ** 2 - gap.var(ddof=1) / len(rows))
    return float(np.sqrt(max(0.0, np.mean(squared))))


def weighted_kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Quadratic weighted kappa of two ratings in 0 to 1, rounded to tenths."""
    a, b = np.round(a * 10), np.round(b * 10)
    chance = ((a[:, None] - b[None]) ** 2).mean()
    return float(1 - ((a - b) ** 2).mean() / chance)


def by_source(statistic, groups: np.ndarray) -> Interval:
    """A statistic of rows (given as their numbers) with its 95 % interval over whole groups, drawn with repetition."""
    names = np.unique(groups)
    rows = [np.flatnonzero(groups == name) for name in names]
    return stats.bootstrap(lambda drawn: statistic(np.concatenate([rows[i] for i in drawn])), np.arange(len(names)))


def separation(score: np.ndarray, labels: Labelled, groups: np.ndarray | None = None) -> Interval:
    """AUC of the high cells over the low ones, with its interval over `groups` (by default the sources)."""

    def statistic(rows: np.ndarray) -> float:
        return auc(score[rows][labels.high[rows]], score[rows][labels.low[rows]])

    return by_source(statistic, labels.sources if groups is None else groups)


def pairwise(score: np.ndarray, labels: Labelled) -> dict[str, float]:
    """AUC of every high cell over every low one, `HIGH over LOW` -> AUC, lowest first."""
    found = {
        f"{high} over {low}": auc(score[labels.cells == high], score[labels.cells == low])
        for high in HIGH
        for low in LOW
        if (labels.cells == high).any() and (labels.cells == low).any()
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


def agreement(score: np.ndarray, labels: Labelled) -> Interval:
    """Spearman of score and graded label where the label is not null, by source."""
    known = ~np.isnan(labels.regulation)

    def statistic(rows: np.ndarray) -> float:
        kept = rows[known[rows]]
        return spearman(score[kept], labels.regulation[kept])

    return by_source(statistic, labels.sources)


def with_valence(score: np.ndarray, labels: Labelled, seed: int = 0) -> dict[str, float]:
    """Spearman with the valence: among the high, among the low, and on a set where valence says nothing of the label.

    That set takes from each of five bands of valence as many high passages as low ones.
    """
    found = {}
    for name, chosen in (("high", labels.high), ("low", labels.low)):
        found[name] = spearman(score[chosen], labels.valence[chosen])
    generator, kept = np.random.default_rng(seed), []
    for band in np.array_split(np.argsort(labels.valence, kind="stable"), 5):
        sides = [generator.permutation(band[side[band]]) for side in (labels.high, labels.low)]
        kept += [side[: min(map(len, sides))] for side in sides]
    rows = np.concatenate(kept)
    found["balanced"] = spearman(score[rows], labels.valence[rows])
    found["balanced, number"] = float(len(rows))
    found["balanced, AUC"] = auc(score[rows][labels.high[rows]], score[rows][labels.low[rows]])
    return found


def swapped(score: np.ndarray, labels: Labelled) -> Interval | None:
    """Share of the pairs that tell one event with two outcomes in which the better labelled one scores higher.

    With its Wilson interval; None where there are no such pairs.
    """
    right = []
    for event in np.unique(labels.events):
        rows = np.flatnonzero(labels.events == event)
        if len(rows) == 2 and np.ptp(labels.regulation[rows]) > 0:  # nan where a label is null
            right.append(float(np.prod(np.diff(score[rows]) * np.diff(labels.regulation[rows])) > 0))
    return stats.wilson(np.array(right)) if right else None


def explained(score: np.ndarray, groups: np.ndarray) -> float:
    """Share of a score's variance that lies between groups, adjusted for their number (as an adjusted R2)."""
    names, inverse = np.unique(groups, return_inverse=True)
    means = np.bincount(inverse, score) / np.bincount(inverse)
    within = ((score - means[inverse]) ** 2).sum() / max(1, len(score) - len(names))
    return float(1 - within / score.var(ddof=1))


def kept(regulation: np.ndarray, null: np.ndarray, chosen: np.ndarray, threshold: float) -> Interval:
    """Share of the chosen passages that are null or reach the threshold, with its Wilson interval."""
    return stats.wilson((null | (regulation >= threshold))[chosen])


class Figure(NamedTuple):
    """One line of an evaluation; low and high are nan where no interval is made."""

    name: str
    estimate: float
    low: float = float("nan")
    high: float = float("nan")
    note: str = ""

    def line(self) -> str:
        """The figure as a row of a Markdown table."""
        interval = "" if np.isnan(self.low) else f"{self.low:.2f} to {self.high:.2f}"
        return f"| {self.name} | {self.estimate:.3f} | {interval} | {self.note} |"


HEADER = "| figure | value | 95 % interval | note |\n|---|---|---|---|"


def figures(score: np.ndarray, null: np.ndarray, threshold: float, labels: Labelled) -> list[Figure]:
    """What one set of scores reaches on labelled passages; figures whose cells or labels are missing are left out.

    Args:
        score: regulation of every passage, 0 to 1; give 0.5 for those that are read as null.
        null: bool, which of them the scorer gives no regulation.
    """
    found = [Figure("AUC, high cells over low", *separation(score, labels), labels.note)] if labels.low.any() else []
    for name, value in list(pairwise(score, labels).items())[:1]:
        found.append(Figure("lowest AUC of a pair of cells", value, note=name.replace("_", " ")))
    found.append(Figure("Spearman with graded labels", *agreement(score, labels), labels.note))
    known = ~np.isnan(labels.regulation)
    found.append(Figure("quadratic weighted kappa", weighted_kappa(score[known], labels.regulation[known])))
    error = calibration_error(score[known], labels.regulation[known])
    found.append(Figure("calibration error", error, note=f"{BINS} bins of equal mass, debiased"))
    if not np.isnan(labels.valence).any() and labels.low.any() and labels.high.any():
        found += [Figure(f"with VADER, {name}", value) for name, value in with_valence(score, labels).items()]
    for cell, name in (("grief_processed", "grief kept"), ("described", "described kept")):
        if (chosen := labels.cells == cell).any():
            found.append(Figure(name, *kept(score, null, chosen, threshold), f"from {threshold:g}; Wilson"))
    if (chosen := labels.cells == "toxic_positivity").any():
        found.append(Figure("toxic positivity rejected", *stats.wilson(1.0 - (null | (score >= threshold))[chosen])))
    if known.any() and not known.all():
        found.append(Figure("null found", *stats.wilson(null[~known]), "of passages labelled null"))
        found.append(Figure("null where there is a label", *stats.wilson(null[known])))
    if pairs := swapped(score, labels):
        found.append(Figure("same event, other outcome: right way round", *pairs, "Wilson"))
    if labels.note == "by writer":
        world = explained(score[known], labels.sources[known])
        found.append(Figure("R2 of the writer's world", world, note="adjusted"))
    return found
