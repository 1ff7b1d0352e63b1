"""Runs the coding tasks in the sandbox and writes transcripts and preference pairs.

Run as `python -m calibrate.corpora.build`. A task (`tasks/*.yaml`) holds the conversation, the code that the assistant
shows, and two versions of the test file or of the environment. Both versions are executed; what the tools printed
becomes the tool result. Only the sandbox's folder is renamed (to /repo); nothing else of the output is touched.
"""

import argparse
import json
import os
from pathlib import Path
from typing import NamedTuple

import yaml
from tqdm import tqdm

from calibrate import sandbox

FOLDER = Path(__file__).parent
TASKS = FOLDER / "tasks"
HARNESSES = ("pytest", "unittest", "runner")  # train, selection and audit: one tool format each
LENGTH_TOLERANCE = 0.10  # twins differ by at most this share of the longer one, in characters
_KEYS = {"id", "split", "harness", "traits", "system", "user", "assistant", "files", "test_file", "failing", "passing"}
_KEYS |= {"command", "tail", "reply", "felt", "pairs"}


class Twins(NamedTuple):
    """The two executed transcripts of one task, equal but for the tool result."""

    failing: dict
    passing: dict


def load_task(path: Path) -> dict:
    """Reads one task file.

    Raises:
        ValueError: a key is missing or unknown, or the harness is not one of `HARNESSES`.
    """
    task = yaml.safe_load(path.read_text(encoding="utf-8"))
    if wrong := _KEYS.symmetric_difference(task):
        raise ValueError(f"{path.name}: missing or unknown keys {sorted(wrong)}; a task has exactly {sorted(_KEYS)}")
    if task["harness"] not in HARNESSES:
        raise ValueError(f"{path.name}: harness {task['harness']!r} is not one of {', '.join(HARNESSES)}")
    return task


def execute(task: dict, outcome: str) -> sandbox.Completed:
    """Runs the task's command on the version of the tests or of the environment that gives `outcome`."""
    version = task[outcome]
    files = task["files"] | ({task["test_file"]: version["test"]} if "test" in version else {})
    return sandbox.run(task["command"], files, environment=version.get("environment"))


def transcript(task: dict, completed: sandbox.Completed) -> list[dict]:
    """The messages up to the point where the assistant must act, with what the run printed as the tool result."""
    lines = completed.output.rstrip().splitlines()[-task["tail"] :]
    shown = [_show(task["harness"], name, text) for name, text in task["files"].items() if name != task["test_file"]]
    result = "\n".join(lines)
    if task["harness"] == "runner":
        result = f"<run exit={completed.exit_code}>\n{result}\n</run>"
    return [
        {"role": "system", "content": task["system"].strip()},
        {"role": "user", "content": task["user"].strip()},
        {"role": "assistant", "content": "\n".join([task["assistant"].strip(), *shown])},
        {"role": "tool", "content": result},
    ]


def _show(harness: str, name: str, text: str) -> str:
    if harness == "runner":
        return f"--- {name}\n{text.strip()}\n---"
    return f"```python\n# {name}\n{text.strip()}\n```"


def build_twins(task: dict) -> Twins:
    """Executes both versions of a task.

    Raises:
        ValueError: a version does not end as its name says, or the twins' lengths differ by more than the tolerance.
    """
    rows: list[dict] = []
    for outcome in ("failing", "passing"):
        completed = execute(task, outcome)
        if completed.exit_code is None or (completed.exit_code == 0) != (outcome == "passing"):
            raise ValueError(f"{task['id']}: the {outcome} version ended with exit code {completed.exit_code}")
        fields = {key: task[key] for key in ("split", "harness", "traits")}
        row = {"id": f"{task['id']}/{outcome}", "task": task["id"], **fields, "outcome": outcome}
        row |= {
            "exit_code": completed.exit_code,
            "messages": transcript(task, completed),
            "reply": task["reply"].strip(),
        }
        rows.append(row)
    lengths = [sum(len(message["content"]) for message in row["messages"]) for row in rows]
    if abs(lengths[0] - lengths[1]) > LENGTH_TOLERANCE * max(lengths):
        raise ValueError(f"{task['id']}: the twins have {lengths[0]} and {lengths[1]} characters, over 10 % apart")
    return Twins(*rows)


def build_pairs(task: dict, failing: dict) -> list[dict]:
    """Preference pairs on the failing transcript, in TRL's conversational format."""
    rows = []
    for number, pair in enumerate(task["pairs"], 1):
        row = {
            "id": f"{task['id']}/{number}",
            "task": task["id"],
            "split": task["split"],
            "prompt": failing["messages"],
        }
        for side in ("chosen", "rejected"):
            row[side] = [{"role": "assistant", "content": pair[side].strip()}]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", type=Path, help="task files (default: all that are shipped)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for twins.jsonl and pairs.jsonl")
    arguments = parser.parse_args()
    twins, pairs = [], []
    for path in tqdm(sorted(arguments.tasks or TASKS.glob("*.yaml")), desc="executing tasks", unit="task"):
        task = load_task(path)
        built = build_twins(task)
        twins += built
        pairs += build_pairs(task, built.failing)
    for name, rows in (("twins.jsonl", twins), ("pairs.jsonl", pairs)):
        aside = arguments.out / f"{name}.partial"
        aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(aside, arguments.out / name)


if __name__ == "__main__":
    main()
