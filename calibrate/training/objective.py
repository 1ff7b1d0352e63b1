"""The calibration terms of one run: contexts, fixed directions and ceilings, and the weights."""

import json
import logging
import os
import random
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibrate import activations, models, transcripts
from calibrate.corpora import Story
from calibrate.training import arms, ceilings, losses
from calibrate.training.configs import CalibratedDPOConfig
from calibrate.vectors import EmotionVectors, load_vectors

logger = logging.getLogger(__name__)


class Objective:
    """The calibration terms of one run: prepared contexts, fixed directions and ceilings, and the weights."""

    def __init__(self, trainer, twins, dialogues, stories, weight_hash: str):
        self.args: CalibratedDPOConfig = trainer.args
        self.trainer = trainer
        tokenizer, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
        vectors = load_vectors(self.args.vectors)
        config = models.text_config(model)
        vectors.check(config.hidden_size, config.num_hidden_layers, weight_hash, config._name_or_path or "of this run")
        self.layers = self.args.layers or vectors.used_band()
        vectors.positions(self.layers)  # raises where one is not stored
        arms.target_directions(vectors, self.args.concepts)  # raises where one is not among the vectors
        self.failing = ceilings.prepare(tokenizer, [failing for failing, _ in twins], self.args.reply_tokens)
        self.passing = ceilings.prepare(tokenizer, [passing for _, passing in twins], self.args.reply_tokens)
        self.dialogues = [transcripts.encode(tokenizer, dialogue.messages) for dialogue in dialogues]
        if self.args.concept_weight and not any(story.concept in self.args.concepts for story in stories):
            raise ValueError(
                f"the stories have none about {', '.join(self.args.concepts)}, which the story anchor needs; they "
                f"have {', '.join(sorted({story.concept for story in stories}))}; set `concept_weight: 0`"
            )
        self.stories = _shuffled(_alternating(stories, self.args.concepts), self.args.seed)
        self.stories = [transcripts.encode_text(tokenizer, story.text) for story in self.stories]
        self._prepare_readings(model, vectors, weight_hash)
        self.tap = activations.Tap(model, self.layers)
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._anchor_references: dict[tuple[str, int], Tensor] = {}
        self._step, self._micro = -1, 0
        self.hinge_weight = self.args.hinge_weight
        if self.hinge_weight is None and self.args.hinge_share == 0:
            self.hinge_weight = 0.0
        self.path = Path(str(self.args.output_dir)) / "calibration"
        self._load_or_save(vectors)

    def _prepare_readings(self, model, vectors: EmotionVectors, weight_hash: str) -> None:
        """Directions, reference readings and ceilings; a control arm is matched to the real one's initial hinge."""
        args = self.args
        targets = arms.target_directions(vectors, args.concepts)
        side = arms.side_directions(vectors, targets, args.concepts)
        draws = arms.random_directions(vectors, len(targets), args.random_seed)
        count = len(targets)
        everything = torch.cat([targets, draws, side])
        reader = ceilings.Reader(vectors, everything, self.layers, args.header_weight, args.reply_weight)
        with model.disable_adapter():
            read = ceilings.reference_readings(model, reader, self.failing + self.passing, weight_hash)
        failing, passing = (
            ceilings.UnitReadings(read.values[rows], read.weights[rows])
            for rows in (slice(len(self.failing)), slice(len(self.failing), None))
        )
        pressed = slice(0, count)
        self.ceilings = ceilings.reduce_ceilings(_only(passing, pressed), args.ceiling_quantile)
        self.initial_hinge = arms.initial_hinge(_only(failing, pressed), self.ceilings, args.huber_delta)
        if args.arm == "random":
            pressed = slice(count, 2 * count)
            # A direction has no sign of its own: take the one whose reading is higher on failing contexts.
            contrast = (failing.values[:, 0, :, pressed] - passing.values[:, 0, :, pressed]).mean((0, 1))
            everything[pressed] *= torch.where(contrast < 0, -1.0, 1.0)[:, None, None]
            read.values[..., pressed] *= torch.where(contrast < 0, -1.0, 1.0)
            ceiling = ceilings.reduce_ceilings(_only(passing, pressed), args.ceiling_quantile)
            self.ceilings = arms.matched_ceilings(
                _only(failing, pressed), ceiling, args.huber_delta, self.initial_hinge
            )
        keep = [*range(pressed.start, pressed.stop), *range(2 * count, len(everything))]
        self.reference = ceilings.UnitReadings(read.values[..., keep], read.weights)
        self.reader = ceilings.Reader(vectors, everything[keep], self.layers, args.header_weight, args.reply_weight)
        self.num_targets = count

    def _load_or_save(self, vectors: EmotionVectors) -> None:
        """Keeps directions, ceilings and the hinge's weight with the run, so that a resumed run has the same."""
        tensors = {"directions": self.reader.directions.contiguous(), "ceilings": self.ceilings.contiguous()}
        if (self.path / "state.json").is_file():
            kept = load_file(self.path / "tensors.safetensors")
            for name, tensor in tensors.items():
                # Read again on another machine, the reference differs in the last digits.
                if not torch.allclose(kept[name], tensor, rtol=0, atol=1e-3):
                    raise ValueError(
                        f"{self.path}: the {name} differ from those that this run started with; use another "
                        f"`output_dir`"
                    )
            self.reader.directions, self.ceilings = kept["directions"], kept["ceilings"]
            if self.hinge_weight is None:
                self.hinge_weight = json.loads((self.path / "state.json").read_text())["hinge_weight"]
        elif self.trainer.accelerator.is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            save_file(tensors, self.path / "tensors.safetensors")
            self._save_state()
        logger.info(
            "arm %s on layers %d to %d, initial hinge %.3f sigma^2, %d task(s), vectors of %s",
            self.args.arm, self.layers[0], self.layers[-1], self.initial_hinge, len(self.failing), vectors.model,
        )  # fmt: skip

    def _save_state(self) -> None:
        state = {
            "arm": self.args.arm,
            "layers": self.layers,
            "initial_hinge": self.initial_hinge,
            "hinge_weight": self.hinge_weight,
            "ceilings": self.ceilings.mean((1, 2)).tolist(),
        }
        aside = self.path / "state.json.partial"
        aside.write_text(json.dumps(state, indent=2), encoding="utf-8")
        os.replace(aside, self.path / "state.json")

    def __call__(self, model, task_loss: Tensor) -> Tensor:
        """The weighted sum of all terms for this micro-step, to be added to the task's loss."""
        step = self.trainer.state.global_step
        self._micro = self._micro + 1 if step == self._step else 0
        self._step = step
        micro_step = step * self.args.gradient_accumulation_steps + self._micro
        terms = self._context_terms(model, micro_step)
        if micro_step % self.args.text_anchor_every == 0:
            terms |= self._text_anchor_terms(model, micro_step // self.args.text_anchor_every)
        if self.hinge_weight is None:
            self._set_hinge_weight(task_loss, terms["hinge"])
        assert self.hinge_weight is not None
        warmup = min(1.0, (step + 1) / max(1, self.args.hinge_warmup_steps))
        weights = {
            "hinge": self.hinge_weight * warmup,
            "anchor": self.args.anchor_weight,
            "side": self.args.side_weight,
            "kl": self.args.kl_weight,
            "concept": self.args.concept_weight,
        }
        for name, term in terms.items():
            self._record(f"calibration/{name}", term)
        self._metrics["calibration/hinge_weight"].append(weights["hinge"])
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def _context_terms(self, model, micro_step: int) -> dict[str, Tensor]:
        """Hinge and side term on failing contexts, anchor on their twins: one forward pass, cut after the band."""
        rows = self._rows(micro_step)
        total = len(self.failing)
        probes = [self.failing[row] for row in rows] + [self.passing[row] for row in rows]
        states, first = self._forward(model, [probe.ids for probe in probes])
        read = self.reader(states, first, probes)
        device, units = read.values.device, read.values.shape[1]
        at = torch.tensor(rows + [total + row for row in rows])
        reference = self.reference.values[at][:, :units].to(device)
        failing, passing = slice(len(rows)), slice(len(rows), None)
        targets, side = slice(self.num_targets), slice(self.num_targets, None)
        ceiling = ceilings.per_unit(self.ceilings.to(device), units)
        # Readings that the reference already has below the corridor are left where they are, not pulled up.
        floor = torch.minimum(ceiling - self.args.corridor, reference[failing][..., targets])
        values, weights = read.values, read.weights
        self._record("reading/header_failing", values[failing][:, 0, :, targets].mean())
        self._record("reading/header_passing", values[passing][:, 0, :, targets].mean())
        return {
            "hinge": losses.hinge(
                values[failing][..., targets], ceiling, weights[failing], self.args.huber_delta, floor
            ),
            "side": losses.squared_change(values[failing][..., side], reference[failing][..., side], weights[failing]),
            "anchor": losses.squared_change(
                values[passing][..., targets], reference[passing][..., targets], weights[passing]
            ),
        }

    def _text_anchor_terms(self, model, index: int) -> dict[str, Tensor]:
        """KL to the reference on one neutral dialogue and hidden-state distance on one emotion story."""
        terms = {}
        if self.args.kl_weight:
            row = _shuffled(list(range(len(self.dialogues))), self.args.seed)[index % len(self.dialogues)]
            terms["kl"] = losses.kl_to_reference(
                self._reply_log_probabilities(model, row),
                self._reference("kl", row, model, self._reply_log_probabilities),
            )
        if self.args.concept_weight:
            row = index % len(self.stories)
            terms["concept"] = losses.relative_distance(
                self._story_states(model, row), self._reference("story", row, model, self._story_states)
            )
        return terms

    def _reference(self, kind: str, row: int, model, compute) -> Tensor:
        """What `compute` gives with the adapter disabled, computed once for each text."""
        if (kind, row) not in self._anchor_references:
            with torch.no_grad(), model.disable_adapter():
                self._anchor_references[kind, row] = compute(model, row)
        return self._anchor_references[kind, row]

    def _reply_log_probabilities(self, model, row: int) -> Tensor:
        """Log-probabilities of the tokens of the assistant's turns of a dialogue, [tokens, vocabulary]."""
        encoded = self.dialogues[row]
        spans = [span for span in encoded.spans if span.role in ("assistant", "reply")]
        positions = torch.tensor([token - 1 for span in spans for token in range(span.start, span.stop)])
        batch = activations.collate([0], [encoded.ids], self.trainer.accelerator.device)
        logits = model(**batch.inputs, use_cache=False, logits_to_keep=positions.to(batch.first.device)).logits[0]
        return logits.float().log_softmax(-1)

    def _story_states(self, model, row: int) -> Tensor:
        """Hidden states of a story at the band, [layers, tokens, hidden], without the attention sink."""
        states, _ = self._forward(model, [self.stories[row].ids])
        return torch.stack([states[layer][0, activations.SINK_TOKENS :] for layer in self.layers]).float()

    def _forward(self, model, sequences: list[list[int]]) -> tuple[dict[int, Tensor], Tensor]:
        batch = activations.collate(list(range(len(sequences))), sequences, self.trainer.accelerator.device)
        with models.cut_after(model, max(self.layers)), self.tap.recording() as recorded:
            # Entered at the top, not at the decoder: sharded parameters are gathered there.
            model(**batch.inputs, use_cache=False, logits_to_keep=1)
        if torch.is_grad_enabled() and not recorded[max(self.layers)].requires_grad:
            raise RuntimeError("the recorded hidden states carry no gradient; turn `gradient_checkpointing` off")
        return recorded, batch.first

    def _rows(self, micro_step: int) -> list[int]:
        """Tasks of this micro-step: a function of seed, step and process, so that resuming needs no state."""
        accelerator = self.trainer.accelerator
        size = self.args.contexts_per_step
        start = (micro_step * accelerator.num_processes + accelerator.process_index) * size
        total, rows = len(self.failing), []
        for position in range(start, start + size):
            epoch, place = divmod(position, total)
            rows.append(_shuffled(list(range(total)), self.args.seed + epoch)[place])
        return rows

    def _set_hinge_weight(self, task_loss: Tensor, hinge: Tensor) -> None:
        """`hinge_share` times the ratio of gradient norms on the trained parameters, measured at the first step."""
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        norms = []
        for loss in (task_loss, hinge):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            norms.append(torch.stack([g.float().square().sum() for g in gradients if g is not None]).sum().sqrt())
        task, pressure = self.trainer.accelerator.reduce(torch.stack(norms), "mean").tolist()
        if pressure == 0:
            raise ValueError(
                "the hinge is 0 at the first step, so `hinge_share` cannot set its weight; give `hinge_weight` or a "
                "lower `ceiling_quantile`"
            )
        self.hinge_weight = self.args.hinge_share * task / pressure
        logger.info("hinge weight %.4g (gradient norms: task %.4g, hinge %.4g)", self.hinge_weight, task, pressure)
        if self.trainer.accelerator.is_main_process:
            self._save_state()

    def _record(self, name: str, value: Tensor) -> None:
        gathered = self.trainer.accelerator.gather(value.detach().reshape(1).float())
        self._metrics[name].append(gathered.mean().item())

    def take_metrics(self) -> dict[str, float]:
        """Means since the last call."""
        means = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        self._metrics.clear()
        return means


def _only(readings: ceilings.UnitReadings, directions: slice) -> ceilings.UnitReadings:
    return ceilings.UnitReadings(readings.values[..., directions], readings.weights)


def _alternating(stories: list[Story], concepts: list[str]) -> list[Story]:
    """Every other story about one of `concepts`, so that the pressed emotion is half of the anchor's texts."""
    pressed = [story for story in stories if story.concept in concepts]
    others = [story for story in stories if story.concept not in concepts]
    return [
        story
        for pair in zip(pressed * (len(others) // max(1, len(pressed)) + 1), others, strict=False)
        for story in pair
    ]


def _shuffled(items: list, seed: int) -> list:
    return random.Random(seed).sample(items, len(items))
