"""
The cost of the calibration terms: a calibrated DPO step against TRL's plain one on the same task batch.

```bash
python benchmarks/training.py            # time: A/B/A/B in turn, median ratio with its interval
python benchmarks/training.py --terms    # the terms alone against the bare passes that they need, and a refit
python benchmarks/training.py --memory   # peak memory of each, one process each
python benchmarks/training.py --monitor  # a reading of the monitor against the steps between two of them
```

Two micro-steps make one measurement, because the text anchors run at every second one. `bare` is what the extra
forward and backward passes cost without us: the same contexts through the cut body, and the same text through the
whole model, with the mean of the outputs as a loss.
"""

import argparse
import itertools
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from calibrate import activations, corpora, models, stats
from calibrate.training import adapters, arms
from calibrate.training.configs import CalibratedDPOConfig
from calibrate.training.monitor import ReadingMonitor
from calibrate.training.objective import Data
from calibrate.training.trainers import CalibratedDPOTrainer

MICRO_STEPS = 2
# Short contexts and pairs of short contexts: the ratio is that of the tokens, not of their sum.
MAX_CONTEXT_TOKENS = 300


def make(kind: type, folder: str, pairs: int):
    """A DPO trainer of the default model with LoRA up to the band; `pairs` pairs a micro-step."""
    checkpoint = models.load("default")
    twins = [twin for twin in corpora.load_twins() if twin[0].split == "train"]
    chosen = arms.prompts_of("none", [p for p in corpora.load_pairs() if (p.split, p.context) == ("train", "plain")])
    rows = [{name: getattr(pair, name) for name in ("prompt", "chosen", "rejected")} for pair in chosen]
    options: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": pairs, "max_length": 1024, "report_to": "none",
        "use_cpu": not torch.cuda.is_available(), "bf16": torch.cuda.is_available(), "gradient_checkpointing": False,
        "disable_tqdm": True, "save_strategy": "no", "max_steps": 1000,
    }  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    shared: dict[str, Any] = {
        "model": checkpoint.model, "processing_class": checkpoint.tokenizer, "peft_config": lora,
        "train_dataset": Dataset.from_list(rows),
    }  # fmt: skip
    calibrated = CalibratedDPOConfig(
        vectors="default", penalty_weight=1.0, max_context_tokens=MAX_CONTEXT_TOKENS, **options
    )
    adapters.keep_below_band(lora, calibrated)  # the plain run too: the same parameters are trained
    if kind is DPOTrainer:
        return DPOTrainer(args=DPOConfig(**options), **shared)
    dialogues = [row for row in corpora.load_neutral() if row.split == "train"]
    stories = [story for story in corpora.load_stories() if story.split == "train"]
    return kind(args=calibrated, data=Data(twins, dialogues, stories), weight_hash=checkpoint.weight_hash, **shared)


def clock() -> float:
    """CPU seconds of this process, or wall seconds on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(trainer, batch: dict, first: int) -> float:
    """Seconds of two micro-steps, forward and backward, without the optimiser; contexts go on from step `first`."""
    start = clock()
    for step in range(MICRO_STEPS):
        trainer.state.global_step = first + step
        with trainer.accelerator.autocast():  # autocast, on a GPU
            loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        trainer.model.zero_grad()
    return clock() - start


def texts_of(trainer, step: int) -> tuple[list[list[int]], Any]:
    """Token ids of a micro-step's contexts, and the anchor text whose turn it is, if any."""
    objective = trainer._calibration
    rows, every = objective._rows(step), objective.args.text_anchor_every
    contexts = [probe.ids for side in (objective.failing, objective.passing) for probe in (side[row] for row in rows)]
    if step % every:
        return contexts, None
    kinds, index = list(objective.anchors.texts.values()), step // every
    kind = kinds[index % len(kinds)]
    return contexts, kind[index // len(kinds) % len(kind)]


def extra_tokens(trainer, first: int) -> int:
    found = [texts_of(trainer, step) for step in range(first, first + MICRO_STEPS)]
    return sum(sum(map(len, contexts)) + (len(text.ids) if text else 0) for contexts, text in found)


def bare(trainer, first: int) -> tuple[float, float]:
    """Seconds of the contexts' passes and of the text anchors' in the same micro-steps, by plain means."""
    model, device = trainer.model, trainer.accelerator.device
    contexts = texts = 0.0
    for step in range(first, first + MICRO_STEPS):
        sequences, text = texts_of(trainer, step)
        start = clock()
        batch = activations.collate(list(range(len(sequences))), sequences, device)
        with models.cut_after(model, max(trainer._calibration.layers)), trainer.accelerator.autocast():
            loss = model(**batch.inputs, use_cache=False, logits_to_keep=1).logits.mean()
        loss.backward()
        contexts += clock() - start
        if text:
            start = clock()
            batch = activations.collate([0], [text.ids], device)
            at = torch.tensor(text.positions, device=device)
            with trainer.accelerator.autocast():
                loss = model(**batch.inputs, use_cache=False, logits_to_keep=at).logits.mean()
            loss.backward()
            texts += clock() - start
        model.zero_grad()
    return contexts, texts


def terms(trainer, first: int) -> float:
    """Seconds of the calibration terms of the same micro-steps, forward and backward, without the task."""
    objective, model, start = trainer._calibration, trainer.model, clock()
    for step in range(MICRO_STEPS):
        trainer.state.global_step = first + step
        with trainer.accelerator.autocast():
            loss = objective(trainer.accelerator.unwrap_model(model), torch.zeros(()))
        loss.backward()
        model.zero_grad()
    return clock() - start


def refit(trainer) -> float:
    """Seconds of one refit, which comes every `refit_every` steps."""
    objective, start = trainer._calibration, clock()
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        objective.pressure.refit.measure(lambda texts: objective._mean_states(trainer.model, texts))
    trainer.model.train()
    return clock() - start


def ratio(above: list[float] | np.ndarray, below: list[float] | np.ndarray) -> str:
    """Median of the pairwise ratios with a 95 % bootstrap interval."""
    values = np.asarray(above) / np.asarray(below)
    found = stats.bootstrap(lambda v: float(np.median(v)), values)
    return f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}] ({len(values)} pairs)"


