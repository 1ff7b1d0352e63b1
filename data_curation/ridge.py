"""Linear heads from labelled passages: ridge regression by its kernel, cross-validation, and what its numbers mean."""

import itertools
from typing import Any, NamedTuple

import numpy as np

from data_curation.facets import FACETS, MALADAPTIVE, STANCES
from data_curation.kernels import Kernels
from data_curation.scorer import Head

# Held constant in the fit of `regulation`: it is not to be learnt from how much a passage hurts.
HELD = ("distress", "hostility")
# A passage's maladaptive facets count once more, so that a kind of harm nobody has labelled regulation for is seen.
HARM, HARM_MOST = 0.5, 1.5
LEVELS = 4  # of a facet's label
EDGES = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1)  # quantiles between a head's knots
COVERAGE = 0.9  # of an interval
MAX_FOLDS = 10


class Targets(NamedTuple):
    """What the heads learn: labels in 0 to 1 [rows, heads], nan where there is none; and what is held constant.

    Background texts follow the labelled rows: they have no regulation, every other label is 0, and their fold is -1,
    which is in every fit and never judged.
    """

    names: list[str]
    labels: np.ndarray
    held: np.ndarray  # [rows, held facets]
    harm: np.ndarray  # [rows], taken off the regulation that is learnt
    folds: np.ndarray  # [rows]


def targets(rows: list[dict[str, Any]], background: int = 0) -> Targets:
    """Regulation, the facets that every row is labelled with, and a column for each stance.

    Args:
        background: how many texts without any of it are fitted with the rows.

    Raises:
        ValueError: a label is missing or out of range; names the row.
    """
    for row in rows:
        facets, regulation = row.get("facets"), row.get("regulation", "missing")
        if not isinstance(facets, dict) or not all(
            name in FACETS and value in range(5) for name, value in facets.items()
        ):
            raise ValueError(f"row {row.get('id')!r}: `facets` must be some of {', '.join(FACETS)}, each 0 to 4")
        if regulation is not None and regulation not in range(11):
            raise ValueError(f"row {row.get('id')!r}: `regulation` is {regulation!r}; give null or 0 to 10")
        if row.get("stance", "modelled") not in STANCES:
            raise ValueError(f"row {row.get('id')!r}: `stance` {row['stance']!r} is none of {', '.join(STANCES)}")
    known = [facet for facet in FACETS if all(facet in row["facets"] for row in rows)]
    regulation = [np.nan if row["regulation"] is None else row["regulation"] / 10 for row in rows]
    columns = [regulation, *([row["facets"][facet] / LEVELS for row in rows] for facet in known)]
    columns += [[float(row.get("stance", "modelled") == stance) for row in rows] for stance in STANCES]
    held = [[row["facets"][facet] / LEVELS for facet in HELD if facet in known] for row in rows]
    harm = [sum(row["facets"][facet] for facet in MALADAPTIVE if facet in known) / LEVELS for row in rows]
    harm = HARM * np.minimum(harm, HARM_MOST)
    labels, none = np.array(columns).T, ((0, background), (0, 0))
    labels = np.pad(labels, none)
    labels[len(rows) :, 0] = np.nan
    held, harm = np.pad(np.array(held), none), np.pad(harm, none[0])
    where = np.pad(folds(rows), none[0], constant_values=-1)
    return Targets(["regulation", *known, *STANCES], labels, held, harm, where)


