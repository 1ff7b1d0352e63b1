"""Two CPU processes under every launcher end with the weights of one process (`make test-distributed`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cases import CASES
from safetensors.torch import load_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TYPES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def launch(folder: Path, launcher: str, setup: dict, timeout: int = 800) -> subprocess.CompletedProcess:
    """Runs the worker with the launcher's shipped file, on two processes and without a GPU."""
    path = folder / f"setup-{launcher}.json"
    path.write_text(json.dumps(setup | {"launcher": launcher, "out": str(folder)}))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}", "CALIBRATE_CACHE": str(folder / "cache"), "CI": "true"}
    environment |= {
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache/torch_ext"))
    }
    worker = [str(HERE / "worker.py"), str(path)]
    if launcher == "single":
        return subprocess.run(
            [sys.executable, *worker], env=environment, capture_output=True, text=True, timeout=timeout
        )
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{launcher}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no", "main_process_port": 0}
    if launcher == "zero3":
        # A tiny model's parameters would all stay gathered, which hides errors.
        ds = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
        ds["zero_optimization"] |= {"stage3_gather_16bit_weights_on_model_save": True}
        ds |= {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "bf16": {"enabled": False},
            "gradient_clipping": 0.0,
        }
        (folder / "zero3.json").write_text(json.dumps(ds))
        config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "zero3.json"), "zero3_init_flag": False}
        config.pop("mixed_precision")
    file = folder / f"{launcher}.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *worker]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def setup(tiny_folder, tiny_vectors) -> dict:
    return {"model": str(tiny_folder), "vectors": str(tiny_vectors), "cases": list(CASES)}


@pytest.fixture(scope="module")
def single(setup, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run = launch(folder, "single", setup | {"processes": 1})
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


def assert_same_weights(one: Path, other: Path, name: str) -> None:
    """Within 1e-6; a tied vocabulary projection may be saved once or twice."""
    first, second = load_file(one), load_file(other)
    shared = first.keys() & second.keys()
    assert len(shared) >= len(first) - 1
    for key in shared:
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.parametrize("launcher", TYPES)
def test_two_processes_end_as_one(launcher, setup, single):
    run = launch(single, launcher, setup | {"processes": 2})
    assert run.returncode == 0, run.stderr[-6000:]
    facts = json.loads((single / f"{launcher}.json").read_text())
    assert facts.keys() == CASES.keys()
    alone = json.loads((single / "single.json").read_text())
    for name, found in facts.items():
        # Two of these launchers fall back to one process, or to DDP, without a word.
        assert (found["processes"], found["type"]) == (2, TYPES[launcher]), name
        assert_same_weights(single / f"single-{name}.safetensors", single / f"{launcher}-{name}.safetensors", name)
        for row, wanted in zip(found["log"], alone[name]["log"], strict=True):
            for term in ("penalty", "anchor", "side", "kl"):
                if f"calibration/{term}" in wanted:
                    expected = pytest.approx(wanted[f"calibration/{term}"], rel=1e-5, abs=1e-6)
                    assert row[f"calibration/{term}"] == expected, (name, term)


@pytest.mark.parametrize("launcher", TYPES)
def test_a_stopped_run_resumes_and_ends_as_an_unbroken_one(launcher, setup, tmp_path):
    """From the first of two checkpoints; with Adam, whose moments come back too."""
    cases = ["sft-lora", "dpo-full"]
    options = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "save_total_limit": None}
    for change in ({}, {"resume": True}):
        run = launch(tmp_path, launcher, setup | {"processes": 2, "cases": cases, "options": options} | change)
        assert run.returncode == 0, run.stderr[-6000:]
        for name in cases:
            written = tmp_path / f"{launcher}-{name}.safetensors"
            if change:
                assert_same_weights(tmp_path / f"unbroken-{name}.safetensors", written, name)
            else:
                written.rename(tmp_path / f"unbroken-{name}.safetensors")


@pytest.mark.parametrize("launcher", TYPES)
def test_a_killed_process_ends_the_run_with_an_error(launcher, setup, tmp_path):
    """Within the time limit: the others do not wait for it for ever."""
    run = launch(tmp_path, launcher, setup | {"processes": 2, "cases": ["sft-lora"], "kill": True}, timeout=180)
    assert run.returncode != 0
    assert not (tmp_path / f"{launcher}-sft-lora.safetensors").exists()


def test_sharded_launchers_refuse_a_share_of_gradients(setup, tmp_path):
    options = {"penalty_weight": None}
    run = launch(tmp_path, "fsdp2", setup | {"processes": 2, "cases": ["sft-lora"], "options": options}, timeout=180)
    assert run.returncode != 0
    assert "`penalty_share` 0.3 compares gradients of whole parameters" in run.stderr
