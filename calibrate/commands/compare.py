"""`calibrate compare`: two checkpoints and their control arms -> a verdict, a report and an exit status."""

import argparse
import sys
from pathlib import Path

from calibrate.commands import audit, digest

NOT_CALIBRATED = 2  # exit status of any other verdict; 1 is an error


def compare(arguments: argparse.Namespace) -> None:
    """Audits what is not audited yet, computes the change, names the outcome and writes the report.

    Of several seeds the verdict is that of the one whose outcome comes first in the rule, and the report is on it.
    Exits with status 0 for `calibrated` and 2 for every other verdict.
    """
    from calibrate import report
    from calibrate.audit import readers, verdict
    from calibrate.audit.record import load_record

    if len({name for name, _ in arguments.arms}) < len(arguments.arms):
        raise ValueError(f"`--arms` names an arm twice ({', '.join(n for n, _ in arguments.arms)}); number them")
    runs = (arguments.after, *arguments.seeds)
    if len(set(runs)) < len(runs):
        raise ValueError(f"AFTER and `--seeds` name a model twice ({', '.join(runs)}); give each once")
    models = (arguments.before, *runs, *(model for _, model in arguments.arms))
    _check_shapes(models, arguments)
    arguments.reference, arguments.reference_revision = None, arguments.revision
    before = load_record(_audited(arguments.before, arguments))
    arguments.reference = before.model
    controls = {
        name: readers.compare(before, load_record(_audited(model, arguments))) for name, model in arguments.arms
    }
    beside = {name: control.by_task for name, control in controls.items()}
    reason = None if before.vectors.band else before.vectors.band_reason
    judged = {}
    for name in runs:
        after = before if name == arguments.before else load_record(_audited(name, arguments))
        change = readers.compare(before, after)
        change = change._replace(figures=change.figures | readers.beside_controls(change.by_task, beside))
        judged[name] = verdict.judge(change.figures, reason), after, change
    order = [outcome.name for outcome in verdict.load_rule()] + [verdict.CALIBRATED]
    worst = min(runs, key=lambda name: order.index(judged[name][0].outcome))
    outcome, after, change = judged.pop(worst)
    seeds = {name: (other, moved) for name, (other, _, moved) in judged.items()}
    report.write(arguments.out, outcome, before, after, change, controls, seeds)
    for name, (other, _) in ({worst: (outcome, change)} | seeds if seeds else {}).items():
        print(f"{name}: {other.outcome}")
    print(f"Verdict: {outcome.outcome}. {outcome.sentence}")
    for finding in outcome.findings[1:]:
        print(f"Also: {finding.outcome}. {finding.means} ({'; '.join(finding.figures)})")
    print(f"Report: {arguments.out / 'report.html'}")
    if outcome.outcome != verdict.CALIBRATED:
        sys.exit(NOT_CALIBRATED)


def _check_shapes(names: tuple[str, ...], arguments: argparse.Namespace) -> None:
    """Raises ValueError where a model is not to be had, or has another architecture than BEFORE, which comes first."""
    shapes = {name: _check(name, arguments) for name in names}
    wide, deep = shapes[names[0]]
    for name, (width, depth) in shapes.items():
        if (width, depth) != (wide, deep):
            raise ValueError(
                f"{name!r} has another architecture (width {width}, {depth} layers) than {names[0]!r} (width {wide}, "
                f"{deep} layers); compare a model with what it was trained from"
            )


def _check(name: str, arguments: argparse.Namespace) -> tuple[int, int]:
    """Width and depth of an audited model or a model, before anything long is read.

    Raises:
        ValueError: neither is found under the name.
    """
    from calibrate import models
    from calibrate.audit.record import load_record

    if (Path(name) / "audit.json").is_file():
        vectors = load_record(Path(name)).vectors
        return vectors.hidden_size, vectors.depth
    try:
        models.load_tokenizer(name, arguments.chat_template)
        return models.load_shape(name, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model {name!r} cannot be loaded ({reason}); give a Hub id, a folder with config.json, a PEFT adapter "
            "folder, `default`, or the folder of an audit"
        ) from error


def _audited(name: str, arguments: argparse.Namespace) -> Path:
    """The folder of an audit: `name` itself, or that of the model it names, audited now unless it has been."""
    if (Path(name) / "audit.json").is_file():
        return Path(name)
    found = []

    def place(options: dict) -> Path:
        found.append(arguments.audits / f"{Path(name).name}-{digest(options)}")
        return found[0]

    audit.run(argparse.Namespace(**vars(arguments) | {"model": name}), place)
    return found[0]
