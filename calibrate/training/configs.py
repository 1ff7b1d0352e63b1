"""Options of calibrated training, beside TRL's own. Each is checked here, because the YAML parser checks no types."""

import math
from dataclasses import dataclass, fields

from trl import DPOConfig, GRPOConfig, SFTConfig

from calibrate.concepts import TARGET
from calibrate.training import arms, ceilings, losses
from calibrate.training.arms import Arm
from calibrate.training.options import check_choice, check_range, check_types, default, option


@dataclass
class CalibrationConfig:
    """The calibration objective, mixed into TRL's configurations. `arm: none` is TRL's plain trainer."""

    vectors: str = option("", "Folder or Hub id of the vectors (`calibrate extract`), or `default`.")
    arm: str = option("hinge-refit", f"Way of training: {', '.join(Arm)} (recipes/README.md says what each does).")
    concepts: list[str] = option([TARGET], "Concepts whose readings are lowered.")
    raise_concepts: list[str] = option([], "Concepts whose readings are raised, such as calm.")
    levels: dict[str, float] = option({}, "YAML only: concept -> its own ceiling (floor, where it is raised), sigma.")
    layers: list[int] | None = option(None, "Layers to read, counted from 0. Default: the band of the vectors.")
    rank: int = option(1, f"Directions for each concept: itself and its nearest neighbours; at most {arms.MAX_RANK}.")
    penalty: str = option("hinge", f"Shape of the penalty: {', '.join(losses.SHAPES)}.")
    penalty_share: float = option(
        0.3,
        "Norm of the penalty's gradient over the task's, on the trained parameters at the first step. Each is a mean "
        "of norms, not the norm of a mean: over processes, and the penalty's over four batches of contexts on each.",
    )
    penalty_weight: float | None = option(None, "Fixed weight of the penalty; set it to override `penalty_share`.")
    penalty_warmup_steps: int = option(2, "Optimiser steps over which the penalty warms up; `warmup_steps`: the rate.")
    huber_delta: float = option(1.0, "Knee of the Huber hinge, sigma.")
    set_point: float = option(1.0, "`penalty: set-point` draws readings so many sigma below the reference's.")
    ceiling: str = option("reduce", f"What the ceiling is: {', '.join(ceilings.MODES)}.")
    ceiling_quantile: float = option(0.5, "`reduce`: quantile of the reference's readings on passing twins.")
    ceiling_margin: float = option(0.0, "`prevent`: sigma above the reference's reading of the same token.")
    corridor: float = option(1.0, "Sigma below the ceiling at which the hinge pays again (a floor).")
    stop_when_met: bool = option(False, "End the run when the mean of the last 8 steps is at or below the ceiling.")
    header_weight: float = option(1.0, "Weight of the turn header in the reading terms.")
    reply_weight: float = option(1.0, "Weight of the reply tokens in the reading terms.")
    tool_weight: float = option(0.0, "Weight of the last tool result, 0 to 0.25: it carries that failure is seen.")
    reply_tokens: int = option(64, "Reply tokens that are read, from the first.")
    contexts_per_step: int = option(1, "Failing contexts, and as many twins, per micro-step.")
    max_context_tokens: int | None = option(
        None, "Leave out contexts that, with their reply, have more tokens than that: they cost memory and time."
    )
    anchor_weight: float = option(1.0, "Weight of the squared change of readings on passing twins.")
    side_weight: float = option(0.01, "Weight of the squared change of the other emotions on failing contexts.")
    norm_weight: float = option(1.0, "Weight of the guard on residual norms beyond 0.9 to 1.1 of the reference's.")
    kl_weight: float = option(1.0, "Weight of KL(reference || tuned) on neutral texts, nats per token.")
    concept_weight: float = option(1.0, "Weight of the relative change of hidden states on emotion stories.")
    concept_kl_weight: float = option(1.0, "Weight of KL(reference || tuned) on emotion stories, nats per token.")
    same_kl_weight: float = option(0.0, "Ablation: weight of the KL on the pressed contexts' own replies.")
    text_anchor_every: int = option(2, "A text anchor runs at every so many micro-steps (the first included).")
    anchor_texts: int = option(48, "Texts of each kind of text anchor, each in turn.")
    refit_every: int = option(10, "Optimiser steps between refits, in the arms that refit.")
    refit_stories: int = option(6, "Stories about each target in a refit; three times as many about others.")
    refit_turns: int = option(6, "Failing contexts in a refit, each with a desperate and a composed opening.")
    shuffled_vectors: str = option("", "`arm: shuffled`: folder of `calibrate extract --recipes shuffled`.")
    other_concept: str = option("nostalgic", "`arm: other-emotion`: the emotion that is pressed instead.")
    steer_dose: float = option(0.05, "`arm: preventative-steering`: share of the residual norm that is added.")
    random_seed: int = option(0, "`arm: random`: which draw.")
    adapt_above_band: bool = option(False, "Let LoRA adapt blocks above the band too; they could undo the penalty.")
    blocks: str | None = option(None, "Dotted name of the model's list of blocks, where it is not found by itself.")
    twins: str | None = option(None, "JSONL of failing and passing contexts. Default: the shipped ones.")
    pairs: str | None = option(None, "JSONL of preference pairs. Default: the shipped ones.")
    neutral: str | None = option(None, "JSONL of neutral dialogues. Default: the shipped ones.")
    stories: str | None = option(None, "JSONL of emotion stories. Default: the shipped ones.")
    max_tasks: int | None = option(None, "Train on so many evenly spaced tasks. Default: all.")
    max_pairs: int | None = option(None, "Train on so many evenly spaced pairs. Default: all.")
    dry_run: bool = option(False, "Recipes: print what the run would take, from a few real steps, and train nothing.")

    def __post_init__(self):
        check_types(self, CalibrationConfig, type(self))
        if not self.vectors:
            raise ValueError("`vectors` is not set; give the folder that `calibrate extract` wrote, or `default`")
        check_choice(self, "arm", list(Arm))
        check_choice(self, "penalty", list(losses.SHAPES))
        check_choice(self, "ceiling", ceilings.MODES)
        self._check_concepts()
        if not 0 <= self.ceiling_quantile <= 1:
            raise ValueError(f"`ceiling_quantile` is {self.ceiling_quantile}; allowed: 0 to 1")
        if not 0 <= self.tool_weight <= 0.25:
            raise ValueError(f"`tool_weight` is {self.tool_weight}; allowed: 0 to 0.25")
        if not 1 <= self.rank <= arms.MAX_RANK:
            raise ValueError(f"`rank` is {self.rank}; allowed: 1 to {arms.MAX_RANK}")
        check_range(self, _AT_LEAST_ONE, "1 or more", lambda value: value >= 1)
        check_range(self, _ABOVE_ZERO, "above 0", lambda value: value > 0)
        check_range(self, _NOT_NEGATIVE, "0 or more", lambda value: value >= 0)
        self._check_together()
        super().__post_init__()  # ty: ignore[missing-attribute]  # TRL's, which stands after this class

    def _check_concepts(self) -> None:
        for name in ("concepts", "layers", "raise_concepts"):
            value = getattr(self, name)
            if value is not None and ((not value and name != "raise_concepts") or len(set(value)) < len(value)):
                raise ValueError(f"`{name}` is {value}; allowed: at least one, each once")
        if self.layers and min(self.layers) < 0:
            raise ValueError(f"`layers` is {self.layers}; allowed: 0 or more, the blocks after which is read")
        if both := sorted(set(self.concepts) & set(self.raise_concepts)):
            raise ValueError(f"`concepts` and `raise_concepts` both hold {', '.join(both)}; allowed: one of them")
        targets = [*self.concepts, *self.raise_concepts]
        if unknown := sorted(set(self.levels) - set(targets)):
            raise ValueError(f"`levels` names {', '.join(unknown)}; allowed: the targets {', '.join(targets)}")
        if not all(map(math.isfinite, self.levels.values())):
            raise ValueError(f"`levels` is {self.levels}; allowed: finite numbers")

    def _check_together(self) -> None:
        """Options that exclude or need one another."""
        if self.arm == Arm.SHUFFLED and not self.shuffled_vectors:
            raise ValueError(
                "`arm: shuffled` needs `shuffled_vectors`; make them with `calibrate extract MODEL --recipes shuffled "
                "--splits train --out FOLDER` and give FOLDER/train-shuffled"
            )
        if self.arm == Arm.OTHER and self.other_concept in [*self.concepts, *self.raise_concepts]:
            raise ValueError(f"`other_concept` is {self.other_concept!r}, a target itself; give another emotion")
        if self.penalty != "hinge" and self.arm in arms.CONTROLS:
            raise ValueError(f"`arm: {self.arm}` is matched by its hinge; `penalty: {self.penalty}` has none")
        if self.penalty != "hinge" and self.ceiling != "reduce":
            raise ValueError(f"`ceiling: {self.ceiling}` is of the hinge; `penalty: {self.penalty}` has no ceiling")
        if self.levels and (self.ceiling != "reduce" or self.arm in arms.CONTROLS):
            raise ValueError("`levels` are ceilings of the targets in mode `reduce`; remove them, or the other option")
        if self.arm == Arm.HINGE_UNION and len([*self.concepts, *self.raise_concepts]) * self.rank >= arms.MAX_RANK:
            raise ValueError(
                f"`arm: hinge-union` adds directions up to {arms.MAX_RANK} in all, of which targets times `rank` "
                f"{self.rank} leave none; lower `rank`, name fewer concepts, or use `arm: hinge-refit`"
            )
        if self.stop_when_met and self.arm in arms.HINGED and self.is_plain():
            raise ValueError(
                "`stop_when_met` waits for readings of the loss's own contexts, but nothing is added to the loss "
                "(`reading_use: reward`, or every weight is 0); set it to false"
            )
        if self.stop_when_met and (self.ceiling == "prevent" or self.arm not in arms.HINGED):
            raise ValueError(
                f"`stop_when_met` waits for a ceiling that is above nothing at the start; `arm: {self.arm}` with "
                f"`ceiling: {self.ceiling}` has none"
            )
        logged = (self.logging_strategy, self.logging_steps)  # ty: ignore[missing-attribute]  # TRL's
        if self.stop_when_met and logged != ("steps", 1):
            raise ValueError(
                "`stop_when_met` needs `logging_steps: 1` and `logging_strategy: steps`: a resumed run takes its last "
                "steps from the log"
            )
        for name, value in (("penalty", "change"), ("ceiling", "prevent")):
            if getattr(self, name) == value and self.measures_share() and self.arm in arms.HINGED:
                raise ValueError(
                    f"`{name}: {value}` is 0 at the first step, so `penalty_share` cannot set its weight; set "
                    "`penalty_weight`"
                )

    def role_weights(self) -> tuple[float, float, float]:
        """Weights of header, reply and tool result."""
        return self.header_weight, self.reply_weight, self.tool_weight

    def term_weights(self) -> dict[str, float]:
        """Fixed weights of all terms but the penalty."""
        names = ("anchor", "side", "norm", "kl", "concept", "concept_kl", "same_kl")
        return {name: getattr(self, f"{name}_weight") for name in names}

    def unused(self) -> list[str]:
        """Options that differ from their defaults and that the arm does not use, with their values."""
        defaults = {found.name: default(found) for found in fields(self)}
        set_here = {name: getattr(self, name) for name, uses in self._uses().items() if not uses}
        return [f"{name} {value!r}" for name, value in set_here.items() if value != defaults[name]]

    def _uses(self) -> dict[str, bool]:
        """Whether an option has any effect, for those that not every arm uses (`layers`: LoRA ends there in all)."""
        arm, terms = self.arm, not self.is_plain()
        presses = terms and arm != Arm.OUTPUT_KL  # contexts are read
        pressed = terms and arm in arms.HINGED and self._weighs()
        hinge, prevent = pressed and self.penalty == "hinge", self.ceiling == "prevent"
        held = hinge or self.stop_when_met  # readings are held against the ceiling
        refits = self.refits()
        story_anchor = presses and self.concept_weight + self.concept_kl_weight > 0
        texts = terms and (self.kl_weight + self.same_kl_weight > 0 or story_anchor)
        directed = self.uses_vectors() and arm != Arm.OUTPUT_KL
        used = {
            "shuffled_vectors": arm == Arm.SHUFFLED and directed,
            "other_concept": arm == Arm.OTHER and directed,
            "random_seed": arm == Arm.RANDOM and directed,
            "steer_dose": arm == Arm.STEER,
            "rank": directed and arm not in arms.STEERED,
            "penalty": pressed,
            "set_point": pressed and self.penalty == "set-point",
            "ceiling": held,
            "ceiling_margin": held and self.ceiling != "reduce",
            "penalty_warmup_steps": presses and self._weighs(),
            "penalty_share": presses and self.penalty_weight is None,
            "refit_turns": refits and TARGET in (*self.concepts, *self.raise_concepts),
            "reply_tokens": presses or (texts and self.same_kl_weight > 0),
            "max_context_tokens": terms,
            "text_anchor_every": texts,
            "anchor_texts": texts and (self.kl_weight > 0 or story_anchor),
            "twins": terms or self.max_tasks is not None,  # which tasks' pairs are left out follows from them
            "neutral": terms and self.kl_weight > 0,
            "stories": story_anchor or refits,
        }
        used |= dict.fromkeys(("concepts", "raise_concepts"), directed)
        used |= dict.fromkeys(("refit_every", "refit_stories"), refits)
        used |= dict.fromkeys(("corridor", "huber_delta"), hinge)
        used |= dict.fromkeys(("ceiling_quantile", "levels"), held and not prevent)
        used |= dict.fromkeys(("kl_weight", "same_kl_weight"), terms)
        return used | dict.fromkeys(_CONTEXT_OPTIONS, presses)

    def uses_vectors(self) -> bool:
        """True where readings or directions enter the run, so that model and vectors must fit each other."""
        return not self.is_plain() or self.arm in arms.STEERED

    def refits(self) -> bool:
        """True where directions follow the model: a term reads along them, the penalty or the anchor on the twins."""
        read = self._weighs() or self.anchor_weight > 0 or self.stop_when_met
        return read and not self.is_plain() and self.arm in arms.REFITTED

    def _weighs(self) -> bool:
        """True where the penalty weighs anything, in the arms that have one."""
        return (self.penalty_share if self.penalty_weight is None else self.penalty_weight) > 0

    def measures_share(self) -> bool:
        """True where `penalty_share` sets the penalty's weight, from gradients at the first step."""
        return self.penalty_weight is None and self._weighs() and not self.is_plain() and self.arm != Arm.OUTPUT_KL

    def is_plain(self) -> bool:
        """True where no term would be added, so that the loss is exactly TRL's."""
        if self.arm == Arm.OUTPUT_KL:
            return not (self.kl_weight or self.same_kl_weight)
        return self.arm in arms.PLAIN | arms.STEERED or not (self._weighs() or any(self.term_weights().values()))


