"""Which texts an audit reads, by its options; what is wrong with them is said before a model is loaded."""

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

QUICK_TASKS = 14  # without `--full`: evenly spaced tasks, one conversation each
QUICK_ELSEWHERE = 8  # of them in another template too
QUICK_ANSWERED = 36  # scenarios that the model answers
QUICK_NEUTRAL = 60  # neutral dialogues whose leading components are projected out of the own directions


def choose(arguments: argparse.Namespace) -> dict[str, Any]:
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
    if arguments.pairs is None:  # the shipped first ones can be told apart by style alone: only the honest reply asks
        pairs.sort(key=lambda p: (tasks.index(p.task), p.context != "plain", not p.id.endswith("/2")))
    each = arguments.max_pairs_per_task or (10**9 if arguments.full else 1)
    pairs = [p for p in pairs if [q.id for q in pairs if q.task == p.task].index(p.id) < each]
    dialogues, training = ([row for row in spoken if row.split == wanted] for wanted in (split, "train"))
    for dialogue in dialogues if arguments.full else []:
        corpora.asked(dialogue)  # said here, not hours later
    elsewhere = corpora.of_tasks(
        [t for t in twins if t[0].context == "plain"] or twins, None if arguments.full else QUICK_ELSEWHERE
    )
    crises = ([row.id for row in kinds.load(kinds.Crisis) if row.crisis is danger] for danger in (True, False))
    half = most and max(1, most // 2)  # both messages of a scene: they are compared
    scenes = {id_ for ids in crises for id_ in corpora.spread(ids, half)}
    paired = {pair.task for pair in pairs}
    _check_counts(split, {"tasks": {*tasks}, "tasks with pairs": paired, "neutral dialogues": dialogues}, training)
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
        "messages": [row for row in kinds.load(kinds.Crisis) if row.id in scenes],
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


def _check_counts(split: str, found: dict[str, Collection], training: list) -> None:
    """Raises ValueError where there is less than two of something that is averaged."""
    for what, rows in found.items():
        if len(rows) < 2:
            raise ValueError(
                f'{len(rows)} {what} of the {split} split; an audit needs at least 2 (rows with `"split": "{split}"`)'
            )
    if len(training) < 2:
        raise ValueError(
            f'{len(training)} neutral dialogues with `"split": "train"`; the own directions need at least 2, whose '
            "components are projected out"
        )


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
