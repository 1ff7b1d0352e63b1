"""A dry run: figures by hand, and no trace of it."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_recipes import LAUNCH, arguments, recipe, run
from test_trainer_kinds import make as make_kind  # noqa: F401  (a fixture)
from test_trainers import NO_TEXTS, PAIRS, TWINS, make  # noqa: F401  (a fixture)
from transformers import TrainerCallback

from calibrate.training import estimate, readings, runs
from calibrate.training.trainers import CalibratedGRPOTrainer, CalibratedSFTTrainer

# Rank 4 on blocks 0 to 2 of width 32: 4 (inputs + outputs) of q and o (32 + 32), k and v (32 + 16), the MLP (32 + 64).
LORA = 3 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
MATRICES = 3 * 7 * 2


class Reporter(TrainerCallback):
    """Stands for trackio and the rest: it must not hear of a dry run."""

    def on_train_begin(self, args, state, control, **_):
        raise AssertionError("a dry run was reported")


def test_figures_by_hand(make, tiny):  # noqa: F811
    """AdamW keeps two float32 moments of every trained parameter, and a float32 counter of steps for each tensor."""
    trainer = make(
        max_steps=-1, num_train_epochs=12, gradient_accumulation_steps=2, text_anchor_every=3, contexts_per_step=2,
        arm="hinge-refit", refit_every=4, penalty_weight=1.0, callbacks=[Reporter()],
    )  # fmt: skip
    found = estimate.measure(trainer)
    base = sum(part.numel() for part in tiny.model.parameters())
    assert (found.parameters, found.trained) == (base + LORA, LORA)
    assert (found.weights, found.gradients) == (4 * (base + LORA), 4 * LORA)
    assert found.optimiser == 4 * (2 * LORA + MATRICES)

    # Two pairs in a micro-batch and two micro-batches in a step, twelve times over.
    micro_batches = -(-len(PAIRS) // 2)
    assert found.steps == 12 * -(-micro_batches // 2)
    assert found.refits == (found.steps - 1) // 4 > 0
    assert found.micro_steps == 2
    # A warm-up; three steps, after which an anchor of every third micro-step has come round; three of the task alone.
    assert trainer.state.global_step == 7
    assert trainer._calibration._step == 3  # counted from 0
    assert 3 <= found.timed <= 6  # the last step of an epoch may be short

    probes = [
        len(probe.ids)
        for side in (0, 1)
        for probe in readings.prepare(tiny.tokenizer, [twin[side] for twin in TWINS], 64)
    ]
    assert found.context_tokens == pytest.approx(2 * 2 * 2 * sum(probes) / len(probes))
    kinds = trainer._calibration.anchors.texts.values()
    means = [sum(len(text.ids) for text in kind) / len(kind) for kind in kinds]
    assert len(means) == 2
    assert found.text_tokens == pytest.approx(sum(means) / 2 * 2 / 3)
    files = [path for path in (readings.default_model.cache_folder()).glob("reference-*/*") if path.is_file()]
    tensors = [part for path in files for part in load_file(path).values()]
    assert len(files) == 2
    assert found.reference == sum(part.nbytes for part in tensors)

    micro_step = found.full_time
    expected = found.steps * (2 * micro_step + found.rest_time) + found.refits * found.refit_time
    assert found.minutes() == pytest.approx(expected / 60)
    assert min(found.task_time, found.full_time, found.rest_time, found.refit_time) > 0
    assert 2**26 < found.peak < 2**36


def test_task_tokens_are_those_of_the_data_without_padding(make, tokenizer):  # noqa: F811
    """One micro-batch holds all pairs: prompt and chosen, prompt and rejected."""
    trainer = make(per_device_train_batch_size=len(PAIRS), max_length=2048, **NO_TEXTS)
    rows = trainer.train_dataset
    expected = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    found = estimate.measure(trainer)
    assert set(found.batches) == {expected}
    assert found.task_tokens == expected
    assert found.text_tokens == 0


@pytest.mark.parametrize(
    ("options", "terms"), [({"arm": "none"}, False), ({"arm": "ablation"}, False), ({"arm": "output-kl"}, True)]
)
def test_other_arms(make, options, terms):  # noqa: F811
    found = estimate.measure(make(max_steps=40, **options))
    assert found.steps == 40
    assert (found.full_time is not None) == terms
    assert found.context_tokens == 0
    assert (found.text_tokens > 0) == terms
    assert (found.reference > 0) == terms
    assert ("with the calibration terms" in found.text()) == terms
    assert found.timed == 4


@pytest.mark.parametrize("kind", [CalibratedSFTTrainer, CalibratedGRPOTrainer])
def test_other_trainers(make_kind, kind):  # noqa: F811
    options = (
        {"reading_use": "both", "auroc_gate": 0.0, "arm": "hinge-frozen"} if kind is CalibratedGRPOTrainer else {}
    )
    found = estimate.measure(make_kind(kind, penalty_weight=1.0, **options))
    assert found.steps == 3
    assert found.full_time > 0
    assert found.task_tokens > 50


def in_process(monkeypatch, *words: str) -> None:
    """The script's own `__main__` part, in this process."""
    monkeypatch.setattr(sys, "argv", [str(recipe("dpo")), *words])
    runpy.run_path(str(recipe("dpo")), run_name="__main__")


