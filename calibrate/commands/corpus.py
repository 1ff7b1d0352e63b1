"""`calibrate corpus check` and `calibrate corpus write`."""

import argparse
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
