"""The calibration terms of one run: the penalty on failing contexts, the anchors, and their weights."""

import logging
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calibrate import activations, models
from calibrate.corpora import Context, Dialogue, Story
from calibrate.training import anchors, arms, ceilings, losses, readings, refit
from calibrate.training.arms import Arm
from calibrate.training.pressure import Pressure
from calibrate.vectors import EmotionVectors, load_vectors

logger = logging.getLogger(__name__)
NORM_ALLOWED = 0.1  # share by which residual norms may differ from the reference's before the guard pays
SMALLEST_PENALTY = 1e-8  # below it the first penalty is rounding between two passes of the same weights
WEIGHING_BATCHES = 4  # batches of contexts whose penalty sets its weight: one alone may lie below the ceiling
MET_WINDOW = 8  # optimiser steps over which readings are averaged to see whether the ceiling is met


class Data(NamedTuple):
    """The texts of the calibration terms, all of the train split."""

    twins: list[tuple[Context, Context]]  # failing and passing
    dialogues: list[Dialogue]
    stories: list[Story]
    prepared: bool = False  # whether they, model and training set are what `runs.prepare` makes of the options


class Objective:
    """The calibration terms of one run. Made before the first step, when the model is still the reference."""

    def __init__(self, trainer: Any, data: Data):
        self.args, self.trainer, self.accelerator = trainer.args, trainer, trainer.accelerator
        tokenizer, model = trainer.processing_class, self.accelerator.unwrap_model(trainer.model)
        vectors = load_vectors(self.args.vectors)
        self.layers = self._check(vectors, data)
        self._role_weights = dict(zip(readings.ROLES, self.args.role_weights(), strict=True))
        tool = self.args.tool_weight > 0 and self.args.arm != Arm.OUTPUT_KL
        both = [
            readings.prepare(tokenizer, [twin[side] for twin in data.twins], self.args.reply_tokens, tool)
            for side in (0, 1)
        ]
        kept = self._short_enough(both)
        data = data._replace(twins=[data.twins[row] for row in kept])
        self.failing, self.passing = ([side[row] for row in kept] for side in both)
        probes = self.failing + self.passing
        if tool and not all(probe.tool.stop > probe.tool.start for probe in probes):
            raise ValueError(
                f"`tool_weight` is {self.args.tool_weight}, but a context has no tool result; set it to 0"
            )
        self.tap = activations.Tap(model, self.layers)
        identity = f"{readings.digest(model)} {self.accelerator.mixed_precision}"
        if readings.casts_weights(self.accelerator):
            identity += f" {self.accelerator.distributed_type.value}"
        with readings.as_trained(self.accelerator, model):
            self.reference = readings.reference(model, probes, self.layers, self._role_weights, identity)
        main = self.accelerator.is_main_process
        self.pressure = Pressure(self.args, vectors, self.layers, self.reference, len(self.failing), main)
        concepts = [*self.args.concepts, *self.args.raise_concepts]
        targets = self.pressure.start
        self.side = readings.Reader(
            vectors, arms.side_directions(vectors, targets, concepts, self.layers), self.layers
        )
        with readings.as_trained(self.accelerator, model):
            self.anchors = self._anchors(model, tokenizer, data, concepts, identity)
        if self.args.refits():
            sources = refit.sources_of(tokenizer, self.args, data.stories, [failing for failing, _ in data.twins])
            with models.as_reference(model), readings.as_trained(self.accelerator, model):
                self.pressure.follow(sources, lambda texts: self._mean_states(model, texts))
        self._metrics: dict[str, list[Tensor]] = defaultdict(list)
        self._step, self._micro = -1, 0
        self._excess: list[float] = []
        self.met = False  # whether readings on failing contexts are at or below the ceiling
        self.penalty_weight: float | None = None
        self._kept_weight = self.pressure.load_or_save()
        if self.args.penalty_weight is not None or self.args.penalty_share == 0:
            self.penalty_weight = self.args.penalty_weight or 0.0
            if self.args.penalty_weight is not None and self.args.arm in arms.CONTROLS:
                logger.info(
                    "`penalty_weight` is fixed, so arm %s does not match the real arm's gradient share", self.args.arm
                )
        self.accelerator.wait_for_everyone()
        logger.info(
            "arm %s on layers %d to %d, initial hinge %.3f sigma^2, %d context(s), vectors of %s", self.args.arm,
            self.layers[0], self.layers[-1], self.pressure.initial_hinge, len(self.failing), vectors.model,
        )  # fmt: skip

    def _check(self, vectors: EmotionVectors, data: Data) -> list[int]:
        """The layers; refuses contexts that do not fit, and a share of gradients that nobody could measure."""
        layers = sorted(self.args.layers or vectors.used_band())
        vectors.positions(layers)  # raises where one is not stored
        if not data.twins:
            raise ValueError(
                'there are no failing and passing contexts with `"split": "train"`; give some with `twins`'
            )
        unlike = [failing.task for failing, passing in data.twins if failing.reply != passing.reply]
        if unlike and self.args.arm == Arm.CONSISTENCY:
            raise ValueError(
                f"`arm: consistency` compares the same reply on both sides, but the twins of {len(unlike)} contexts "
                f"differ in it (first: task {unlike[0]!r}); give both the same `reply`, and set `hinge_reply: opening`"
            )
        if readings.casts_weights(self.accelerator) and self.args.measures_share():
            raise ValueError(
                f"`penalty_share` {self.args.penalty_share} compares gradients of whole parameters, which FSDP and "
                "DeepSpeed manage themselves; set `penalty_weight` (a run on one process prints and saves the one it "
                "found)"
            )
        return layers

    def _short_enough(self, both: list[list[readings.Probe]]) -> list[int]:
        """Rows whose context and twin have `max_context_tokens` or fewer."""
        longest = [max(map(len, (failing.ids, passing.ids))) for failing, passing in zip(*both, strict=True)]
        most = self.args.max_context_tokens or max(longest)
        kept = [row for row, length in enumerate(longest) if length <= most]
        if not kept:
            raise ValueError(
                f"`max_context_tokens` is {most}, but the shortest context and twin have {min(longest)}; raise it"
            )
        if len(kept) < len(longest):
            logger.info(
                "%d of %d contexts have %d tokens or fewer; the others are left out", len(kept), len(longest), most
            )
        return kept

    def _anchors(self, model: Any, tokenizer: Any, data: Data, concepts: list[str], identity: str):
        args, seed, texts = self.args, self.args.seed, {}
        if args.kl_weight:
            passing = [passing for _, passing in data.twins]
            texts["neutral"] = anchors.neutral_texts(tokenizer, data.dialogues, passing, args.anchor_texts, seed)
        if (args.concept_weight or args.concept_kl_weight) and args.arm != Arm.OUTPUT_KL:
            texts["story"] = anchors.story_texts(tokenizer, data.stories, concepts, args.anchor_texts, seed)
        if args.same_kl_weight:
            texts["same"] = anchors.same_texts(self.failing)
        return anchors.Anchors(model, texts, self.tap, identity) if texts else None

    def _mean_states(self, model: Any, texts: list[refit.Text]) -> Tensor:
        """Mean state of each text's tokens in the model as it is, [texts, layers, hidden]."""
        rows = []
        for text in texts:
            states, _ = self._forward(model, [text.ids])
            rows.append(torch.stack([states[layer][0, text.tokens].float().mean(0) for layer in self.layers]))
        return torch.stack(rows).cpu()

    def __call__(self, model: Any, task_loss: Tensor) -> Tensor:
        """The weighted sum of all terms for this micro-step, to be added to the task's loss."""
        step = self.trainer.state.global_step
        self._micro = self._micro + 1 if step == self._step else 0
        if step and self._step == -1:
            self._resume()
        if step != self._step:
            self._step = step
            self._follow(model, step)
        micro_step = step * self.args.gradient_accumulation_steps + self._micro
        if self.penalty_weight is None and self.args.arm != Arm.OUTPUT_KL:
            self._set_penalty_weight(model, task_loss)
        terms = {} if self.args.arm == Arm.OUTPUT_KL else self._context_terms(model, micro_step)
        if self.anchors and micro_step % self.args.text_anchor_every == 0:
            index = micro_step // self.args.text_anchor_every
            terms |= self.anchors.terms(model, index, self.accelerator.device)
        warmup = min(1.0, (step + 1) / max(1, self.args.penalty_warmup_steps))
        weights = self.args.term_weights() | {"penalty": (self.penalty_weight or 0.0) * warmup}
        for name, term in terms.items():
            self._metrics[f"calibration/{name}"].append(term.detach())
        self._metrics["calibration/penalty_weight"].append(torch.tensor(weights["penalty"]))
        total = torch.zeros((), device=task_loss.device)
        return total + sum(weights[name] * term for name, term in terms.items())

    def _resume(self) -> None:
        """Takes from the output folder and the log what the run had when it stopped."""
        if self.penalty_weight is None:
            self.penalty_weight = self._kept_weight
        if self.args.stop_when_met:
            self._excess = self._logged_excess()

    def _follow(self, model: Any, step: int) -> None:
        """Refits the directions where it is time."""
        training = model.training
        model.eval()
        with torch.no_grad():
            moved = self.pressure.refit_if_due(step, lambda texts: self._mean_states(model, texts))
        model.train(training)
        if moved is not None:
            self._metrics["refit/cosine_to_start"].append(torch.tensor(moved))

    def _context_terms(self, model: Any, micro_step: int) -> dict[str, Tensor]:
        """Penalty, guard and side term on failing contexts, anchor on their twins: one pass, cut after the band."""
        rows = self._rows(micro_step)
        units, before = self._read(model, [*rows, *(row + len(self.failing) for row in rows)])
        failing, failing_before, passing, passing_before = (
            readings.Units(*(tensor[side] for tensor in part))
            for side in (slice(len(rows)), slice(len(rows), None))
            for part in (units, before)
        )
        read, weights = self.pressure.reader, failing.weights
        ratio = failing.states.norm(dim=-1) / failing_before.states.norm(dim=-1).clamp(min=1e-6)
        self._metrics["reading/header_passing"].append(read(passing)[:, 0].mean().detach())
        self._metrics["calibration/norm_ratio"].append(losses.mean(ratio.detach()[..., None], weights))
        side = {"side": losses.squared_change(self.side(failing), self.side(failing_before), weights)}
        return (side if len(self.side.directions) else {}) | {
            "penalty": self._penalty(failing, failing_before, rows),
            "anchor": losses.squared_change(read(passing), read(passing_before), passing.weights),
            "norm": losses.norm_guard(ratio, weights, NORM_ALLOWED),
        }

    def _read(self, model: Any, rows: list[int]) -> tuple[readings.Units, readings.Units]:
        """The units of these probes (failing contexts, then their twins) now and in the reference."""
        probes = [[*self.failing, *self.passing][row] for row in rows]
        states, first = self._forward(model, [probe.ids for probe in probes])
        return readings.gather(states, first, probes, self._role_weights), self._before(rows)

    def _before(self, rows: list[int]) -> readings.Units:
        return readings.Units(*(part.to(self.accelerator.device) for part in self.reference.rows(rows)))

    def _penalty(self, units: readings.Units, reference: readings.Units, rows: list[int]) -> Tensor:
        """The penalty in the shape that is asked for, on the failing contexts `rows`."""
        args, weights, read = self.args, units.weights, self.pressure.reader
        if args.arm == Arm.CONSISTENCY:
            return _distance(units, self._before([row + len(self.failing) for row in rows]))
        values, before = read(units), read(reference)
        limit = ceilings.limits(args.ceiling, self.pressure.ceilings, args.ceiling_margin, units.roles, before)
        self._note(values.detach(), limit, units)
        if args.penalty == "hinge":
            # Readings that the reference already has below the corridor are left where they are, not pulled up.
            floor = torch.minimum(limit - args.corridor, before)
            return losses.hinge(values, limit, weights, args.huber_delta, floor)
        if args.penalty == "absolute":
            return losses.absolute(values, weights)
        if args.penalty == "cosine":
            norms = read.centred(units).norm(dim=-1)[..., None]
            return losses.cosine(values, read.sigmas.to(values.device)[units.roles], norms, weights)
        goal = {"squared": 0.0, "change": before, "set-point": before - args.set_point}[args.penalty]
        return losses.squared_change(values, goal, weights)

    def _note(self, values: Tensor, limit: Tensor, units: readings.Units) -> None:
        """Logs the reading at the header and how far readings stand above the ceiling, and whether that is met."""
        excess = losses.mean(values - limit, units.weights)
        self._metrics["reading/header_failing"].append(values[:, 0].mean())
        self._metrics["reading/above_ceiling"].append(excess)
        if self.args.stop_when_met:
            window = MET_WINDOW * self.args.gradient_accumulation_steps
            self._excess = [*self._excess, float(self.accelerator.reduce(excess, "mean"))][-window:]
            self.met = len(self._excess) == window and sum(self._excess) <= 0

    def _logged_excess(self) -> list[float]:
        """Of a resumed run, what stood above the ceiling in its last steps, as its checkpoint logged it."""
        name, history = "reading/above_ceiling", self.trainer.state.log_history
        logged = [row[name] for row in history if name in row][-MET_WINDOW:]
        return [value for value in logged for _ in range(self.args.gradient_accumulation_steps)]

    def _forward(self, model: Any, sequences: list[list[int]]) -> tuple[dict[int, Tensor], Tensor]:
        batch = activations.collate(list(range(len(sequences))), sequences, self.accelerator.device)
        with models.cut_after(model, max(self.layers)), self.tap.recording() as recorded:
            # Entered at the top, not at the decoder: sharded parameters are gathered there.
            model(**batch.inputs, use_cache=False, logits_to_keep=1)
        if torch.is_grad_enabled() and not recorded[max(self.layers)].requires_grad:
            raise RuntimeError("the recorded hidden states carry no gradient; turn `gradient_checkpointing` off")
        return recorded, batch.first

    def _rows(self, micro_step: int) -> list[int]:
        """Contexts of this micro-step: a function of seed, step and process, so that resuming needs no state."""
        size = self.args.contexts_per_step
        start = (micro_step * self.accelerator.num_processes + self.accelerator.process_index) * size
        total, rows = len(self.failing), []
        for position in range(start, start + size):
            epoch, place = divmod(position, total)
            rows.append(anchors.shuffled(list(range(total)), self.args.seed + epoch)[place])
        return rows

    def _set_penalty_weight(self, model: Any, task_loss: Tensor) -> None:
        """`penalty_share` times the ratio of gradient norms on the trained parameters, measured before the first step.

        The penalty's norm is the mean over the first batches of contexts.
        """
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]

        def norm(loss: Tensor) -> Tensor:
            gradients = torch.autograd.grad(loss, parameters, retain_graph=loss is task_loss, allow_unused=True)
            return torch.stack([g.float().square().sum() for g in gradients if g is not None]).sum().sqrt()

        norms, penalties = [], []
        for batch in range(WEIGHING_BATCHES):
            rows = self._rows(batch)
            term = self._penalty(*self._read(model, rows), rows)
            norms.append(norm(term))
            penalties.append(term.detach())
        self._metrics.clear()  # these passes are no step of the run
        self._excess.clear()
        found = torch.stack([norm(task_loss), torch.stack(norms).mean(), torch.stack(penalties).mean()])
        task, pressure, penalty = self.accelerator.reduce(found, "mean").tolist()
        if penalty < SMALLEST_PENALTY:
            raise ValueError(
                "the penalty is 0 at the first step, so `penalty_share` cannot set its weight; give `penalty_weight`, "
                "or a lower `ceiling_quantile`"
            )
        if task < SMALLEST_PENALTY:
            raise ValueError(
                "the task has no gradient at the first step (in GRPO: every reward is the same), so `penalty_share` "
                "cannot set the penalty's weight; give `penalty_weight`"
            )
        self.penalty_weight = self.args.penalty_share * task / pressure
        logger.info(
            "penalty weight %.4g (gradient norms: task %.4g, penalty %.4g)", self.penalty_weight, task, pressure
        )
        if self.accelerator.is_main_process:
            self.pressure.save_state(self.penalty_weight)

    def take_metrics(self) -> dict[str, float]:
        """Means over processes and micro-steps since the last call; every process calls it."""
        names, device = sorted(self._metrics), self.accelerator.device
        if not names:
            return {}
        means = torch.stack(
            [torch.stack([v.float().to(device) for v in self._metrics[name]]).mean() for name in names]
        )
        self._metrics.clear()
        return dict(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))


def _distance(units: readings.Units, twins: readings.Units) -> Tensor:
    """Relative distance of failing states to the reference's on the passing twins, at header and reply (ACT)."""
    shared = min(units.states.shape[1], twins.states.shape[1])
    both = [(part.weights[:, :shared] > 0) & (part.roles[:, :shared] < 2) for part in (units, twins)]
    inside = both[0] & both[1]
    return losses.relative_distance(units.states[:, :shared][inside], twins.states[:, :shared][inside])