def figures(text: str) -> dict[str, str]:
    """The lines of a dry run by name; DeepSpeed, where it is installed, prints one of its own."""
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines() if re.match(r"[a-z -]+  ", line))


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_recipe_end_to_end(tiny_folder, tiny_vectors, tmp_path, monkeypatch):
    aside, output = tmp_path / "tmp", tmp_path / "run"
    aside.mkdir()
    monkeypatch.setenv("TMPDIR", str(aside))
    dry = run(
        *LAUNCH,
        recipe("dpo"),
        *arguments("dpo", tiny_folder, tiny_vectors, output, {"dry_run": "true", "save_steps": 1}),
    )
    assert dry.returncode == 0, dry.stderr
    assert not output.exists()
    assert not list(aside.glob("calibrate-*"))  # the temporary folder is gone with the process
    lines = figures(dry.stdout)
    names = ["dry run", "parameters", "memory", "reference", "tokens", "micro-step", "batches", "whole run"]
    assert list(lines) == names
    assert re.fullmatch(r"[\d,]+ in all, 24,576 trained", lines["parameters"])  # of rank 16
    assert re.match(r"[\d.]+ s of the task alone, [\d.]+ s with the calibration terms", lines["micro-step"])
    assert re.fullmatch(r"2 optimiser steps of 2 micro-step\(s\): \d\.\d minutes .*", lines["whole run"])


def test_a_dry_run_changes_no_real_one(tiny_folder, tiny_vectors, tmp_path, monkeypatch, capsys):
    """The same bytes with a dry run before it and without, and the same folder with one after it."""
    weights = []
    for name in ("after", "fresh"):
        monkeypatch.setenv("CALIBRATE_CACHE", str(tmp_path / f"{name}-cache"))
        words = arguments("dpo", tiny_folder, tiny_vectors, tmp_path / name)
        if name == "after":
            with monkeypatch.context() as patch:
                patch.setattr(runs, "finish", None)  # nothing but the measured steps is run
                in_process(patch, *words, "--dry_run", "true", "--push_to_hub", "true")
            assert "whole run" in figures(capsys.readouterr().out)
            assert not (tmp_path / name).exists()
        in_process(monkeypatch, *words)
        weights.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert "dry_run" not in json.loads((tmp_path / "after" / "calibration" / "options.json").read_text())

    before = times(tmp_path / "after")
    capsys.readouterr()
    in_process(monkeypatch, *arguments("dpo", tiny_folder, tiny_vectors, tmp_path / "after", {"dry_run": "true"}))
    assert figures(capsys.readouterr().out)["whole run"].startswith("2 optimiser steps")
    assert times(tmp_path / "after") == before
