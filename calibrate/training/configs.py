"""Options of calibrated training, beside TRL's own. Each is checked here, because the YAML parser checks no types."""

import math
from dataclasses import dataclass, field, fields
from typing import get_args, get_origin, get_type_hints

from trl import DPOConfig

from calibrate.concepts import TARGET
from calibrate.training.arms import ARMS


@dataclass
class CalibratedDPOConfig(DPOConfig):
    """Preference tuning with the calibration objective. All weights 0, or `arm: none`, is TRL's plain DPO."""

    vectors: str = field(default="", metadata={"help": "Folder or Hub id of the vectors (`calibrate extract`)."})
    arm: str = field(
        default="hinge-frozen",
        metadata={"help": "`hinge-frozen`, `random` (a matched control direction) or `none` (no calibration terms)."},
    )
    concepts: list[str] = field(
        default_factory=lambda: [TARGET], metadata={"help": "Concepts whose readings the hinge lowers."}
    )
    layers: list[int] | None = field(
        default=None, metadata={"help": "Layers to read, counted from 0. Default: the band of the vectors."}
    )
    hinge_share: float = field(
        default=0.3,
        metadata={
            "help": "Norm of the hinge's gradient over the task's, on the trained parameters at the first step."
        },
    )
    hinge_weight: float | None = field(
        default=None, metadata={"help": "Fixed weight of the hinge; set it to override `hinge_share`."}
    )
    hinge_warmup_steps: int = field(default=2, metadata={"help": "Optimiser steps over which the hinge is warmed up."})
    anchor_weight: float = field(
        default=1.0, metadata={"help": "Weight of the squared change of readings on passing twins."}
    )
    side_weight: float = field(
        default=0.01, metadata={"help": "Weight of the squared change of the other emotions on failing contexts."}
    )
    kl_weight: float = field(
        default=1.0, metadata={"help": "Weight of KL(reference || tuned) on neutral dialogues, nats per token."}
    )
    concept_weight: float = field(
        default=1.0, metadata={"help": "Weight of the relative change of hidden states on emotion stories."}
    )
    text_anchor_every: int = field(
        default=2, metadata={"help": "The KL and story anchors run at every so many micro-steps (the first included)."}
    )
    ceiling_quantile: float = field(
        default=0.5, metadata={"help": "Quantile of the reference's readings on passing twins that is the ceiling."}
    )
    corridor: float = field(
        default=1.0, metadata={"help": "Sigma below the ceiling at which the hinge pays again (a floor)."}
    )
    huber_delta: float = field(default=1.0, metadata={"help": "Knee of the Huber hinge, sigma."})
    header_weight: float = field(default=1.0, metadata={"help": "Weight of the turn header in the reading terms."})
    reply_weight: float = field(default=1.0, metadata={"help": "Weight of the reply tokens in the reading terms."})
    reply_tokens: int = field(default=64, metadata={"help": "Reply tokens that are read, from the first."})
    contexts_per_step: int = field(
        default=2, metadata={"help": "Failing contexts, and as many twins, per micro-step."}
    )
    twins: str | None = field(
        default=None, metadata={"help": "JSONL of failing and passing contexts. Default: the shipped ones."}
    )
    pairs: str | None = field(default=None, metadata={"help": "JSONL of preference pairs. Default: the shipped ones."})
    neutral: str | None = field(
        default=None, metadata={"help": "JSONL of neutral dialogues. Default: the shipped ones."}
    )
    stories: str | None = field(
        default=None, metadata={"help": "JSONL of emotion stories. Default: the shipped ones."}
    )
    max_tasks: int | None = field(
        default=None, metadata={"help": "Train on so many evenly spaced tasks. Default: all."}
    )
    max_pairs: int | None = field(
        default=None, metadata={"help": "Train on so many evenly spaced pairs. Default: all."}
    )
    random_seed: int = field(default=0, metadata={"help": "Seed of the random direction of `arm: random`."})

    def __post_init__(self):
        hints = get_type_hints(CalibratedDPOConfig)
        for option in (f.name for f in fields(self) if f.name in CalibratedDPOConfig.__annotations__):
            _check_type(option, getattr(self, option), hints[option])
        if not self.vectors:
            raise ValueError("`vectors` is not set; give the folder that `calibrate extract` wrote")
        if self.arm not in ARMS:
            raise ValueError(f"`arm` is {self.arm!r}; allowed: {', '.join(ARMS)}")
        for option in ("concepts", "layers"):
            value = getattr(self, option)
            if value is not None and (not value or len(set(value)) < len(value)):
                raise ValueError(f"`{option}` is {value}; allowed: at least one, each once")
        if not 0 <= self.ceiling_quantile <= 1:
            raise ValueError(f"`ceiling_quantile` is {self.ceiling_quantile}; allowed: 0 to 1")
        for option in ("text_anchor_every", "reply_tokens", "contexts_per_step", "max_tasks", "max_pairs"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"`{option}` is {value}; allowed: 1 or more")
        for option in ("huber_delta", "header_weight", "reply_weight"):
            value = getattr(self, option)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{option}` is {value}; allowed: above 0")
        for option in _NOT_NEGATIVE:
            value = getattr(self, option)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`{option}` is {value}; allowed: 0 or more")
        super().__post_init__()

    def is_plain(self) -> bool:
        """True where no term would be added, so that the trainer is exactly TRL's."""
        hinge = self.hinge_share if self.hinge_weight is None else self.hinge_weight
        weights = (hinge, self.anchor_weight, self.side_weight, self.kl_weight, self.concept_weight)
        return self.arm == "none" or not any(weights)


_NOT_NEGATIVE = (
    "hinge_share",
    "hinge_weight",
    "anchor_weight",
    "side_weight",
    "kl_weight",
    "concept_weight",
    "corridor",
)
_NOT_NEGATIVE += ("hinge_warmup_steps",)


def _check_type(option: str, value: object, hint: object) -> None:
    """Raises ValueError where a value from YAML is not of the option's type (a bare `2e-4` is a string to YAML)."""
    allowed = get_args(hint) if type(None) in get_args(hint) else (hint,)
    for kind in allowed:
        if kind is type(None):
            matches = value is None
        elif get_origin(kind) is list:
            (item,) = get_args(kind)
            matches = isinstance(value, list) and all(type(entry) is item for entry in value)
        else:
            matches = type(value) is kind or (kind is float and type(value) is int)
        if matches:
            return
    names = " or ".join(
        "nothing" if k is type(None) else getattr(k, "__name__", str(k)) if not get_args(k) else str(k)
        for k in allowed
    )
    raise ValueError(f"`{option}` is {value!r} ({type(value).__name__}); allowed: {names}")
