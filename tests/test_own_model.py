"""docs/own_model.md on the tiny model: transcripts in, two steps of its YAML, its own Python for merged weights."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import torch
from conftest import write_jsonl
from safetensors.torch import load_file
from test_imports import chat, run

from calibrate import cli, models
from calibrate.training.configs import CalibratedDPOConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own_model.md").read_text(encoding="utf-8")
YAML = "recipes/qwen2.5-7b-instruct/dpo.yaml"


def test_transcripts_become_a_calibrated_and_merged_model(tiny_folder, tiny_vectors, tmp_path, monkeypatch):
    outcomes = [("failed", "AssertionError: 3 != 4"), ("passed", "2 passed")]
    rows = [chat(task, status, result) for task in ("sort", "parse") for status, result in outcomes]
    write_jsonl(tmp_path / "agent.jsonl", rows)
    run(monkeypatch, tmp_path / "agent.jsonl", "--model", tiny_folder, "--out", tmp_path / "runs/own/twins.jsonl")
    tiny = {"model_name_or_path": tiny_folder, "vectors": tiny_vectors, "bf16": "false", "use_cpu": "true"}
    short = {"max_steps": 2, "max_pairs": 4, "per_device_train_batch_size": 1, "anchor_texts": 2}
    options = {"config": ROOT / YAML} | tiny | short
    monkeypatch.chdir(tmp_path)
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["dpo.py", *words])
    runpy.run_path(str(ROOT / "recipes" / "dpo.py"), run_name="__main__")
    log = (tmp_path / "runs/own/calibrated/calibration/finished.json").read_text()
    assert (
        "reading/header_failing" in log
    )  # the contexts are those of the transcripts: the shipped ones were not given

    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "own_model.md", "exec"), {})
    merged, adapted = models.load("./runs/own/merged"), models.load("./runs/own/calibrated")
    ids = torch.tensor([[5, 9, 40, 77, 3]])
    with torch.no_grad():
        one, other, base = (found.model(ids).logits for found in (merged, adapted, models.load(str(tiny_folder))))
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(one, base, atol=1e-5)
    assert not any("lora" in name for name in load_file("runs/own/merged/model.safetensors"))


def test_every_command_of_the_page_is_one_that_the_programs_take():
    for path in re.findall(r"(?:recipes|accelerate_configs)/[\w./-]+\.(?:yaml|py|md)", PAGE):
        assert (ROOT / path).is_file(), path
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL))
    lines = [line for line in shell.splitlines() if line.startswith("calibrate ")]
    assert len(lines) == 4
    for line in lines:
        arguments = cli._parser().parse_args(shlex.split(line)[1:])
        assert arguments.verb in ("extract", "audit", "compare", "corpus")
    trained = [line for line in shell.splitlines() if line.startswith("$RECIPE")]
    for option in {option for line in trained for option in re.findall(r"--(\w+)", line)}:
        assert option == "model_name_or_path" or hasattr(CalibratedDPOConfig, option), option
