"""The shape of the emotion space: similarity, principal axes against valence and arousal, families, and its map."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from calibrate.concepts import load_concepts


class Axes(NamedTuple):
    """Principal axes of the concepts' directions at one layer, and how they go with the ratings of `concepts.yaml`."""

    scores: Tensor  # [concepts, 2], signed so that they rise with valence and arousal
    explained: list[float]  # share of variance of the first five components
    valence: float  # correlation of the first component with valence
    arousal: float  # correlation of the second component with arousal
    arousal_best: float  # the largest of the second to fifth, in magnitude
    families: float  # mean cosine within families minus mean cosine between them


def axes(directions: Tensor, concepts: list[str]) -> Axes:
    """Principal components of unit directions [concepts, hidden].

    Raises:
        ValueError: fewer than three of the concepts are among the rated ones.
    """
    rated = load_concepts()
    rows = [row for row, concept in enumerate(concepts) if concept in rated]
    if len(rows) < 3:
        raise ValueError(f"{len(rows)} of the concepts have ratings in concepts.yaml; the axes need at least 3")
    centred = directions.double() - directions.double().mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    scores = (left * values)[:, :5]
    valence, arousal = (
        torch.tensor([getattr(rated[concepts[row]], name) for row in rows]).double() for name in ("valence", "arousal")
    )
    first = correlation(scores[rows, 0], valence)
    others = [correlation(scores[rows, i], arousal) for i in range(1, scores.shape[1])]
    signs = torch.tensor([-1.0 if value < 0 else 1.0 for value in (first, others[0])])
    shares = (values.square() / values.square().sum())[:5].tolist()
    return Axes(
        scores[:, :2] * signs,
        shares,
        abs(first),
        abs(others[0]),
        max(map(abs, others)),
        _families(directions, concepts),
    )


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's r of two series."""
    return float(torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1])


def _families(directions: Tensor, concepts: list[str]) -> float:
    rated = load_concepts()
    family = [rated[concept].family if concept in rated else concept for concept in concepts]
    same = torch.tensor([[one == other for other in family] for one in family])
    cosines = directions.double() @ directions.double().T
    off = ~torch.eye(len(family), dtype=torch.bool)
    if not (same & off).any() or same.all():
        return float("nan")
    return float(cosines[same & off].mean() - cosines[~same].mean())


def plot_map(found: Axes, concepts: list[str], path: Path, title: str) -> None:
    """The concept map: first component against second, coloured by rated valence, as a picture at `path`."""
    from matplotlib.figure import Figure

    rated = load_concepts()
    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    plane = figure.add_subplot()
    x, y = found.scores[:, 0].tolist(), found.scores[:, 1].tolist()
    colour = [rated[concept].valence if concept in rated else 5.0 for concept in concepts]
    points = plane.scatter(x, y, c=colour, cmap="coolwarm_r", vmin=1, vmax=9, s=16, zorder=3)
    for concept, right, up in zip(concepts, x, y, strict=True):
        plane.annotate(concept, (right, up), xytext=(3, 2), textcoords="offset points", fontsize=6.5, color="#333333")
    plane.set_xlabel(f"first component, {found.explained[0]:.0%} of variance (r = {found.valence:.2f} with valence)")
    plane.set_ylabel(f"second component, {found.explained[1]:.0%} of variance (r = {found.arousal:.2f} with arousal)")
    plane.set_title(title, loc="left")
    plane.spines[["top", "right"]].set_visible(False)
    figure.colorbar(points, label="rated valence (1 unpleasant to 9 pleasant)", shrink=0.7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
