"""What only a full audit reads: behaviour by execution, whose the change is, preferences, dose-response; lm-eval."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOSED = ("calm", "angry")  # steered beside the target, and as many random directions
CROSSED = 12  # tasks whose replies are written and read by both models
RELEARNT = 8  # tasks that are read while benign fine-tuning goes on


def read(
    arguments: argparse.Namespace, checkpoint, vectors, texts: dict[str, Any], reference, partial: Path
) -> dict[str, Any]:
    """Plain data by what it is; each part is kept in `partial` when done."""
    from calibrate import corpora
    from calibrate.audit import agents, crossing, dose, preferences, relearning, rollouts
    from calibrate.corpora.situations import Activity, load

    partial.mkdir(parents=True, exist_ok=True)
    tasks = corpora.spread(rollouts.load_tasks(), arguments.max_rows)
    settings = agents.Settings(max_new_tokens=arguments.max_new_tokens)
    played = agents.play(checkpoint, tasks, settings, partial / "rollouts.jsonl")
    activities = corpora.spread(load(Activity), arguments.max_rows)
    liked = _kept(partial / "preferences.json", lambda: _preferences(checkpoint, vectors, activities, preferences))
    curves = []
    concepts = [name for name in (arguments.target, *DOSED) if name in vectors.concepts]
    dialogues = texts["dialogues"][:12]
    for name, direction in dose.directions(vectors, concepts, len(concepts), seed=0).items():

        def curve(name=name, direction=direction):
            return dose.plain(dose.measure(checkpoint, vectors, name, direction, texts["pairs"], dialogues))

        curves.append(_kept(partial / f"dose-{name.replace(' ', '-')}.json", curve))
    failing = [twin[0] for twin in corpora.of_tasks(texts["elsewhere"], CROSSED)]
    crossed = _kept(
        partial / "crossing.json",
        lambda: crossing.read(checkpoint, vectors, failing, arguments.target, reference and reference.model),
    )
    # Last: it trains, and though the adapter goes again nothing else should have to trust in that.
    relearnt = _kept(
        partial / "relearning.json",
        lambda: relearning.read(
            checkpoint, vectors, corpora.spread(failing, RELEARNT), texts["neutral"], arguments.target
        ),
    )
    return {"rollouts": played, "preferences": liked, "dose": curves, "crossing": crossed, "relearning": relearnt}


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
