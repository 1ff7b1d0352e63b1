"""Agent transcripts of the user's own: OpenAI chats with tool calls, inspect logs, templates without a tool role."""

import json
from pathlib import Path

import pytest
from conftest import write_jsonl

from calibrate import cli, corpora
from calibrate.corpora import imports

LOG = Path(__file__).parent / "data" / "inspect_log.json"  # written by inspect-ai 0.3.285, events left out
ALTERNATING = """
{%- for m in messages %}
{%- if m['role'] not in ('user', 'assistant') or (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}
{%- endif %}
{{- '[' + m['role'] + ']' + m['content'] + '[/]' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""


def chat(task: str, status, result: str, **more) -> dict:
    call = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": '{"target": "tests"}'}}
    messages = [
        {"role": "developer", "content": "You mend code."},
        {"role": "user", "content": [{"type": "text", "text": f"Mend {task}."}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": result},
        {"role": "assistant", "content": "Done."},
    ]
    return {"task": task, "status": status, "messages": messages} | more


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr("sys.argv", ["calibrate", "corpus", "import", *map(str, words)])
    cli.main()


def failure(monkeypatch, *words) -> str:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *words)
    return str(caught.value)


def test_openai_chats_become_twins_that_load(tmp_path, monkeypatch, capsys, tiny_folder):
    rows = [chat("sort", "failed", "1 failed"), chat("sort", "passed", "1 passed"), chat("lone", "failed", "1 failed")]
    write_jsonl(tmp_path / "chats.jsonl", rows)
    out = tmp_path / "twins.jsonl"
    run(monkeypatch, tmp_path / "chats.jsonl", "--out", out, "--model", tiny_folder)
    ((failing, passing),) = corpora.load_twins(out)
    assert failing.messages == [
        {"role": "system", "content": "You mend code."},
        {"role": "user", "content": "Mend sort."},
        {
            "role": "assistant",
            "content": '<tool_call>\n{"name": "run", "arguments": {"target": "tests"}}\n</tool_call>',
        },
        {"role": "tool", "content": "1 failed"},
    ]
    assert passing.messages[-1]["content"] == "1 passed"
    assert failing.reply == passing.reply == imports.REPLY
    assert (failing.split, failing.task, failing.outcome, passing.outcome) == ("train", "sort", "failing", "passing")
    printed = capsys.readouterr().out
    assert "1 twins of 1 tasks, from 3 transcripts" in printed
    assert "left out, with one outcome only: 1 tasks (lone)" in printed
    assert "tokens with the reply: median" in printed


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (["hi"], "a message is 'hi', not an object"),
        ([{"role": "user", "content": ["hi"]}], r"has content \['hi'\]; each"),
    ],
)
def test_messages_of_another_form_are_named(tmp_path, messages, told):
    path = write_jsonl(tmp_path / "chats.jsonl", [{"task": "a", "status": "failed", "messages": messages}])
    with pytest.raises(ValueError, match=told):
        imports.read(path)


def test_an_inspect_log_is_read_as_inspect_wrote_it(tmp_path, monkeypatch):
    run(monkeypatch, LOG, "--out", tmp_path / "twins.jsonl", "--split", "audit", "--reply", "I see.")
    ((failing, passing),) = corpora.load_twins(tmp_path / "twins.jsonl")
    assert (failing.task, failing.split, failing.reply) == ("tally", "audit", "I see.")
    assert [message["role"] for message in failing.messages] == ["system", "user", "assistant", "tool"]
    before, call = failing.messages[2]["content"].split("\n", 1)
    assert before == "I try this version."
    written = json.loads(call.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    assert written == {
        "name": "run_tests",
        "arguments": {"code": "def tally(text):\n    return {c: 1 for c in text}\n"},
    }
    assert failing.messages[3]["content"].startswith("exit 1\nF\n===")
    assert passing.messages[3]["content"].startswith("exit 0\n.\n---")


def test_each_failing_chat_takes_the_nearest_passing_one_and_none_twice():
    def transcript(status, size):
        messages = [{"role": "assistant", "content": "x"}, {"role": "tool", "content": "y" * size}]
        return imports.Transcript(f"{status}-{size}", "t", status, messages)

    given = [
        transcript(s, n) for s, n in (("failed", 10), ("failed", 50), ("passed", 45), ("passed", 11), ("passed", 9))
    ]
    rows, left = imports.pair(given, imports.FAILING, imports.PASSING, "r", "train")
    assert [(row["context"], row["source"]) for row in rows] == [
        ("plain", "failed-10"), ("plain", "passed-11"), ("2", "failed-50"), ("2", "passed-45"),
    ]  # fmt: skip
    assert left == []


def test_a_template_without_a_tool_role_takes_them_all_the_same(tmp_path, monkeypatch, tiny_folder):
    """What is written names the roles: another model's template may have them."""
    write_jsonl(tmp_path / "chats.jsonl", [chat("sort", "failed", "1 failed"), chat("sort", "passed", "1 passed")])
    (tmp_path / "plain.jinja").write_text(ALTERNATING)
    words = [tmp_path / "chats.jsonl", "--out", tmp_path / "twins.jsonl", "--model", tiny_folder]
    run(monkeypatch, *words, "--chat-template", tmp_path / "plain.jinja")
    ((failing, _),) = corpora.load_twins(tmp_path / "twins.jsonl")
    assert [message["role"] for message in failing.messages] == ["system", "user", "assistant", "tool"]