def times(pairs: int, rounds: int) -> None:
    """A calibrated step against a plain one, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = make(DPOTrainer, f"{folder}/plain", pairs), make(CalibratedDPOTrainer, f"{folder}/ours", pairs)
        batch = ours._prepare_inputs(next(iter(ours.get_train_dataloader())))
        task = int(batch["attention_mask"].sum()) * MICRO_STEPS
        for trainer in (plain, ours):
            trainer.model.train()
            measure(trainer, batch, 0)  # the first passes are slower
        seconds: dict[str, list[float]] = {"plain": [], "calibrated": []}
        extra = 0
        for number in range(rounds):
            first = MICRO_STEPS * (number + 1)
            seconds["plain"].append(measure(plain, batch, first))
            seconds["calibrated"].append(measure(ours, batch, first))
            extra += extra_tokens(ours, first)
            report(number, rounds, seconds)
        print(
            f"task tokens {task}, extra tokens {extra // rounds} ({extra / rounds / task:.0%}), {pairs} pairs a step"
        )
        print(f"calibrated / plain: {ratio(seconds['calibrated'], seconds['plain'])}")


def overhead(rounds: int) -> None:
    """Our terms against their bare passes, without a task; and what one refit takes."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(CalibratedDPOTrainer, folder, 1)
        trainer.model.train()
        terms(trainer, 0)
        seconds: dict[str, list[float]] = {"terms": [], "bare contexts": [], "bare text anchors": []}
        for number in range(rounds):
            first = MICRO_STEPS * (number + 1)
            seconds["terms"].append(terms(trainer, first))
            contexts, texts = bare(trainer, first)
            seconds["bare contexts"].append(contexts)
            seconds["bare text anchors"].append(texts)
            report(number, rounds, seconds)
        both = np.array(seconds["bare contexts"]) + seconds["bare text anchors"]
        print(f"our terms / bare passes: {ratio(seconds['terms'], both)}")
        print(f"one refit, every {trainer.args.refit_every} steps: {refit(trainer):.1f} s")


def report(number: int, rounds: int, seconds: dict[str, list[float]]) -> None:
    """One line a round, and medians after the last."""
    print(
        f"round {number + 1} of {rounds}: " + ", ".join(f"{k} {v[-1]:.1f} s" for k, v in seconds.items()), flush=True
    )
    if number + 1 == rounds:
        print("medians: " + ", ".join(f"{k} {statistics.median(v):.2f} s" for k, v in seconds.items()))


def monitor() -> None:
    """Share of a reading of the default monitor in the plain steps, of one pair each, between two of them."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(DPOTrainer, folder, 1)
        trainer.model.train()
        watch = ReadingMonitor(trainer, "default")
        batches = list(itertools.islice(trainer.get_train_dataloader(), 9))
        steps, reads = [], []
        for batch in batches:
            steps.append(measure(trainer, trainer._prepare_inputs(batch), 0) / MICRO_STEPS)
            start = clock()
            with trainer.accelerator.autocast():
                watch._read()
            reads.append(clock() - start)
    print(f"step: median {statistics.median(steps):.2f} s; reading: median {statistics.median(reads):.2f} s")
    found = ratio(np.array(reads), np.array(steps) * watch.every)
    print(f"reading / {watch.every} steps: {found}")


def peak(which: str, pairs: int) -> None:
    """Prints the peak memory of two micro-steps in this process, MiB."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(DPOTrainer if which == "plain" else CalibratedDPOTrainer, folder, pairs)
        trainer.model.train()
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        measure(trainer, batch, 0)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="pairs a micro-step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--monitor", action="store_true")
    parser.add_argument("--terms", action="store_true")
    parser.add_argument("--peak", choices=("plain", "calibrated"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        return peak(arguments.peak, arguments.pairs)
    if arguments.terms:
        return overhead(arguments.rounds)
    if arguments.monitor:
        return monitor()
    if not arguments.memory:
        return times(arguments.pairs, arguments.rounds)
    found = {}
    for which in ("plain", "calibrated"):
        command = [sys.executable, __file__, "--peak", which, "--pairs", str(arguments.pairs)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[which] = float(printed.split()[-1])
        print(f"{which}: {found[which]:.0f} MiB")
    print(f"calibrated / plain: {found['calibrated'] / found['plain']:.3f}")


if __name__ == "__main__":
    main()
