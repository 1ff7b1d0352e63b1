"""Audited checkpoints that are built by hand, so that every reading in them is known."""

import numpy as np
import torch

from calibrate.audit.preservation import Neutral
from calibrate.audit.profile import KINDS, Profile, TokenTrace
from calibrate.audit.record import Record

TASKS = ["north", "alder", "quay", "birch", "salt", "mill", "fern", "dune"]  # not in alphabetical order
TRACE = TokenTrace("ab", [(0, 1), (1, 2)], ["system", "reply"], [0.0, 1.5])

# Each task's own level, and a small spread around 0; both [tasks, layers]. Only matched twins cancel the levels.
LEVELS = np.arange(8)[:, None] * np.ones(2)
SPREAD = np.array([-0.2, 0.2, -0.1, 0.1, -0.2, 0.2, -0.1, 0.1])[:, None] * np.ones(2)
BASELINE = {
    "failing": {0: LEVELS + 2},
    "passing": {0: LEVELS},
}  # untrained: a contrast of 2 sigma


def make_record(vectors, header=None, reply=None, own=0, likelihoods=None, loss=2.0, kl=None, **fields) -> Record:
    """A record of eight tasks with given readings, for vectors whose directions are axes 0 (desperate) and 1 (calm).

    `header` and `reply` are {kind: {axis: reading}} with a reading in sigma as one number, one for each layer, or
    [tasks, layers]; what is not given reads 0. The checkpoint's own direction of desperate lies along the axis `own`.
    """
    states = torch.zeros(len(KINDS), len(TASKS), 2, len(vectors.layers), vectors.hidden_size)
    for position, (role, given) in enumerate((("header", header), ("reply", reply))):
        for kind, axis, reading in [(k, a, r) for k, by_axis in (given or {}).items() for a, r in by_axis.items()]:
            states[KINDS.index(kind), :, position, :, axis] = torch.as_tensor(reading, dtype=torch.float32)
        neutral = vectors.neutral(role)
        states[:, :, position] = states[:, :, position] * neutral.std(0) + neutral.mean(0)
    # The passing texts stand in another order than the failing ones: twins must be matched by task.
    order = {kind: list(range(8)) if kind != "passing" else list(range(7, -1, -1)) for kind in KINDS}
    profile = Profile(
        ids=[f"{TASKS[i]}/{kind}" for kind in KINDS for i in order[kind]],
        kinds=[kind for kind in KINDS for _ in TASKS],
        tasks=[TASKS[i] for kind in KINDS for i in order[kind]],
        states=torch.cat([states[row, order[kind]] for row, kind in enumerate(KINDS)]),
        trace=TRACE,
    )
    own_direction = torch.zeros_like(vectors.directions[0])
    own_direction[:, own] = 1
    return Record(
        profile=profile,
        vectors=vectors,
        own_direction=own_direction,
        likelihoods=np.full((8, 2), -1.0) if likelihoods is None else np.array(likelihoods),
        neutral=Neutral(np.full(8, loss), None if kl is None else np.full(8, kl)),
        **{"model": "planted", "concept": "desperate", "pair_tasks": TASKS, "options": {}} | fields,
    )
