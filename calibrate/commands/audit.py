"""`calibrate audit`: one checkpoint -> one folder with everything that is measured about it."""

import argparse
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from calibrate.commands import check_finite, digest, full, identity, is_done, load

QUICK_TASKS = 14  # without `--full`: evenly spaced tasks, one conversation each
QUICK_ELSEWHERE = 8  # of them in another template too
QUICK_ANSWERED = 36  # scenarios that the model answers
QUICK_NEUTRAL = 60  # neutral dialogues whose leading components are projected out of the own directions


def audit(arguments: argparse.Namespace) -> None:
    """Audits one checkpoint, or with `--tasks` reads the prompts of a file."""
    if arguments.tasks:
        from calibrate.commands.lint import lint

        return lint(arguments)
    if arguments.steer and (arguments.full or arguments.lm_eval):
        raise ValueError("`--steer` steers what a quick audit reads; leave out `--full` and `--lm-eval`, or `--steer`")
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
    if arguments.concepts and arguments.max_concepts:
        raise ValueError("`--concepts` names what `--max-concepts` would choose; give one of them")
    vectors = load_vectors(arguments.vectors)
    vectors.index(arguments.target)
    if arguments.lm_eval:
        from calibrate.audit import capability

        capability.check(arguments.lm_eval)
    texts = _texts(arguments, vectors)
    checkpoint = load(arguments)
    config = models.text_config(checkpoint.model)
    vectors.check(config.hidden_size, config.num_hidden_layers, checkpoint.weight_hash, checkpoint.name)
    situations.encode(checkpoint, situations.texts([], [], [], [], texts["chats"]), arguments.truncate)  # too long?
    check_finite(checkpoint)
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


