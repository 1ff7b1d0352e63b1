"""One mixin that adds the calibration terms to a TRL trainer's loss, and the trainers made with it."""

from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from trl import DPOTrainer

from calibrate.corpora import Context, Dialogue, Story
from calibrate.training.objective import Objective

# What the mixin is mixed into, for the type checker; at run time it stands before any of TRL's trainers.
_Trainer = DPOTrainer if TYPE_CHECKING else object


class CalibrationMixin(_Trainer):
    """Adds hinge, anchors and side term to `compute_loss`, on batches of contexts of its own.

    The contexts are read in a second forward pass after the trainer's, on the unwrapped model, cut after the band:
    TRL's fused head returns neither logits nor hidden states, and its batches do not say which tokens are whose. One
    scalar, one backward pass. With all weights 0, or `arm: none`, nothing is added or run.

    Args:
        twins: (failing, passing) contexts to train on.
        dialogues: neutral dialogues for the KL anchor.
        stories: emotion stories for the hidden-state anchor, so that the model still understands the emotion.
        weight_hash: `Checkpoint.weight_hash` of the model.
    """

    args: Any
    model: Any

    def __init__(
        self,
        *positional,
        twins: list[tuple[Context, Context]],
        dialogues: list[Dialogue],
        stories: list[Story],
        weight_hash: str,
        **options,
    ):
        super().__init__(*positional, **options)
        if isinstance(self.train_dataset, Sized) and not len(self.train_dataset):  # TRL drops them without a word
            raise ValueError(
                f"no training example is left: with `max_length` {self.args.max_length} every prompt is cut; raise it"
            )
        self._calibration = None
        if not self.args.is_plain():
            if not hasattr(self.model, "disable_adapter"):
                raise ValueError(
                    "calibrated training needs a LoRA adapter (the reference is the model without it); set `use_peft: "
                    "true`"
                )
            self._calibration = Objective(self, twins, dialogues, stories, weight_hash)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Evaluation has the trainer's own loss: the contexts are training data, and their order must not depend on it.
        if self._calibration is None or not self.model.training:
            return result
        loss = result[0] if return_outputs else result
        unwrapped = self.accelerator.unwrap_model(model)
        loss = loss + self._calibration(unwrapped, loss) / self._extra_divisor(num_items_in_batch)
        return (loss, result[1]) if return_outputs else loss

    def _extra_divisor(self, num_items_in_batch) -> int:
        """The accumulation steps where the trainer's own loss is already divided by them, else 1."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return self.current_gradient_accumulation_steps if scaled else 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._calibration is not None and self.model.training:
            logs |= self._calibration.take_metrics()
        super().log(logs, start_time)


class CalibratedDPOTrainer(CalibrationMixin, DPOTrainer):
    """TRL's `DPOTrainer` with the calibration terms; see `CalibrationMixin`."""

    _tag_names = ["trl", "dpo", "calibrate"]
