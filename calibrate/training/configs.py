"""Options of calibrated training, beside TRL's own. Each is checked here, because the YAML parser checks no types."""

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

from trl import DPOConfig, GRPOConfig, SFTConfig

from calibrate.concepts import TARGET
from calibrate.training import arms, ceilings, losses
from calibrate.training.arms import Arm


def _option(default: Any, text: str) -> Any:
    """A dataclass field whose help text is its only description."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class CalibrationConfig:
    """The calibration objective, mixed into TRL's configurations. `arm: none` is TRL's plain trainer."""

    vectors: str = _option("", "Folder or Hub id of the vectors (`calibrate extract`), or `default`.")
    arm: str = _option("hinge-refit", f"Way of training: {', '.join(Arm)} (recipes/README.md says what each does).")
    concepts: list[str] = _option([TARGET], "Concepts whose readings are lowered.")
    raise_concepts: list[str] = _option([], "Concepts whose readings are raised, such as calm.")
    levels: dict[str, float] = _option({}, "YAML only: concept -> its own ceiling (floor, where it is raised), sigma.")
    layers: list[int] | None = _option(None, "Layers to read, counted from 0. Default: the band of the vectors.")
    rank: int = _option(1, f"Directions for each concept: itself and its nearest neighbours; at most {arms.MAX_RANK}.")
    penalty: str = _option("hinge", f"Shape of the penalty: {', '.join(losses.SHAPES)}.")
    penalty_share: float = _option(
        0.3, "Norm of the penalty's gradient over the task's, on the trained parameters at the first step."
    )
    penalty_weight: float | None = _option(None, "Fixed weight of the penalty; set it to override `penalty_share`.")
    penalty_warmup_steps: int = _option(2, "Optimiser steps over which the penalty is warmed up.")
    huber_delta: float = _option(1.0, "Knee of the Huber hinge, sigma.")
    set_point: float = _option(1.0, "`penalty: set-point` draws readings so many sigma below the reference's.")
    ceiling: str = _option("reduce", f"What the ceiling is: {', '.join(ceilings.MODES)}.")
    ceiling_quantile: float = _option(0.5, "`reduce`: quantile of the reference's readings on passing twins.")
    ceiling_margin: float = _option(0.0, "`prevent`: sigma above the reference's reading of the same token.")
    corridor: float = _option(1.0, "Sigma below the ceiling at which the hinge pays again (a floor).")
    stop_when_met: bool = _option(
        False, "End the run when the mean reading of the last 8 steps is at or below the ceiling."
    )
    header_weight: float = _option(1.0, "Weight of the turn header in the reading terms.")
    reply_weight: float = _option(1.0, "Weight of the reply tokens in the reading terms.")
    tool_weight: float = _option(
        0.0, "Weight of the last tool result, 0 to 0.25: it carries the perception of failure."
    )
    reply_tokens: int = _option(64, "Reply tokens that are read, from the first.")
    contexts_per_step: int = _option(1, "Failing contexts, and as many twins, per micro-step.")
    max_context_tokens: int | None = _option(
        None, "Leave out contexts that, with their reply, have more tokens than that: they cost memory and time."
    )
    anchor_weight: float = _option(1.0, "Weight of the squared change of readings on passing twins.")
    side_weight: float = _option(0.01, "Weight of the squared change of the other emotions on failing contexts.")
    norm_weight: float = _option(1.0, "Weight of the guard on residual norms beyond 0.9 to 1.1 of the reference's.")
    kl_weight: float = _option(1.0, "Weight of KL(reference || tuned) on neutral texts, nats per token.")
    concept_weight: float = _option(1.0, "Weight of the relative change of hidden states on emotion stories.")
    concept_kl_weight: float = _option(1.0, "Weight of KL(reference || tuned) on emotion stories, nats per token.")
    same_kl_weight: float = _option(0.0, "Ablation: weight of the KL on the pressed contexts' own replies.")
    text_anchor_every: int = _option(2, "A text anchor runs at every so many micro-steps (the first included).")
    anchor_texts: int = _option(48, "Texts of each kind of text anchor, each in turn.")
    refit_every: int = _option(10, "Optimiser steps between refits, in the arms that refit.")
    refit_stories: int = _option(6, "Stories about each target in a refit; three times as many about others.")
    refit_turns: int = _option(6, "Failing contexts in a refit, each with a desperate and a composed opening.")
    shuffled_vectors: str = _option("", "`arm: shuffled`: folder of `calibrate extract --recipes shuffled`.")
    other_concept: str = _option("nostalgic", "`arm: other-emotion`: the emotion that is pressed instead.")
    steer_dose: float = _option(0.05, "`arm: preventative-steering`: share of the residual norm that is added.")
    random_seed: int = _option(0, "`arm: random`: which draw.")
    adapt_above_band: bool = _option(False, "Let LoRA adapt blocks above the band too; they could undo the penalty.")
    twins: str | None = _option(None, "JSONL of failing and passing contexts. Default: the shipped ones.")
    pairs: str | None = _option(None, "JSONL of preference pairs. Default: the shipped ones.")
    neutral: str | None = _option(None, "JSONL of neutral dialogues. Default: the shipped ones.")
    stories: str | None = _option(None, "JSONL of emotion stories. Default: the shipped ones.")
    max_tasks: int | None = _option(None, "Train on so many evenly spaced tasks. Default: all.")
    max_pairs: int | None = _option(None, "Train on so many evenly spaced pairs. Default: all.")
    dry_run: bool = _option(False, "Recipes: print what the run would take, from a few real steps, and train nothing.")

    def __post_init__(self):
        _check_types(self)
        if not self.vectors:
            raise ValueError("`vectors` is not set; give the folder that `calibrate extract` wrote, or `default`")
        _check_choice(self, "arm", list(Arm))
        _check_choice(self, "penalty", list(losses.SHAPES))
        _check_choice(self, "ceiling", ceilings.MODES)
        self._check_concepts()
        if not 0 <= self.ceiling_quantile <= 1:
            raise ValueError(f"`ceiling_quantile` is {self.ceiling_quantile}; allowed: 0 to 1")
        if not 0 <= self.tool_weight <= 0.25:
            raise ValueError(f"`tool_weight` is {self.tool_weight}; allowed: 0 to 0.25")
        if not 1 <= self.rank <= arms.MAX_RANK:
            raise ValueError(f"`rank` is {self.rank}; allowed: 1 to {arms.MAX_RANK}")
        _check_range(self, _AT_LEAST_ONE, "1 or more", lambda value: value >= 1)
        _check_range(self, _ABOVE_ZERO, "above 0", lambda value: value > 0)
        _check_range(self, _NOT_NEGATIVE, "0 or more", lambda value: value >= 0)
        self._check_together()
        super().__post_init__()  # ty: ignore[missing-attribute]  # TRL's, which stands after this class

    def _check_concepts(self) -> None:
        for option in ("concepts", "layers", "raise_concepts"):
            value = getattr(self, option)
            if value is not None and ((not value and option != "raise_concepts") or len(set(value)) < len(value)):
                raise ValueError(f"`{option}` is {value}; allowed: at least one, each once")
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
        if self.stop_when_met and (self.ceiling == "prevent" or self.arm not in arms.HINGED):
            raise ValueError(
                f"`stop_when_met` waits for a ceiling that is above nothing at the start; `arm: {self.arm}` with "
                f"`ceiling: {self.ceiling}` has none"
            )
        if self.penalty in ("change",) and self.penalty_weight is None and self.arm in arms.HINGED:
            raise ValueError(
                f"`penalty: {self.penalty}` is 0 at the first step, so `penalty_share` cannot set its weight; set "
                "`penalty_weight`"
            )
        if self.ceiling == "prevent" and self.penalty_weight is None and self.arm in arms.HINGED:
            raise ValueError(
                "`ceiling: prevent` starts at a hinge of 0, so `penalty_share` cannot set its weight; set "
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
        """Options of this class that differ from their defaults and that the arm does not use, with their values."""
        arm, pressed = self.arm, self.arm in arms.HINGED
        hinge = pressed and self.penalty == "hinge"
        used = {
            "shuffled_vectors": arm == Arm.SHUFFLED,
            "other_concept": arm == Arm.OTHER,
            "random_seed": arm == Arm.RANDOM,
            "steer_dose": arm == Arm.STEER,
            "set_point": pressed and self.penalty == "set-point",
            "ceiling_margin": hinge and self.ceiling != "reduce",
            "rank": arm not in arms.STEERED,
            "layers": arm != Arm.STEER,
        }
        used |= dict.fromkeys(("refit_every", "refit_stories", "refit_turns"), arm in arms.REFITTED)
        used |= dict.fromkeys(("ceiling", "ceiling_quantile", "corridor", "huber_delta", "levels"), hinge)
        used |= {"penalty": pressed}
        if self.is_plain():
            used |= dict.fromkeys([*_LOSS_OPTIONS, *used.keys() - {"steer_dose", "rank", "layers"}], False)
        options = {option.name: option for option in fields(CalibrationConfig)}
        set_here = {name: getattr(self, name) for name, uses in used.items() if not uses}
        return [f"{name} {value!r}" for name, value in set_here.items() if value != _default(options[name])]

    def is_plain(self) -> bool:
        """True where no term would be added, so that the loss is exactly TRL's."""
        share = self.penalty_share if self.penalty_weight is None else self.penalty_weight
        if self.arm == Arm.OUTPUT_KL:
            return not (self.kl_weight or self.same_kl_weight)
        return self.arm in arms.PLAIN | arms.STEERED or not any([share, *self.term_weights().values()])


