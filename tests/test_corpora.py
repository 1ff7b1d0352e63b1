import json
import re
import sys
from collections import defaultdict
from itertools import combinations

import pytest
import yaml
from conftest import write_jsonl

from calibrate import corpora
from calibrate.concepts import Concept, load_concepts
from calibrate.corpora import build
from calibrate.sandbox import Completed

REQUIRED_CONCEPTS = {
    "desperate", "calm", "angry", "afraid", "sad", "happy", "guilty", "proud", "hopeful", "frustrated", "hostile",
    "panicked", "trapped", "relieved",
}  # fmt: skip
STORY = {"id": "calm/pier", "concept": "calm", "topic": "pier", "split": "train", "text": "She sat by the water."}
CONTEXT = {"id": "a/failing", "task": "a", "split": "train", "outcome": "failing", "messages": [{}], "reply": "Next."}
PASSING = CONTEXT | {"outcome": "passing"}


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


def test_twins_differ_in_the_tool_result_alone():
    twins = corpora.load_twins()
    assert len(twins) >= 40
    assert sum(failing.split == "audit" for failing, _ in twins) >= 12
    for failing, passing in twins:
        assert [message["role"] for message in failing.messages] == ["system", "user", "assistant", "tool"], failing.id
        assert failing.messages[:-1] == passing.messages[:-1], failing.id
        assert failing.messages[-1]["content"] != passing.messages[-1]["content"], failing.id
        assert (failing.split, failing.reply) == (passing.split, passing.reply), failing.id
        short, long = sorted(sum(len(m["content"]) for m in row.messages) for row in (failing, passing))
        assert long - short <= 0.1 * long, failing.id


def test_splits_share_no_harness():
    harnesses = defaultdict(set)
    for row in read_raw("twins.jsonl"):
        harnesses[row["split"]].add(row["harness"])
        assert (row["exit_code"] == 0) == (row["outcome"] == "passing"), row["id"]
    assert harnesses.keys() == set(corpora.SPLITS)
    assert not any(one & other for one, other in combinations(harnesses.values(), 2))


def test_pairs_stand_on_the_failing_contexts():
    pairs = corpora.load_pairs()
    failing = {context.task: context for context, _ in corpora.load_twins()}
    assert len(pairs) >= 60
    assert {pair.task for pair in pairs} == failing.keys()
    assert len({pair.id for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair.prompt == failing[pair.task].messages, pair.id
        assert pair.split == failing[pair.task].split, pair.id
        assert [message["role"] for message in (*pair.chosen, *pair.rejected)] == ["assistant"] * 2, pair.id
        assert pair.chosen[0]["content"] != pair.rejected[0]["content"], pair.id


def test_tasks_of_different_splits_share_no_eight_words():
    """In what was written for them: a reader that learnt phrases of the training tasks finds none in the audit."""
    written: dict[str, set] = {split: set() for split in corpora.SPLITS}
    for context, _ in corpora.load_twins():
        for text in (*(m["content"] for m in context.messages if m["role"] in ("system", "user")), context.reply):
            written[context.split] |= sequences(text)
    for pair in corpora.load_pairs():
        for message in (*pair.chosen, *pair.rejected):
            written[pair.split] |= sequences(message["content"])
    assert all(len(found) > 500 for found in written.values())
    for one, other in combinations(written.values(), 2):
        assert one & other == set()


# ---- the builder


def test_shipped_rows_are_those_of_the_task_files():
    """All but the tool result, which the next test executes for three of them."""
    twins, pairs = defaultdict(list), defaultdict(list)
    for row in read_raw("twins.jsonl"):
        twins[row["task"]].append(row)
    for row in read_raw("pairs.jsonl"):
        pairs[row["task"]].append(row)
    tasks = [build.load_task(path) for path in build.TASKS.glob("*.yaml")]
    assert {task["id"] for task in tasks} == twins.keys() == pairs.keys()
    for task in tasks:
        before_the_result = build.transcript(task, Completed(0, ""))[:-1]
        for row in twins[task["id"]]:
            assert row["messages"][:-1] == before_the_result
            assert row["reply"] == task["reply"].strip()
            for key in ("split", "harness", "traits"):
                assert row[key] == task[key]
        assert build.build_pairs(task, twins[task["id"]][0]) == pairs[task["id"]]


def test_execution_gives_the_shipped_rows(tmp_path, monkeypatch):
    """One task of each harness; nothing but the time that the tests took may differ."""
    names = ["audit-grid-bed", "selection-shop-ini", "train-text-slugs"]
    tasks = [build.TASKS / f"{name}.yaml" for name in names]
    assert {build.load_task(path)["harness"] for path in tasks} == {"runner", "unittest", "pytest"}
    monkeypatch.setattr(sys, "argv", ["build", *map(str, tasks), "--out", str(tmp_path)])
    build.main()
    for name in ("twins.jsonl", "pairs.jsonl"):
        built = (tmp_path / name).read_text(encoding="utf-8")
        shipped = [json.dumps(row, ensure_ascii=False) for row in read_raw(name) if row["task"] in built]
        assert _without_durations(built).splitlines() == [_without_durations(row) for row in shipped]
    assert len(list(tmp_path.iterdir())) == 2


def _without_durations(text: str) -> str:
    return re.sub(r"in \d+\.\d+s", "in 0.00s", text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"difficulty": 3},
            r"task.yaml: missing or unknown keys \['difficulty'\]; a task has exactly \['assistant', ",
        ),
        ({"reply": None}, r"task.yaml: missing or unknown keys \['reply'\]; a task has exactly"),
        ({"harness": "nose"}, "task.yaml: harness 'nose' is not one of pytest, unittest, runner"),
    ],
)
def test_a_task_file_with_other_keys_or_harness_is_refused(change, message, tmp_path):
    task = build.load_task(next(build.TASKS.glob("*.yaml"))) | change
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in task.items() if value is not None}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        build.load_task(path)


@pytest.mark.parametrize(
    ("failing", "passing", "message"),
    [
        ("raise SystemExit(1)", "raise SystemExit(2)", "small: the passing version ended with exit code 2"),
        ("pass", "pass", "small: the failing version ended with exit code 0"),
        # Edit. (5) + Mend it. (8) + Done. and the code in its fence (32) + the result: 45 + 6 against 45 + 15.
        (
            "print('no way'); raise SystemExit(1)",
            "print('all is well now')",
            "small: the twins have 51 and 60 characters, over 10 % apart",
        ),
    ],
)
def test_a_task_that_does_not_do_as_it_says_is_refused(failing, passing, message):
    task = {
        "id": "small", "split": "train", "harness": "pytest", "traits": [], "system": "Edit.", "user": "Mend it.",
        "assistant": "Done.", "files": {"a.py": "A = 1"}, "test_file": "run.py", "failing": {"test": failing},
        "passing": {"test": passing}, "command": ["python", "run.py"], "tail": 5, "reply": "Next.", "pairs": [],
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        build.build_twins(task)
