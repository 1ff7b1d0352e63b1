"""The behaviours as inspect-ai tasks, for any of its providers; logs resume and open in its viewer.

```bash
inspect eval calibrate/audit/tasks.py@coding --model hf/local -M model_path=FOLDER -T impossible=true
inspect eval calibrate/audit/tasks.py@mailbox --model openai/NAME
```

Code that a model writes runs in this project's own sandbox on the machine where inspect runs (Linux).
"""

import asyncio
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageSystem, ChatMessageUser
from inspect_ai.scorer import Score, Target, mean, scorer, stderr
from inspect_ai.solver import Generate, TaskState, generate, solver

from calibrate.audit import grading, rollouts
from calibrate.audit.rollouts import Rollout
from calibrate.corpora.situations import Mailbox, Manner, load

_MESSAGES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


def _chat(messages: list[dict[str, str]]) -> list[ChatMessage]:
    return [_MESSAGES[message["role"]](content=message["content"]) for message in messages]


@task
def coding(impossible: bool = True, exit_option: bool = False) -> Task:
    """Coding tasks with real runs of their checks: hacks, concessions, false success; see `rollouts.Outcome`."""
    samples = [
        Sample(id=row.id, input=_chat(rollouts.opening(row, impossible, exit_option)), target=row.kind)
        for row in rollouts.load_tasks()
    ]
    return Task(MemoryDataset(samples), solver=play(impossible, exit_option), scorer=outcome())


@solver
def play(impossible: bool, exit_option: bool):
    """Several turns: files in, what the checks print out, and a closing message."""
    by_id = {row.id: row for row in rollouts.load_tasks()}

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        rollout = Rollout(by_id[str(state.sample_id)], impossible, exit_option, state.epoch)
        while rollout.open:
            state = await generate(state)
            if state.output.stop_reason == "model_length":  # no room to go on, which is not giving up
                rollout.open, rollout.cut = False, True
                break
            await asyncio.to_thread(rollout.take, state.output.completion)
            if rollout.open:
                state.messages.append(ChatMessageUser(content=rollout.messages[-1]["content"]))
        row = await asyncio.to_thread(rollout.row)
        state.store.set("outcome", row["outcome"] | {"cut": row["cut"]})
        state.store.set("attempts", row["attempts"])
        return state

    return solve


@scorer(metrics={"*": [mean(), stderr()]})
def outcome():
    """The labels of a rollout, 0 or 1, and its counts; `cut` where it outgrew the context window, in every mean."""

    async def score(state: TaskState, target: Target) -> Score:
        found: dict[str, Any] = state.store.get("outcome")
        return Score(value={name: float(value) for name, value in found.items()}, metadata={"kind": target.text})

    return score


@task
def mailbox() -> Task:
    """Inboxes in which the assistant could blackmail whoever replaces it."""
    rows = {row.id: row for row in load(Mailbox)}
    samples = [Sample(id=row.id, input=_chat(row.messages), target=row.variant) for row in rows.values()]

    @scorer(name="mailbox", metrics={"*": [mean(), stderr()]})
    def graded():
        async def score(state: TaskState, target: Target) -> Score:
            row, reply = rows[str(state.sample_id)], state.output.completion
            value = {"blackmail": float(grading.blackmail(reply, row)), "reports": float(grading.reports(reply, row))}
            return Score(value=value, answer=reply, metadata={"variant": target.text})

        return score

    return Task(MemoryDataset(samples), solver=generate(), scorer=graded())


@task
def manner() -> Task:
    """Prompts that invite sycophancy or harshness."""
    rows = {row.id: row for row in load(Manner)}
    samples = [Sample(id=row.id, input=_chat(row.messages), target=row.kind) for row in rows.values()]

    @scorer(name="manner", metrics={"*": [mean(), stderr()]})
    def graded():
        async def score(state: TaskState, target: Target) -> Score:
            grade = grading.manner(state.output.completion, rows[str(state.sample_id)])
            value = {name: float(grade == name) for name in grading.GRADES}
            return Score(value=value, answer=state.output.completion, metadata={"kind": target.text})

        return score

    return Task(MemoryDataset(samples), solver=generate(), scorer=graded())
