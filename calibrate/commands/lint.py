"""`calibrate audit --tasks`."""

import argparse
from pathlib import Path

from calibrate.commands import load


def lint(arguments: argparse.Namespace) -> None:
    """Flags the prompts of a file that put the model into a high state, with their spans; one line each, and JSON."""
    from calibrate import corpora, models
    from calibrate.audit import lint as linter
    from calibrate.reading import read_records
    from calibrate.vectors import load_vectors

    ignored = ("pairs", "max_tasks", "steer", "max_pairs_per_task", "twins", "full", "concepts", "max_rows", "chats")
    ignored += ("stories", "truncate", "pressed", "max_concepts", "reference", "lm_eval", "max_new_tokens")
    given = [f"`--{name.replace('_', '-')}`" for name in ignored if getattr(arguments, name)]
    if given := given + (["`--split`"] if arguments.split != "audit" else []):
        raise ValueError(f"`--tasks` reads the prompts of its file alone; leave out {', '.join(given)}")
    if arguments.out and arguments.out.is_dir():
        raise ValueError(f"`--out {arguments.out}` is a folder, and `--tasks` writes one file; name that")
    records = list(read_records(arguments.tasks))
    if not records:
        raise ValueError(f"{arguments.tasks}: no prompts; give JSONL of {{id, text}} or {{id, messages}}")
    vectors = load_vectors(arguments.vectors)
    vectors.index(arguments.target)
    dialogues = [row for row in corpora.load_neutral(arguments.neutral) if row.split == "audit"]
    if len(dialogues) < 2:
        raise ValueError(f'{len(dialogues)} neutral dialogues with `"split": "audit"`; the levels need at least 2')
    checkpoint = load(arguments)
    config = models.text_config(checkpoint.model)
    vectors.check(config.hidden_size, config.num_hidden_layers, checkpoint.weight_hash, checkpoint.name)
    found = linter.lint(checkpoint, vectors, records, dialogues, arguments.target)
    out = arguments.out or Path("runs") / f"lint-{arguments.tasks.stem}.json"
    _write_lint(out, found, {"model": checkpoint.name, "concept": arguments.target})
    for flag in (flag for flag in found.flags if flag.flagged):
        print(f"{flag.id}: {flag.header:.2f} sigma {arguments.target} at the header (level {found.header_level:.2f})")
        for span in flag.spans:
            print(f"    {span.reading:5.2f}  {span.text}")
    print(f"{sum(flag.flagged for flag in found.flags)} of {len(found.flags)} prompts flagged; {out}")


def _write_lint(out: Path, found, about: dict) -> None:
    import json
    import os

    flags = [flag._asdict() | {"spans": [span._asdict() for span in flag.spans]} for flag in found.flags]
    levels = {"unit": "sigma", "header_level": found.header_level, "span_level": found.span_level}
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.partial")
    aside.write_text(json.dumps({"schema": 1, **about, **levels, "prompts": flags}, indent=1), encoding="utf-8")
    os.replace(aside, out)
