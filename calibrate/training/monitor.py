"""Readings of a few fixed texts while any trainer trains, logged beside its own metrics, with alerts by rule."""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from calibrate import activations, corpora, models
from calibrate.concepts import TARGET
from calibrate.corpora import Context
from calibrate.training import readings
from calibrate.vectors import load_vectors

logger = logging.getLogger(__name__)
TWINS = 4  # default probes: so many failing contexts and their passing twins
REPLY_TOKENS = 64
TOKEN_BUDGET = 2048  # padded tokens of one pass
PREFIX = "monitor/"
SIDES, ROLES = ("failing", "passing"), ("header", "reply")
_ROLE_WEIGHTS = {"header": 1.0, "reply": 1.0, "tool": 0.0}


class Level(NamedTuple):
    """Alerts while a metric, such as `desperate/failing_header`, is above or below a value; NaN is neither and alerts.

    Readings are in sigma of the reference's neutral text.
    """

    metric: str
    above: float = math.inf
    below: float = -math.inf

    def finding(self, history: list[float]) -> str | None:
        """What is wrong with the last reading, in words."""
        if self.below <= history[-1] <= self.above:
            return None
        return f"{self.metric} is {history[-1]:.3f}; allowed: {self.below} to {self.above}"


class Rise(NamedTuple):
    """Alerts where a metric is at least `by` above the lowest of the last `readings` before it."""

    metric: str
    by: float = 1.0
    readings: int = 3

    def finding(self, history: list[float]) -> str | None:
        """What is wrong with the last reading, in words."""
        earlier = history[:-1][-self.readings :]
        if not earlier or history[-1] - min(earlier) < self.by:
            return None
        return (
            f"{self.metric} is {history[-1]:.3f}, up {history[-1] - min(earlier):.3f} within {len(earlier)} reading(s)"
        )


class Alert(NamedTuple):
    """A rule that fired at an optimiser step."""

    step: int
    rule: Level | Rise
    text: str


