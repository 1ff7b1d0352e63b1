"""The `calibrate` command: extract vectors, audit a checkpoint, compare two audits."""

import argparse
import hashlib
import json
import logging
import sys
from pathlib import Path

from calibrate.concepts import TARGET


def main() -> None:
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
    try:
        {"extract": extract, "audit": audit, "compare": compare}[arguments.verb](arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calibrate", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    reading = argparse.ArgumentParser(add_help=False)
    reading.add_argument("model", help="Hub id, folder, PEFT adapter folder, or `default`")
    reading.add_argument("--out", type=Path, required=True, help="folder to write")
    reading.add_argument("--target", default=TARGET, help="the target concept (default: %(default)s)")
    reading.add_argument("--neutral", type=Path, help="JSONL of neutral dialogues (default: the shipped ones)")
    reading.add_argument(
        "--twins", type=Path, help="JSONL of failing and passing contexts (default: the shipped ones)"
    )
    reading.add_argument("--chat-template", type=Path, help="Jinja file, for a tokenizer without a chat template")
    reading.add_argument("--revision", help="revision of a Hub id")
    reading.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    reading.add_argument("--verbose", action="store_true", help="say more")
    one = verbs.add_parser(
        "extract", parents=[reading], help="stories -> vectors, one folder for each split of topics"
    )
    one.add_argument("--stories", type=Path, help="JSONL of stories (default: the shipped ones)")
    one.add_argument(
        "--splits", nargs="+", default=["train"], help="splits of topics to extract from (default: train)"
    )
    one.add_argument("--layers", nargs="+", type=int, help="layers to store (default: 30 to 80 %% of depth)")
    one.add_argument("--reference", help="vectors of the reference, whose neutral text gives mu and sigma")
    two = verbs.add_parser("audit", parents=[reading], help="the emotional profile of a checkpoint")
    two.add_argument("--vectors", required=True, help="the reference's vectors (frozen)")
    two.add_argument("--own-vectors", required=True, help="vectors extracted from this checkpoint on the audit topics")
    two.add_argument("--pairs", type=Path, help="JSONL of preference pairs (default: the shipped ones)")
    two.add_argument("--max-tasks", type=int, help="audit so many evenly spaced tasks (default: all)")
    two.add_argument("--max-pairs-per-task", type=int, help="read the first so many pairs of a task (default: all)")
    three = verbs.add_parser("compare", help="two audits -> report.html and report.json")
    three.add_argument("before", type=Path)
    three.add_argument("after", type=Path)
    three.add_argument("--control", type=Path, help="audit of the control arm")
    three.add_argument("--out", type=Path, required=True, help="folder for the report")
    three.add_argument("--verbose", action="store_true", help="say more")
    return parser


def extract(arguments: argparse.Namespace) -> None:
    """Reads all texts once and writes one folder of vectors for each split."""
    from calibrate import corpora, extraction, models
    from calibrate.vectors import load_vectors

    stories = corpora.load_stories(arguments.stories)
    _check_splits(arguments.splits, stories)
    if arguments.target not in (concepts := {story.concept for story in stories}):
        raise ValueError(
            f"the stories have none about the target {arguments.target!r}; they have {', '.join(sorted(concepts))}; "
            f"set `--target`"
        )
    dialogues = [row for row in corpora.load_neutral(arguments.neutral) if row.split == "train"]
    twins = [twin for twin in corpora.load_twins(arguments.twins) if twin[0].split == "selection"]
    if len(dialogues) < 2:
        raise ValueError(f'{len(dialogues)} neutral dialogues with `"split": "train"`; mu and sigma need at least 2')
    reference = load_vectors(arguments.reference) if arguments.reference else None
    if reference is None:
        _check_splits(["train", "selection"], stories, "; the band search needs it")
    checkpoint = _load(arguments)
    config = models.text_config(checkpoint.model)
    if reference is not None:
        reference.check(config.hidden_size, config.num_hidden_layers, checkpoint.weight_hash, checkpoint.name)
        reference.positions(arguments.layers or [])
    models.check_layers(arguments.layers or [], config.num_hidden_layers)
    layers = sorted({*(arguments.layers or (reference.layers if reference else []))})
    layers = layers or extraction.candidate_layers(config.num_hidden_layers)
    recipe = _recipe(arguments, checkpoint, reference, layers, _digest([stories, dialogues, twins]))
    wanted = [split for split in arguments.splits if not _is_done(arguments.out / split, recipe | {"split": split})]
    if not wanted:
        return print(f"{arguments.out} already holds these vectors; nothing to do")
    read_splits = {*wanted} | ({"train", "selection"} if reference is None else set())
    read = extraction.read_stories(checkpoint, [story for story in stories if story.split in read_splits], layers)
    own = extraction.read_neutral(checkpoint, dialogues, layers)
    if reference is None:
        searched = extraction.make_vectors(
            checkpoint, extraction.of_split(read, "train"), own["token"], own, layers, recipe
        )
        extraction.choose_band(checkpoint, searched, arguments.target, twins, read)
    for split in wanted:
        part, neutral = extraction.of_split(read, split), own
        if reference is not None:
            neutral = {pooling: reference.neutral_at(pooling, layers) for pooling in own}
        vectors = extraction.make_vectors(checkpoint, part, own["token"], neutral, layers, recipe | {"split": split})
        source = reference or searched
        vectors.set_band(source.band, source.band_reason, source.band_search)
        vectors.save(arguments.out / split)
        print(f"{arguments.out / split}: {len(vectors.concepts)} concepts, layers {layers[0]} to {layers[-1]}")
    print(source.band_reason)


def _recipe(arguments: argparse.Namespace, checkpoint, reference, layers: list[int], corpora: str) -> dict:
    """Everything that vectors depend on, the split apart."""
    from calibrate import extraction

    return {
        **_identity(checkpoint),
        "method": "mean over stories minus mean over concepts, neutral components out, unit norm",
        "start_fraction": extraction.START_FRACTION,
        "neutral_variance": extraction.NEUTRAL_VARIANCE,
        "layers": layers,
        "target": arguments.target,
        "corpora": corpora,
        "reference": _digest(reference.recipe) if reference else None,
        "stories_by": "written for this project by a language model, one by one (see calibrate/corpora/README.md)"
        if arguments.stories is None
        else str(arguments.stories.name),
    }


def audit(arguments: argparse.Namespace) -> None:
    """Reads the audit texts and writes one folder with everything that is measured."""
    from calibrate import models
    from calibrate.audit import behaviour, preservation, profile
    from calibrate.audit.record import Record
    from calibrate.vectors import load_vectors

    vectors, own = load_vectors(arguments.vectors), load_vectors(arguments.own_vectors)
    vectors.index(arguments.target)
    if own.concepts != vectors.concepts or own.layers != vectors.layers:
        raise ValueError(
            "`--vectors` and `--own-vectors` hold other concepts or layers; extract both with the same options"
        )
    twins, pairs, dialogues = _audit_texts(arguments)
    checkpoint = _load(arguments)
    config = models.text_config(checkpoint.model)
    vectors.check(config.hidden_size, config.num_hidden_layers, checkpoint.weight_hash, checkpoint.name)
    own.check(config.hidden_size, config.num_hidden_layers, checkpoint.weight_hash, checkpoint.name)
    if own.recipe.get("adapter") != checkpoint.adapter_hash:
        raise ValueError(
            f"`--own-vectors` come from a model with adapter {own.recipe.get('adapter')}, {checkpoint.name!r} has "
            f"{checkpoint.adapter_hash}; extract them from it with `calibrate extract {checkpoint.name}`"
        )
    options = {
        **_identity(checkpoint),
        "target": arguments.target,
        "vectors": _digest(vectors.recipe),
        "own_vectors": _digest(own.recipe),
        "tasks": len(twins),
        "pairs": len(pairs),
        "corpora": _digest([twins, pairs, dialogues]),
    }
    if _is_done(arguments.out, options):
        return print(f"{arguments.out} already holds this audit; nothing to do")
    read = profile.read_profile(checkpoint, vectors, twins, dialogues, arguments.target)
    likelihoods = behaviour.reply_log_likelihoods(checkpoint, pairs)
    neutral = preservation.read_neutral(checkpoint, dialogues)
    record = Record(
        checkpoint.name,
        arguments.target,
        read,
        vectors,
        own.directions,
        likelihoods,
        [p.task for p in pairs],
        neutral,
        options,
    )
    record.save(arguments.out)
    summary = record.summary()["header"]
    print(f"{arguments.out}: {arguments.target} at the turn header, sigma (95 % interval over tasks)")
    for kind, readings in summary.items():
        estimate, low, high = readings[arguments.target]
        print(f"  {kind:8} {estimate:6.2f} [{low:.2f}, {high:.2f}]")


def _audit_texts(arguments: argparse.Namespace) -> tuple[list, list, list]:
    """Twins, the pairs of their tasks, and neutral dialogues, all of the audit split."""
    from calibrate import corpora

    twins = [twin for twin in corpora.load_twins(arguments.twins) if twin[0].split == "audit"]
    twins = corpora.spread(twins, arguments.max_tasks)
    tasks = [failing.task for failing, _ in twins]
    pairs = [pair for pair in corpora.load_pairs(arguments.pairs) if pair.task in tasks]
    pairs = [
        p
        for p in pairs
        if [q.id for q in pairs if q.task == p.task].index(p.id) < (arguments.max_pairs_per_task or 10**9)
    ]
    dialogues = [row for row in corpora.load_neutral(arguments.neutral) if row.split == "audit"]
    for what, rows in (
        ("contexts", twins),
        ("tasks with pairs", {pair.task for pair in pairs}),
        ("neutral dialogues", dialogues),
    ):
        if len(rows) < 2:
            raise ValueError(
                f'{len(rows)} {what} of the audit split; an audit needs at least 2 (rows with `"split": "audit"`)'
            )
    return twins, pairs, dialogues


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


def _load(arguments: argparse.Namespace):
    from calibrate import models

    return models.load(
        arguments.model,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
        chat_template=arguments.chat_template,
    )


def _identity(checkpoint) -> dict:
    """What tells one checkpoint from another, a folder whose weights were replaced included."""
    return {
        "model": checkpoint.name,
        "weight_hash": checkpoint.weight_hash,
        "adapter": checkpoint.adapter_hash,
        "chat_template": _digest(checkpoint.tokenizer.chat_template),
    }


def _check_splits(splits: list[str], stories: list, why: str = "") -> None:
    for split in splits:
        if split not in (found := {story.split for story in stories}):
            raise ValueError(f"no stories of split {split!r}; the file has {', '.join(sorted(found))}{why}")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _is_done(folder: Path, options: dict) -> bool:
    """True where the folder holds this very result.

    Raises:
        ValueError: it holds another one.
    """
    for name, key in (("audit.json", "options"), ("config.json", "recipe")):
        if (folder / name).is_file():
            kept = json.loads((folder / name).read_text(encoding="utf-8")).get(key)
            if kept == json.loads(json.dumps(options)):
                return True
            differing = sorted(k for k in {*(kept or {}), *options} if (kept or {}).get(k) != options.get(k))
            raise ValueError(
                f"output folder {folder} holds a result with another configuration (differing: "
                f"{', '.join(differing)}); choose "
                "another `--out` or delete it"
            )
    if folder.exists():
        raise ValueError(f"output folder {folder} exists and holds no result of this command; choose another `--out`")
    return False