@dataclass
class CalibratedDPOConfig(CalibrationConfig, DPOConfig):
    """Preference tuning with the calibration objective."""

    hinge_reply: str = _option(
        "opening",
        "Recipes: a failing context's reply. `opening`: the same as its passing twin's, so that they differ by "
        "the outcome alone; `chosen`: the chosen reply of its pair. Never the rejected one.",
    )

    def __post_init__(self):
        _check_choice(self, "hinge_reply", ("opening", "chosen"))
        super().__post_init__()

    def unused(self) -> list[str]:
        """Without reading terms, the reply that they would read too."""
        extra = [f"hinge_reply {self.hinge_reply!r}"] if self.is_plain() and self.hinge_reply != "opening" else []
        return super().unused() + extra


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

    arm: str = _option("hinge-frozen", "Way of training; with `reading_use: reward` directions cannot be refitted.")
    reading_use: str = _option(
        "reward", "Where readings enter: `reward` (no gradient), `aux` (the penalty) or `both`."
    )
    reading_reward: float = _option(
        0.5, "Reward that is taken off for each standard deviation above the group's mean."
    )
    reading_by: str = _option("reference", "Who reads completions: `reference` (cannot be moved) or `policy`.")
    top_share: float = _option(0.1, "Share of a completion's tokens, the highest, whose mean is its reading.")
    group_sd_floor: float = _option(0.1, "Least standard deviation of a group's readings, sigma.")
    repairs: str | None = _option(None, "JSONL of tasks whose tests run on a reply's code. Default: the shipped ones.")
    auroc_gate: float = _option(
        0.7, "Least AUROC of the reading on shipped gaming against honest replies; 0: no gate."
    )

    def __post_init__(self):
        _check_types(self)
        _check_choice(self, "reading_use", ("reward", "aux", "both"))
        _check_choice(self, "reading_by", ("reference", "policy"))
        _check_range(self, ("reading_reward", "top_share", "group_sd_floor"), "above 0", lambda value: value > 0)
        for option in ("top_share", "auroc_gate"):
            if not 0 <= getattr(self, option) <= 1:
                raise ValueError(f"`{option}` is {getattr(self, option)}; allowed: 0 to 1")
        if self.arm == Arm.CALM_DPO or self.arm in arms.STEERED:
            raise ValueError(f"`arm: {self.arm}` is a way of preference tuning; use it with recipes/dpo.py")
        if self.max_pairs is not None:
            raise ValueError(f"`max_pairs` is {self.max_pairs}, but GRPO trains on no pairs; leave it out")
        if self.reading_use == "reward" and self.arm in {*arms.REFITTED, Arm.CONSISTENCY, Arm.OUTPUT_KL}:
            raise ValueError(
                f"`arm: {self.arm}` works through the loss, to which `reading_use: reward` adds nothing; set "
                "`reading_use: aux`, or `arm: hinge-frozen`"
            )
        super().__post_init__()

    def unused(self) -> list[str]:
        """Where readings do not enter the reward, its options too."""
        names = ("reading_reward", "reading_by", "top_share", "group_sd_floor", "auroc_gate")
        own = [option for option in fields(CalibratedGRPOConfig) if option.name in names]
        changed = [option for option in own if getattr(self, option.name) != _default(option)]
        extra = changed if self.reading_use == "aux" or self.arm not in arms.HINGED else []
        return super().unused() + [f"{option.name} {getattr(self, option.name)!r}" for option in extra]

    def is_plain(self) -> bool:
        """In use `reward` nothing is added to the loss."""
        return self.reading_use == "reward" or super().is_plain()


