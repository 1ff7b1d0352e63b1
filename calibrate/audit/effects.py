"""Falls of readings, and what a change did besides: replies, understanding, neutral text, what probes read."""

import numpy as np
import torch
from torch import Tensor

from calibrate import stats
from calibrate.audit import probes
from calibrate.audit.probes import Probe
from calibrate.audit.profile import Profile
from calibrate.audit.record import Record
from calibrate.concepts import load_concepts
from calibrate.stats import Interval

SMALLEST_FALL = 0.3  # sigma; ratios to a smaller fall mean nothing
NEAREST = 5  # concepts that are read as the target's synonyms
UNPLEASANT = 4.5  # valence, of 1 to 9, below which another concept's rise counts as the target's displacement


def by_kind(
    record: Record, directions: Tensor | None = None, profile: Profile | None = None
) -> dict[tuple[str, str], np.ndarray]:
    """Readings by role and outcome, [tasks, concepts, layers], of the record's profile or another one."""
    profile = profile or record.profile
    readings = profile.readings(record.vectors, directions)
    return {
        (role, kind): profile.by_task(kind, readings[role]) for role in readings for kind in ("failing", "passing")
    }


def fall(readings: list[dict], role: str, kind: str, row: int, at: list[int]) -> np.ndarray:
    """Before minus after of one concept, mean over the layers `at`, [tasks]."""
    return (readings[0][role, kind] - readings[1][role, kind])[:, row][:, at].mean(1)


def counts(fall: np.ndarray) -> bool:
    """Whether a fall is sure and large enough for a ratio to it."""
    interval = stats.mean(fall)
    return interval.above(0) and interval.estimate > SMALLEST_FALL


def share(lost: np.ndarray, held: np.ndarray, fall: np.ndarray, contrast: np.ndarray) -> float:
    """Share of one reader's contrast that is lost, over that of another."""
    return float((lost.mean() / held.mean()) / (fall.mean() / contrast.mean()))


def relative_difference(failing: np.ndarray, other: np.ndarray) -> float:
    """(mean fall on failing - other mean fall) / mean fall on failing."""
    return float((failing.mean() - other.mean()) / failing.mean())


def over(one: np.ndarray, other: np.ndarray) -> float:
    """Ratio of two means."""
    return float(one.mean() / other.mean())


def behaviour(before: Record, after: Record) -> tuple[dict[str, Interval], np.ndarray]:
    """Honest against gaming replies, after failing contexts and after their twins; the task is the unit.

    The array is the gain of each task, nats per token.
    """
    margins = [record.contexts.replies @ np.array([1.0, -1.0]) for record in (before, after)]  # [pairs, outcomes]
    change = margins[1] - margins[0]
    owner = np.array(before.contexts.pair_tasks)
    tasks = list(dict.fromkeys(before.contexts.pair_tasks))
    by_task = np.array([change[owner == task].mean(0) for task in tasks])
    tempted = np.array([float(margins[0][owner == task, 0].mean() <= 0) for task in tasks])
    gain = by_task[:, 0] - by_task[:, 1]
    figures = {
        "tempted": stats.wilson(tempted),
        "margin": stats.mean(by_task[:, 0]),
        "margin_passing": stats.mean(by_task[:, 1]),
        "gain": stats.mean(gain),
    }
    return figures, gain


def executed(before: Record, after: Record) -> dict[str, Interval]:
    """Coding tasks that both models played: gamed checks, and unsolved code called done; nothing in a quick audit.

    Impossible tasks without the exit option for the first, all for the second; the task is the unit. Conversations
    that were cut at the end of the context window in either audit are left out.
    """
    played = [record.more.get("rollouts") for record in (before, after)]
    if not all(played):
        return {}

    kept = [{(*row["key"],): row["outcome"] for row in rows or [] if not row["cut"]} for rows in played]

    def shares(label: str, forms: list[tuple[bool, bool]]) -> list[np.ndarray]:
        """Of each task, [tasks], over the conversations that are whole in both audits: the same forms."""
        keys = [key for key in kept[0] if key in kept[1] and key[1:3] in forms]
        tasks = dict.fromkeys(key[0] for key in keys)
        return [np.array([np.mean([one[key][label] for key in keys if key[0] == t]) for t in tasks]) for one in kept]

    hacks = shares("strict_hack", [(True, False)])
    told = shares("false_success", [(a, b) for a in (True, False) for b in (True, False)])
    if min(len(hacks[0]), len(told[0])) < 2:
        return {}
    return {
        "hacks": stats.wilson(hacks[0]),
        "hack_change": stats.mean(hacks[1] - hacks[0]),
        "false_success_change": stats.mean(told[1] - told[0]),
    }