class ReadingMonitor(TrainerCallback):
    """Reads a fixed set of texts every `every` optimiser steps of any transformers or TRL trainer.

    `trainer.add_callback(ReadingMonitor(trainer, "runs/vectors/train"))`. It is given the trainer, as TRL's own
    `LogCompletionsCallback` is: a callback is handed model and control, but nothing that logs, and metrics that it
    adds in `on_log` come after the reporters before it have run and after the row is in the history. All are logged as
    `monitor/...`, means over texts and over the vectors' band, before the first step and then every `every` steps:
    `CONCEPT/failing_header`, `.../failing_reply`, `.../passing_header`, `.../passing_reply` in sigma; `norm`, the
    geometric mean of the residual norms, and `norm_ratio`, it over the reference's; `alerts`, how many rules fired.

    The reference is the model at the start of the run, with any adapter disabled; a run that is resumed takes its
    readings from the log of the checkpoint. Weights, gradients and random numbers are left as they are.

    Cost at the defaults: the shipped texts have about 300 tokens, so 8 of them every 50 steps are 48 tokens a step,
    forward only and at most to the last block. Training costs a token at least as much as two forward passes (LoRA:
    forward, and back through the activations), so the share is at most 48 / (2 x task tokens per optimiser step):
    2.4 % at 1,000, and 3 % from 800 on. Below that, raise `every` in proportion.

    Args:
        vectors: folder or Hub id of vectors, or `default`; of this model, with the weights that the run starts from.
        every: optimiser steps between readings.
        rules: what alerts. Default: each concept's failing readings 1 sigma up within 3 readings, and the norm ratio
            outside 0.9 to 1.1. Judged from the first reading after the start; the start counts as an earlier reading.
        twins: JSONL of failing and passing contexts, all of which are read. Default: the 4 shortest plain ones of the
            shipped selection split, which no recipe trains on.
        stop: end the run at the first alert.

    Raises:
        ValueError: vectors, concepts, rules or contexts do not fit the trainer's model.
    """

    def __init__(
        self,
        trainer: Trainer,
        vectors: str,
        *,
        concepts: Sequence[str] = (TARGET,),
        every: int = 50,
        rules: Sequence[Level | Rise] | None = None,
        twins: str | None = None,
        stop: bool = False,
    ):
        self.trainer, self.concepts, self.every, self.stop = trainer, list(concepts), every, stop
        self.alerts: list[Alert] = []
        self._model = _model_of(trainer)
        self._check(every)
        loaded, config = load_vectors(vectors), models.text_config(self._model)
        # By shape only: the weights under an adapter have other names, and sharded ones are not whole.
        loaded.check(config.hidden_size, config.num_hidden_layers, loaded.weight_hash, config._name_or_path)
        layers = sorted(loaded.used_band())
        directions = loaded.directions[[loaded.index(name) for name in self.concepts]][:, loaded.positions(layers)]
        self._reader = readings.Reader(loaded, directions, layers)
        found = probe_twins(twins)
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        contexts = [failing for failing, _ in found] + [passing for _, passing in found]
        self._probes = readings.prepare(tokenizer, contexts, REPLY_TOKENS)
        self._names = [f"{concept}/{side}_{role}" for concept in self.concepts for side in SIDES for role in ROLES]
        self._names += ["norm", "norm_ratio"]
        self.rules = list(self._default_rules() if rules is None else rules)
        self._check_rules()
        self._tap = activations.Tap(self._model, layers)
        self._history: list[dict[str, float]] = []

    def _check(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"`every` is {every}; allowed: 1 or more optimiser steps")
        if self.trainer.processing_class is None:
            raise ValueError(
                "the trainer has no `processing_class`; give it the tokenizer (its chat template is used)"
            )

    def _default_rules(self) -> list[Level | Rise]:
        rises = [Rise(f"{concept}/failing_{role}") for concept in self.concepts for role in ROLES]
        return [*rises, Level("norm_ratio", above=1.1, below=0.9)]

    def _check_rules(self) -> None:
        for rule in self.rules:
            if rule.metric not in self._names:
                raise ValueError(f"a rule is about {rule.metric!r}; allowed: {', '.join(self._names)}")
            if isinstance(rule, Rise) and rule.readings < 1:
                raise ValueError(f"a rise over {rule.readings} readings; allowed: 1 or more")

    def on_train_begin(self, args, state, control, **_):
        """Takes the reference's readings, or where the run is resumed, those of its log."""
        if _model_of(self.trainer) is not self._model:
            raise ValueError("the trainer has made another model (`model_init`), which is not read; give it `model`")
        kept = [row for row in state.log_history if f"{PREFIX}norm" in row]
        self._history = [{name.removeprefix(PREFIX): value for name, value in row.items()} for row in kept]
        if state.global_step == 0:
            with models.as_reference(self._model):
                self._note(control, self._read())
        elif not self._history or any(name not in self._history[0] for name in self._names):
            raise ValueError(
                f"the checkpoint at step {state.global_step} has no log of these readings from its start, so the "
                "reference is not known; start anew, or go on without the monitor"
            )

    def on_step_end(self, args, state, control, **_):
        """Reads where it is time."""
        if state.global_step % self.every == 0:
            self._note(control, self._read())

    def _read(self) -> dict[str, float]:
        """All metrics of the model as it is; every process runs the same passes on the same texts."""
        model, accelerator = self._model, self.trainer.accelerator
        sequences = [probe.ids for probe in self._probes]
        values = torch.zeros(len(sequences), len(ROLES), len(self.concepts), device=accelerator.device)
        norms = torch.zeros(len(sequences), device=accelerator.device)
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for rows in activations.token_budget_batches([len(ids) for ids in sequences], TOKEN_BUDGET):
                    units = self._units(model, activations.collate(rows, sequences, accelerator.device))
                    by_unit = self._reader(units).mean(2)
                    values[rows, 0] = by_unit[:, 0]
                    values[rows, 1] = torch.einsum("ruc,ru->rc", by_unit[:, 1:], units.weights[:, 1:])
                    logs = units.states.norm(dim=-1).clamp(min=1e-6).log().mean(2)  # padding has weight 0
                    norms[rows] = (logs * units.weights).sum(1) / units.weights.sum(1)
        finally:
            model.train(training)
        return self._metrics(accelerator.reduce(values, "mean"), accelerator.reduce(norms, "mean"))

    def _units(self, model: Any, batch: activations.Batch) -> readings.Units:
        with models.cut_after(model, max(self._tap.layers)), self._tap.recording() as recorded:
            # Entered at the top, not at the decoder: sharded parameters are gathered there.
            model(**batch.inputs, use_cache=False, logits_to_keep=1)
        return readings.gather(recorded, batch.first, [self._probes[row] for row in batch.rows], _ROLE_WEIGHTS)

    def _metrics(self, values: Tensor, norms: Tensor) -> dict[str, float]:
        """Means over the texts of either side, of readings [texts, roles, concepts] and log norms [texts]."""
        half = len(values) // 2
        sides = torch.stack([values[:half].mean(0), values[half:].mean(0)])
        norm = float(norms.mean().exp())
        ratio = norm / (self._history[0]["norm"] if self._history else norm)
        # By concept, side and role, as the names are.
        return dict(zip(self._names, [*sides.permute(2, 0, 1).flatten().tolist(), norm, ratio], strict=True))

    def _note(self, control: Any, metrics: dict[str, float]) -> None:
        """Keeps and logs a reading, and raises the alerts."""
        first, step = not self._history, self.trainer.state.global_step
        self._history.append(metrics)
        raised = []
        for rule in [] if first else self.rules:
            if text := rule.finding([reading[rule.metric] for reading in self._history]):
                raised.append(Alert(step, rule, text))
        self.alerts += raised
        row = {f"{PREFIX}{name}": value for name, value in metrics.items()} | {f"{PREFIX}alerts": len(raised)}
        due = control.should_log
        # The base class's: TRL's trainers empty their running means into whatever row is logged next, which is to be
        # the step's own. Logging also counts as the log that is due at this step, so that is put back.
        Trainer.log(self.trainer, row)
        control.should_log = due
        if self.trainer.is_world_process_zero():
            for alert in raised:
                logger.warning("monitor: step %d: %s", alert.step, alert.text)
        if raised and self.stop:
            control.should_training_stop = True


def _model_of(trainer: Trainer) -> Any:
    """The trainer's model without wrappers, a PEFT model where there is an adapter."""
    return trainer.accelerator.unwrap_model(trainer.model)


def probe_twins(path: str | None) -> list[tuple[Context, Context]]:
    """The user's twins, all of them, or the `TWINS` shortest plain ones of the shipped selection split."""
    if path is not None:
        return corpora.load_twins(path)
    twins = [twin for twin in corpora.load_twins() if twin[0].split == "selection" and twin[0].context == "plain"]
    return sorted(twins, key=_characters)[:TWINS]


def _characters(twin: tuple[Context, Context]) -> int:
    return sum(len(message["content"]) for context in twin for message in context.messages)