_LOSS_OPTIONS = ("penalty_share", "penalty_weight", "penalty_warmup_steps", "contexts_per_step", "anchor_weight")
_LOSS_OPTIONS += ("side_weight", "norm_weight", "kl_weight", "concept_weight", "concept_kl_weight", "same_kl_weight")
_LOSS_OPTIONS += ("text_anchor_every", "anchor_texts", "max_context_tokens", "reply_tokens", "header_weight")
_LOSS_OPTIONS += ("reply_weight", "tool_weight")


def _default(option: Field) -> object:
    return option.default if option.default_factory is MISSING else option.default_factory()


_AT_LEAST_ONE = ("text_anchor_every", "reply_tokens", "contexts_per_step", "max_tasks", "max_pairs", "anchor_texts")
_AT_LEAST_ONE += ("refit_every", "refit_stories", "max_context_tokens")
_ABOVE_ZERO = ("huber_delta", "header_weight", "reply_weight")
_NOT_NEGATIVE = ("penalty_share", "penalty_weight", "anchor_weight", "side_weight", "norm_weight", "kl_weight")
_NOT_NEGATIVE += ("concept_weight", "concept_kl_weight", "same_kl_weight", "corridor", "penalty_warmup_steps")
_NOT_NEGATIVE += ("ceiling_margin", "refit_turns", "steer_dose", "set_point")