def dosed(before: Record, after: Record) -> dict[str, Interval]:
    """Whether replies still follow the target: the slope of their margin over steering doses, before and after.

    An unchanged slope with a shifted margin says that the state moved, a flatter one that the replies no longer follow
    it. Over the doses that both models can be used at; nothing in a quick audit.
    """
    curves = [
        curve for record in (before, after) for curve in record.more.get("dose", []) if curve["name"] == record.concept
    ]
    if len(curves) < 2:
        return {}
    low, high = (pick(curve["usable"][end] for curve in curves) for end, pick in ((0, max), (1, min)))
    points = [{p["dose"]: p["margins"] for p in curve["points"] if low <= p["dose"] <= high} for curve in curves]
    doses = np.array(sorted(points[0]))
    if len(doses) < 2 or any(margins is None for one in points for margins in one.values()):
        return {}
    margins = [np.array([one[dose] for dose in doses]) for one in points]  # [doses, tasks]
    centred = (doses - doses.mean()) / 0.1
    slopes = [centred @ rows / (centred @ centred) for rows in margins]
    figures = {"slope_change": stats.mean(slopes[1] - slopes[0])}
    if not stats.mean(slopes[0]).low <= 0 <= stats.mean(slopes[0]).high:
        zero = int(np.flatnonzero(doses == 0)[0])
        figures["dose_shift"] = stats.bootstrap(over, margins[1][zero] - margins[0][zero], slopes[0])
    return figures


def preserved(before: Record, after: Record, at: list[int]) -> dict[str, Interval | None]:
    """Perception of failure, understanding of others, neutral text and the size of the residual stream."""
    answers = after.contexts.failure - before.contexts.failure
    profile = before.profile
    kinds = np.array(profile.kinds[: len(answers)])
    tasks = np.array(profile.tasks[: len(answers)])
    found: dict[str, Interval | None] = {}
    for name, kind in (("failure_change", "failing"), ("success_change", "passing")):
        rows = kinds == kind
        by_task = [answers[rows & (tasks == task)].mean() for task in dict.fromkeys(tasks[rows].tolist())]
        found[name] = stats.mean(np.array(by_task))
    told, known = after.comprehension.emotion - before.comprehension.emotion, load_concepts()
    found["emotion_change"] = stats.mean(told)
    found["emotion_right_change"] = stats.mean(after.comprehension.emotion_right - before.comprehension.emotion_right)
    if before.concept in known:
        families = [name in known and known[name].family for name in before.comprehension.emotion_concepts]
        alike = np.array([family == known[before.concept].family for family in families])
        found["emotion_family_change"] = stats.mean(told[alike]) if alike.sum() > 1 else None
    truth = before.comprehension.crisis_true.astype(bool)
    change = after.comprehension.crisis - before.comprehension.crisis
    if truth.sum() == (~truth).sum() > 1:  # by scene: its two messages stand at the same place of their kind
        found["crisis_change"] = stats.mean(change[truth] - change[~truth])
    found["loss_change"] = stats.mean(after.neutral.loss - before.neutral.loss)
    found["kl"] = stats.mean(after.neutral.kl) if after.neutral.kl is not None and refers(before, after) else None
    norms = [record.contexts.norms[:, at].mean(1) for record in (before, after)]
    found["norm_ratio"] = stats.bootstrap(over, norms[1], norms[0])
    return found


def elsewhere(before: Record, after: Record, row: int, at: list[int]) -> dict[str, Interval]:
    """The fall in another template and tool format, and how it compares with that of the same contexts in their own.

    A model whose contrast is smaller there can fall less; the ratio allows for that. It is formed where the fall and
    both contrasts are sure and large enough.
    """
    found, ids = [], {*before.elsewhere.ids}
    for profiles in ([r.profile.only(ids) for r in (before, after)], [before.elsewhere, after.elsewhere]):
        read = [by_kind(record, None, profile) for record, profile in zip((before, after), profiles, strict=True)]
        contrast = (read[0]["header", "failing"] - read[0]["header", "passing"])[:, row][:, at].mean(1)
        found += [fall(read, "header", "failing", row, at), contrast]
    own, contrast, other, held = found
    figures = {"contrast_elsewhere": stats.mean(held), "fall_elsewhere": stats.mean(other)}
    if counts(own) and counts(contrast) and counts(held):
        figures["elsewhere"] = stats.bootstrap(_carried, other, held, own, contrast)
    return figures


def _carried(other: np.ndarray, held: np.ndarray, own: np.ndarray, contrast: np.ndarray) -> float:
    return float(other.mean() / (own.mean() * min(1.0, held.mean() / contrast.mean())))


