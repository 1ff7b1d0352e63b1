"""A user's own agent transcripts -> failing contexts with passing twins, for `twins` of the recipes.

Two formats: JSONL of chats as the OpenAI API has them (`messages`, with `tool_calls`), with the task and how it ended
beside them; logs of inspect-ai as JSON. Each chat is cut where the assistant must act on the last result.
"""

import contextlib
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

FAILING = ("failing", "failed", "fail", "failure", "incorrect", "i", "false", "0", "0.0")
PASSING = ("passing", "passed", "pass", "success", "correct", "c", "true", "1", "1.0")
REPLY = "I have read what the last run printed. Here is where this stands."  # fits either outcome


class Transcript(NamedTuple):
    """One chat, its messages with text contents only, cut before the turn in which the assistant must act."""

    source: str  # file and row
    task: str
    status: str
    messages: list[dict[str, str]]


def read(path: Path, task_field: str = "task", status_field: str | None = None) -> list[Transcript]:
    """The chats of a JSONL file or of an inspect log in JSON.

    Args:
        task_field: key of the task in a JSONL row.
        status_field: key of the outcome in a JSONL row (default: `status`); in a log a scorer (default: the only one).

    Raises:
        ValueError: the file or a row does not fit; the message names file and row.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give JSONL of chats, or an inspect log in JSON")
    if path.suffix == ".eval":
        raise ValueError(
            f"{path}: a binary log; convert it with `inspect log convert {path} --to json --output-dir FOLDER"
            " --resolve-attachments full`"
        )
    found = []
    for where, row in _rows(path):
        if "scores" in row:  # a sample of an inspect log
            status, task = _score(row["scores"], status_field, where), row.get("id")
        else:
            status, task = row.get(status_field or "status"), row.get(task_field)
        for name, value in ((status_field or "status", status), (task_field, task)):
            if not isinstance(value, str | int | float):
                raise ValueError(f"{where}: {name!r} is {value!r}; each transcript needs its task and how it ended")
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"{where}: `messages` is {messages!r}; give a list of chat messages")
        texts = [_text(message, where) for message in messages]
        while texts and texts[-1]["role"] == "assistant":  # what it did next is no part of the context
            texts.pop()
        if not any(message["role"] == "assistant" for message in texts):
            raise ValueError(
                f"{where}: no result follows an assistant's turn; a context ends with what it must act on"
            )
        found.append(Transcript(where, str(task), str(status).lower(), texts))
    return found


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            log = json.loads(text)
            if not isinstance(log, dict) or not isinstance(log.get("samples"), list):
                raise ValueError(f"{path}: not an inspect log with samples; other chats go into a .jsonl file")
            rows = []
            for number, sample in enumerate(log["samples"], 1):
                known = isinstance(sample, dict) and "id" in sample
                which = f"{sample['id']}, epoch {sample.get('epoch')}" if known else number
                rows.append((f"{path}: sample {which}", sample))
        else:
            lines = text.split("\n")
            rows = [(f"{path}:{number}", json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); a .jsonl file has one object a line") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a {type(row).__name__}, not an object; each line or sample is one JSON object")
    return rows


def _score(scores: dict[str, Any] | None, scorer: str | None, where: str) -> Any:
    if scores is not None and not (isinstance(scores, dict) and all(isinstance(s, dict) for s in scores.values())):
        raise ValueError(f"{where}: `scores` is {scores!r:.40}; give an object of scores, each with a `value`")
    names = list(scores or {})
    if scorer is None and len(names) != 1:
        raise ValueError(f"{where}: has the scores {', '.join(names) or 'none'}; name one with `--status-field`")
    if (scorer or names[0]) not in names:
        raise ValueError(f"{where}: has no score {scorer!r}; it has {', '.join(names) or 'none'}")
    return (scores or {})[scorer or names[0]].get("value")


def _text(message: dict[str, Any], where: str) -> dict[str, str]:
    """A message with text content; tool calls are written below it as the models of Hermes' format write them."""
    if not isinstance(message, dict):
        raise ValueError(f"{where}: a message is {message!r:.40}, not an object with `role` and `content`")
    role = {"developer": "system", "function": "tool"}.get(message.get("role", ""), message.get("role"))
    if role not in ("system", "user", "assistant", "tool"):
        raise ValueError(f"{where}: role {role!r} is not one of system, user, assistant, tool")
    content = message.get("content") or ""
    if isinstance(content, list):
        if not all(isinstance(part, dict) for part in content):
            raise ValueError(f"{where}: a message has content {content!r:.40}; each part is an object with a `type`")
        kinds = {part.get("type") for part in content}
        if other := sorted(kinds - {"text", "input_text", "output_text", "reasoning"}, key=str):
            raise ValueError(f"{where}: a message has content of type {', '.join(map(str, other))}; only text is read")
        # Templates leave the reasoning of earlier turns out, and so does this.
        texts = [part.get("text") for part in content if part["type"] != "reasoning"]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: a message has content {content!r:.40}; each part has its `text`")
        content = "\n".join(texts)
    if not isinstance(content, str):
        raise ValueError(f"{where}: a message has content {content!r:.40}; give a text, or a list of its parts")
    if content.startswith("attachment://"):
        raise ValueError(f"{where}: a message is an attachment; convert the log with `--resolve-attachments full`")
    calls = []
    for call in message.get("tool_calls") or []:
        if not isinstance(call, dict):
            raise ValueError(f"{where}: a tool call is {call!r:.40}; give an object with a `function`")
        function, arguments = call.get("function"), call.get("arguments")
        if isinstance(function, dict):  # OpenAI's, with the arguments as text
            function, arguments = function.get("name"), function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(json.JSONDecodeError):  # else as the model wrote them
                arguments = json.loads(arguments)
        written = json.dumps({"name": function, "arguments": arguments}, ensure_ascii=False)
        calls.append(f"<tool_call>\n{written}\n</tool_call>")
    return {"role": role, "content": "\n".join([content.strip(), *calls] if content.strip() else calls)}


