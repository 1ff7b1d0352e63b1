"""`dry_run`: what a run would take, from a few real steps in a temporary folder; nothing of them is kept."""

import atexit
import contextlib
import math
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from calibrate.training.arms import Arm

KIB, MIB = 2**10, 2**20
LEAST_TIMED = 4  # micro-steps with the calibration terms, and as many without: single batches differ in length


class Estimate(NamedTuple):
    """Memory in bytes, tokens of all processes for one optimiser step, times in seconds."""

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimiser: int  # of this process, measured after a step
    reference: int  # states of the reference on disk
    peak: int  # of this process
    steps: int  # optimiser steps of the whole run
    micro_steps: int  # of an optimiser step
    task_tokens: float
    context_tokens: float
    text_tokens: float
    batches: list[int]  # task tokens of each micro-batch that was run
    timed: int  # micro-steps behind each of the two times below
    task_time: float  # of a micro-step, forward and backward
    full_time: float | None  # with the calibration terms; None: the loss has none
    rest_time: float  # of an optimiser step beyond its micro-steps: clipping and the step itself
    refit_time: float
    refits: int

    def minutes(self) -> float:
        """Of the whole run, without loading and saving."""
        micro_step = self.task_time if self.full_time is None else self.full_time
        step = self.micro_steps * micro_step + self.rest_time
        return (self.steps * step + self.refits * self.refit_time) / 60

    def text(self) -> str:
        """One line for each figure."""
        mean = sum(self.batches) / len(self.batches)
        peak = "of the GPU" if torch.cuda.is_available() else "resident"
        extra = (self.context_tokens + self.text_tokens) / self.task_tokens
        full = "" if self.full_time is None else f", {self.full_time:.3f} s with the calibration terms"
        refits = f", {self.refits} refits of {self.refit_time:.2f} s" if self.refits else ""
        lines = {
            "dry run": "nothing is trained, and nothing written to the output folder",
            "parameters": f"{self.parameters:,} in all, {self.trained:,} trained",
            "memory": f"{self.weights / MIB:,.1f} MiB weights and {self.gradients / MIB:,.1f} gradients of the whole "
            f"model; of a process {self.optimiser / MIB:,.1f} optimiser states, peak {self.peak / MIB:,.1f} {peak}",
            "reference": f"{self.reference / MIB:,.1f} MiB of states in the cache on disk",
            "tokens": f"{self.task_tokens:,.0f} of the task, {self.context_tokens:,.0f} of contexts and "
            f"{self.text_tokens:,.0f} of anchor texts per optimiser step ({extra:.0%} extra)",
            "micro-step": f"{self.task_time:.3f} s of the task alone{full}, there and back, mean of {self.timed}",
            "batches": f"timed on the first of the run, typical ones, not its longest: {mean:,.0f} task tokens on "
            f"average, {max(self.batches):,} at most",
            "whole run": f"{self.steps:,} optimiser steps of {self.micro_steps} micro-step(s){refits}: "
            f"{self.minutes():,.1f} minutes without loading and saving",
        }
        return "".join(f"{name:<12}{line}\n" for name, line in lines.items())


def set_aside(args: Any) -> None:
    """Points a run at a folder that goes with the process, and keeps it from making a repository on the Hub."""
    args.output_dir = tempfile.mkdtemp(prefix="calibrate-dry-run-")
    args.push_to_hub = False
    atexit.register(shutil.rmtree, args.output_dir, ignore_errors=True)


def measure(trainer: Any) -> Estimate:
    """Runs a few steps and measures them; the trainer's model is of no use afterwards."""
    args, objective = trainer.args, trainer._calibration
    sizes = _sizes(trainer.model)  # before it is sharded
    steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
    refits = (steps - 1) // args.refit_every if objective and objective.pressure.refit else 0
    timer, batches = _run(trainer)
    task, full = (timer.micro["task"], timer.micro["all"]) if objective else (timer.micro["all"], [])
    contexts, texts = _calibration_tokens(args, objective)
    share = args.gradient_accumulation_steps * trainer.accelerator.num_processes
    return Estimate(
        **sizes,
        optimiser=_optimiser_bytes(trainer.optimizer),
        reference=_reference_bytes(objective),
        peak=_peak_bytes(),
        steps=steps,
        micro_steps=args.gradient_accumulation_steps,
        task_tokens=sum(batches) / len(batches) * share,
        context_tokens=contexts * share,
        text_tokens=texts * share,
        batches=batches,
        timed=len(task),
        task_time=sum(task) / len(task),
        full_time=sum(full) / len(full) if full else None,
        rest_time=sum(timer.rest) / len(timer.rest),
        refit_time=_refit_time(trainer, objective) if refits else 0.0,
        refits=refits,
    )


