"""`calibrate compare`: two checkpoints and their control arms -> a verdict, a report and an exit status."""

import argparse
import logging
import sys
from pathlib import Path

from calibrate.commands import audit, digest
from calibrate.concepts import TARGET

logger = logging.getLogger(__name__)
MIN_TASKS = 8  # of normal data 2, 3, 5, 8 tasks have the true mean in 51, 75, 84, 90 % of `stats.mean`'s intervals
NOT_CALIBRATED = 2  # exit status of any other verdict; 1 is an error
# Of the options of two audits, what must agree; the checkpoint's own are left out.
SHARED = ("target", "vectors", "split", "own_stories", "corpora", "chat_template", "played", "max_new_tokens")


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
    if arguments.out.is_file():
        raise ValueError(f"`--out {arguments.out}` is a file; name a folder")
    models = (arguments.before, *runs, *(model for _, model in arguments.arms))
    _check_unused(models, arguments)
    _check_shapes(models, arguments)
    plan = _plan(models, arguments)
    before = load_record(_audited(*plan[arguments.before]))
    _check_tasks({*before.contexts.pair_tasks})
    controls = {name: readers.compare(before, load_record(_audited(*plan[model]))) for name, model in arguments.arms}
    beside = {name: control.by_task for name, control in controls.items()}
    # Adopted vectors have no band and no reason either: no search was made, whose result could be a verdict.
    reason = None if before.vectors.band else before.vectors.band_reason or None
    if (searched := before.vectors.recipe.get("target", before.concept)) != before.concept:
        reason = None  # that search was about something else
        logger.warning("the layers that are read were searched for %r, not for %r", searched, before.concept)
    judged = {}
    for name in runs:
        after = before if name == arguments.before else load_record(_audited(*plan[name]))
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


def _check_tasks(tasks: set[str]) -> None:
    """Raises ValueError where a verdict would be on too few tasks."""
    if len(tasks) < MIN_TASKS:
        raise ValueError(
            f"{len(tasks)} tasks with pairs; a verdict needs at least {MIN_TASKS}, as intervals over fewer are "
            "too narrow: give more tasks, or look at each audit by itself"
        )


def _check_unused(names: tuple[str, ...], arguments: argparse.Namespace) -> None:
    """Raises ValueError where options of an audit are given, and all that is compared is audited."""
    if not all(_is_audit(name) for name in names):
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

    if _is_audit(name):
        record = load_record(Path(name))
        return record.options["architecture"], record.vectors.hidden_size, record.vectors.depth
    try:
        options = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
        models.load_tokenizer(name, arguments.chat_template, **options)
        return models.load_shape(name, **options)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model {name!r} cannot be loaded ({reason}); give a Hub id, a folder with config.json, a PEFT adapter "
            "folder, `default`, or the folder of an audit"
        ) from error


def _plan(names: tuple[str, ...], arguments: argparse.Namespace) -> dict[str, tuple[Path, argparse.Namespace, dict]]:
    """By name the folder of its audit, there or not yet, what it is audited with, and the audit's options.

    Every model is loaded once and let go, so that what no audit is needed for is not found out after hours of them.

    Raises:
        ValueError: a checkpoint is damaged, an adapter is not of BEFORE's base, or the audits of two would not be on
            the same texts.
    """
    from calibrate.audit.record import load_record

    arguments.reference, arguments.reference_revision = None, arguments.revision
    plan: dict[str, tuple[Path, argparse.Namespace, dict]] = {}
    for name in dict.fromkeys(names):  # BEFORE comes first
        folder, given = Path(name), argparse.Namespace(**vars(arguments) | {"model": name})
        if _is_audit(name):
            options = load_record(folder).options
        else:
            ready = audit.prepare(given)
            options = ready.options
            _check_tasks({pair.task for pair in ready.texts["pairs"]})
            folder = arguments.audits / f"{folder.name}-{digest(options)}"
        plan[name] = folder, given, options
        _, _, first = plan[names[0]]
        arguments.reference = first["model"]
        if first["adapter"] is None and options["adapter"] and options["weight_hash"] != first["weight_hash"]:
            raise ValueError(
                f"{name!r} is an adapter of a base with other weights ({options['weight_hash']}) than BEFORE "
                f"({first['weight_hash']}); give the adapter's own base, or merge the adapter first"
            )
        differing = [key for key in SHARED if options.get(key) != first.get(key)]
        # Two audits that are there are compared at once, by what they hold.
        if differing and not (_is_audit(name) and _is_audit(names[0])):
            raise ValueError(
                f"the audits of {name!r} and {names[0]!r} differ in {', '.join(differing)}; give the options of the "
                "one that is there, or models in place of audits; one template with `--chat-template`"
            )
    return plan


def _is_audit(name: str) -> bool:
    return (Path(name) / "audit.json").is_file()


def _audited(folder: Path, given: argparse.Namespace, options: dict) -> Path:
    """The folder of an audit, made now unless it has been."""
    if folder != Path(given.model) and not audit.is_kept(folder, options):
        audit.run(given, folder)
    return folder
