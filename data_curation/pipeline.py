"""Runs datatrove steps over shards with the executor that a config names: local processes, Slurm or Ray."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.utils.stats import Stats
from tqdm import tqdm

from data_curation.documents import Fault
from data_curation.inputs import Shard
from data_curation.writing import write_json

logger = logging.getLogger(__name__)

# One thread each: sums in another order end in other last bits, and the workers share the cores already.
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
THREADS["TOKENIZERS_PARALLELISM"] = "false"
ATTEMPTS = 2  # of a shard by itself, after a worker died while it was among those in work
SLURM = ("time", "partition", "cpus_per_task", "mem_per_cpu_gb", "qos", "job_name", "env_command", "sbatch_args")
SLURM += ("max_array_size", "tasks_per_job", "mail_user", "gpus_per_task", "srun_args", "requeue")
RAY = ("address", "cpus_per_task", "mem_per_cpu_gb", "gpus_per_task")


class Config(NamedTuple):
    """Where and how wide a stage runs; none of it changes a result."""

    executor: str = "local"
    workers: int = 1
    options: dict[str, Any] = {}


def load_config(path: Path | None, workers: int | None) -> Config:
    """Reads `executor`, `workers` and the section of that executor from YAML; `workers` given here comes first.

    Raises:
        ValueError: an unknown executor or option; says which are allowed.
    """
    content = {}
    if path is not None:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict) or (unknown := sorted(content.keys() - {"executor", "workers", "slurm", "ray"})):
        what = "no mapping" if not isinstance(content, dict) else f"{unknown[0]!r}"
        raise ValueError(f"{path}: {what}; a config has executor, workers, slurm and ray")
    name = content.get("executor", "local")
    allowed = {"local": (), "slurm": SLURM, "ray": RAY}
    if not isinstance(name, str) or name not in allowed:
        raise ValueError(f"{path}: executor {name!r} is none of local, slurm, ray")
    options = content.get(name) or {}
    if not isinstance(options, dict):
        such = ", ".join(allowed[name])
        raise ValueError(f"{path}: the section {name} is {options!r}; give options by name: {such}")
    if unknown := sorted(options.keys() - set(allowed[name])):
        raise ValueError(f"{path}: {name} has no option {unknown[0]!r}; there are {', '.join(allowed[name])}")
    number = workers if workers is not None else content.get("workers", 1)
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"workers {number!r} is no whole number from 1")
    return Config(name, number, options)


def run(steps: list[Any], shards: list[Shard], out: Path, stage: str, config: Config) -> bool:
    """Runs the steps on every shard that is not complete. False: handed to Slurm, which has not ended.

    Raises:
        Incomplete: some shards failed; the others are complete and stay.
    """
    state = out / "state" / stage
    _forget(state, out)
    executor = _executor(steps, len(shards), state, config)
    if executor.get_incomplete_ranks(range(len(shards))):
        if config.executor == "local":  # on a cluster others may be writing now
            _sweep(out)
        shutil.rmtree(state / "failures", ignore_errors=True)
        before = {name: os.environ.get(name) for name in THREADS}
        os.environ.update(THREADS)  # what the workers inherit
        try:
            handed = _launch(executor, config)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        if handed:
            return False
        _sweep(out)
    if missing := executor.get_incomplete_ranks(range(len(shards))):
        raise Incomplete([failure(state, shards, rank) for rank in missing], len(shards))
    return True


class Incomplete(ValueError):
    """Some shards failed: one line each, equal lines once."""

    def __init__(self, lines: list[str], total: int):
        self.lines = list(dict.fromkeys(lines))
        rest = f"{len(lines)} of {total} shards are not complete; the others are, and the same command goes on there"
        super().__init__("\n".join([*self.lines, rest]))


def note_failure(executor, rank: int, what: str) -> None:
    """Leaves the line of a shard whose writer could not."""
    shard = executor.pipeline[0].shards[rank]
    line = f"{shard.path} ({shard.name}): {what}".splitlines()[0]
    write_json(Path(executor.logging_dir.path) / "failures" / f"{rank:05d}.json", {"line": line})


def failure(state: Path, shards: list[Shard], rank: int) -> str:
    try:
        return json.loads((state / "failures" / f"{rank:05d}.json").read_text(encoding="utf-8"))["line"]
    except FileNotFoundError:
        return f"{shards[rank].path} ({shards[rank].name}): ended without a word, killed or out of memory"


def _forget(state: Path, out: Path) -> None:
    """Takes back the completion of shards whose record or one of whose files has gone."""
    for marker in (state / "completions").glob("*"):
        record = state / "records" / f"{int(marker.name):05d}.json"
        files = json.loads(record.read_text(encoding="utf-8"))["files"] if record.is_file() else None
        if files is None or not all((out / name).is_file() for name in files):
            marker.unlink()


def _sweep(out: Path) -> None:
    """Removes what a kill left half-written."""
    for partial in out.rglob(".*.partial"):
        partial.unlink(missing_ok=True)


def _executor(steps: list[Any], tasks: int, state: Path, config: Config):
    common: dict[str, Any] = {"pipeline": steps, "tasks": tasks, "logging_dir": str(state)}
    if config.executor == "local":
        return LocalExecutor(workers=config.workers, **common)
    options: dict[str, Any] = dict(config.options)
    if config.executor == "ray":
        try:
            from data_curation.on_ray import RayExecutor
        except ImportError as error:
            raise ValueError(f"`executor: ray` needs Ray ({error}); run `pip install 'ray>=2.60'`") from error

        options.pop("address", None)
        return RayExecutor(workers=config.workers, **common, **options)
    from data_curation.on_slurm import SlurmExecutor

    if missing := [name for name in ("time", "partition") if name not in options]:
        raise ValueError(f"the section slurm of the config needs {missing[0]!r}")
    exports = " ".join(f"{name}={value}" for name, value in THREADS.items())
    path = f'export PATH="{Path(sys.executable).parent}:$PATH"'
    options["env_command"] = f"export {exports}\n{options.get('env_command', path)}"
    return SlurmExecutor(workers=config.workers, **common, **options)


def _launch(executor, config: Config) -> bool:
    """Runs to the end; True where the work was only handed over."""
    from loguru import logger as talk

    talk.disable("datatrove")  # failures are told once, by `failure`
    if config.executor == "slurm":
        try:
            executor.run()
        except FileNotFoundError as error:
            raise ValueError("sbatch was not found; start on a machine that can submit to Slurm") from error
        except subprocess.CalledProcessError as error:
            raise ValueError(f"sbatch ended with {error.returncode}, and what it said stands above") from error
        return True
    if config.executor == "ray":
        import ray

        # Without an address a cluster of this machine alone. It listens on all interfaces and asks for Ray's token.
        address = config.options.get("address")
        own: dict[str, Any] = {} if address else {"num_cpus": config.workers * executor.cpus_per_task}
        ray.init(address, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": THREADS}, **own)
        try:
            if own:  # what no machine has is waited for until one that has it joins: here, for ever
                executor.check_room(ray.cluster_resources())
            executor.run()
        finally:
            ray.shutdown()
        return False
    executor.run()
    return False


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor on a pool that notices a dead worker.

    Its own pool waits for ever for a worker that was killed, and ends all tasks at one exception. Here a shard that
    fails leaves its line and the others go on; after a death the shards then in work are redone one by one.
    """

    pipeline: list[Any]

    def run(self) -> None:
        queue = deque(self.get_incomplete_ranks(range(self.tasks)))
        with tqdm(total=self.tasks, initial=self.tasks - len(queue), unit=" shards", disable=None) as bar:
            while queue:
                for rank in self._drain(queue, self.workers, bar.update):
                    self._alone(rank, bar.update)

    def _drain(self, queue: deque[int], workers: int, done: Callable) -> list[int]:
        """Works off the queue; when a worker dies, returns the shards that were in work."""
        running: dict = {}
        context = get_context("forkserver")
        context.set_forkserver_preload(["pandas", "data_curation.runs"])  # imported once, not in every worker
        with ProcessPoolExecutor(workers, context, _start, (self,)) as pool:
            while queue or running:
                while queue and len(running) < workers:
                    try:
                        running[pool.submit(_run, queue[0])] = queue[0]
                    except BrokenProcessPool:
                        return list(running.values())
                    queue.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        return list(running.values())
                    rank = running.pop(future)
                    if error is not None and not isinstance(error, Fault):
                        logger.error("shard %d", rank, exc_info=error)
                        note_failure(self, rank, f"{type(error).__name__}: {error}")
                    done()
        return []

    def _alone(self, rank: int, done: Callable) -> None:
        for _ in range(ATTEMPTS):
            if not self._drain(deque([rank]), 1, done):
                return
            logger.warning("a worker died on shard %d", rank)
        note_failure(self, rank, f"its worker was killed {ATTEMPTS + 1} times; out of memory, perhaps")
        done()


_EXECUTOR: LocalExecutor | None = None  # of this worker


def _start(executor: LocalExecutor) -> None:
    """Prepares a worker: the steps come once, and it ends when its parent does."""
    global _EXECUTOR
    from loguru import logger as talk

    talk.disable("datatrove")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _EXECUTOR = executor
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _run(rank: int) -> None:
    assert _EXECUTOR is not None
    for step in _EXECUTOR.pipeline:
        step.stats = Stats(str(step))
    _EXECUTOR._run_for_rank(rank)
