"""Audited checkpoints that are built by hand, so that every reading in them is known."""

import numpy as np
import torch

from calibrate.audit.comprehension import Comprehension
from calibrate.audit.contexts import Contexts
from calibrate.audit.own import Own
from calibrate.audit.preservation import Neutral
from calibrate.audit.profile import KINDS, Profile, TokenTrace
from calibrate.audit.record import Record
from calibrate.audit.situations import PLACES, Situations, Text
from calibrate.vectors import POOLINGS, EmotionVectors

TASKS = ["north", "alder", "quay", "birch", "salt", "mill", "fern", "dune"]  # not in alphabetical order
TRACE = TokenTrace("north/failing", "ab", [(0, 1), (1, 2)], ["system", "reply"], {"desperate": [0.0, 1.5]})

# Each task's own level, and a small spread around 0; both [tasks, 1]. Only matched twins cancel the levels.
LEVELS = np.arange(8.0)[:, None]
SPREAD = np.array([-0.2, 0.2, -0.1, 0.1, -0.2, 0.2, -0.1, 0.1])[:, None]
BASELINE = {
    "failing": {0: LEVELS + 2},
    "passing": {0: LEVELS},
}  # untrained: a contrast of 2 sigma

# Two texts of every set, each with what a reader should find; the rungs of two ladders.
TEXTS = [
    *(Text(f"s{i}", "scenarios", "neutral", [{"role": "user", "content": "Hi"}]) for i in range(2)),
    *(Text(f"i{i}", "implicit", name, [], {"header": name}) for i, name in enumerate(("desperate", "calm"))),
    *(Text(f"p{i}", "speakers", "calm to desperate", [], {"reply": "calm", "other": "desperate"}) for i in range(2)),
    *(Text(f"l{i}/{r}", "ladders", f"l{i}", [], {"rung": r, "desperate": "up"}) for i in range(2) for r in range(3)),
]


def make_vectors(concepts: list[str], layers: list[int], band: list[int]) -> EmotionVectors:
    """Vectors whose directions are the first axes of eight, at every layer."""
    vectors = EmotionVectors(concepts, layers, 8, 5, dict.fromkeys(POOLINGS, 50), "planted", "0", {})
    for axis in range(len(concepts)):
        vectors.directions[axis, :, axis] = 1
    for pooling in POOLINGS:
        vectors.neutral(pooling).normal_(0, 2, generator=torch.Generator().manual_seed(0))
    vectors.set_band(band, "by hand")
    return vectors


def make_record(
    vectors, header=None, reply=None, own=0, replies=None, loss=2.0, kl=None, failure=None, emotion=1.0,
    crisis=(1.0, -1.0), norms=10.0, felt=None, elsewhere=None, **fields,
) -> Record:  # fmt: skip
    """A record of eight tasks with given readings, for vectors whose directions are the first axes (0 is the target).

    `header` and `reply` are {kind: {axis: reading}} with a reading in sigma as one number, one for each layer, or
    [tasks, layers]; what is not given reads 0. `own`: the axis along which the checkpoint's own direction of the
    stories lies, or axes by the directions' names. `replies` [pairs, (failing, passing), (honest, gaming)], all -1 nat
    by default, and `failure` {kind: log-odds} are in nats; so are `emotion` and `crisis`, the log-odds of danger where
    there is some and at a false alarm. `norms` of the dialogues; `felt` [contexts, (desperate, composed), ...].
    `elsewhere`: the header in another template, by default as in the model's own.
    """
    contexts = Contexts(
        profile=_profile(vectors, header, reply),
        replies=np.full((8, 2, 2), -1.0) if replies is None else np.array(replies, dtype=float),
        pair_tasks=fields.pop("pair_tasks", TASKS),
        felt=torch.zeros(0, 2, len(vectors.layers), vectors.hidden_size) if felt is None else felt,
        felt_tasks=fields.pop("felt_tasks", [] if felt is None else TASKS),
        failure=np.concatenate([np.full(8, (failure or {}).get(kind, 1.0))[ORDER[kind]] for kind in KINDS[:2]]),
        trajectory=[(task, kind, [0.5, 1.0, 2.0]) for kind in KINDS[:2] for task in TASKS],
        norms=np.broadcast_to(norms, (8, len(vectors.layers))).copy(),
    )
    axes = own if isinstance(own, dict) else {"stories": own}
    directions = {name: torch.zeros_like(vectors.directions[0]) for name in axes}
    for name, axis in axes.items():
        directions[name][:, axis] = 1
    comprehension = Comprehension(
        emotion=np.full(8, emotion), emotion_right=np.ones(8), emotion_about=["user"] * 8,
        emotion_concepts=["sad"] * 8, crisis=np.tile(crisis, 4), crisis_true=np.tile([1.0, 0.0], 4),
    )  # fmt: skip
    readings = np.zeros((len(TEXTS), len(PLACES), len(vectors.concepts)))
    return Record(
        vectors=vectors,
        contexts=contexts,
        elsewhere=_profile(vectors, elsewhere or header, reply).only(
            {f"{task}/{kind}" for kind in KINDS[:2] for task in TASKS}
        ),
        own=Own(directions, torch.ones(4, vectors.hidden_size), ["desperate", "calm"] * 2),
        neutral=Neutral(np.full(8, loss), None if kl is None else np.full(8, kl)),
        comprehension=comprehension,
        situations=Situations(TEXTS, readings),
        **{"model": "planted", "concept": "desperate", "more": {}, "options": {}} | fields,
    )


# The passing texts stand in another order than the failing ones: twins must be matched by task.
ORDER = {kind: list(range(8)) if kind != "passing" else list(range(7, -1, -1)) for kind in KINDS}


def _profile(vectors, header, reply) -> Profile:
    states = torch.zeros(len(KINDS), len(TASKS), 2, len(vectors.layers), vectors.hidden_size)
    for position, (role, given) in enumerate((("header", header), ("reply", reply))):
        for kind, axis, reading in [(k, a, r) for k, by_axis in (given or {}).items() for a, r in by_axis.items()]:
            states[KINDS.index(kind), :, position, :, axis] = torch.as_tensor(reading, dtype=torch.float32)
        neutral = vectors.neutral(role)
        states[:, :, position] = states[:, :, position] * neutral.std(0) + neutral.mean(0)
    return Profile(
        ids=[f"{TASKS[i]}/{kind}" for kind in KINDS for i in ORDER[kind]],
        kinds=[kind for kind in KINDS for _ in TASKS],
        tasks=[TASKS[i] for kind in KINDS for i in ORDER[kind]],
        states=torch.cat([states[row, ORDER[kind]] for row, kind in enumerate(KINDS)]),
        traces=[TRACE],
    )
