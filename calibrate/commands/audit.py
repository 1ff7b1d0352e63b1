"""`calibrate audit`: one checkpoint -> one folder with everything that is measured about it."""

import argparse
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from calibrate.commands import check_finite, digest, full, identity, is_done, load
from calibrate.commands.texts import choose


def audit(arguments: argparse.Namespace) -> None:
    """Audits one checkpoint, or with `--tasks` reads the prompts of a file."""
    if arguments.tasks:
        from calibrate.commands.lint import lint

        return lint(arguments)
    if arguments.steer and (arguments.full or arguments.lm_eval):
        raise ValueError("`--steer` steers what a quick audit reads; leave out `--full` and `--lm-eval`, or `--steer`")
    if len(dict(arguments.steer)) < len(arguments.steer):
        raise ValueError("`--steer` names a concept twice; give each concept one dose")
    arguments.out = arguments.out or Path("runs") / f"audit-{Path(arguments.model).name}"
    record = run(arguments, arguments.out)
    if record is None and (arguments.out / "profile.html").is_file():
        return print(f"{arguments.out} already holds this audit; nothing to do")
    _profile(arguments, record)


def _profile(arguments: argparse.Namespace, record) -> None:
    """Writes the profile of a record, or of an audit that was stopped before it, and prints the main of it."""
    from calibrate.audit.record import load_record
    from calibrate.report import profile

    record = record or load_record(arguments.out)
    data = profile.write(arguments.out, record)
    print(f"{arguments.out}: {arguments.target} at the turn header, sigma (95 % interval over tasks)")
    for kind, readings in record.summary()["header"].items():
        estimate, low, high = readings[arguments.target]
        print(f"  {kind:8} {estimate:6.2f} [{low:.2f}, {high:.2f}]")
    ranked = [(row["concept"], row["header"]) for row in data["concepts"] if row["header"]]
    for which, rows in (("Highest", ranked[:10]), ("Lowest", ranked[:-11:-1])):
        print(f"{which} of {len(ranked)} concepts at the turn header, sigma (95 % interval over scenarios)")
        for name, i in rows:
            print(f"  {name:14} {i['estimate']:6.2f} [{i['low']:.2f}, {i['high']:.2f}]")
    print(f"Profile: {arguments.out / 'profile.html'}")


class Ready(NamedTuple):
    """What an audit starts from, once all is checked that can be before texts are read."""

    checkpoint: Any
    vectors: Any
    texts: dict[str, Any]
    reference: Any  # a checkpoint, or None
    options: dict[str, Any]


def prepare(arguments: argparse.Namespace) -> Ready:
    """Loads the checkpoint that `arguments` names and what it is read with, and refuses what cannot be audited."""
    from calibrate import models
    from calibrate.audit import situations
    from calibrate.vectors import load_vectors

    if arguments.max_new_tokens and not arguments.full:
        raise ValueError("`--max-new-tokens` is of coding tasks, which only `--full` asks; add it or leave it out")
    if arguments.full and arguments.split == "selection":
        raise ValueError(
            "`--full` plays the shipped coding tasks, mailboxes and activities, which are the audit's and stay unseen "
            "with `--split selection`; leave one of them out"
        )
    if arguments.concepts and arguments.max_concepts:
        raise ValueError("`--concepts` names what `--max-concepts` would choose; give one of them")
    vectors = load_vectors(arguments.vectors)
    vectors.index(arguments.target)
    if arguments.lm_eval:
        from calibrate.audit import capability

        capability.check(arguments.lm_eval)
    texts = choose(arguments)
    checkpoint = load(arguments)
    config = models.text_config(checkpoint.model)
    vectors.check(config.hidden_size, config.num_hidden_layers, checkpoint.weight_hash, checkpoint.name)
    situations.encode(checkpoint, situations.texts([], [], [], [], texts["chats"]), arguments.truncate)  # too long?
    _check_lengths(checkpoint, texts)
    if arguments.full:
        full.check_sandbox()
    reference = None
    if arguments.verb == "audit" and arguments.reference and checkpoint.adapter_hash:
        raise ValueError(f"{checkpoint.name} is an adapter, whose own base is its reference; leave out `--reference`")
    if arguments.reference and checkpoint.adapter_hash is None:
        reference = models.load(
            arguments.reference, revision=arguments.reference_revision, chat_template=arguments.chat_template,
            trust_remote_code=arguments.trust_remote_code, block_list=arguments.blocks,
        )  # fmt: skip
        check_finite(reference)
        if (wanted := models.text_config(reference.model)) and (
            (wanted.hidden_size, wanted.num_hidden_layers) != (config.hidden_size, config.num_hidden_layers)
        ):
            raise ValueError(
                f"`--reference {arguments.reference}` has another architecture than {checkpoint.name!r}; give the "
                "model that it was trained from"
            )
    options = _options(arguments, checkpoint, vectors, texts, reference)
    return Ready(checkpoint, vectors, texts, reference, options)


def _check_lengths(checkpoint, texts: dict[str, Any]) -> None:
    """Raises ValueError where a dialogue or story is too long: past its window a model reads what means nothing."""
    from calibrate import models, transcripts

    window, tokenizer = models.window(checkpoint.model), checkpoint.tokenizer
    dialogues = [*texts["dialogues"], *texts["neutral"]]
    rows = [("neutral", row.id, transcripts.encode(tokenizer, row.messages)) for row in dialogues]
    rows += [("stories", story.id, transcripts.encode_text(tokenizer, story.text)) for story in texts["stories"]]
    for option, id_, encoded in rows:
        if window and (length := len(encoded.ids)) > window:
            raise ValueError(
                f"{id_}: {length} tokens, and the model takes {window}; shorten it, or leave it out of `--{option}`"
            )


