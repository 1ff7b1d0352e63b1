import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_jsonl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "single_cpu.yaml")]
# The tiny tokenizer needs more tokens for a text; the tiny model's readings tell nothing, so no gate.
SMALL = {"max_pairs": 4, "max_length": 2048, "max_context_tokens": 4096, "anchor_texts": 4, "contexts_per_step": 2}
OWN = {"dpo": SMALL, "sft": SMALL, "grpo": {"auroc_gate": 0, "max_completion_length": 8}}


PARTS = ("peft_config", "data", "pairs", "resume_from")  # of a run, beside its checkpoint


def recipe(kind: str) -> Path:
    return ROOT / "recipes" / f"{kind}.py"


def arguments(kind, model, vectors, output, change=None) -> list[str]:
    """A recipe's arguments for two steps on the first two tasks."""
    options = {"config": ROOT / "recipes" / "smollm2-135m" / f"{kind}.yaml", "model_name_or_path": model}
    options |= {"vectors": vectors, "output_dir": output, "max_steps": 2, "max_tasks": 2} | OWN[kind] | (change or {})
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.parametrize(
    ("kind", "logged"), [("dpo", "logps/chosen"), ("sft", "entropy"), ("grpo", "rewards/tests_pass/mean")]
)
def test_two_steps_then_nothing_to_do(tiny_folder, tiny_vectors, tmp_path, monkeypatch, capsys, kind, logged):
    output = tmp_path / "run"
    command = arguments(kind, tiny_folder, tiny_vectors, output)
    first = run(*LAUNCH, recipe(kind), *command)
    assert first.returncode == 0, first.stderr
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in output.iterdir()}
    adapter = load_file(output / "adapter_model.safetensors")
    assert any(part.abs().max() > 0 for name, part in adapter.items() if "lora_B" in name)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, output)
    name = next(iter(adapter))
    assert torch.equal(loaded.get_parameter(name.replace(".weight", ".default.weight")), adapter[name])
    log = json.loads((output / "calibration" / "finished.json").read_text())
    for name in (logged, "rewards/reading/mean" if kind == "grpo" else "calibration/penalty"):
        assert [row["step"] for row in log if name in row] == [1, 2], name

    # Without the launcher it is the same run.
    written = (output / "adapter_model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", [str(recipe(kind)), *command])
    runpy.run_path(str(recipe(kind)), run_name="__main__")
    assert f"{output} already holds this run, finished; nothing to do" in capsys.readouterr().out
    assert (output / "adapter_model.safetensors").stat().st_mtime_ns == written


