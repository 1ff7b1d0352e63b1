"""datatrove's Slurm executor, whose jobs go on after a shard that fails."""

import logging
from concurrent.futures import ThreadPoolExecutor

from datatrove.executor.slurm import SlurmPipelineExecutor

from data_curation.documents import Fault
from data_curation.pipeline import note_failure

logger = logging.getLogger(__name__)


class SlurmExecutor(SlurmPipelineExecutor):
    """Within a job of several shards one that fails leaves its line, the others are done, and the job ends with it.

    datatrove's own ends at the first: as failed shards are handed over first again, those behind it never had a turn.
    """

    def run(self) -> None:
        self.failed: list[BaseException] = []
        super().run()
        for error in self.failed:
            raise error

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(super()._run_for_rank, rank, local_rank, node_rank).exception()
        if error is None:
            return
        self.failed.append(error)
        if not isinstance(error, Fault):
            logger.error("shard %d", rank, exc_info=error)
            note_failure(self, rank, f"{type(error).__name__}: {error}")