def run(arguments: argparse.Namespace, out: Path):
    """Audits the checkpoint that `arguments` names into the folder `out`.

    Returns:
        the record, or None where the folder holds this very audit already. What a stopped audit had read of stories,
        rollouts, preferences and doses is kept beside it in `FOLDER.partial-DIGEST` and used again.
    """
    ready = prepare(arguments)
    if is_kept(out, ready.options):
        return None
    partial = _partial(out, ready.options)
    record = _read(arguments, *ready, partial)
    record.save(out)
    shutil.rmtree(partial)
    return record


def is_kept(out: Path, options: dict[str, Any]) -> bool:
    """Whether the folder holds this very audit; what one that was stopped when it was saved left beside it goes."""
    if not is_done(out, options):
        return False
    shutil.rmtree(_partial(out, options), ignore_errors=True)
    return True


def _partial(out: Path, options: dict[str, Any]) -> Path:
    return out.with_name(f"{out.name}.partial-{digest(options)}")


def _options(arguments, checkpoint, vectors, texts: dict[str, Any], reference) -> dict[str, Any]:
    """What the audit depends on; two audits are compared where all but the checkpoint agrees."""
    from calibrate import models
    from calibrate.audit.record import SCHEMA

    options = {
        "schema": SCHEMA,  # an audit of an older format is made again, beside it
        **identity(checkpoint),
        "architecture": models.text_config(checkpoint.model).model_type,
        "target": arguments.target,
        "vectors": digest([vectors.config(), vectors.content_hash()]),
        "own_stories": digest([(s.id, s.text) for s in texts["stories"]]),
        "tasks": len({failing.task for failing, _ in texts["twins"]}),
        "pairs": len(texts["pairs"]),
        "corpora": digest([texts[name] for name in sorted(texts) if name not in ("stories", "elsewhere")]),
        "tokenizer": digest(checkpoint.tokenizer.get_vocab()),
    }
    options |= {"split": arguments.split} if arguments.split != "audit" else {}
    options |= {"steer": dict(arguments.steer)} if arguments.steer else {}
    if arguments.full:
        options |= {"full": True, "max_new_tokens": arguments.max_new_tokens or full.MAX_NEW_TOKENS}
        options["played"] = full.played()
    if arguments.lm_eval:
        content = {name: Path(name).read_text(encoding="utf-8") for name in arguments.lm_eval if Path(name).is_file()}
        options |= {"lm_eval": arguments.lm_eval, "max_rows": arguments.max_rows, "lm_eval_files": digest(content)}
    # An adapter leaves its base's hash as it is: without its own the base would pass for it.
    return options | ({"reference": [reference.weight_hash, reference.adapter_hash]} if reference else {})


def _asked(arguments: argparse.Namespace) -> dict[str, str]:
    """Options that were given and versions that ran, for the page; what decides a comparison is in `options`."""
    import platform
    from importlib.metadata import version

    from calibrate import __version__

    left = ("verb", "verbose", "out", "audits", "before", "after", "arms", "seeds", "reference_revision")
    left += ("reference",) if arguments.verb == "compare" else ()  # there it is BEFORE, which nobody gave as one
    given = {key: str(value) for key, value in sorted(vars(arguments).items()) if key not in left and value}
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return given | {"calibrate": __version__, "python": platform.python_version()} | packages


def _read(arguments, checkpoint, vectors, texts: dict[str, Any], reference, options: dict, partial: Path):
    """Reads everything; what takes long keeps its state in `partial`."""
    from contextlib import nullcontext

    from calibrate import steering
    from calibrate.audit import comprehension, contexts, harness, own, preservation, situations
    from calibrate.audit.record import Record

    doses = dict(arguments.steer)
    with steering.steer(checkpoint.model, vectors, doses) if doses else nullcontext():
        read = contexts.read(
            checkpoint, vectors, texts["twins"], texts["pairs"], texts["questions"], texts["dialogues"],
            arguments.target,
        )  # fmt: skip
        read.profile.traces.extend(contexts.trace(checkpoint, vectors, texts["traced"], arguments.target))
        elsewhere = harness.read(checkpoint, vectors, texts["elsewhere"])
        rows = situations.texts(*(texts[name] for name in ("scenarios", "implicit", "speakers", "ladders", "chats")))
        rows = situations.answered(checkpoint, rows, texts["answered"])
        found = situations.read(checkpoint, vectors, rows, arguments.truncate)
        asked = comprehension.read(checkpoint, texts["passages"], texts["messages"])
        # The reference of an adapter is the model without it, which would be steered too: a KL of something else.
        given = {"divergence": not doses or reference is not None, "reference": reference and reference.model}
        neutral = preservation.read_neutral(checkpoint, texts["dialogues"], **given)
    # A steered checkpoint's stories are read without steering: the directions are its own, not the dose's.
    made = own.read(
        checkpoint, vectors, texts["stories"], texts["deflection"], texts["neutral"], read.felt, arguments.target,
        partial / "states",
    )  # fmt: skip
    more: dict[str, Any] = {"asked": _asked(arguments)}
    if cut := [f"{text.id} ({text.cut} tokens)" for text in found.texts if text.cut]:
        more["asked"]["cut at the beginning"] = ", ".join(cut)
    more |= full.benchmarks(arguments, checkpoint, partial) if arguments.lm_eval else {}
    if arguments.full:
        more |= full.read(arguments, checkpoint, vectors, texts, made.directions["stories"], reference, partial)
    return Record(
        checkpoint.name, arguments.target, vectors, read, elsewhere, made, neutral, asked, found, more, options
    )
