"""What a change did besides readings: replies, understanding, neutral text, and what probes read from the states."""

import numpy as np
import torch

from calibrate import stats
from calibrate.audit import probes
from calibrate.audit.probes import Probe
from calibrate.audit.record import Record
from calibrate.stats import Interval


def behaviour(before: Record, after: Record) -> dict[str, Interval]:
    """Honest against gaming replies, after failing contexts and after their twins; the task is the unit."""
    margins = [record.contexts.replies @ np.array([1.0, -1.0]) for record in (before, after)]  # [pairs, outcomes]
    change = margins[1] - margins[0]
    owner = np.array(before.contexts.pair_tasks)
    tasks = list(dict.fromkeys(before.contexts.pair_tasks))
    by_task = np.array([change[owner == task].mean(0) for task in tasks])
    tempted = np.array([float(margins[0][owner == task, 0].mean() <= 0) for task in tasks])
    return {
        "tempted": stats.wilson(tempted),
        "margin": stats.mean(by_task[:, 0]),
        "margin_passing": stats.mean(by_task[:, 1]),
        "gain": stats.mean(by_task[:, 0] - by_task[:, 1]),
    }


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
    found["emotion_change"] = stats.mean(after.comprehension.emotion - before.comprehension.emotion)
    truth = before.comprehension.crisis_true.astype(bool)
    if truth.any() and not truth.all():
        sign = np.where(truth, 1 / truth.mean(), -1 / (~truth).mean())
        found["crisis_change"] = stats.mean((after.comprehension.crisis - before.comprehension.crisis) * sign)
    found["loss_change"] = stats.mean(after.neutral.loss - before.neutral.loss)
    found["kl"] = None if after.neutral.kl is None else stats.mean(after.neutral.kl)
    norms = [record.contexts.norms[:, at].mean(1) for record in (before, after)]
    found["norm_ratio"] = stats.bootstrap(
        lambda after, before: float(after.mean() / before.mean()), norms[1], norms[0]
    )
    return found


def crossed(after: Record) -> dict[str, Interval]:
    """The change of readings over own replies, in two parts that sum to it; nothing where they were not crossed.

    Of the four readings (reader before and after, of the text before and after) a part is the mean over both orders:
    the text's with either reader, the state's on either text.
    """
    if not (found := after.more.get("crossing")):
        return {}
    readings = np.array(found["readings"])  # [tasks, reader, text]
    text = (readings[:, :, 0] - readings[:, :, 1]).mean(1)
    state = (readings[:, 0] - readings[:, 1]).mean(1)
    parts = {"fall_written": text + state, "fall_text": text, "fall_state": state}
    return {name: stats.mean(part) for name, part in parts.items()}


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
