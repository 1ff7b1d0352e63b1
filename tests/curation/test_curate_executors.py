"""One config, three executors: Ray on this machine, and Slurm's script run as Slurm would run it."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from small_corpora import FAKE, contents, four_files, score, texts, write_jsonl

from data_curation import runs
from data_curation.pipeline import Config, load_config

HERE = str(Path(__file__).parent)


@pytest.fixture
def corpus(tmp_path):
    return four_files(tmp_path / "in")


def config(path: Path, text: str, workers: int | None = None) -> Config:
    path.write_text(text)
    return load_config(path, workers)


def test_a_config_names_the_executor_and_workers(tmp_path):
    path = tmp_path / "c.yaml"
    assert load_config(None, None) == Config("local", 1, {})
    assert config(path, "executor: ray\nworkers: 3\nray: {cpus_per_task: 2}") == Config("ray", 3, {"cpus_per_task": 2})
    assert config(path, "executor: ray\nworkers: 3", workers=5).workers == 5
    assert config(path, "") == Config("local", 1, {})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("executor: dask", "executor 'dask' is none of local, slurm, ray"),
        ("worker: 3", "'worker'; a config has executor, workers, slurm and ray"),
        ("- local", "no mapping; a config has executor, workers, slurm and ray"),
        ("executor: slurm\nslurm: {queue: x}", "slurm has no option 'queue'; there are time, partition, "),
        ("executor: ray\nray: [a]", r"the section ray is \['a'\]; give options by name: address, cpus_per_task"),
        ("executor: [ray]", r"executor \['ray'\] is none of local, slurm, ray"),
        ("workers: many", "workers 'many' is no whole number from 1"),
        ("workers: 0", "workers 0 is no whole number from 1"),
        ("executor: [", r"c\.yaml cannot be read as YAML"),
    ],
)
def test_what_a_config_must_not_be(tmp_path, text, told):
    with pytest.raises(ValueError, match=told):
        config(tmp_path / "c.yaml", text)


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """Stands in for Slurm's sbatch: keeps each script, and answers as it does."""
    folder = tmp_path / "bin"
    folder.mkdir()
    fake = folder / "sbatch"
    fake.write_text(f'#!/bin/sh\nfor last; do :; done\nn=$(ls {folder} | wc -l)\ncp "$last" {folder}/script$n\n'
                    'echo "Submitted batch job $n"\n')  # fmt: skip
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    scontrol = folder / "scontrol"
    scontrol.write_text("#!/bin/sh\necho node1\n")
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    srun = folder / "srun"
    srun.write_text('#!/bin/sh\nshift 3\nexec "$@"\n')  # srun -l -n 1 COMMAND
    srun.chmod(srun.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", HERE)
    return folder


SLURM = "executor: slurm\nworkers: 7\nslurm: {time: '02:00:00', partition: cpu, mem_per_cpu_gb: 3, tasks_per_job: 2}"


def test_slurm_gets_a_script_that_does_the_work(sbatch, corpus, tmp_path):
    """Four shards, two a job: an array of two, which run as Slurm would run it completes the work.

    The first shard of the second job has a bad row: the other one is done all the same.
    """
    (corpus / "c.parquet").unlink()
    write_jsonl(corpus / "c.jsonl", [*texts(3, "c"), {"id": "bad", "text": ""}])
    options = {"config": config(tmp_path / "c.yaml", SLURM), **FAKE}
    assert runs.score(str(corpus), tmp_path / "out", **options) is None
    script = (tmp_path / "out/state/score/launch_script.slurm").read_text()
    for line in ("--array=0-1%7", "--time=02:00:00", "--partition=cpu", "--mem-per-cpu=3G", "--cpus-per-task=1"):
        assert f"#SBATCH {line}\n" in script
    assert "export OMP_NUM_THREADS=1" in script
    assert f'export PATH="{Path(sys.executable).parent}:$PATH"' in script
    assert f"launch_pickled_pipeline {tmp_path / 'out/state/score/executor.pik'}" in script
    submitted = next(path for path in sbatch.glob("script*") if "launch_pickled_pipeline" in path.read_text())
    codes = []
    for job in range(2):
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(job), "SLURM_NODELIST": "node1"}
        codes.append(subprocess.run(["bash", submitted], env=environment, capture_output=True).returncode)
    assert codes == [0, 1]
    assert sorted(contents(tmp_path / "out/scores")) == ["a.parquet", "b.parquet", "d.parquet"]
    options["set_aside"] = True
    assert runs.score(str(corpus), tmp_path / "out", **options) is None  # hands the one that failed over again
    assert json.loads((tmp_path / "out/state/score/ranks_to_run.json").read_text()) == [2]
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "0", "SLURM_NODELIST": "node1"}
    newest = max(sbatch.glob("script*"), key=lambda path: (("pickled" in path.read_text()), path.stat().st_mtime_ns))
    subprocess.run(["bash", newest], env=environment, check=True, capture_output=True)
    done = runs.score(str(corpus), tmp_path / "out", **options)
    assert (done["figures"]["rows"], done["figures"]["set_aside"]) == (37, 1)
    score(corpus, tmp_path / "local", set_aside=True)
    assert contents(tmp_path / "out/scores") == contents(tmp_path / "local/scores")


