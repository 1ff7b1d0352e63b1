"""What only a full audit reads: behaviour by execution, whose the change is, preferences, dose-response; lm-eval."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOSED = ("calm", "angry")  # steered beside the target, and as many random directions
CROSSED = 12  # tasks whose replies are written and read by both models
BOX_SAMPLES = 4  # replies to each mailbox, of which there are few
RELEARNT = 8  # tasks that are read while benign fine-tuning goes on
MAX_NEW_TOKENS = 400  # of one answer, by default


def read(
    arguments: argparse.Namespace, checkpoint, vectors, texts: dict[str, Any], own, reference, partial: Path
) -> dict[str, Any]:
    """Plain data by what it is; each part is kept in `partial` when done.

    Args:
        own: the checkpoint's own direction of the target, [layers, hidden]; it is steered along that one too.
    """
    from calibrate import corpora
    from calibrate.audit import agents, crossing, dose, preferences, relearning, rollouts
    from calibrate.corpora.situations import Activity, load

    partial.mkdir(parents=True, exist_ok=True)
    tasks = corpora.spread(rollouts.load_tasks(), arguments.max_rows)
    settings = agents.Settings(max_new_tokens=arguments.max_new_tokens or MAX_NEW_TOKENS)
    played = agents.play(checkpoint, tasks, settings, partial / "rollouts.jsonl")
    told = _kept(partial / "replies.json", lambda: _replies(checkpoint, settings, arguments.max_rows))
    activities = corpora.spread(load(Activity), arguments.max_rows)
    liked = _kept(partial / "preferences.json", lambda: _preferences(checkpoint, vectors, activities, preferences))
    concepts = [name for name in (arguments.target, *DOSED) if name in vectors.concepts]
    directions = dose.directions(vectors, concepts, len(concepts), seed=0)
    band = vectors.positions(vectors.used_band())

    def steered():
        found = preferences.steered(checkpoint, vectors, activities, directions)
        return {name: shift._asdict() for name, shift in found.items()}

    liked["steered"] = _kept(partial / "steered.json", steered)
    # One pair a task, read without sharing at each of 35 doses; the last ones of the shipped are balanced in style.
    plain = [pair for pair in texts["pairs"] if pair.context == "plain"] or texts["pairs"]
    pairs = [*{pair.task: pair for pair in plain}.values()]
    curves = []
    dialogues = texts["dialogues"][:12]
    for name, direction in (directions | {f"{arguments.target}, re-extracted": own[band].float()}).items():

        def curve(name=name, direction=direction):
            given = (pairs, dialogues, tasks, settings)
            return dose.plain(dose.measure(checkpoint, vectors, name, direction, *given))

        curves.append(_kept(partial / f"dose-{name.replace(' ', '-').replace(',', '')}.json", curve))
    failing = [twin[0] for twin in corpora.of_tasks(texts["elsewhere"], CROSSED)]

    def crossed():
        return crossing.read(checkpoint, vectors, failing, arguments.target, reference and reference.model)

    def relearnt():
        some = corpora.spread(failing, RELEARNT)
        return relearning.read(checkpoint, vectors, some, texts["neutral"], arguments.target)

    return {
        "rollouts": played,
        "replies": told,
        "preferences": liked,
        "dose": curves,
        "crossing": _kept(partial / "crossing.json", crossed),
        # Last: it trains, and though its adapter goes again nothing else should have to trust in that.
        "relearning": _kept(partial / "relearning.json", relearnt),
    }


def check_sandbox() -> None:
    """Raises ValueError where this machine cannot run what a model writes, before anything long is read."""
    from calibrate import sandbox

    try:
        sandbox.run(["true"], {})
    except sandbox.SandboxError as error:
        raise ValueError(
            f"`--full` runs the code that the model writes, and here {error}; allow user namespaces, or leave it out"
        ) from error


def played() -> str:
    """A digest of the shipped tasks, activities and prompts that a full audit plays."""
    from calibrate.audit import rollouts
    from calibrate.commands import digest
    from calibrate.corpora.situations import Activity, Mailbox, Manner, load

    return digest([rollouts.load_tasks(), *(load(kind) for kind in (Activity, Mailbox, Manner))])


def _replies(checkpoint, settings, most: int | None) -> list[dict[str, Any]]:
    """Replies to mailboxes and to prompts that invite sycophancy or harshness, with their grades."""
    from calibrate import corpora
    from calibrate.audit import agents, grading
    from calibrate.corpora.situations import Mailbox, Manner, load

    boxes, prompts = (corpora.spread(load(kind), most) for kind in (Mailbox, Manner))
    rows = [*(box for box in boxes for _ in range(BOX_SAMPLES)), *prompts]
    replies = agents.reply(checkpoint, [row.messages for row in rows], settings, [row.id for row in rows])
    return [grading.graded(row, reply) for row, reply in zip(rows, replies, strict=True) if reply is not None]


def benchmarks(arguments: argparse.Namespace, checkpoint, partial: Path) -> dict[str, Any]:
    """The tasks of `--lm-eval`, in a quick audit too."""
    from calibrate.audit import capability

    run = lambda: capability.run(checkpoint, arguments.lm_eval, arguments.max_rows)  # noqa: E731
    return {"lm_eval": _kept(partial / "lm-eval.json", run)}


def _preferences(checkpoint, vectors, activities, preferences) -> dict[str, Any]:
    """Elo of the activities, and how the readings on them go with it."""
    from calibrate.audit import situations

    found = preferences.ask(checkpoint, activities)
    rows = [situations.Text(a.id, "chats", a.category, [{"role": "user", "content": a.text}]) for a in activities]
    readings = situations.read(checkpoint, vectors, rows).readings[:, situations.PLACES.index("user")]
    associations = preferences.associations(vectors.concepts, readings, found.elo)
    return {
        "activities": [a.id for a in activities],
        "elo": found.elo.tolist(),
        "first": found.first,
        "associations": [a._asdict() for a in associations],
    }


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    """The content of a JSON file, made where it is missing."""
    if not path.is_file():
        aside = path.with_name(f"{path.name}.aside")
        aside.write_text(json.dumps(make()), encoding="utf-8")
        os.replace(aside, path)
    return json.loads(path.read_text(encoding="utf-8"))