def pair(
    transcripts: list[Transcript], failing: tuple[str, ...], passing: tuple[str, ...], reply: str, split: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows for `corpora.load_twins`, and the tasks that lack one of the two outcomes.

    Each failing chat of a task gets a passing one of the same task, nearest in length first; none is used twice.

    Raises:
        ValueError: a status is in neither list, or no task has both outcomes.
    """
    if unknown := Counter(t.status for t in transcripts if t.status not in {*failing, *passing}):
        counts = ", ".join(f"{status!r} ({count})" for status, count in unknown.items())
        raise ValueError(f"statuses {counts} are neither failing nor passing; name them in `--failing` or `--passing`")
    tasks: dict[str, tuple[list[Transcript], list[Transcript]]] = defaultdict(lambda: ([], []))
    for transcript in transcripts:
        tasks[transcript.task][transcript.status in passing].append(transcript)
    rows = []
    for task, (failed, passed) in tasks.items():
        for number in range(min(len(failed), len(passed))):
            both = min(
                ((f, p) for f in failed for p in passed), key=lambda pair: abs(_length(pair[0]) - _length(pair[1]))
            )
            failed.remove(both[0])
            passed.remove(both[1])
            context = f"{number + 1}" if number else "plain"
            for outcome, found in zip(("failing", "passing"), both, strict=True):
                rows.append(
                    {"id": f"{task}/{context}/{outcome}", "task": task, "context": context, "split": split,
                     "outcome": outcome, "messages": found.messages, "reply": reply, "source": found.source}
                )  # fmt: skip
    if not rows:
        raise ValueError(
            f"none of {len(tasks)} tasks has both a failing and a passing transcript; a twin is the same task with "
            "the other outcome"
        )
    used = {row["task"] for row in rows}
    return rows, [task for task in tasks if task not in used]


def _length(transcript: Transcript) -> int:
    return sum(len(message["content"]) for message in transcript.messages)
