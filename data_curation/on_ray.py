"""datatrove's Ray executor, with a task of Ray for each shard."""

import logging
from collections import deque
from typing import Any

import ray
from datatrove.executor.ray import RayPipelineExecutor
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from data_curation.documents import Fault
from data_curation.pipeline import ATTEMPTS, note_failure

logger = logging.getLogger(__name__)


class RayExecutor(RayPipelineExecutor):
    """Each shard is one Ray task, which Ray starts again elsewhere when its worker dies.

    datatrove's own `run` puts a process pool into every actor: a process in it that is killed leaves its task waiting
    for ever, and an error is only counted.
    """

    def check_room(self, there: dict[str, float]) -> None:
        """Raises ValueError where one task asks for more than these resources."""
        gib = self.mem_per_cpu_gb * self.cpus_per_task
        for what, asked, has in (
            ("gpus_per_task", self.gpus_per_task, there.get("GPU", 0)),
            ("mem_per_cpu_gb", gib, there.get("memory", 0) / (1 << 30)),
        ):
            if asked > has:
                raise ValueError(f"`{what}`: a task asks for {asked:g}, and this machine has {has:.3g}; lower it")

    def run(self) -> None:
        held: Any = ray.put(self)
        memory = int(self.mem_per_cpu_gb * self.cpus_per_task * (1 << 30))
        task = ray.remote(num_cpus=self.cpus_per_task, num_gpus=self.gpus_per_task, memory=memory,
                          max_retries=ATTEMPTS)(_run)  # fmt: skip
        waiting = deque(self.get_incomplete_ranks(range(self.tasks)))
        running: dict = {}
        with tqdm(total=self.tasks, initial=self.tasks - len(waiting), unit=" shards", disable=None) as bar:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    rank = waiting.popleft()
                    running[task.remote(held, rank)] = rank
                (ended,), _ = ray.wait(list(running), num_returns=1)
                self._told(ended, running.pop(ended))
                bar.update()

    def _told(self, ended, rank: int) -> None:
        """Leaves the line of a shard that failed, where its writer has not."""
        try:
            ray.get(ended)
        except RayTaskError as error:
            if not isinstance(error.cause, Fault):
                logger.error("shard %d", rank, exc_info=error)
                note_failure(self, rank, f"{type(error.cause).__name__}: {error.cause}")
        except RayError as error:
            note_failure(self, rank, f"its worker was lost {ATTEMPTS + 1} times ({type(error).__name__})")


def _run(executor: RayExecutor, rank: int) -> None:
    from loguru import logger as talk

    talk.disable("datatrove")
    executor._run_for_rank(rank)
