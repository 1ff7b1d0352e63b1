"""The builder of contexts: tasks that are executed, and what it refuses."""

import json
import re
import sys
from collections import defaultdict

import pytest
import yaml
from test_corpora import read_raw

from calibrate import corpora
from calibrate.corpora import build


def test_shipped_rows_are_those_of_the_task_files():
    """All but the tool results, which the next test executes for five of them."""
    twins, pairs = defaultdict(list), defaultdict(list)
    for row in read_raw("twins.jsonl"):
        twins[row["task"], row["context"]].append(row)
    for row in read_raw("pairs.jsonl"):
        pairs[row["task"], row["context"]].append(row)
    tasks = [build.load_task(path) for path in build.TASKS.glob("*.yaml")]
    places = {(task["id"], context["name"]) for task in tasks for context in task["contexts"]}
    assert places == twins.keys() >= pairs.keys()
    for task in tasks:
        for context in task["contexts"]:
            rows = twins[task["id"], context["name"]]
            printed = [[m["content"] for m in row["messages"] if m["role"] == "tool"] for row in rows]
            for row, results in zip(rows, printed, strict=True):
                assert row["messages"] == build.transcript(task, context, results)
                assert row["reply"] == context["reply"].strip()
                assert (row["harness"], row["traits"]) == (task["harness"], context["traits"])
            assert build.build_pairs(context, rows[0]) == pairs.get((task["id"], context["name"]), [])


def test_execution_gives_the_shipped_rows(tmp_path, monkeypatch):
    """One task of each harness, and one of the type checker; nothing but the time that the tests took may differ."""
    names = ["audit-grid-bed", "audit-pilot-keel", "selection-shop-ini", "train-text-slugs"]
    names += ["train-shell-lamb-gain", "train-api-trail-codes"]
    tasks = [build.TASKS / f"{name}.yaml" for name in names]
    assert {build.load_task(path)["harness"] for path in tasks} == {
        h for some in build.HARNESSES.values() for h in some
    }
    monkeypatch.setattr(sys, "argv", ["build", *map(str, tasks), "--out", str(tmp_path)])
    build.main()
    ids = {build.load_task(path)["id"] for path in tasks}
    for name in ("twins.jsonl", "pairs.jsonl", "repairs.jsonl"):
        built = (tmp_path / name).read_text(encoding="utf-8")
        shipped = [json.dumps(row, ensure_ascii=False) for row in read_raw(name) if row["task"] in ids]
        assert sorted(_without_durations(built).splitlines()) == sorted(_without_durations(row) for row in shipped)
    assert len(list(tmp_path.iterdir())) == 3


def test_repairs_are_fair_tasks_of_python():
    repairs = corpora.load_repairs()
    assert len({repair.task for repair in repairs if repair.split == "train"}) >= 15
    ordinary = {row["id"] for row in read_raw("twins.jsonl") if "ordinary" in row["traits"]}
    for repair in repairs:
        assert repair.id in ordinary
        assert repair.code_file in repair.files


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
        ({"split": "test"}, "task.yaml: split 'test' is not one of train, selection, audit"),
        ({"split": "audit", "harness": "pytest"}, "task.yaml: harness 'pytest' is not one of runner"),
        ({"cause": "bad luck"}, "task.yaml: cause 'bad luck' is not one of off by one, rounding,"),
        ({"more": [{"name": "x"}]}, r"task.yaml: a context has missing or unknown keys \['attempts', 'felt', "),
    ],
)
def test_a_task_file_with_other_keys_or_harness_is_refused(change, message, tmp_path):
    task = yaml.safe_load((build.TASKS / "train-text-slugs.yaml").read_text(encoding="utf-8")) | change
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in task.items() if value is not None}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        build.load_task(path)


SMALL = {
    "id": "small", "split": "train", "harness": "pytest", "cause": "order", "traits": [], "system": "Edit.",
    "user": "Mend it.", "assistant": "Done.", "files": {"a.py": "A = 1"}, "test_file": "run.py",
    "command": ["python", "run.py"], "tail": 5, "reply": "Next.", "felt": {}, "pairs": [],
}  # fmt: skip


def small(folder, failing: str, passing: str, **change) -> dict:
    """A task that is written and read again; its tests are these two scripts."""
    task = SMALL | {"failing": {"test": failing}, "passing": {"test": passing}} | change
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    return build.load_task(path)


@pytest.mark.parametrize(
    ("failing", "passing", "message"),
    [
        ("raise SystemExit(1)", "raise SystemExit(2)", "small/plain: the passing version ended with exit code 2"),
        ("pass", "pass", "small/plain: the failing version ended with exit code 0"),
        # Edit. (5) + Mend it. (8) + Done. and the code in its fence (32) + the result: 45 + 6 against 45 + 15.
        (
            "print('no way'); raise SystemExit(1)",
            "print('all is well now')",
            "small/plain: the twins have 51 and 60 characters, over 10 % apart",
        ),
    ],
)
def test_a_task_that_does_not_do_as_it_says_is_refused(tmp_path, failing, passing, message):
    task = small(tmp_path, failing, passing)
    with pytest.raises(ValueError, match=message):
        build.build_twins(task, task["contexts"][0])


def test_attempts_are_executed_and_shown_in_order(tmp_path):
    """The first attempt fails on both versions alike; the second passes where the test says so."""
    attempts = [
        {"user": "Please.", "assistant": "First.", "files": {"a.py": "raise SystemExit('broken')"}},
        {"user": "Again, quickly.", "assistant": "Second.", "files": {"a.py": "A = 1"}},
    ]
    more = {"name": "pressed", "traits": ["stakes"], "system": "Work.", "attempts": attempts}
    more |= {"reply": "Well.", "felt": {}, "pairs": []}
    failing, passing = (f"import a\nprint('A is', a.A)\nraise SystemExit({code})" for code in (1, 0))
    task = small(tmp_path, failing, passing, more=[more])
    twins = build.build_twins(task, task["contexts"][1])
    assert [row["exit_codes"] for row in twins] == [[1, 1], [1, 0]]
    shown = [message["content"] for message in twins.passing["messages"]]
    code = "```python\n# a.py\n{}\n```"
    assert shown == [
        "Work.", "Please.", "First.\n" + code.format("raise SystemExit('broken')"), "broken",
        "Again, quickly.", "Second.\n" + code.format("A = 1"), "A is 1",
    ]  # fmt: skip
    attempts[0]["files"]["a.py"] = "import sys\nraise SystemExit(open('run.py').read()[-3:])"
    task = small(tmp_path, failing, passing, more=[more])
    with pytest.raises(ValueError, match=r"small/pressed: attempt 1 does not fail alike on both versions: '\(1\)'"):
        build.build_twins(task, task["contexts"][1])