def folds(rows: list[dict[str, Any]]) -> np.ndarray:
    """Number of each row's fold: whole writers, where there are three or more; else whole pairs and events."""
    writers = [str(row.get("writer") or "") for row in rows]
    events = [str(row.get("pair") or row.get("event") or row.get("id")) for row in rows]
    names = writers if len(set(writers)) >= 3 else events
    sizes = {name: names.count(name) for name in dict.fromkeys(names)}
    if len(sizes) < 3:
        raise ValueError(f"{len(rows)} rows of {len(sizes)} writers or events; cross-validation needs at least 3")
    filled, where = [0] * min(MAX_FOLDS, len(sizes)), {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        where[name] = filled.index(min(filled))
        filled[where[name]] += sizes[name]
    return np.array([where[name] for name in names])


def solve(kernel: np.ndarray, labels: np.ndarray, held: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Dual ridge regression with unpenalised constant and `held` columns, generalised least squares.

    Args:
        kernel: [rows, rows]; labels [rows, heads]; held [rows, columns].

    Returns:
        dual weights [rows, heads], and constants [heads] that put the held columns at their mean.
    """
    inverse = np.linalg.inv(kernel + penalty * np.eye(len(kernel)))
    fixed = np.concatenate([np.ones((len(kernel), 1)), held], 1)
    effect = np.linalg.lstsq(fixed.T @ inverse @ fixed, fixed.T @ inverse @ labels, rcond=None)[0]
    return inverse @ (labels - fixed @ effect), fixed.mean(0) @ effect


def heads(
    kernel: np.ndarray, wanted: Targets, rows: np.ndarray, penalty: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Dual weights [rows, heads] and constants of all heads, fitted on some rows of the targets.

    Args:
        kernel: of these rows.
        penalty: of regulation, and of the other heads.
    """
    labels = wanted.labels[rows].copy()
    labels[:, 0] -= wanted.harm[rows]
    dual, constant = np.zeros(labels.shape), np.zeros(labels.shape[1])
    # Without a constant: a text that is like none of these has no facet, not the mean of passages chosen for theirs.
    dual[:, 1:] = np.linalg.solve(kernel + penalty[1] * np.eye(len(kernel)), labels[:, 1:])
    known = np.flatnonzero(~np.isnan(labels[:, 0]))
    found = solve(kernel[np.ix_(known, known)], labels[known, :1], wanted.held[rows[known]], penalty[0])
    dual[known, :1], constant[:1] = found
    return dual, constant


def cross_validate(
    kernels: Kernels, wanted: Targets, penalties: list[tuple[float, float]], leave: np.ndarray | None = None
) -> np.ndarray:
    """Raw numbers [penalties, rows, heads] of rows from heads that saw neither their fold nor the rows `leave`."""
    result = np.zeros((len(penalties), *wanted.labels.shape))
    for fold in np.unique(wanted.folds[wanted.folds >= 0]):
        left = wanted.folds == fold
        fit = np.flatnonzero(~left if leave is None else ~left & ~leave)
        kernel, across = kernels(fit)
        for index, penalty in enumerate(penalties):
            dual, constant = heads(kernel, wanted, fit, penalty)
            result[index, left] = across[left] @ dual + constant
    return result


def calibrate(raw: np.ndarray, label: np.ndarray) -> Head:
    """What raw numbers mean, from cross-validated ones: knots at the means of bins of equal mass, finer at the top."""
    order = np.argsort(raw, kind="stable")
    edges = np.unique(np.round(np.array(EDGES) * len(raw)).astype(int))
    bins = [order[start:end] for start, end in itertools.pairwise(edges)]
    knots = np.array([raw[rows].mean() for rows in bins])
    score = _rising(np.array([label[rows].mean() for rows in bins]), np.array([len(rows) for rows in bins], float))
    mapped = np.interp(raw, knots, score)
    sure, low, high = [], [], []
    for at in range(len(bins)):
        near = np.concatenate(bins[max(0, at - 1) : at + 2])  # three bins: a tail needs rows
        error = label[near] - mapped[near]
        sure.append(float((np.abs(error) <= 1 / LEVELS).mean()))
        # The finite-sample rank of split-conformal intervals, on each side.
        rank = min(1.0, (len(error) + 1) / len(error) * (1 + COVERAGE) / 2)
        low.append(float(score[at] + min(0.0, np.quantile(error, 1 - rank))))
        high.append(float(score[at] + max(0.0, np.quantile(error, rank))))
    clipped = [np.clip(values, 0, 1).round(5).tolist() for values in (score, sure, low, high)]
    return Head(knots.round(6).tolist(), *clipped)


def _rising(values: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """The rising sequence nearest to `values` in weighted squares: pools neighbours that fall."""
    blocks: list[list[float]] = []  # mean, mass, how many
    for value, weight in zip(values, mass, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, weight, count = blocks.pop()
            total = blocks[-1][1] + weight
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * weight) / total, total, blocks[-1][2] + count]
    return np.concatenate([np.full(int(count), mean) for mean, _, count in blocks])


def cross_calibrated(raw: np.ndarray, label: np.ndarray, folds: np.ndarray, what: str = "score") -> np.ndarray:
    """Scores of cross-validated raw numbers, each fold by what the other folds' numbers mean."""
    result = np.zeros(len(raw))
    for fold in np.unique(folds):
        others = (folds != fold) & ~np.isnan(label)
        result[folds == fold] = calibrate(raw[others], label[others]).at(raw[folds == fold], what)
    return result


def stance_offsets(raw: np.ndarray, label: np.ndarray) -> np.ndarray:
    """What to add to the raw numbers of the stances [rows, 3] so that the greatest finds each best, float64 [3].

    The greatest mean F1 over the stances that are labelled; without offsets the rare ones would never be named.
    """
    truth, best = label.argmax(1), (-1.0, (0.0, 0.0, 0.0))
    for second, third in itertools.product(np.linspace(0, 0.8, 17), repeat=2):
        found = (raw + np.array([0.0, second, third])).argmax(1)
        hits = [
            (2 * ((found == at) & (truth == at)).sum(), (found == at).sum() + (truth == at).sum()) for at in range(3)
        ]
        mean = float(np.mean([both / total for both, total in hits if total]))
        best = max(best, (mean, (0.0, -float(second), -float(third))))  # of equals the smallest
    return -np.array(best[1])
