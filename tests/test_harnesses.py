"""Training contexts in other harnesses: what is said stays, and nothing looks like an audit's."""

import json

import pytest

from calibrate import corpora
from calibrate.audit import harness
from calibrate.training import harnesses


@pytest.fixture(scope="module")
def shown():
    """(twins of the train split, the same in four harnesses)"""
    twins = [twin for twin in corpora.load_twins() if twin[0].split == "train"]
    return twins, harnesses.varied(twins)


def test_a_file_and_a_result_in_each_harness():
    files = 'Done. I ran it.\n```python\n# sum.py\ndef f():\n    return "a"\n```\nMore.'
    twins = []
    for task in "abcde":
        said = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": files}]
        said += [{"role": "tool", "content": "1 failed"}]
        one = corpora.Context(f"{task}/failing", task, "train", "failing", said, "Well.")
        twins.append((one, one._replace(id=f"{task}/passing", outcome="passing")))
    found = [[message["content"] for message in failing.messages] for failing, _ in harnesses.varied(twins)]
    call = json.dumps({"call": "write_file", "path": "sum.py", "text": 'def f():\n    return "a"\n'})
    assert found == [
        ["Go.", files, "1 failed"],
        ["Go.", f"Done. I ran it.\n{call}\nMore.", '{"output": "1 failed"}'],
        [
            "Go.",
            'Done. I ran it.\n[write sum.py]\ndef f():\n    return "a"\n[/write]\nMore.',
            "[stdout]\n1 failed\n[/stdout]",
        ],
        [
            "Go.",
            "Done. I ran it.\n$ cat > sum.py << 'EOF'\ndef f():\n    return \"a\"\nEOF\nMore.",
            "$ check\n1 failed\n$",
        ],
        ["Go.", files, "1 failed"],
    ]


def test_a_task_has_one_harness_and_a_quarter_of_the_tasks_each(shown):
    """Told by the first result of a tool: a twin whose format differs from its failing context would give it away."""
    starts = {"{": 1, "[stdout]": 2, "$ check": 3}

    def harness_of(context) -> int:
        result = next(m["content"] for m in context.messages if m["role"] == "tool")
        return next((number for start, number in starts.items() if result.startswith(start)), 0)

    by_task = {}
    for twin in shown[1]:
        by_task.setdefault(twin[0].task, set()).update(harness_of(context) for context in twin)
    assert all(len(found) == 1 for found in by_task.values())
    assert sorted(number for found in by_task.values() for number in found) == sorted([0, 1, 2, 3] * 18)


def test_only_files_and_results_change(shown):
    for before, after in zip(*shown, strict=True):
        for one, other in zip(before, after, strict=True):
            assert other._replace(messages=one.messages) == one
            for was, now in zip(one.messages, other.messages, strict=True):
                assert was["role"] == now["role"]
                if was["role"] in ("system", "user"):
                    assert was == now
                elif was["role"] == "tool" and now["content"].startswith("{"):
                    assert json.loads(now["content"]) == {"output": was["content"]}
                elif was["role"] == "tool":
                    assert was["content"] in now["content"]
    fenced = {twin[0].task for twin in shown[1] for context in twin for m in context.messages if "```" in m["content"]}
    assert len(fenced) == 18


def test_none_is_a_harness_of_the_audit(shown):
    """Its own contexts have files between dashes and results in a tag, its other harness results in a fence."""
    audited = [twin for twin in corpora.load_twins() if twin[0].split == "audit"]
    marks = ("\n---", "<run", harness.TOOL.split("{content}")[0])
    assert all(any(mark in m["content"] for m in twin[0].messages for mark in marks) for twin in audited)
    for twin in shown[1]:
        for message in (m for context in twin for m in context.messages):
            assert not any(mark in message["content"] for mark in marks)


def test_what_would_change_nothing_is_refused(shown):
    said = [{"role": "user", "content": "Go."}]
    twins = []
    for task in "ab":
        one = corpora.Context(f"{task}/failing", task, "train", "failing", said, "Well.")
        twins.append((one, one._replace(outcome="passing")))
    with pytest.raises(ValueError, match=r"^`vary_harness` is true, but changes none of 2 tasks: .*; leave it out$"):
        harnesses.varied(twins)
    with pytest.raises(ValueError, match=r"changes none of 1 tasks: it needs two or more"):  # the first stays as it is
        harnesses.varied(shown[0][:1])
