"""Runs the coding tasks in the sandbox and writes transcripts, preference pairs and tasks to repair.

Run as `python -m calibrate.corpora.build`. A task (`tasks/*.yaml`) holds a conversation, the code that the assistant
shows, and two versions of the test file or of the environment; `more` holds further conversations on the same tests,
some with several attempts. Every attempt is executed; what the tools printed becomes the tool result. Only the
sandbox's folder is renamed (to /repo); nothing else of the output is touched.
"""

import argparse
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import yaml
from tqdm import tqdm

from calibrate import sandbox

FOLDER = Path(__file__).parent
TASKS = FOLDER / "tasks"
# Tool formats by split: the audit shares none with training.
HARNESSES = {"train": ("pytest", "shell", "service"), "selection": ("unittest",), "audit": ("runner",)}
CAUSES = (
    "off by one", "rounding", "empty or missing value", "wrong type", "text encoding", "pattern",
    "dates and time zones", "order", "shared state", "name or import", "environment", "resource limit",
    "contradictory tests", "impossible requirement", "wrong formula", "interface", "configuration",
    "duplicates", "recursion", "units",
)  # fmt: skip
LENGTH_TOLERANCE = 0.10  # twins differ by at most this share of the longer one, in characters
_KEYS = {"id", "split", "harness", "cause", "traits", "system", "user", "assistant", "files", "test_file", "failing"}
_KEYS |= {"passing", "command", "tail", "reply", "felt", "pairs"}
_MORE = {"name", "traits", "system", "attempts", "reply", "felt", "pairs"}
_FENCES = {".py": "python", ".sh": "sh", ".toml": "toml", ".json": "json", ".csv": "csv"}


class Twins(NamedTuple):
    """The two executed transcripts of one conversation, equal but for the last tool result."""

    failing: dict
    passing: dict


def load_task(path: Path) -> dict:
    """Reads one task file; its first conversation becomes one of `contexts`, with the name `plain`.

    Raises:
        ValueError: a key is missing or unknown, or the harness is not one of its split's `HARNESSES`, or the cause not
            one of `CAUSES`.
    """
    task = yaml.safe_load(path.read_text(encoding="utf-8"))
    if wrong := _KEYS.symmetric_difference(task) - {"more"}:
        raise ValueError(f"{path.name}: missing or unknown keys {sorted(wrong)}; a task has exactly {sorted(_KEYS)}")
    allowed = HARNESSES.get(task["split"], ())
    for key, values in (("split", HARNESSES), ("harness", allowed), ("cause", CAUSES)):
        if task[key] not in values:
            raise ValueError(f"{path.name}: {key} {task[key]!r} is not one of {', '.join(values)}")
    first = {key: task[key] for key in _MORE - {"name", "attempts"}} | {"name": "plain"}
    first["attempts"] = [{"user": task["user"], "assistant": task["assistant"], "files": task["files"]}]
    task["contexts"] = [first, *task.pop("more", [])]
    for context in task["contexts"]:
        if wrong := _MORE.symmetric_difference(context):
            raise ValueError(
                f"{path.name}: a context has missing or unknown keys {sorted(wrong)}; it has exactly {sorted(_MORE)}"
            )
    return task


def execute(task: dict, outcome: str, files: dict[str, str]) -> sandbox.Completed:
    """Runs the task's command on `files` and on the version of the tests or environment that gives `outcome`."""
    version = task[outcome]
    files = task["files"] | files | ({task["test_file"]: version["test"]} if "test" in version else {})
    program, *rest = task["command"]
    limits = {}
    if program == "ty":  # the type checker beside this interpreter; it reserves address space generously
        program, limits = str(Path(sys.executable).with_name("ty")), {"memory_mib": 16384}
    command = [program, *rest]
    service = task["harness"] == "service"
    return sandbox.run(command, files, environment=version.get("environment"), loopback=service, **limits)


def result(task: dict, completed: sandbox.Completed) -> str:
    """What the tool shows of a run: the last `tail` lines, in the envelope of the harness."""
    lines = "\n".join(completed.output.rstrip().splitlines()[-task["tail"] :])
    return f"<run exit={completed.exit_code}>\n{lines}\n</run>" if task["harness"] == "runner" else lines


def transcript(task: dict, context: dict, results: list[str]) -> list[dict]:
    """The messages up to the point where the assistant must act, with one tool result for each attempt."""
    messages = [{"role": "system", "content": context["system"].strip()}]
    for attempt, printed in zip(context["attempts"], results, strict=True):
        files = attempt.get("files", {})
        shown = [_show(task["harness"], name, text) for name, text in files.items() if name != task["test_file"]]
        if "user" in attempt:
            messages.append({"role": "user", "content": attempt["user"].strip()})
        messages.append({"role": "assistant", "content": "\n".join([attempt["assistant"].strip(), *shown])})
        messages.append({"role": "tool", "content": printed})
    return messages


def _show(harness: str, name: str, text: str) -> str:
    if harness == "runner":
        return f"--- {name}\n{text.strip()}\n---"
    return f"```{_FENCES.get(Path(name).suffix, 'text')}\n# {name}\n{text.strip()}\n```"


