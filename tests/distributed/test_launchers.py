"""Two CPU processes under every launcher end with the weights of one process (`make test-distributed`)."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from cases import CASES, build
from safetensors.torch import load_file
from trl import DPOTrainer

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
    bf16 = setup.get("options", {}).get("bf16", False)
    config |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "bf16" if bf16 else "no"}
    config |= {"main_process_port": 0}
    if launcher == "zero3":
        # A tiny model's parameters would all stay gathered, which hides errors.
        ds = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
        ds["zero_optimization"] |= {"stage3_gather_16bit_weights_on_model_save": True}
        ds |= {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "bf16": {"enabled": bf16},
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
def test_a_stopped_run_resumes_and_a_killed_process_ends_the_run_with_an_error(launcher, setup, tmp_path):
    """From the first of two checkpoints; with Adam, whose moments come back too. The others do not wait for ever."""
    cases = ["sft-lora", "dpo-full"]
    options = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "save_total_limit": None}
    setup = setup | {"processes": 2, "options": options}
    run = launch(tmp_path, launcher, setup | {"cases": [*cases, "sft-full"], "kill": "sft-full"}, timeout=300)
    assert run.returncode != 0
    assert not (tmp_path / f"{launcher}-sft-full.safetensors").exists()
    for name in cases:
        written = tmp_path / f"{launcher}-{name}.safetensors"
        assert written.is_file(), run.stderr[-6000:]
        written.rename(tmp_path / f"unbroken-{name}.safetensors")

    run = launch(tmp_path, launcher, setup | {"cases": cases, "resume": True})
    assert run.returncode == 0, run.stderr[-6000:]
    for name in cases:
        written = tmp_path / f"{launcher}-{name}.safetensors"
        assert_same_weights(tmp_path / f"unbroken-{name}.safetensors", written, name)


@pytest.mark.parametrize("launcher", ["fsdp2", "zero2", "zero3"])
def test_under_bf16_the_reference_is_read_as_the_training_passes_are(launcher, setup, tmp_path):
    """These launchers cast the weights: read in float32, the anchors would start at the rounding of bf16, 1.5e-4."""
    options, cases = {"bf16": True, "max_steps": 1}, ["sft-lora", "sft-full"]
    run = launch(tmp_path, launcher, setup | {"processes": 2, "cases": cases, "options": options})
    assert run.returncode == 0, run.stderr[-6000:]
    for name, found in json.loads((tmp_path / f"{launcher}.json").read_text()).items():
        assert found["log"][0]["calibration/anchor"] < 1e-7, name
        assert found["log"][0]["calibration/side"] < 1e-7, name


def test_the_share_of_gradients_is_of_means_over_processes(setup, tmp_path):
    """Of norms, not the norm of a mean: the first batch of each process, and four of contexts, one by one here."""
    setup = setup | {"processes": 2, "cases": ["dpo-lora"]}
    setup |= {"options": {"penalty_weight": None, "penalty_share": 0.5, "max_steps": 1}}
    run = launch(tmp_path, "ddp", setup)
    assert run.returncode == 0, run.stderr[-6000:]
    trainer = build(CASES["dpo-lora"], tmp_path / "alone", setup)
    objective, batches = trainer._calibration, iter(trainer.get_train_dataloader())
    trained = [part for part in trainer.model.parameters() if part.requires_grad]

    def norm(loss: torch.Tensor) -> float:
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        return math.sqrt(sum(float(part.square().sum()) for part in gradients if part is not None))

    tasks, penalties = [], []
    for process in range(2):
        inputs = trainer._prepare_inputs(next(batches))
        tasks.append(norm(DPOTrainer.compute_loss(trainer, trainer.model, inputs)))
        objective.accelerator = SimpleNamespace(num_processes=2, process_index=process, device=torch.device("cpu"))
        for batch in range(4):
            rows = objective._rows(batch)
            penalties.append(norm(objective._penalty(*objective._read(trainer.model, rows), rows)))
    assert len(set(tasks)) == 2
    state = json.loads((tmp_path / "ddp" / "dpo-lora" / "calibration" / "state.json").read_text())
    assert state["penalty_weight"] == pytest.approx(0.5 * (sum(tasks) / 2) / (sum(penalties) / 8), rel=1e-4)


def test_sharded_launchers_refuse_a_share_of_gradients(setup, tmp_path):
    options = {"penalty_weight": None}
    run = launch(tmp_path, "fsdp2", setup | {"processes": 2, "cases": ["sft-lora"], "options": options}, timeout=180)
    assert run.returncode != 0
    assert "`penalty_share` 0.3 compares gradients of whole parameters" in run.stderr