@dataclass
class CalibratedDPOConfig(CalibrationConfig, DPOConfig):
    """Preference tuning with the calibration objective."""

    hinge_reply: str = option(
        "opening",
        "Recipes: a failing context's reply. `opening`: the same as its passing twin's, so that they differ by "
        "the outcome alone; `chosen`: the chosen reply of its pair. Never the rejected one.",
    )

    def __post_init__(self):
        check_choice(self, "hinge_reply", ("opening", "chosen"))
        super().__post_init__()
        plugin = self.deepspeed_plugin
        if plugin and plugin.zero_stage == 3 and self.precompute_ref_log_probs and not self.is_plain():
            raise ValueError(
                "`precompute_ref_log_probs` shards the model under ZeRO-3 before the reference's readings are taken; "
                "set it to false"
            )

    def _uses(self) -> dict[str, bool]:
        used = super()._uses()
        return used | {"hinge_reply": used["reply_tokens"]}


@dataclass
class CalibratedSFTConfig(CalibrationConfig, SFTConfig):
    """Supervised tuning on the chosen replies with the calibration objective."""


@dataclass
class CalibratedGRPOConfig(CalibrationConfig, GRPOConfig):
    """Reinforcement learning: the reading enters the reward (the default), the loss (`aux`), or both.

    A gradient through a reader raised obfuscation where a reward did not (arXiv 2602.15515), so `aux` is an ablation.
    `beta` is the weight of TRL's own KL to the reference; sweep it (1e-4, 1e-2, 1e-1): it protects most against text
    that hides the state.
    """

    arm: str = option("hinge-frozen", "Way of training; with `reading_use: reward` directions cannot be refitted.")
    reading_use: str = option("reward", "Where readings enter: `reward` (no gradient), `aux` (the penalty) or `both`.")
    reading_reward: float = option(0.5, "Reward that is taken off for each standard deviation above the group's mean.")
    reading_by: str = option("reference", "Who reads completions: `reference` (cannot be moved) or `policy`.")
    top_share: float = option(0.1, "Share of a completion's tokens, the highest, whose mean is its reading.")
    group_sd_floor: float = option(0.1, "Least standard deviation of a group's readings, sigma.")
    repairs: str | None = option(None, "JSONL of tasks whose tests run on a reply's code. Default: the shipped ones.")
    auroc_gate: float = option(0.7, "Least AUROC of the reading on shipped gaming against honest replies; 0: no gate.")

    def __post_init__(self):
        check_types(self, CalibrationConfig, type(self))
        check_choice(self, "reading_use", ("reward", "aux", "both"))
        check_choice(self, "reading_by", ("reference", "policy"))
        check_range(self, ("reading_reward", "top_share", "group_sd_floor"), "above 0", lambda value: value > 0)
        for name in ("top_share", "auroc_gate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; allowed: 0 to 1")
        if self.arm == Arm.CALM_DPO or self.arm in arms.STEERED:
            raise ValueError(f"`arm: {self.arm}` is not for GRPO; use it with recipes/dpo.py or recipes/sft.py")
        if self.max_pairs is not None:
            raise ValueError(f"`max_pairs` is {self.max_pairs}, but GRPO trains on no pairs; leave it out")
        if self.reading_use == "reward" and self.arm in {*arms.REFITTED, Arm.CONSISTENCY, Arm.OUTPUT_KL}:
            raise ValueError(
                f"`arm: {self.arm}` works through the loss, to which `reading_use: reward` adds nothing; set "
                "`reading_use: aux`, or `arm: hinge-frozen`"
            )
        if self.reading_use == "both" and self.arm in {Arm.CONSISTENCY, Arm.OUTPUT_KL}:
            raise ValueError(
                f"`arm: {self.arm}` presses no direction that the reward of `reading_use: both` could read; set "
                "`reading_use: aux`"
            )
        super().__post_init__()

    def in_reward(self) -> bool:
        """Whether readings enter the reward: along the targets' directions, or a control's."""
        return self.reading_use != "aux" and self.arm in arms.HINGED

    def _uses(self) -> dict[str, bool]:
        """Where readings do not enter the reward, its options too; GRPO has pairs for its gate alone."""
        reward, control = self.in_reward(), self.arm in arms.CONTROLS
        gate = reward and not control
        used = super()._uses() | dict.fromkeys(("reading_reward", "reading_by", "top_share", "group_sd_floor"), reward)
        used |= {"auroc_gate": gate, "pairs": gate and self.auroc_gate > 0, "twins": not self.is_plain()}
        return used | {"reading_use": reward or not self.is_plain()}

    def uses_vectors(self) -> bool:
        """With readings in the reward alone, too."""
        return self.in_reward() or super().uses_vectors()

    def is_plain(self) -> bool:
        """In use `reward` nothing is added to the loss."""
        return self.reading_use == "reward" or super().is_plain()


_CONTEXT_OPTIONS = ("penalty_weight", "contexts_per_step", "anchor_weight", "side_weight", "norm_weight")
_CONTEXT_OPTIONS += ("concept_weight", "concept_kl_weight", "header_weight", "reply_weight", "tool_weight")
_AT_LEAST_ONE = ("text_anchor_every", "reply_tokens", "contexts_per_step", "max_tasks", "max_pairs", "anchor_texts")
_AT_LEAST_ONE += ("refit_every", "refit_stories", "max_context_tokens")
_ABOVE_ZERO = ("huber_delta", "header_weight", "reply_weight")
_NOT_NEGATIVE = ("penalty_share", "penalty_weight", "anchor_weight", "side_weight", "norm_weight", "kl_weight")
_NOT_NEGATIVE += ("concept_weight", "concept_kl_weight", "same_kl_weight", "corridor", "penalty_warmup_steps")
_NOT_NEGATIVE += ("ceiling_margin", "refit_turns", "steer_dose", "set_point")
