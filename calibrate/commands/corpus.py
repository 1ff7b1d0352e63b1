"""`calibrate corpus check`, `calibrate corpus write` and `calibrate corpus import`."""

import argparse
import json
import os

KINDS = ("stories", "neutral", "deflection", "ladders")


def check(arguments: argparse.Namespace) -> None:
    """Checks the files that are given, or the shipped ones; raises ValueError where one has a problem."""
    from calibrate.corpora import FOLDER
    from calibrate.corpora.check import check as check_file

    files = {kind: getattr(arguments, kind) for kind in KINDS if getattr(arguments, kind)}
    problems = 0
    for kind, path in (files or {kind: FOLDER / f"{kind}.jsonl" for kind in KINDS}).items():
        found, counts = check_file(kind, path)
        print(f"{path}: {', '.join(f'{name} {value}' for name, value in counts.items())}")
        for problem in found:
            print(problem)
        problems += len(found)
    if problems:
        raise ValueError(f"{problems} problems in the corpora; each is named above with file and line")


def write(arguments: argparse.Namespace) -> None:
    """Writes stories with a model or a server."""
    from calibrate import generation, models, writers
    from calibrate.concepts import load_concepts

    if bool(arguments.server) == bool(arguments.model):
        raise ValueError("give either `--model MODEL` or `--server URL` with `--server-model NAME`")
    if arguments.server and not arguments.server_model:
        raise ValueError("`--server` needs `--server-model`, the name under which the server knows its model")
    if arguments.model and (arguments.server_model or arguments.concurrency != 1):
        raise ValueError("`--server-model` and `--concurrency` go with `--server` only")
    for option in ("per_cell", "per_request", "concurrency", "max_topics"):
        if getattr(arguments, option) is not None and getattr(arguments, option) < 1:
            raise ValueError(f"`--{option.replace('_', '-')}` is {getattr(arguments, option)}; give 1 or more")
    known = load_concepts()
    concepts = arguments.concepts or list(known)
    if unknown := [concept for concept in concepts if concept not in known]:
        raise ValueError(f"concepts {', '.join(unknown)} are not in concepts.yaml; add them there with their synonyms")
    topics = generation.load_topics(arguments.topics)[: arguments.max_topics]
    shared = {name: getattr(arguments, name) for name in ("per_cell", "per_request", "seed", "temperature", "top_p")}
    if arguments.server:
        settings = generation.Settings(arguments.server_model, server=writers.host(arguments.server), **shared)
        writer = writers.server_writer(arguments.server, settings, os.environ.get("OPENAI_API_KEY"))
    else:
        checkpoint = models.load(arguments.model)
        settings = generation.Settings(arguments.model, weights=writers.weights(checkpoint), **shared)
        writer = writers.model_writer(checkpoint, settings)
    tally = generation.write(writer, settings, concepts, topics, arguments.out, arguments.concurrency)
    print(f"{arguments.out}: {tally.pop('kept')} stories; refused in this run: {dict(tally) or 'none'}")


def import_(arguments: argparse.Namespace) -> None:
    """Turns transcripts into twins, renders them with the model's template, and writes one file."""
    from calibrate.corpora import imports

    if arguments.out.exists():
        raise ValueError(f"{arguments.out} exists; choose another `--out` or delete it")
    failing, passing = (
        tuple(status.lower() for status in given) if given else default
        for given, default in ((arguments.failing, imports.FAILING), (arguments.passing, imports.PASSING))
    )
    found = []
    for path in arguments.files:
        found += imports.read(path, arguments.task_field, arguments.status_field)
    rows, left = imports.pair(found, failing, passing, arguments.reply or imports.REPLY, arguments.split)
    lengths = _lengths(arguments, rows) if arguments.model else []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    aside = arguments.out.with_name(f"{arguments.out.name}.partial")
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, arguments.out)
    tasks = len({row["task"] for row in rows})
    print(f"{arguments.out}: {len(rows) // 2} twins of {tasks} tasks, from {len(found)} transcripts")
    if left:
        print(f"left out, with one outcome only: {len(left)} tasks ({', '.join(left[:5])}{', ...' * (len(left) > 5)})")
    if lengths:
        print(f"tokens with the reply: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}")


def _lengths(arguments: argparse.Namespace, rows: list[dict]) -> list[int]:
    """Tokens of every context, sorted; raises ValueError where the model's template does not take one."""
    from calibrate import models, transcripts

    try:
        tokenizer = models.load_tokenizer(arguments.model, chat_template=arguments.chat_template)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the tokenizer of {arguments.model!r} cannot be loaded ({reason})") from error
    lengths = []
    for row in rows:
        try:
            lengths.append(len(transcripts.encode(tokenizer, row["messages"], row["reply"]).ids))
        except ValueError as error:
            raise ValueError(f"{row['source']}: {error}") from error
    return sorted(lengths)