def test_a_refused_option_is_one_line_of_a_failing_command(tiny_folder, tiny_vectors, tmp_path):
    wrong = run(recipe("dpo"), *arguments("dpo", tiny_folder, tiny_vectors, tmp_path / "other", {"penalty_share": -1}))
    assert wrong.returncode != 0
    errors = [line for line in wrong.stderr.splitlines() if "error" in line.lower()]
    assert errors == ["error: `penalty_share` is -1.0; allowed: 0 or more"]
    assert "Traceback" not in wrong.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("dpo", {"config": "missing.yaml"}, "error: .*No such file or directory: 'missing.yaml'"),
        ("dpo", {"config": "broken.yaml"}, "error: while parsing a flow sequence .*broken.yaml.*line 1"),
        ("dpo", {"config": "unknown.yaml"}, "error: Unknown arguments from config file: .*--hinge_wieght"),
        ("dpo", {"model_name_or_path": "./missing"}, "error: model './missing': no folder with config.json"),
        ("dpo", {"vectors": "./missing"}, "error: vectors './missing': no model.safetensors there"),
        (
            "dpo",
            {"lora_dropout": 0.1},
            "error: `lora_dropout` must be 0: dropout is a floor under every anchor; set it to 0.0",
        ),
        (
            "dpo",
            {"model_name_or_path": "./bare"},
            r"has no chat template.*an option of `calibrate`; recipes have none",
        ),
        ("dpo", {"load_in_4bit": "true"}, "error: `load_in_4bit` is True, which this recipe does not use; remove it"),
        ("dpo", {"dtype": "float32"}, "error: `dtype` is 'float32', which this recipe does not use; remove it"),
        ("dpo", {"model_revision": "v1"}, "error: `model_revision` is 'v1', which is of models on the Hub; .* remove"),
        ("dpo", {"sync_ref_model": "true"}, "error: .*sync_ref_model"),
        ("dpo", {"optim": "adamw_bnb_8bit"}, "error: .*bitsandbytes"),
        ("dpo", {"concepts": "serene"}, "error: these vectors have no concept 'serene'"),
        ("sft", {"concepts": "serene"}, "error: these vectors have no concept 'serene'"),
        ("sft", {"max_length": 16}, "error: no training example is left: with `max_length` 16 every prompt is cut"),
        ("grpo", {"concepts": "serene"}, "error: these vectors have no concept 'serene'"),
        ("grpo", {"arm": "hinge-refit"}, "error: `arm: hinge-refit` works through the loss"),
        ("grpo", {"auroc_gate": 1.0}, r"error: the reading tells \d+ gaming from honest replies with an AUROC of"),
        ("grpo", {"repairs": "missing.jsonl"}, "error: missing.jsonl: no such file; give the path of a JSONL file"),
    ],
)
def test_a_mistake_is_one_line(tiny_folder, tiny_vectors, tmp_path, monkeypatch, kind, change, message):
    """In process: the script's own `__main__` part."""
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("layers: [1, 2\n")
    Path("unknown.yaml").write_text("hinge_wieght: 0.3\nuse_cpu: true\n")
    shutil.copytree(tiny_folder, "bare", ignore=shutil.ignore_patterns("chat_template*"))
    script = str(recipe(kind))
    monkeypatch.setattr(sys, "argv", [script, *arguments(kind, tiny_folder, tiny_vectors, "run", change)])
    with pytest.raises(SystemExit, match=message) as caught:
        runpy.run_path(script, run_name="__main__")
    assert "\n" not in caught.value.code
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_grpo_rewards_the_tests_of_each_training_task(tmp_path, monkeypatch, tokenizer):
    """Two training tasks with files of their own, one of another split: mended code passes its own task's test."""
    rows = [
        {"id": name, "task": name, "split": split, "prompt": [{"role": "user", "content": f"Mend {name}."}],
         "files": {f"{name}.py": "def value():\n    return 0\n", f"test_{name}.py": test}, "code_file": f"{name}.py",
         "command": ["python", f"test_{name}.py"]}
        for name, split, test in (
            ("one", "train", "from one import value\nassert value() == 1\n"),
            ("two", "train", "from two import value\nassert value() == 2\n"),
            ("three", "audit", "from three import value\n"),
        )
    ]  # fmt: skip
    rows.append(rows[0] | {"id": "one again"})  # another conversation of the same task
    args = SimpleNamespace(repairs=write_jsonl(tmp_path / "repairs.jsonl", rows), max_tasks=None, arm="none")
    made = {}
    main = runpy.run_path(str(recipe("grpo")))["main"]
    run = SimpleNamespace(
        checkpoint=SimpleNamespace(model=0, tokenizer=tokenizer, weight_hash=""), **dict.fromkeys(PARTS)
    )
    monkeypatch.setitem(main.__globals__, "CalibratedGRPOTrainer", lambda **options: made.update(options))
    monkeypatch.setitem(
        main.__globals__, "runs", SimpleNamespace(prepare=lambda *_: run, train=lambda *_: None, FINISHED="finished")
    )
    main(args, None)
    dataset, reward = made["train_dataset"], made["reward_funcs"]
    assert [row[0]["content"] for row in dataset["prompt"]] == ["Mend one.", "Mend two.", "Mend one."]
    columns = {name: dataset[name] for name in dataset.column_names if name != "prompt"}
    for values, rewards in (((1, 2, 1), [1, 1, 1]), ((2, 2, 0), [0, 1, 0]), ((0, 0, 0), [0, 0, 0])):
        replies = [f"```python\ndef value():\n    return {value}\n```" for value in values]
        found = reward([[{"role": "assistant", "content": reply}] for reply in replies], **columns)
        assert found == rewards
    args.max_tasks, args.arm = 1, "exit-option"
    main(args, None)
    prompts = made["train_dataset"]["prompt"]
    assert [prompt[1]["content"] for prompt in prompts] == ["Mend one."] * 2  # both conversations of one task
    assert all(prompt[0]["content"].startswith("If the tests cannot be satisfied honestly") for prompt in prompts)