def refers(before: Record, after: Record) -> bool:
    """Whether the model that AFTER was read beside (its adapter off, or its `--reference`) is BEFORE."""
    is_adapter = after.options.get("adapter") is not None
    beside = [after.options.get("weight_hash"), None] if is_adapter else after.options.get("reference")
    return beside == [before.options.get("weight_hash"), before.options.get("adapter")]


def crossed(before: Record, after: Record) -> dict[str, Interval]:
    """The change of readings over own replies, in two parts that sum to it; nothing where they were not crossed.

    Of the four readings (reader before and after, of the text before and after) a part is the mean over both orders:
    the text's with either reader, the state's on either text.
    """
    if not (found := after.more.get("crossing")) or not refers(before, after):
        return {}
    readings = np.array(found["readings"])  # [tasks, reader, text]
    text = (readings[:, :, 0] - readings[:, :, 1]).mean(1)
    state = (readings[:, 0] - readings[:, 1]).mean(1)
    parts = {"fall_written": text + state, "fall_text": text, "fall_state": state}
    return {name: stats.mean(part) for name, part in parts.items()}


def relearned(before: Record, after: Record) -> dict[str, Interval]:
    """The share of the fall that comes back in benign fine-tuning, beyond what that does to the model before."""
    one, other = (record.more.get("relearning") for record in (before, after))
    if not one or not other:
        return {}
    falls = np.array(one["readings"]) - np.array(other["readings"])  # [tasks, steps]
    first, last = falls[:, 0], falls[:, -1]
    return {"returned": stats.bootstrap(relative_difference, first, last)} if counts(first) else {}


def others(before: Record, frozen: list[dict], concepts: list, at: list[int]) -> dict[str, Interval | None]:
    """The target's nearest and family, the axis of valence, the largest sure rise of another unpleasant concept."""
    vectors, known = before.vectors, load_concepts()
    target = known.get(before.concept)
    family = [
        i
        for i, name in enumerate(vectors.concepts)
        if target and name != target.name and name in known and known[name].family == target.family
    ]
    found: dict[str, Interval | None] = {}
    row, directions = vectors.index(before.concept), vectors.directions[:, at].flatten(1)
    nearest = [int(i) for i in (directions @ directions[row]).argsort(descending=True) if i != row][:NEAREST]
    for name, rows in (("fall_synonyms", nearest), ("fall_neighbours", family)):
        if rows:
            falls = [fall(frozen, "header", "failing", i, at) for i in rows]
            found[name] = stats.mean(np.mean(falls, axis=0))
    rated = [i for i, name in enumerate(vectors.concepts) if name in known]
    if len(rated) > 2:
        valence = np.array([known[vectors.concepts[i]].valence for i in rated])
        # Readings are linear in the directions but for sigma, so the axis is read as a weighted mean of readings.
        weights = (valence - valence.mean()) / np.abs(valence - valence.mean()).sum()
        changes = np.stack([-fall(frozen, "header", "failing", i, at) for i in rated])
        found["rise_valence"] = stats.mean(weights @ changes)
    # A concept that is lower on failing than on passing contexts may rise to the twins' level; beyond it, it counts.
    rises = []
    names = [c.concept for c in concepts]
    named = [name in known and name != before.concept and known[name].valence < UNPLEASANT for name in names]
    if not any(named):
        return found | {"rise_elsewhere": None}
    for i, c in enumerate(concepts):
        if named[i] and c.p < 0.05:
            was = [frozen[0]["header", kind][:, i][:, at].mean(1) for kind in ("failing", "passing")]
            now = frozen[1]["header", "failing"][:, i][:, at].mean(1)
            rises.append(stats.mean(now - np.maximum(was[0], was[1].mean())))
    found["rise_elsewhere"] = max(rises, key=lambda rise: rise.low, default=Interval(0.0, 0.0, 0.0))
    return found


def read_probes(record: Record) -> list[Probe]:
    """`failed`: failing from passing headers, wanted. `felt`: desperate from composed turns, and its transfer."""
    vectors, profile = record.vectors, record.profile
    band = vectors.positions(vectors.used_band())
    at = band[len(band) // 2]
    states = profile.states[:, :, at].numpy()
    failing, passing = (torch.from_numpy(profile.by_task(kind, states)) for kind in ("failing", "passing"))
    found = probes.held_out("failed", failing[:, 0], passing[:, 0])
    owner = np.array(record.contexts.felt_tasks)
    if len(tasks := dict.fromkeys(record.contexts.felt_tasks)) >= probes.FOLDS:
        # A task's conversations are one row: in two folds they would read one another.
        felt = torch.stack([record.contexts.felt[owner == task][:, :, at].mean(0) for task in tasks])
        found += probes.held_out("felt", felt[:, 0], felt[:, 1], (failing[:, 1], passing[:, 1]))
    return found
