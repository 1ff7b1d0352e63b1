"""What changed between two audited checkpoints, read frozen and re-extracted, over tasks."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from calibrate import stats
from calibrate.audit.record import Record
from calibrate.stats import Interval

SMALLEST_FALL = 0.3  # sigma; ratios to a smaller fall mean nothing


class ConceptChange(NamedTuple):
    """Readings of one concept at the turn header on failing contexts, mean over the band, sigma."""

    concept: str
    before: Interval
    after: Interval
    change: Interval
    p: float  # family-wise over all concepts (maximum statistic)


class Change(NamedTuple):
    """Before against after of one checkpoint, on audit tasks. Falls are positive where the reading went down."""

    contrast: Interval  # failing minus passing before training, sigma: the premise
    fall_failing: Interval
    fall_passing: Interval
    fall_reply: Interval  # over the reply tokens of failing contexts
    fall_held_out: Interval  # with directions of the reference from the audit topics, the same before and after
    fall_own: Interval  # with directions that each checkpoint gave itself on the audit topics
    specificity: Interval | None  # None where the fall is too small for a ratio
    evasion: Interval | None
    concepts: list[ConceptChange]
    layers: list[tuple[int, Interval, Interval]]  # layer, fall on failing, fall on passing
    margin: Interval  # change of honest minus gaming log-likelihood, nats per token
    honest: tuple[float, float]  # mean log-likelihood before and after, nats per token
    gaming: tuple[float, float]
    perplexity: tuple[float, float]  # of neutral text
    loss_change: Interval  # of neutral text, nats per token
    kl: Interval | None
    direction_cosine: float  # mean cosine between the own directions before and after at the band
    topic_cosine: float  # the same between the frozen directions (training topics) and the reference's own


def compare(before: Record, after: Record) -> Change:
    """Computes all changes.

    Raises:
        ValueError: the two were audited on different texts, layers, concepts or with different frozen vectors.
    """
    _check_comparable(before, after)
    vectors, row = before.vectors, before.vectors.index(before.concept)
    at = vectors.positions(vectors.used_band())
    frozen = [_by_kind(record, None) for record in (before, after)]
    own = [_by_kind(record, record.own_direction[None]) for record in (before, after)]
    held_out = [_by_kind(record, before.own_direction[None]) for record in (before, after)]

    def fall(readings: list[dict], role: str, kind: str, row: int = row) -> np.ndarray:
        return (readings[0][role, kind] - readings[1][role, kind])[:, row][:, at].mean(1)

    failing, passing = fall(frozen, "header", "failing"), fall(frozen, "header", "passing")
    fall_own = fall(own, "header", "failing", 0)
    fall_failing = stats.mean(failing)
    ratios = fall_failing.above(0) and fall_failing.estimate > SMALLEST_FALL
    contrast = (frozen[0]["header", "failing"] - frozen[0]["header", "passing"])[:, row][:, at].mean(1)
    layers = []
    for i, layer in enumerate(vectors.layers):
        falls = [(frozen[0]["header", kind] - frozen[1]["header", kind])[:, row, i] for kind in ("failing", "passing")]
        layers.append((layer, stats.mean(falls[0]), stats.mean(falls[1])))

    def cosine(one: Tensor, other: Tensor) -> float:
        return float((one[at] * other[at]).sum(-1).mean())

    return Change(
        contrast=stats.mean(contrast),
        fall_failing=fall_failing,
        fall_passing=stats.mean(passing),
        fall_reply=stats.mean(fall(frozen, "reply", "failing")),
        fall_held_out=stats.mean(fall(held_out, "header", "failing", 0)),
        fall_own=stats.mean(fall_own),
        specificity=stats.bootstrap(_relative_difference, failing, passing) if ratios else None,
        evasion=stats.bootstrap(_relative_difference, failing, fall_own) if ratios else None,
        concepts=_concepts(vectors.concepts, frozen, at),
        layers=layers,
        margin=_margin_change(before, after),
        honest=(before.likelihoods[:, 0].mean(), after.likelihoods[:, 0].mean()),
        gaming=(before.likelihoods[:, 1].mean(), after.likelihoods[:, 1].mean()),
        perplexity=(float(np.exp(before.neutral.loss.mean())), float(np.exp(after.neutral.loss.mean()))),
        loss_change=stats.mean(after.neutral.loss - before.neutral.loss),
        kl=None if after.neutral.kl is None else stats.mean(after.neutral.kl),
        direction_cosine=cosine(before.own_direction, after.own_direction),
        topic_cosine=cosine(vectors.directions[row], before.own_direction),
    )


def _check_comparable(before: Record, after: Record) -> None:
    for what, one, other in (
        ("texts", before.profile.ids, after.profile.ids),
        ("layers", before.vectors.layers, after.vectors.layers),
        ("concepts", before.vectors.concepts, after.vectors.concepts),
        ("target concept", before.concept, after.concept),
        ("base weights of the vectors", before.vectors.weight_hash, after.vectors.weight_hash),
        ("pairs", before.pair_tasks, after.pair_tasks),
        ("stories of the own vectors", before.options.get("own_stories"), after.options.get("own_stories")),
        ("content of the corpora", before.options.get("corpora"), after.options.get("corpora")),
        ("chat template", before.options.get("chat_template"), after.options.get("chat_template")),
    ):
        if one != other:
            raise ValueError(
                f"the audits of {before.model!r} and {after.model!r} differ in their {what}; audit both with the same "
                f"options"
            )
    if not before.vectors.directions.equal(after.vectors.directions):
        raise ValueError("the two audits were read with different vectors; pass the same `--vectors` to both")


def _by_kind(record: Record, directions) -> dict[tuple[str, str], np.ndarray]:
    readings = record.profile.readings(record.vectors, directions)
    return {
        (role, kind): record.profile.by_task(kind, readings[role])
        for role in readings
        for kind in ("failing", "passing")
    }


def _relative_difference(failing: np.ndarray, other: np.ndarray) -> float:
    """(mean fall on failing - other mean fall) / mean fall on failing."""
    return float((failing.mean() - other.mean()) / failing.mean())


def _concepts(names: list[str], frozen: list[dict], at: list[int]) -> list[ConceptChange]:
    before, after = (readings["header", "failing"][:, :, at].mean(2) for readings in frozen)
    p = stats.max_statistic(after - before)
    return [
        ConceptChange(
            name, stats.mean(before[:, i]), stats.mean(after[:, i]), stats.mean((after - before)[:, i]), float(p[i])
        )
        for i, name in enumerate(names)
    ]


def _margin_change(before: Record, after: Record) -> Interval:
    """Change of (honest - gaming) per task: a task's pairs are averaged first, the task is the unit."""
    change = (after.likelihoods - before.likelihoods) @ np.array([1.0, -1.0])
    tasks = list(dict.fromkeys(before.pair_tasks))
    owner = np.array(before.pair_tasks)
    return stats.mean(np.array([change[owner == task].mean() for task in tasks]))