def _check_range(config: Any, options: tuple[str, ...], allowed: str, holds) -> None:
    for option in options:
        value = getattr(config, option)
        if value is not None and not (holds(value) and math.isfinite(value)):
            raise ValueError(f"`{option}` is {value}; allowed: {allowed}")


def _check_choice(config: Any, option: str, allowed) -> None:
    if getattr(config, option) not in allowed:
        raise ValueError(f"`{option}` is {getattr(config, option)!r}; allowed: {', '.join(allowed)}")


def _check_types(config: Any) -> None:
    """Raises ValueError where a value from YAML is not of its option's type (a bare `2e-4` is a string to YAML)."""
    for owner in (CalibrationConfig, type(config)):
        hints = get_type_hints(owner)
        for option in (f.name for f in fields(config) if f.name in owner.__annotations__):
            _check_type(option, getattr(config, option), hints[option])


def _check_type(option: str, value: object, hint: Any) -> None:
    allowed = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if any(_is(value, kind) for kind in allowed):
        return
    names = " or ".join(
        "nothing" if k is type(None) else getattr(k, "__name__", str(k)) if not get_args(k) else str(k)
        for k in allowed
    )
    raise ValueError(f"`{option}` is {value!r} ({type(value).__name__}); allowed: {names}")


def _is(value: object, kind: Any) -> bool:
    if kind is type(None):
        return value is None
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(entry, get_args(kind)[0]) for entry in value)
    if get_origin(kind) is dict:
        key, item = get_args(kind)
        return isinstance(value, dict) and all(_is(k, key) and _is(v, item) for k, v in value.items())
    return type(value) is kind or (kind is float and type(value) is int)