def test_own_status_words_and_fields(tmp_path, monkeypatch):
    rows = [chat("a", "x", "bad", verdict="RED", problem=7), chat("a", "x", "good", verdict="green", problem=7)]
    write_jsonl(tmp_path / "chats.jsonl", rows)
    fields = ["--status-field", "verdict", "--task-field", "problem"]
    run(monkeypatch, tmp_path / "chats.jsonl", "--out", tmp_path / "t.jsonl", *fields, "--failing", "red", "--passing",
        "Green")  # fmt: skip
    ((failing, _),) = corpora.load_twins(tmp_path / "t.jsonl")
    assert (failing.task, failing.messages[-1]["content"]) == ("7", "bad")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": None}, "'status' is None; each transcript needs its task and how it ended"),
        ({"task": ["a"]}, "'task' is ['a']; each transcript needs its task and how it ended"),
        ({"status": "timeout"}, "statuses 'timeout' (1) are neither failing nor passing; name them in `--failing` or"),
        ({"status": "passed"}, "none of 1 tasks has both a failing and a passing transcript"),
        ({"messages": []}, "`messages` is []; give a list of chat messages"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "role 'robot' is not one of system, user, assistant, tool",
        ),
        ({"messages": [{"role": "user", "content": "x"}]}, "no result follows an assistant's turn"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "a message has content of type image_url; only text is read",
        ),
        (
            {"messages": [{"role": "user", "content": "attachment://ab"}]},
            "convert the log with `--resolve-attachments",
        ),
        (
            {"messages": [{"role": "tool", "content": {"stdout": "x"}}]},
            "a message has content {'stdout': 'x'}; give",
        ),
        (
            {"messages": [{"role": "tool", "content": 7}]},
            "a message has content 7; give a text, or a list of its",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content [{'type': 'text'}]; each part has"),
        (
            {"messages": [{"role": "assistant", "tool_calls": ["x"]}]},
            "a tool call is 'x'; give an object with a",
        ),
        ({"scores": {"s": "C"}}, "`scores` is {'s': 'C'}; give an object of scores, each with a `value`"),
        ({"scores": {"s": {}}}, "'status' is None; each transcript needs its task and how it ended"),
        ({"scores": {}}, "has the scores none; name one with `--status-field`"),
        (
            {"scores": {"a": {"value": "C"}, "b": {"value": "I"}}},
            "has the scores a, b; name one with `--status-field`",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, monkeypatch, change, message):
    write_jsonl(tmp_path / "chats.jsonl", [chat("sort", "failed", "1 failed") | change])
    error = failure(monkeypatch, tmp_path / "chats.jsonl", "--out", tmp_path / "t.jsonl")
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


def test_a_score_that_is_not_there(tmp_path, monkeypatch):
    error = failure(monkeypatch, LOG, "--out", tmp_path / "t.jsonl", "--status-field", "speed")
    assert error.endswith("sample tally, epoch 1: has no score 'speed'; it has passed")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.eval", b"PK", "a binary log; convert it with `inspect log convert"),
        ("log.json", b'{"a": 1}', "not an inspect log with samples; other chats go into a .jsonl file"),
        ("chats.jsonl", b"{", "not JSON (Expecting property name"),
        ("chats.jsonl", b"[1]", "a list, not an object; each line or sample is one JSON object"),
        (
            "log.json",
            b'{"samples": ["a"]}',
            "log.json: sample 1: a str, not an object; each line or",
        ),
        ("chats.jsonl", b"\xff", "not UTF-8 text (invalid start byte at byte 0); save it as UTF-8"),
        (None, b"", "no such file; give JSONL of chats, or an inspect log in JSON"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, monkeypatch, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    assert message in failure(monkeypatch, tmp_path / (name or "none.jsonl"), "--out", tmp_path / "t.jsonl")


def test_an_existing_output_stays(tmp_path, monkeypatch):
    (tmp_path / "t.jsonl").write_text("mine")
    assert "t.jsonl exists; choose another `--out`" in failure(monkeypatch, LOG, "--out", tmp_path / "t.jsonl")
    assert (tmp_path / "t.jsonl").read_text() == "mine"
