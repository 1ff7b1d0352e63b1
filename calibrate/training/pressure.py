"""Which directions are pressed and how far down: the target's or a control's, fixed or following the model."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from calibrate.training import arms, ceilings, readings, refit
from calibrate.training.arms import Arm
from calibrate.vectors import EmotionVectors

logger = logging.getLogger(__name__)


class Pressure:
    """Directions and ceilings of one run, kept in `OUTPUT/calibration` so that a resumed run has the same.

    Args:
        reference: unit states of all probes in the reference: `count` failing contexts, then their passing twins.
        main: whether this process writes.
    """

    def __init__(
        self,
        args: Any,
        vectors: EmotionVectors,
        layers: list[int],
        reference: readings.Reference,
        count: int,
        main: bool,
    ):
        self.args, self.vectors, self.layers, self.reference, self.count = args, vectors, layers, reference, count
        self.main, self.path = main, Path(str(args.output_dir)) / "calibration"
        targets = arms.target_directions(vectors, args.concepts, args.raise_concepts, args.rank, layers)
        self.press(targets)
        failing = list(range(count))
        self.initial_hinge = ceilings.initial_hinge(reference, failing, self.reader, self.ceilings, args.huber_delta)
        if args.arm in arms.CONTROLS:
            self._press_control(targets)
        self.start = self.reader.directions
        self.refit: refit.Refit | None = None
        self._refitted = 0  # the step of the refit in force

    def press(self, directions: Tensor) -> None:
        """Takes these directions [directions, layers, hidden], with ceilings from the reference's passing twins."""
        self.reader = readings.Reader(self.vectors, directions, self.layers)
        passing = list(range(self.count, 2 * self.count))
        self.ceilings = ceilings.quantiles(self.reference, passing, self.reader, self.args.ceiling_quantile)
        named = [*self.args.concepts, *self.args.raise_concepts]
        for concept, level in self.args.levels.items():
            sign = -1.0 if concept in self.args.raise_concepts else 1.0
            self.ceilings[..., named.index(concept) * self.args.rank] = sign * level

    def _press_control(self, targets: Tensor) -> None:
        """Another direction with the same dose: the real arm's initial hinge, by one shift of all ceilings."""
        args, failing = self.args, list(range(self.count))
        controls = arms.control_directions(args, self.vectors, targets, self.layers)
        if args.arm == Arm.RANDOM:  # it has no sign of its own: take the one that reads higher on failing contexts
            reader = readings.Reader(self.vectors, controls, self.layers)
            headers = torch.stack(
                [reader(units)[0, 0] for units in self.reference.stream(list(range(2 * self.count)))]
            )
            lower = headers[: self.count].mean((0, 1)) < headers[self.count :].mean((0, 1))
            controls = controls * torch.where(lower, -1.0, 1.0)[:, None, None]
        self.press(controls)
        if args.ceiling != "prevent":  # a ceiling at the reference's own readings starts at hinge 0 in every arm
            self.ceilings = ceilings.matched(
                self.reference, failing, self.reader, self.ceilings, args.huber_delta, self.initial_hinge
            )

    def follow(self, sources: list[list[refit.Source]], states: refit.States) -> None:
        """Lets the directions be refitted; called while the model is the reference."""
        raised = len(self.args.raise_concepts)
        self.refit = refit.Refit(self.vectors, self.layers, self.start, sources, self.args.rank, raised)
        self.refit.at_start = self.refit.measure(states)

    def refit_if_due(self, step: int, states: refit.States) -> float | None:
        """New directions every `refit_every` steps; returns the cosine of the new to the start, where there are new.

        A resumed run first takes those that were in force when it stopped. Every process reads the same texts.

        Raises:
            FileNotFoundError: the run is resumed, and the file of its last refit is gone.
        """
        due = step // self.args.refit_every * self.args.refit_every
        if self.refit is None or due == self._refitted:
            return None
        before = due if step > due else due - self.args.refit_every  # the refit in force up to now
        if before != self._refitted:
            self.press(load_file(self._refit_file(before))["directions"])
        self._refitted = due
        if before == due:
            return None
        self.press(self.refit.directions(self.refit.measure(states), self.args.arm, self.reader.directions))
        if self.main:
            readings.write(self._refit_file(due), {"directions": self.reader.directions})
        rank = self.args.rank  # only the first row of a concept is refitted, its neighbours stay
        return refit.cosine(self.refit.fresh[::rank], self.start[::rank])

    def _refit_file(self, step: int) -> Path:
        return self.path / f"refit-{step}.safetensors"

    def load_or_save(self) -> float | None:
        """Takes what the run started with and returns the penalty's weight, where it has been set; else saves it."""
        tensors = {"directions": self.reader.directions, "ceilings": self.ceilings}
        if not (self.path / "state.json").is_file():
            if self.main:
                readings.write(self.path / "tensors.safetensors", tensors)
                self.save_state(None)
            return None
        kept = load_file(self.path / "tensors.safetensors")
        for name, tensor in tensors.items():
            # Read again on another machine, the reference differs in the last digits.
            if kept[name].shape != tensor.shape or not torch.allclose(kept[name], tensor, rtol=0, atol=1e-3):
                raise ValueError(
                    f"{self.path}: the {name} differ from those that this run started with; use another `output_dir`"
                )
        self.reader = readings.Reader(self.vectors, kept["directions"], self.layers)
        self.ceilings = kept["ceilings"].clone()
        return json.loads((self.path / "state.json").read_text())["penalty_weight"]

    def save_state(self, penalty_weight: float | None) -> None:
        """Keeps arm, layers, weight and mean ceilings by role as JSON."""
        state = {
            "arm": self.args.arm,
            "layers": self.layers,
            "initial_hinge": self.initial_hinge,
            "penalty_weight": penalty_weight,
            "ceilings": dict(zip(readings.ROLES, self.ceilings.mean((1, 2)).tolist(), strict=True)),
        }
        aside = self.path / "state.json.partial"
        aside.write_text(json.dumps(state, indent=2), encoding="utf-8")
        os.replace(aside, self.path / "state.json")
