"""docs/own_model.md on the tiny model: transcripts in, two steps of its YAML, its own Python for merged weights."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl
from safetensors.torch import load_file
from test_imports import chat, run

from calibrate import cli, models

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


def test_the_page_names_files_and_options_that_exist(capsys, monkeypatch):
    for path in re.findall(r"(?:recipes|accelerate_configs)/[\w./-]+\.(?:yaml|py|md)", PAGE):
        assert (ROOT / path).is_file(), path
    helps = ""
    for verb in (["extract"], ["audit"], ["compare"], ["corpus", "import"]):
        monkeypatch.setattr(sys, "argv", ["calibrate", *verb, "--help"])
        with pytest.raises(SystemExit):
            cli.main()
        helps += capsys.readouterr().out
    others = {"--config_file", "--config", "--output_dir", "--dry_run", "--arm"}  # of accelerate and of the recipe
    others |= {"--to", "--output-dir", "--resolve-attachments"}  # of inspect
    options = set(re.findall(r"--[a-z][\w-]+", PAGE)) - others
    assert len(options) > 8
    assert [option for option in sorted(options) if option not in helps] == []
