"""What the model can do besides, by tasks of EleutherAI's lm-eval (the `lm-eval` extra).

The checkpoint as it was loaded, adapter and all, with lm-eval's own defaults: no chat template, each task's own number
of examples. Most of its tasks download their data set; a task of your own is a YAML file
that names no other task.
"""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from calibrate import stats
from calibrate.models import Checkpoint


def check(tasks: list[str]) -> None:
    """Before anything is read.

    Raises:
        ValueError: lm-eval is not installed, or a task is neither one that it knows nor a YAML file.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("`--lm-eval` needs lm-eval, which is not installed; run `pip install 'lm-eval[hf]>=0.4.13'`")
    for task in _named(tasks):
        if task not in _manager(True).all_tasks:
            raise ValueError(
                f"`--lm-eval` {task!r} is neither a task of lm-eval nor a YAML file that exists; "
                "`lm-eval ls tasks` prints the names"
            )


def run(checkpoint: Checkpoint, tasks: list[str], limit: int | None) -> list[dict[str, Any]]:
    """Every metric of every task as plain data: its value and, where lm-eval gives an error, its 95 % interval.

    Args:
        limit: at most so many examples of a task.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=checkpoint.model, tokenizer=checkpoint.tokenizer, batch_size=1)
    # The path absolute, as lm-eval's own command gives it.
    given = [str(Path(task).absolute()) if Path(task).is_file() else task for task in tasks]
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=given,
        limit=limit,
        task_manager=_manager(bool(_named(tasks))),
        bootstrap_iters=stats.RESAMPLES,
    )
    assert found is not None, "one process"
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, kept = key.partition(",")  # "acc,none": the metric and the filter of the answers
            if not kept or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kept}")
            sure = isinstance(error, int | float)
            half = 1.959964 * error if sure else 0.0
            rows.append({
                "task": task, "metric": metric if kept == "none" else f"{metric}, {kept}", "value": value,
                "interval": [value - half, value + half] if sure else None,
                "examples": found["n-samples"].get(task, {}).get("effective"),
            })  # fmt: skip
    return rows


def _named(tasks: list[str]) -> list[str]:
    """Those that are no files."""
    return [task for task in tasks if not (task.endswith((".yaml", ".yml")) and Path(task).is_file())]


@cache
def _manager(named: bool):
    """lm-eval's register of tasks; with the thousands that come with it, which take it seconds, only where named."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=named)