def _sizes(model: Any) -> dict[str, int]:
    parts = [(part.numel(), part.numel() * part.element_size(), part.requires_grad) for part in model.parameters()]
    return {
        "parameters": sum(count for count, _, _ in parts),
        "trained": sum(count for count, _, trained in parts if trained),
        "weights": sum(size for _, size, _ in parts),
        "gradients": sum(size for _, size, trained in parts if trained),
    }


def _run(trainer: Any) -> tuple["_Timer", list[int]]:
    """One step to warm up, then some in which text anchors have their share, then as many of the task alone.

    Returns:
        The times, and the task's tokens in each micro-batch.
    """
    args, objective = trainer.args, trainer._calibration
    every, accumulation = args.text_anchor_every if objective else 1, args.gradient_accumulation_steps
    cycle = every // math.gcd(every, accumulation)  # steps after which the text anchors come round
    timer = _Timer(trainer, cycle * math.ceil(LEAST_TIMED / (cycle * accumulation)))
    args.max_steps = 1 + (2 if objective else 1) * timer.count
    refit_every, args.refit_every = args.refit_every, sys.maxsize  # timed by itself
    # Neither reporters, nor checkpoints and evaluation, which the default callbacks start.
    trainer.callback_handler.callbacks = [timer]
    with _counting(trainer) as batches:
        trainer.train()
    trainer._calibration, args.refit_every = objective, refit_every
    return timer, batches


class _Timer(TrainerCallback):
    """Times micro-steps; after `count` steps beyond the first, the trainer goes on without its calibration terms."""

    def __init__(self, trainer: Any, count: int):
        self.trainer, self.count = trainer, count
        self.micro: dict[str, list[float]] = {"first": [], "all": [], "task": []}
        self.rest: list[float] = []

    def on_step_begin(self, args, state, control, **_):
        self.block = "first" if state.global_step == 0 else "all" if state.global_step <= self.count else "task"
        if self.block == "task":
            self.trainer._calibration = None
        self.since = _now()

    def on_substep_end(self, args, state, control, **_):
        before, self.since = self.since, _now()
        self.micro[self.block].append(self.since - before)

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.on_substep_end(args, state, control)

    def on_step_end(self, args, state, control, **_):
        self.rest.append(_now() - self.since)
        control.should_training_stop = state.global_step >= args.max_steps


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def _counting(trainer: Any) -> Generator[list[int]]:
    """Collects the task's tokens, without padding, of each micro-batch that reaches the loss."""
    counts: list[int] = []
    plain = trainer.compute_loss

    def compute_loss(model, inputs, **options):
        counts.append(_tokens(inputs))
        return plain(model, inputs, **options)

    trainer.compute_loss = compute_loss
    try:
        yield counts
    finally:
        del trainer.compute_loss


def _tokens(inputs: dict[str, Any]) -> int:
    """Real tokens of a batch; GRPO has prompts and completions apart, padding-free batches have no mask."""
    masks = [inputs[name] for name in ("attention_mask", "prompt_mask") if name in inputs]
    if "prompt_mask" in inputs:
        masks.append(inputs["completion_mask"])
    return sum(int(mask.sum()) for mask in masks) if masks else inputs["input_ids"].numel()


def _calibration_tokens(args: Any, objective: Any) -> tuple[float, float]:
    """Mean tokens of one micro-step of one process: of contexts with their twins, and of anchor texts."""
    if objective is None:
        return 0.0, 0.0
    contexts = texts = 0.0
    if args.arm != Arm.OUTPUT_KL:
        probes = objective.failing + objective.passing
        contexts = 2 * args.contexts_per_step * sum(len(probe.ids) for probe in probes) / len(probes)
    if objective.anchors:
        kinds = objective.anchors.texts.values()  # in turn
        texts = sum(sum(len(text.ids) for text in kind) / len(kind) for kind in kinds) / len(kinds)
    return contexts, texts / args.text_anchor_every


def _optimiser_bytes(optimizer: Any) -> int:
    parts = [part for kept in optimizer.state.values() for part in kept.values() if isinstance(part, Tensor)]
    return sum(getattr(part, "_local_tensor", part).nbytes for part in parts)  # of a sharded one, the part held here


def _reference_bytes(objective: Any) -> int:
    """From the headers of the files, so that they need not be read."""
    holders = [holder for holder in (objective.reference, objective.anchors) if holder] if objective else []
    parts = [holder._file.get_slice(name) for holder in holders for name in holder._file.keys()]  # noqa: SIM118
    return sum(math.prod(part.get_shape()) * int(part.get_dtype().lstrip("BFIU")) // 8 for part in parts)


def _refit_time(trainer: Any, objective: Any) -> float:
    begun = _now()
    objective._follow(trainer.accelerator.unwrap_model(trainer.model_wrapped), trainer.args.refit_every)
    return _now() - begun


def _peak_bytes() -> int:
    """Most memory held at once so far: of the GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