def test_what_a_cluster_refuses_or_lacks_is_one_line(sbatch, corpus, tmp_path, monkeypatch):
    (sbatch / "sbatch").write_text("#!/bin/sh\necho wrong partition >&2\nexit 3\n")
    with pytest.raises(ValueError, match=r"^sbatch ended with 3, and what it said stands above$"):
        runs.score(str(corpus), tmp_path / "out", config=config(tmp_path / "c.yaml", SLURM), **FAKE)
    monkeypatch.setitem(sys.modules, "data_curation.on_ray", None)
    with pytest.raises(ValueError, match=r"^`executor: ray` needs Ray \(.*\); run `pip install 'ray>=2.60'`$"):
        runs.score(str(corpus), tmp_path / "ray", config=config(tmp_path / "c.yaml", "executor: ray"), **FAKE)


def test_slurm_needs_sbatch_and_its_options(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sbatch was not found; start on a machine that can submit to Slurm"):
        runs.score(str(corpus), tmp_path / "out", config=config(tmp_path / "c.yaml", SLURM), **FAKE)
    short = config(tmp_path / "c.yaml", "executor: slurm\nslurm: {time: '1'}")
    with pytest.raises(ValueError, match="the section slurm of the config needs 'partition'"):
        runs.score(str(corpus), tmp_path / "other", config=short, **FAKE)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_gives_the_bytes_of_the_local_executor(corpus, tmp_path, monkeypatch):
    """A row that cannot be used is told as elsewhere, and a killed worker noticed: datatrove's own Ray executor only
    counts tasks that failed, and waits for ever for a process that was killed within one.
    """
    monkeypatch.setenv("PYTHONPATH", HERE)
    on_ray = config(tmp_path / "c.yaml", "executor: ray\nworkers: 2\nray: {mem_per_cpu_gb: 0.5}")
    write_jsonl(corpus / "e.jsonl", [*texts(3, "e"), {"id": "bad", "text": ""}])
    (tmp_path / "mark").touch()
    write_jsonl(corpus / "f.jsonl", [{"id": "killer", "text": f"DIE ONCE {tmp_path / 'mark'}"}])
    write_jsonl(corpus / "g.jsonl", [{"id": "bug", "text": "UNFORESEEN"}])
    empty = rf"{corpus / 'e.jsonl'}, row 4: an empty text"
    bug = rf"{corpus / 'g.jsonl'} \(g\): RuntimeError: a bug of the scorer"
    with pytest.raises(ValueError, match=f"{empty}\n{bug}\n2 of 7 shards are not complete"):
        runs.score(str(corpus), tmp_path / "ray", config=on_ray, **FAKE)
    assert not (tmp_path / "mark").exists()
    assert len(contents(tmp_path / "ray/scores")) == 5
    write_jsonl(corpus / "g.jsonl", texts(3, "g"))
    much = config(tmp_path / "m.yaml", "executor: ray\nray: {mem_per_cpu_gb: 1.0e+6}")
    with pytest.raises(
        ValueError, match=r"`mem_per_cpu_gb`: a task asks for 1e\+06, and this machine has .*; lower it"
    ):
        runs.score(str(corpus), tmp_path / "much", config=much, **FAKE)
    on_ray = config(tmp_path / "c.yaml", "executor: ray\nworkers: 1\nray: {mem_per_cpu_gb: 0.5, cpus_per_task: 2}")
    runs.score(str(corpus), tmp_path / "ray", config=on_ray, set_aside=True, fresh=True, **FAKE)
    score(corpus, tmp_path / "local", workers=2, set_aside=True)
    assert contents(tmp_path / "ray/scores") == contents(tmp_path / "local/scores")
