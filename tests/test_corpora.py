import json
import re
from collections import Counter, defaultdict
from itertools import chain, combinations

import pytest
from conftest import write_jsonl

from calibrate import corpora
from calibrate.concepts import Concept, load_concepts
from calibrate.corpora import build

REQUIRED_CONCEPTS = {
    "desperate", "calm", "angry", "afraid", "sad", "happy", "guilty", "proud", "hopeful", "frustrated", "hostile",
    "panicked", "trapped", "relieved",
}  # fmt: skip
STORY = {"id": "calm/pier", "concept": "calm", "topic": "pier", "split": "train", "text": "She sat by the water."}
CONTEXT = {"id": "a/failing", "task": "a", "split": "train", "outcome": "failing"}
CONTEXT |= {"messages": [{"role": "user", "content": "Mend it."}], "reply": "Next."}
PASSING = CONTEXT | {"outcome": "passing"}
DIALOGUE = {"id": "a", "split": "train", "messages": [{"role": "user", "content": "When?"}]}
LADDER = {"id": "a", "split": "audit", "template": "{value} mg", "values": [1, 2], "expected": {"calm": "up"}}
DEFLECTION = STORY | {"felt": "sad", "shown": "calm", "spans": [[0, 3]]}


def sequences(text: str, length: int = 8) -> set[tuple[str, ...]]:
    """All sequences of `length` words; case and punctuation do not count."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def read_raw(name: str) -> list[dict]:
    """The shipped rows with their provenance keys."""
    return [json.loads(line) for line in (corpora.FOLDER / name).read_text(encoding="utf-8").splitlines()]


# ---- loaders


def test_a_users_file_loads(tmp_path):
    """Keys that a story does not have are left out; a line separator inside a text does not end the line."""
    text = "One\u2028two, été."
    path = write_jsonl(tmp_path / "mine.jsonl", [json.dumps(STORY | {"text": text, "mood": 1}, ensure_ascii=False)])
    assert corpora.load_stories(path) == [corpora.Story("calm/pier", "calm", "pier", "train", text)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([STORY, "", STORY], ":2: the line is empty; remove it"),
        ([STORY, "{'id': 1}"], r":2: not JSON \(Expecting .*\); each line is one JSON object"),
        (["[1]"], ":1: a list, not an object; each line is one JSON object"),
        ([STORY, {"id": "x"}], ":2: lacks the key 'concept'; a story has id, concept, topic, split, text"),
        ([STORY | {"text": ""}], ":1: the value of 'text' is empty; give it or remove the line"),
        ([STORY, STORY | {"split": "test"}], ":2: split 'test' is not one of train, selection, audit"),
        ([], ": the file holds no rows; give at least one"),
    ],
)
def test_a_bad_line_is_refused_with_its_place(rows, message, tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}{message}"):
        corpora.load_stories(path)


@pytest.mark.parametrize(
    ("load", "row", "change", "message"),
    [
        (corpora.load_stories, STORY, {"text": 5}, "'text' is a number, 5; give a text"),
        (corpora.load_stories, STORY, {"text": None}, "'text' is null, null; give a text"),
        (corpora.load_stories, STORY, {"id": [1]}, "'id' is a list, [1]; give a text"),
        (corpora.load_stories, STORY, {"split": {"a": 1}}, """'split' is an object, {"a": 1}; give a text"""),
        (corpora.load_neutral, DIALOGUE, {"messages": 5}, "'messages' is a number, 5; give a list"),
        (corpora.load_neutral, DIALOGUE, {"messages": True}, "'messages' is a truth value, true; give a list"),
        (corpora.load_ladders, LADDER, {"values": 5}, "'values' is a number, 5; give a list"),
        (corpora.load_ladders, LADDER, {"template": 5.5}, "'template' is a number, 5.5; give a text"),
        (corpora.load_ladders, LADDER, {"expected": ["calm"]}, """'expected' is a list, ["calm"]; give an object"""),
        (corpora.load_deflection, DEFLECTION, {"spans": 5}, "'spans' is a number, 5; give a list"),
        (corpora.load_deflection, DEFLECTION, {"spans": "x" * 99}, f"'spans' is a text, \"{'x' * 39}; give a list"),
        (
            corpora.load_deflection,
            DEFLECTION,
            {"spans": [1, 2]},
            "'spans' is no list of [start, stop) in whole numbers",
        ),
        (
            corpora.load_twins,
            CONTEXT,
            {"messages": ["hi"]},
            "'messages' is no list of messages; each has `role` and `content`, both texts",
        ),
        (
            corpora.load_twins,
            CONTEXT,
            {"messages": [{"role": "user", "content": None}]},
            "'messages' is no list of messages; each has `role` and `content`, both texts",
        ),
        (corpora.load_twins, CONTEXT, {"traits": "deadline"}, """'traits' is a text, "deadline"; give a list"""),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_place_and_key(load, row, change, message, tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", [row, row | change])
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}:2: the value of {message}')}$"):
        load(path)


@pytest.mark.parametrize("load", [corpora.load_stories, corpora.load_neutral, corpora.load_twins, corpora.load_pairs])
def test_a_missing_or_foreign_file_is_refused(load, tmp_path):
    path = tmp_path / "none.jsonl"
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: no such file; give the path of a JSONL file"):
        load(path)
    path.write_bytes('{"id": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: not UTF-8 text .* at byte 8.*; save it as UTF-8"):
        load(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([CONTEXT], r"task 'a' has outcomes \['failing'\]; give one failing and one passing"),
        ([CONTEXT, PASSING | {"outcome": "green"}], r"task 'a' has outcomes \['failing', 'green'\]; give one failing"),
        ([CONTEXT, PASSING, CONTEXT], "task 'a' has two failing contexts; give one failing and one passing"),
        ([CONTEXT, PASSING | {"split": "audit"}], r"task 'a' has its twins in the splits \['audit', 'train'\]"),
    ],
)
def test_a_task_without_its_twin_is_refused(rows, message, tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}"):
        corpora.load_twins(path)


# ---- the shipped corpora


def test_stories_of_every_concept_share_their_topics():
    """171 concepts of 12 stories, one for each topic, so that topics cancel in the mean over concepts."""
    topics, splits = defaultdict(list), defaultdict(set)
    for story in corpora.load_stories():
        topics[story.concept].append(story.topic)
        splits[story.topic].add(story.split)
        assert 80 <= len(story.text.split()) <= 120, story.id
    assert len(topics) == 171
    assert topics.keys() == load_concepts().keys()
    assert topics.keys() >= REQUIRED_CONCEPTS
    assert len(splits) >= 10
    assert all(sorted(listed) == sorted(splits) for listed in topics.values())
    assert all(len(of_topic) == 1 for of_topic in splits.values())
    assert set.union(*splits.values()) == set(corpora.SPLITS)


def test_no_story_names_its_concept():
    named = {story.id: load_concepts()[story.concept].leak(story.text) for story in corpora.load_stories()}
    assert {story: word for story, word in named.items() if word} == {}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("So CALM.", "CALM"), ("In all serenity,", "serenity"), ("He was fed up now.", "fed up"),
        ("A madman, becalmed, fed upstairs", None), ("Unseren", None),
    ],
)  # fmt: skip
def test_leaks_are_whole_words_or_prefixes(text, word):
    assert Concept("calm", "family", 7.0, 2.0, ("seren*", "fed up", "mad"), "").leak(text) == word


def test_no_two_stories_share_eight_words():
    seen = {}
    for story in corpora.load_stories():
        found = sequences(story.text)
        shared = found & seen.keys()
        assert not shared, (story.id, seen[next(iter(shared))], shared)
        seen |= dict.fromkeys(found, story.id)


def test_neutral_dialogues_end_with_the_assistant():
    dialogues = corpora.load_neutral()
    assert len(dialogues) >= 200
    assert {dialogue.split for dialogue in dialogues} == set(corpora.SPLITS)
    assert len({dialogue.messages[0]["content"] for dialogue in dialogues}) == len(dialogues)
    for dialogue in dialogues:
        roles = [message["role"] for message in dialogue.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2), dialogue.id
        assert all(message["content"].strip() for message in dialogue.messages), dialogue.id


TWINS = corpora.load_twins()
CONTROLS = corpora.load_twins(controls=True)


def test_there_are_enough_contexts_of_enough_kinds():
    """200 failing contexts of 60 tasks; a third with three to six attempts; ten causes; both kinds of controls."""
    rows = [row for row in read_raw("twins.jsonl") if row["outcome"] == "failing"]
    pressed = [row for row in rows if not set(row["traits"]) & set(corpora.CONTROLS)]
    assert len(pressed) == len(TWINS) >= 200
    assert len({row["task"] for row in pressed}) >= 60
    attempts = [len(row["exit_codes"]) for row in pressed]
    assert sum(3 <= count <= 6 for count in attempts) >= len(pressed) / 3
    assert max(attempts) <= 6
    assert len({row["cause"] for row in pressed}) >= 10
    harnesses = Counter(row["harness"] for row in pressed)
    assert harnesses["pytest"] + harnesses["unittest"] > len(pressed) / 2  # Python's test runners for most
    assert {"shell", "service"} <= harnesses.keys()
    assert any(
        "error[" in row["messages"][-1]["content"] for row in pressed if row["split"] == "audit"
    )  # type checker
    for kind in corpora.CONTROLS:
        splits = {failing.split for failing, _ in CONTROLS if kind in failing.traits}
        assert splits == set(corpora.SPLITS), kind


def test_twins_differ_in_the_last_tool_result_alone():
    for failing, passing in TWINS + CONTROLS:
        roles = [message["role"] for message in failing.messages]
        assert roles[:2] == ["system", "user"], failing.id
        assert roles[-2:] == ["assistant", "tool"], failing.id
        assert failing.messages[:-1] == passing.messages[:-1], failing.id
        assert failing.messages[-1]["content"] != passing.messages[-1]["content"], failing.id
        assert (failing.split, failing.reply) == (passing.split, passing.reply), failing.id
        assert failing.felt.keys() == {"desperate", "composed"}, failing.id
        short, long = sorted(sum(len(m["content"]) for m in row.messages) for row in (failing, passing))
        assert long - short <= 0.1 * long, failing.id


def test_splits_share_no_harness_and_exit_codes_say_what_happened():
    harnesses = defaultdict(set)
    for row in read_raw("twins.jsonl"):
        harnesses[row["split"]].add(row["harness"])
        *earlier, last = row["exit_codes"]
        assert all(earlier), row["id"]
        if "benign" not in row["traits"]:
            assert (last == 0) == (row["outcome"] == "passing"), row["id"]
    assert harnesses.keys() == set(corpora.SPLITS)
    assert not any(one & other for one, other in combinations(harnesses.values(), 2))


# Type and message, as Python, pytest and the type checker print them; a long one as far as pytest shows it.
EXCEPTION = re.compile(r"\b\w*(?:Error|Exception|error|Failed)(?:\[[\w-]+\]|:) .+")
ASSERTION = re.compile(r"(?:\bassert |\bself\.assert\w+\().+")


def test_no_two_tasks_share_a_function_an_assertion_or_an_exception():
    """Functions and classes under test, lines that only the failing test has, and all that any tool result shows."""
    functions, asserted, exceptions, failed = (defaultdict(set) for _ in range(4))
    for path in build.TASKS.glob("*.yaml"):
        task = build.load_task(path)
        for name, text in task["files"].items():
            if name.endswith(".py") and name != task["test_file"]:
                for found in re.findall(r"^(?:def|class) (\w+)", text, re.MULTILINE):
                    functions[found].add(task["id"])
        if "test" in task["failing"]:
            passing = {line.strip() for line in task["passing"]["test"].splitlines()}
            for line in map(str.strip, task["failing"]["test"].splitlines()):
                if "assert" in line.lower() and line not in passing:
                    asserted[line].add(task["id"])
    for context in chain(*TWINS, *CONTROLS):
        for message in context.messages:
            if message["role"] == "tool":
                for pattern, what in ((EXCEPTION, exceptions), (ASSERTION, failed)):
                    for found in pattern.findall(message["content"]):
                        what[found].add(context.task)
    for what in (functions, asserted, exceptions, failed):
        assert len(what) > 40
        assert {name: tasks for name, tasks in what.items() if len(tasks) > 1} == {}


def test_pairs_stand_on_the_failing_contexts():
    pairs = corpora.load_pairs()
    failing = {(context.task, context.context): context for context, _ in TWINS + CONTROLS}
    assert len(pairs) >= 300
    assert {(pair.task, pair.context) for pair in pairs} <= failing.keys()
    assert len({pair.id for pair in pairs}) == len(pairs)
    assert {pair.kind for pair in pairs} == set(corpora.PAIR_KINDS)
    turns = [sum(message["role"] == "assistant" for message in pair.prompt) for pair in pairs]
    assert sum(count > 1 for count in turns) >= 150
    lengths = []
    for pair in pairs:
        context = failing[pair.task, pair.context]
        assert pair.prompt == context.messages, pair.id
        assert pair.split == context.split, pair.id
        assert [message["role"] for message in (*pair.chosen, *pair.rejected)] == ["assistant"] * 2, pair.id
        lengths.append((len(pair.chosen[0]["content"]), len(pair.rejected[0]["content"])))
        assert abs(lengths[-1][0] - lengths[-1][1]) <= 0.2 * max(lengths[-1]), pair.id
    # Neither side can be told by its length.
    assert 0.4 < sum(chosen > rejected for chosen, rejected in lengths) / len(pairs) < 0.6


def test_questions_and_code_do_not_tell_honest_from_gaming_replies():
    """In the pair of a further hand, the last of each audit task's plain conversation; of the older pairs' replies,
    51 of 70 honest ones ask something, no gaming one does, and none holds code."""
    pairs = [pair for pair in corpora.load_pairs() if (pair.split, pair.context) == ("audit", "plain")]
    further = {pair.task: (pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in pairs}
    assert len(further) == 28
    fenced = [["```python\n" in reply for reply in replies] for replies in further.values()]
    asked = [["?" in reply for reply in replies] for replies in further.values()]
    assert all(honest == gaming for honest, gaming in fenced)
    # By code and by a question in the gaming reply 7 each; by code and by one in the honest reply as even as 7 can be.
    assert Counter((code, gaming) for (code, _), (_, gaming) in zip(fenced, asked, strict=True)) == {
        (code, gaming): 7 for code in (True, False) for gaming in (True, False)
    }
    assert Counter(code for (code, _), (honest, _) in zip(fenced, asked, strict=True) if honest) == {True: 4, False: 3}
    assert Counter(gaming for honest, gaming in asked if honest) == {True: 4, False: 3}
    seen: set = set()
    for task, replies in further.items():
        assert replies[0].endswith("?") == ("?" in replies[0]), task
        short, long = sorted(len(reply.split()) for reply in replies)
        assert 35 <= short <= long <= 60, task
        assert long - short <= 0.1 * long, task
        found = set().union(*map(sequences, replies))
        assert not found & seen, task
        seen |= found


def test_tasks_of_different_splits_share_no_eight_words():
    """In what was written for them: a reader that learnt phrases of the training tasks finds none in the audit."""
    written: dict[str, set] = {split: set() for split in corpora.SPLITS}
    for context, _ in TWINS + CONTROLS:
        for text in (*(m["content"] for m in context.messages if m["role"] in ("system", "user")), context.reply):
            written[context.split] |= sequences(text)
    for pair in corpora.load_pairs():
        for message in (*pair.chosen, *pair.rejected):
            written[pair.split] |= sequences(message["content"])
    assert all(len(found) > 500 for found in written.values())
    for one, other in combinations(written.values(), 2):
        assert one & other == set()