def build_twins(task: dict, context: dict) -> Twins:
    """Executes every attempt of a conversation, on both versions of the tests or of the environment.

    Raises:
        ValueError: a version does not end as its name says, an earlier attempt does not fail alike on both, or the
            twins' lengths differ by more than the tolerance.
    """
    name = f"{task['id']}/{context['name']}"
    files: dict[str, str] = {}
    shown, codes = [], []
    for attempt in context["attempts"]:
        files |= attempt.get("files", {})
        runs = {outcome: execute(task, outcome, files) for outcome in ("failing", "passing")}
        shown.append([result(task, run) for run in runs.values()])
        codes.append([run.exit_code for run in runs.values()])
    benign = "benign" in context["traits"]
    for outcome, code in zip(("failing", "passing"), codes[-1], strict=True):
        if code is None or ((code == 0) != (outcome == "passing") and not benign):
            raise ValueError(f"{name}: the {outcome} version ended with exit code {code}")
    for number, (one, other) in enumerate(shown[:-1], 1):
        if not all(codes[number - 1]) or without_durations(one) != without_durations(other):
            raise ValueError(f"{name}: attempt {number} does not fail alike on both versions: {one!r}, {other!r}")
    rows: list[dict] = []
    for side, outcome in enumerate(("failing", "passing")):
        fields = {key: task[key] for key in ("split", "harness", "cause")} | {"traits": context["traits"]}
        row = {"id": f"{name}/{outcome}", "task": task["id"], "context": context["name"], **fields}
        row |= {"outcome": outcome, "exit_codes": [*(pair[0] for pair in codes[:-1]), codes[-1][side]]}
        results = [*(pair[0] for pair in shown[:-1]), shown[-1][side]]
        row |= {"messages": transcript(task, context, results), "reply": context["reply"].strip()}
        row |= {"felt": context["felt"]} if outcome == "failing" else {}
        rows.append(row)
    lengths = [sum(len(message["content"]) for message in row["messages"]) for row in rows]
    if abs(lengths[0] - lengths[1]) > LENGTH_TOLERANCE * max(lengths):
        raise ValueError(f"{name}: the twins have {lengths[0]} and {lengths[1]} characters, over 10 % apart")
    return Twins(*rows)


def without_durations(printed: str) -> str:
    """A tool result with the times that test runners print made alike."""
    return re.sub(r"\d+\.\d+ ?s\b", "0.00s", printed)


def build_pairs(context: dict, failing: dict) -> list[dict]:
    """Preference pairs on the failing transcript, in TRL's conversational format."""
    rows = []
    for number, pair in enumerate(context["pairs"], 1):
        row = {key: failing[key] for key in ("task", "context", "split")}
        row = {"id": f"{failing['task']}/{context['name']}/{number}"} | row
        row |= {"kind": pair.get("kind", "honest"), "prompt": failing["messages"]}
        for side in ("chosen", "rejected"):
            row[side] = [{"role": "assistant", "content": pair[side].strip()}]
        rows.append(row)
    return rows


def build_repair(task: dict, context: dict, failing: dict) -> dict | None:
    """What reinforcement learning needs to run a reply's code against the tests; None where these are not fair.

    Fair are the failing tests of `ordinary` Python tasks with one file of code: mended code can pass them.
    """
    code = [name for name in task["files"] if name.endswith(".py") and name != task["test_file"]]
    if "ordinary" not in context["traits"] or "test" not in task["failing"] or len(code) != 1:
        return None
    files = task["files"] | {task["test_file"]: task["failing"]["test"]}
    row = {key: failing[key] for key in ("id", "task", "split")} | {"prompt": failing["messages"]}
    return row | {"files": files, "command": task["command"], "code_file": code[0]}


class Rows(NamedTuple):
    """What one task gives to each file."""

    twins: list[dict]
    pairs: list[dict]
    repairs: list[dict]


def _build(path: Path) -> Rows:
    task, rows = load_task(path), Rows([], [], [])
    for context in task["contexts"]:
        built = build_twins(task, context)
        rows.twins.extend(built)
        rows.pairs.extend(build_pairs(context, built.failing))
        repair = build_repair(task, context, built.failing) if task["harness"] == "pytest" else None
        rows.repairs.extend([repair] if repair else [])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", type=Path, help="task files (default: all that are shipped)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the JSONL files")
    arguments = parser.parse_args()
    paths = sorted(arguments.tasks or TASKS.glob("*.yaml"))
    twins, pairs, repairs = [], [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the sandbox's processes do the work
        bar = tqdm(pool.map(_build, paths), total=len(paths), desc="executing tasks", unit="task")
        for rows in bar:
            twins += rows.twins
            pairs += rows.pairs
            repairs += rows.repairs
    for name, rows in (("twins.jsonl", twins), ("pairs.jsonl", pairs), ("repairs.jsonl", repairs)):
        aside = arguments.out / f"{name}.partial"
        aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(aside, arguments.out / name)


if __name__ == "__main__":
    main()
