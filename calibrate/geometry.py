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
    read: Tensor  # [rated concepts, 2], valence and arousal as a ridge regression reads them, each concept left out
    read_valence: float  # correlation of these with the ratings
    read_arousal: float
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
    second = correlation(scores[rows, 1], arousal)
    signs = torch.tensor([-1.0 if value < 0 else 1.0 for value in (first, second)])
    shares = (values.square() / values.square().sum())[:5].tolist()
    read = torch.stack([left_out(centred[rows], ratings) for ratings in (valence, arousal)], dim=1)
    return Axes(
        scores[:, :2] * signs,
        shares,
        abs(first),
        abs(second),
        read,
        correlation(read[:, 0], valence),
        correlation(read[:, 1], arousal),
        _families(directions, concepts),
    )


def left_out(directions: Tensor, ratings: Tensor, penalty: float = 0.3) -> Tensor:
    """Ratings as ridge regression on the other concepts' directions reads them, one concept left out at a time.

    Near synonyms of the one that is left out stay in. `penalty` is a share of the directions' mean squared norm.
    """
    rows = directions - directions.mean(0)
    kernel = rows @ rows.T
    hat = kernel @ torch.linalg.inv(kernel + penalty * kernel.diag().mean() * torch.eye(len(rows), dtype=rows.dtype))
    centred = ratings - ratings.mean()
    return ratings - (centred - hat @ centred) / (1 - hat.diag() - 1 / len(rows))


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
    """The concept map, valence by arousal as read from the directions, coloured by rated valence, at `path`."""
    from matplotlib.figure import Figure

    rated = load_concepts()
    shown = [concept for concept in concepts if concept in rated]
    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    plane = figure.add_subplot()
    x, y = found.read[:, 0].tolist(), found.read[:, 1].tolist()
    colour = [rated[concept].valence for concept in shown]
    points = plane.scatter(x, y, c=colour, cmap="coolwarm_r", vmin=1, vmax=9, s=16, zorder=3)
    for concept, right, up in zip(shown, x, y, strict=True):
        plane.annotate(concept, (right, up), xytext=(3, 2), textcoords="offset points", fontsize=6.5, color="#333333")
    plane.set_xlabel(f"valence, read with the concept itself left out (r = {found.read_valence:.2f} with its rating)")
    plane.set_ylabel(f"arousal, read with the concept itself left out (r = {found.read_arousal:.2f} with its rating)")
    plane.set_title(title, loc="left")
    plane.spines[["top", "right"]].set_visible(False)
    figure.colorbar(points, label="rated valence (1 unpleasant to 9 pleasant)", shrink=0.7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