def _texts(arguments: argparse.Namespace, vectors) -> dict[str, Any]:
    """Everything that is read, of one split, evenly thinned."""
    from calibrate import corpora
    from calibrate.corpora import situations as kinds

    split, most = arguments.split, arguments.max_rows
    every, told = corpora.load_twins(arguments.twins), corpora.load_pairs(arguments.pairs)
    spoken, records = corpora.load_neutral(arguments.neutral), _chats(arguments)
    _check_ids(arguments.twins, [context for twin in every for context in twin])
    for path, rows in ((arguments.pairs, told), (arguments.neutral, spoken), (arguments.chats, records)):
        _check_ids(path, rows)
    twins = [twin for twin in every if twin[0].split == split]
    if not arguments.full and arguments.twins is None:
        twins = [twin for twin in twins if twin[0].context == "plain" or arguments.pressed]
    twins = corpora.of_tasks(twins, arguments.max_tasks or (None if arguments.full else QUICK_TASKS))
    tasks = [failing.task for failing, _ in twins]
    held = {(failing.task, failing.context) for failing, _ in twins}
    pairs = [p for p in told if (p.task, p.context) in held and p.kind == "honest"]
    each = arguments.max_pairs_per_task or (10**9 if arguments.full else 1)
    pairs = [p for p in pairs if [q.id for q in pairs if q.task == p.task].index(p.id) < each]
    dialogues, training = ([row for row in spoken if row.split == wanted] for wanted in (split, "train"))
    elsewhere = corpora.of_tasks(
        [t for t in twins if t[0].context == "plain"] or twins, None if arguments.full else QUICK_ELSEWHERE
    )
    for what, rows in (
        ("tasks", set(tasks)),
        ("tasks with pairs", {pair.task for pair in pairs}),
        ("neutral dialogues", dialogues),
    ):
        if len(rows) < 2:
            raise ValueError(
                f'{len(rows)} {what} of the {split} split; an audit needs at least 2 (rows with `"split": "{split}"`)'
            )
    if len(training) < 2:
        raise ValueError(
            f'{len(training)} neutral dialogues with `"split": "train"`; the own directions need at least 2, whose '
            "components are projected out"
        )
    stories = _stories(arguments)
    chats = [(r.id, r.messages or [{"role": "user", "content": r.text or ""}]) for r in records]
    scenarios = corpora.spread(kinds.load(kinds.Scenario), most)
    answered = corpora.spread(scenarios, None if arguments.full else QUICK_ANSWERED)
    return {
        "twins": twins,
        "elsewhere": elsewhere,
        "pairs": pairs,
        "dialogues": corpora.spread(dialogues, most),
        "neutral": corpora.spread(training, most or (None if arguments.full else QUICK_NEUTRAL)),
        "stories": stories,
        "deflection": [row for row in corpora.load_deflection() if row.split == "audit"] if arguments.full else [],
        "scenarios": scenarios,
        "answered": [*(scenario.id for scenario in answered), *(id_ for id_, _ in chats)],
        "implicit": corpora.spread(kinds.load(kinds.Implicit), most),
        "speakers": corpora.spread(kinds.load(kinds.Speakers), most),
        "ladders": corpora.spread([row for row in corpora.load_ladders() if row.split == "audit"], most and most // 6),
        "chats": chats,
        "passages": corpora.spread(kinds.load(kinds.Passage), most),
        "messages": corpora.spread(kinds.load(kinds.Crisis), most),
        "questions": kinds.load(kinds.FailureQuestion),
        "traced": _traced([] if arguments.twins else twins, split),
    }


def _chats(arguments: argparse.Namespace) -> list:
    """The records of `--chats`."""
    from calibrate.reading import read_records

    records = list(read_records(arguments.chats)) if arguments.chats else []
    if arguments.chats and not records:
        raise ValueError(f"{arguments.chats}: no chats; give JSONL of {{id, messages}} or {{id, text}}")
    return records


def _check_ids(path: Path | None, rows: list) -> None:
    """Raises ValueError where two rows have one id: the readings of one would stand for those of the other."""
    seen = set()
    for id_ in (str(row.id) for row in rows):
        if id_ in seen:
            raise ValueError(f"{path}: two rows have the id {id_!r}; give every row an id of its own")
        seen.add(id_)


def _traced(twins: list, split: str) -> list[tuple[str, list[dict[str, str]], str]]:
    """Whole transcripts that are shown token by token besides the contexts: name, messages, reply.

    A mailbox up to the answer, and where only plain ones of the shipped contexts are read, the shortest of those with
    several attempts: failure upon failure, up to the shortcut.
    """
    from calibrate import corpora
    from calibrate.corpora import situations as kinds

    boxes = [box for box in kinds.load(kinds.Mailbox) if box.variant == "threatened"][:1]
    found = [(box.id, box.messages, "") for box in boxes]
    if twins and all(failing.context == "plain" for failing, _ in twins):
        gaming = {(p.task, p.context): p.rejected[0]["content"] for p in corpora.load_pairs() if p.kind == "honest"}
        pressed = [f for f, _ in corpora.load_twins() if f.split == split and (f.task, f.context) in gaming]
        pressed = [context for context in pressed if context.context == "pressed"]
        shortest = min(pressed, key=lambda context: sum(len(message["content"]) for message in context.messages))
        reply = gaming[shortest.task, shortest.context]
        found.append((f"{shortest.id}, gaming reply", shortest.messages, reply))
    return found


def _asked(arguments: argparse.Namespace) -> dict[str, str]:
    """Options that were given and versions that ran, for the page; what decides a comparison is in `options`."""
    import platform
    from importlib.metadata import version

    from calibrate import __version__

    left = ("verb", "verbose", "out", "audits", "before", "after", "arms", "seeds")
    given = {key: str(value) for key, value in sorted(vars(arguments).items()) if key not in left and value}
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return given | {"calibrate": __version__, "python": platform.python_version()} | packages


def _stories(arguments: argparse.Namespace) -> list:
    """What the checkpoint's own directions are made from."""
    from calibrate import corpora
    from calibrate.audit import own

    stories = [story for story in corpora.load_stories(arguments.stories) if story.split == "audit"]
    known = list(dict.fromkeys(story.concept for story in stories))
    for concept in (arguments.target, *(arguments.concepts or [])):
        if concept not in known:
            raise ValueError(f"no stories of the audit split are about {concept!r}; they are about {', '.join(known)}")
    wanted = arguments.concepts
    if wanted is None and arguments.max_concepts:
        wanted_known = corpora.spread([name for name in known if name != arguments.target], arguments.max_concepts)
        stories = [story for story in stories if story.concept in {arguments.target, *wanted_known}]
    stories = own.choose(stories, arguments.target, wanted or (known if arguments.full else None))
    own.check_topics(stories, arguments.target)
    return stories


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
        neutral = preservation.read_neutral(checkpoint, texts["dialogues"], reference=reference and reference.model)
    # A steered checkpoint's stories are read without steering: the directions are its own, not the dose's.
    made = own.read(
        checkpoint, vectors, texts["stories"], texts["deflection"], texts["neutral"], read.felt, arguments.target,
        partial / "states",
    )  # fmt: skip
    more: dict[str, Any] = {"asked": _asked(arguments)}
    if arguments.full:
        more |= full.read(arguments, checkpoint, vectors, texts, made.directions["stories"], reference, partial)
    more |= full.benchmarks(arguments, checkpoint, partial) if arguments.lm_eval else {}
    return Record(
        checkpoint.name, arguments.target, vectors, read, elsewhere, made, neutral, asked, found, more, options
    )
