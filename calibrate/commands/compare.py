"""`calibrate compare`: two checkpoints and their control arms -> a verdict, a report and an exit status."""

import argparse
import sys
from pathlib import Path

from calibrate.commands import audit, digest
from calibrate.concepts import TARGET

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
    _check_unused(models, arguments)
    _check_shapes(models, arguments)
    arguments.reference, arguments.reference_revision, arguments.base = None, arguments.revision, None
    before = load_record(_audited(arguments.before, arguments))
    arguments.reference = before.model
    if before.options.get("adapter") is None:  # of an adapter before, what came after may be its merged model's
        arguments.base = before.options.get("weight_hash")
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


def _check_unused(names: tuple[str, ...], arguments: argparse.Namespace) -> None:
    """Raises ValueError where options of an audit are given, and all that is compared is audited."""
    if not all((Path(name) / "audit.json").is_file() for name in names):
        return
    usual = {"target": TARGET, "vectors": "default", "split": "audit", "audits": Path("runs/audits")}
    own = ("verb", "verbose", "before", "after", "arms", "seeds", "out")
    given = [name for name, value in vars(arguments).items() if name not in own and value and value != usual.get(name)]
    if given:
        named = ", ".join(f"`--{name.replace('_', '-')}`" for name in given)
        raise ValueError(
            f"{named}: all that is compared is audited already; leave it out, or give models in place of audits"
        )


def _check_shapes(names: tuple[str, ...], arguments: argparse.Namespace) -> None:
    """Raises ValueError where a model is not to be had, or has another architecture than BEFORE, which comes first."""
    shapes = {name: _check(name, arguments) for name in names}
    first = shapes[names[0]]
    for name, shape in shapes.items():
        if shape != first:
            said = ["{} of width {}, {} layers".format(*one) for one in (shape, first)]
            raise ValueError(
                f"{name!r} has another architecture ({said[0]}) than {names[0]!r} ({said[1]}); compare a model with "
                "what it was trained from"
            )


def _check(name: str, arguments: argparse.Namespace) -> tuple[str, int, int]:
    """Kind, width and depth of an audited model or a model, before anything long is read.

    Raises:
        ValueError: neither is found under the name.
    """
    from calibrate import models
    from calibrate.audit.record import load_record

    if (Path(name) / "audit.json").is_file():
        record = load_record(Path(name))
        return record.options["architecture"], record.vectors.hidden_size, record.vectors.depth
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
