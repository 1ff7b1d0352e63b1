"""`calibrate compare`: two checkpoints and their control arms -> a verdict, a report and an exit status."""

import argparse
import sys
from pathlib import Path

from calibrate.commands import audit, digest

NOT_CALIBRATED = 2  # exit status of any other verdict; 1 is an error


def compare(arguments: argparse.Namespace) -> None:
    """Audits what is not audited yet, computes the change, names the outcome and writes the report.

    Exits with status 0 for `calibrated` and 2 for every other verdict.
    """
    from calibrate import report
    from calibrate.audit import readers, verdict
    from calibrate.audit.record import load_record

    if len({name for name, _ in arguments.arms}) < len(arguments.arms):
        raise ValueError(f"`--arms` names an arm twice ({', '.join(n for n, _ in arguments.arms)}); number them")
    for name in (arguments.before, arguments.after, *(model for _, model in arguments.arms)):
        _check(name, arguments)
    arguments.reference = None
    before = load_record(_audited(arguments.before, arguments))
    arguments.reference = before.model
    after = before if arguments.after == arguments.before else load_record(_audited(arguments.after, arguments))
    change = readers.compare(before, after)
    controls = {
        name: readers.compare(before, load_record(_audited(model, arguments))) for name, model in arguments.arms
    }
    beside = readers.beside_controls(change.figures, {name: control.figures for name, control in controls.items()})
    change = change._replace(figures=beside)
    outcome = verdict.judge(beside, None if before.vectors.band else before.vectors.band_reason)
    report.write(arguments.out, outcome, before, after, change, controls)
    print(f"Verdict: {outcome.outcome}. {outcome.sentence}")
    for finding in outcome.findings[1:]:
        print(f"Also: {finding.outcome}. {finding.means} ({'; '.join(finding.figures)})")
    print(f"Report: {arguments.out / 'report.html'}")
    if outcome.outcome != verdict.CALIBRATED:
        sys.exit(NOT_CALIBRATED)


def _check(name: str, arguments: argparse.Namespace) -> None:
    """Raises ValueError where neither an audit nor a model is found under a name, before anything long is read."""
    from calibrate import models
    from calibrate.audit.record import load_record

    if (Path(name) / "audit.json").is_file():
        load_record(Path(name))
        return
    try:
        models.load_tokenizer(name, arguments.chat_template)
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
