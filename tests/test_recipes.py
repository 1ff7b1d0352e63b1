import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
RECIPE, YAML = ROOT / "recipes" / "dpo.py", ROOT / "recipes" / "smollm2-135m" / "dpo.yaml"
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "single_cpu.yaml")]


def arguments(model, vectors, output, change=None) -> list[str]:
    """The recipe's arguments for two steps on the first two tasks; the tiny tokenizer needs more tokens for a text."""
    options = {"config": YAML, "model_name_or_path": model, "vectors": vectors, "output_dir": output, "max_steps": 2}
    options |= {"max_tasks": 2, "max_pairs": 4, "max_length": 2048} | (change or {})
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_two_steps_then_nothing_to_do_then_an_error(tiny_folder, tiny_vectors, tmp_path):
    output = tmp_path / "run"
    command = arguments(tiny_folder, tiny_vectors, output)
    first = run(*LAUNCH, RECIPE, *command)
    assert first.returncode == 0, first.stderr
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in output.iterdir()}
    adapter = load_file(output / "adapter_model.safetensors")
    assert any(part.abs().max() > 0 for name, part in adapter.items() if "lora_B" in name)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, output)
    name = next(iter(adapter))
    assert torch.equal(loaded.get_parameter(name.replace(".weight", ".default.weight")), adapter[name])
    log = json.loads((output / "calibration" / "finished.json").read_text())
    assert [row["step"] for row in log if "calibration/penalty" in row] == [1, 2]

    # Without the launcher it is the same run.
    written = (output / "adapter_model.safetensors").stat().st_mtime_ns
    again = run(RECIPE, *command)
    assert again.returncode == 0, again.stderr
    assert f"{output} already holds this run, finished; nothing to do" in again.stdout
    assert (output / "adapter_model.safetensors").stat().st_mtime_ns == written

    wrong = run(RECIPE, *arguments(tiny_folder, tiny_vectors, tmp_path / "other", {"penalty_share": -1}))
    assert wrong.returncode != 0
    errors = [line for line in wrong.stderr.splitlines() if "error" in line.lower()]
    assert errors == ["error: `penalty_share` is -1.0; allowed: 0 or more"]
    assert "Traceback" not in wrong.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "missing.yaml"}, "error: .*No such file or directory: 'missing.yaml'"),
        ({"config": "broken.yaml"}, "error: while parsing a flow sequence .*broken.yaml.*line 1"),
        ({"config": "unknown.yaml"}, "error: Unknown arguments from config file: .*--hinge_wieght"),
        ({"model_name_or_path": "./missing"}, "error: model './missing': no folder with config.json"),
        ({"vectors": "./missing"}, "error: vectors './missing': no model.safetensors there"),
        (
            {"lora_dropout": 0.1},
            "error: `lora_dropout` must be 0: dropout is a floor under every anchor; set it to 0.0",
        ),
        ({"load_in_4bit": "true"}, "error: `load_in_4bit` is True, which this recipe does not use; remove it"),
        ({"concepts": "serene"}, "error: these vectors have no concept 'serene'"),
    ],
)
def test_a_mistake_is_one_line(tiny_folder, tiny_vectors, tmp_path, monkeypatch, change, message):
    """In process: the script's own `__main__` part."""
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("layers: [1, 2\n")
    Path("unknown.yaml").write_text("hinge_wieght: 0.3\nuse_cpu: true\n")
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments(tiny_folder, tiny_vectors, "run", change)])
    with pytest.raises(SystemExit, match=message) as caught:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert "\n" not in caught.value.code
    assert not list(tmp_path.glob("run/*.safetensors"))
