"""One mixin that adds the calibration terms to a TRL trainer's loss, and the trainers made with it."""

import contextlib
import os
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer, TrainerCallback
from trl import DPOTrainer, GRPOTrainer, SFTTrainer

from calibrate import models
from calibrate.training import adapters, arms, rewards
from calibrate.training.configs import CalibrationConfig
from calibrate.training.objective import Data, Objective
from calibrate.vectors import load_vectors

# What the mixin is mixed into, for the type checker; at run time it stands before any of TRL's trainers.
_Trainer = Trainer if TYPE_CHECKING else object
# Options that `runs.prepare` and recipes use; a trainer has its texts from `data`, and its model as it is.
_OF_RECIPES = ("dry_run", "twins", "pairs", "neutral", "stories", "repairs", "max_tasks", "max_pairs", "blocks")


class CalibrationMixin(_Trainer):
    """Adds penalty, anchors and side term to `compute_loss`, on batches of contexts of its own.

    The contexts are read in a second forward pass after the trainer's, on the unwrapped model, cut after the band:
    TRL's fused head returns neither logits nor hidden states, and its batches do not say which tokens are whose. One
    scalar, one backward pass. In the arms without terms of their own nothing is added or run.

    Args:
        data: the texts of the calibration terms.
        weight_hash: `Checkpoint.weight_hash` of the model.
    """

    args: Any
    model: Any

    def __init__(self, *positional, data: Data, weight_hash: str, **options):
        # Seen before TRL sets it by itself.
        given = [one for one in (*positional, *options.values()) if isinstance(one, CalibrationConfig)]
        self._reentrant_given = any((one.gradient_checkpointing_kwargs or {}).get("use_reentrant") for one in given)
        super().__init__(*positional, **options)
        if isinstance(self.train_dataset, Sized) and not len(self.train_dataset):
            if length := getattr(self.args, "max_length", None):  # TRL drops them without a word
                raise ValueError(
                    f"no training example is left: with `max_length` {length} every prompt is cut; raise it"
                )
            raise ValueError(
                'no training example: `train_dataset` is empty; give some, in `repairs` with `"split": "train"`'
            )
        self._check_prepared(data)
        self._check_supported()
        self._calibration = self._steering = None
        if not self.args.uses_vectors():
            return
        vectors, model = load_vectors(self.args.vectors), self.accelerator.unwrap_model(self.model)
        config = models.text_config(model)
        name = config._name_or_path or "of this run"
        vectors.check(config.hidden_size, config.num_hidden_layers, weight_hash, name)
        if not self.args.is_plain():
            self._calibration = Objective(self, data)
            self.add_callback(_StopWhenMet(self._calibration))
        elif self.args.arm in arms.STEERED:
            layers = self.args.layers or vectors.used_band()
            targets = arms.target_directions(vectors, self.args.concepts, self.args.raise_concepts, 1, layers)
            self._steering = arms.steering_of(self.args, model, vectors, targets, layers)

    def _check_prepared(self, data: Data) -> None:
        """Refuses what `runs.prepare` does to texts, model and adapter, where nobody has done it."""
        args = self.args
        adapters.refuse_outside(self.model, args.adapt_above_band)
        gate = getattr(args, "auroc_gate", 0) and args.in_reward()  # reads `pairs` by itself
        for name in _OF_RECIPES if not data.prepared else ():
            if (value := getattr(args, name, None)) and not (gate and name == "pairs"):
                raise ValueError(
                    f"`{name}` is {value!r}, which recipes use and the trainer does not; use a recipe, or remove it "
                    "and give the texts in `data` and the model of `calibrate.load`"
                )
        chosen = getattr(args, "hinge_reply", "") == "chosen" and not args.is_plain()
        if (chosen or args.arm in arms.PREPARED) and not data.prepared:
            option = "hinge_reply: chosen" if chosen else f"arm: {args.arm}"
            raise ValueError(
                f"`{option}` changes the texts of a run, which recipes do and the trainer does not; use a recipe, or "
                "change them as `calibrate.training.runs.prepare` does and say so with `Data(..., prepared=True)`"
            )

    def _check_supported(self) -> None:
        """Refuses at the start what would fail later or change a result in silence."""
        args = self.args
        if not args.uses_vectors():  # it is TRL's own trainer then
            return
        if getattr(self.accelerator.unwrap_model(self.model), "is_quantized", False):
            raise ValueError("the base is quantised, so its readings are not those of its vectors; load it in full")
        configs = getattr(self.model, "peft_config", {}).values()
        at_zero = ("lora_B", "lora_embedding_A")  # the factors that PEFT starts at 0, of matrices and of embeddings
        if any(part.any() for name, part in self.model.named_parameters() if any(one in name for one in at_zero)):
            starts = ", ".join({repr(getattr(config, "init_lora_weights", None)) for config in configs})
            raise ValueError(
                f"the adapter is not 0 at the start (`init_lora_weights` is {starts}, or it was trained before), and "
                "the reference is the model without it; set `init_lora_weights` to True, or merge it into its base"
            )
        for option in ("use_liger_kernel", "torch_compile"):
            if getattr(args, option):
                raise ValueError(f"`{option}` is not supported with readings; set it to false")
        if template := getattr(args, "chat_template_path", None):
            raise ValueError(
                f"`chat_template_path` is {template!r}, but vectors are read with the tokenizer's own template; leave "
                "it out, or put the template into the tokenizer and extract vectors with it"
            )
        self._check_launch()
        if args.is_plain() and args.arm not in arms.STEERED:
            return  # the reward reads in evaluation mode, without a gradient, in passes of its own
        if any(getattr(config, "lora_dropout", 0) for config in configs):
            raise ValueError("`lora_dropout` must be 0: dropout is a floor under every anchor; set it to 0.0")
        self._check_model()
        if args.measures_share() and getattr(args, "activation_offloading", False):
            raise ValueError(
                "`activation_offloading` frees what the gradient norms of `penalty_share` read again; set it to "
                "false, or `penalty_weight`"
            )
        reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if args.gradient_checkpointing and reentrant and args.measures_share():
            raise ValueError(
                "`gradient_checkpointing_kwargs: {use_reentrant: true}` gives no gradient norms for `penalty_share`; "
                "set `use_reentrant: false`, or `penalty_weight`"
            )
        distributed = self.accelerator.distributed_type != DistributedType.NO
        if args.gradient_checkpointing and distributed:
            # A second forward pass under re-entrant checkpointing fails under DDP and ZeRO; TRL itself asks for it
            # with LoRA and ZeRO-3 because of a DeepSpeed bug that is mended since 0.19.8.
            if reentrant and not self._trl_chose_reentrant():
                raise ValueError(
                    "`gradient_checkpointing_kwargs: {use_reentrant: true}` breaks the second forward pass on several "
                    "processes; set `use_reentrant: false`"
                )
            for option in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
                setattr(args, option, (getattr(args, option) or {}) | {"use_reentrant": False})

    def _check_model(self) -> None:
        """Refuses a model, or a way of running it, under which the reference or the readings would be others."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        unsupported = ["neftune_noise_alpha", "use_vllm"]
        for option in [*unsupported, *(["padding_free"] if isinstance(self, DPOTrainer) else [])]:
            if getattr(args, option, None):
                raise ValueError(f"`{option}` is not supported with calibration terms; leave it out")
        ends = ("dropout", "dropout_prob", "pdrop")
        # Where text is a part of the model, its configuration is one of its own.
        found = [*model.config.to_dict().items(), *models.text_config(model).to_dict().items()]
        dropped = [(name, rate) for name, rate in found if name.endswith(ends)]
        if rates := {name: rate for name, rate in dropped if isinstance(rate, float) and rate > 0}:
            raise ValueError(f"the model's config has {rates}: dropout is a floor under every anchor; set it to 0.0")
        if args.arm in arms.STEERED and not hasattr(model, "disable_adapter"):
            raise ValueError(
                f"`arm: {args.arm}` steers policy and reference alike, which needs LoRA (`use_peft: true`)"
            )
        if args.arm in arms.STEERED and getattr(args, "precompute_ref_log_probs", False):
            raise ValueError(f"`arm: {args.arm}` steers the reference too; set `precompute_ref_log_probs: false`")

    def _check_launch(self) -> None:
        """Refuses ways of sharing the work in which a second pass on the unwrapped model is no part of the first."""
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)  # there under FSDP alone
        parallel, kind = self.accelerator.parallelism_config, self.accelerator.distributed_type
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and kind != DistributedType.FSDP:
            raise ValueError(
                f"the launcher asks for FSDP, which accelerate has on GPUs alone: this run would be {kind.value}; set "
                "`use_cpu: false`, or take another launcher"
            )
        if fsdp and fsdp.fsdp_version == 1:
            raise ValueError("`fsdp_version: 1` is not supported; set it to 2")
        if fsdp and fsdp.cpu_ram_efficient_loading:
            raise ValueError(
                "`fsdp_cpu_ram_efficient_loading: true` leaves all processes but the first without the weights of "
                "the reference, which each reads before they are shared out; set it to false"
            )
        if fsdp and fsdp.activation_checkpointing:
            raise ValueError(
                "`fsdp_activation_checkpointing: true` is not tested with a second forward pass; set it to false, "
                "and `gradient_checkpointing: true`"
            )
        if fsdp and isinstance(fsdp.cpu_offload, CPUOffloadPolicy):
            raise ValueError("`fsdp_offload_params: true` is not tested; set it to false")
        if parallel and parallel.non_data_parallel_size > 1:
            raise ValueError(
                "`parallelism_config` with context, sequence or tensor parallelism is not supported; leave "
                "`cp_size`, `sp_size` and `tp_size` at 1"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would share each batch (DataParallel); "
                "start one process for each with `accelerate launch`, or show one GPU with `CUDA_VISIBLE_DEVICES`"
            )

    def _trl_chose_reentrant(self) -> bool:
        plugin = self.accelerator.state.deepspeed_plugin
        wanted = plugin and plugin.zero_stage == 3 and hasattr(self.model, "peft_config")
        return bool(wanted and not self._reentrant_given)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        steered = self.model.training and self._steering is not None
        with self._steering.active() if steered else contextlib.nullcontext():
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Evaluation has the trainer's own loss: the contexts are training data, and their order must not depend on it.
        if self._calibration is None or not self.model.training:
            return result
        loss: Any = result[0] if return_outputs else result
        unwrapped, divisor = self.accelerator.unwrap_model(model), self._extra_divisor(num_items_in_batch)
        loss = loss + self._calibration(unwrapped, loss * divisor) / divisor
        return (loss, result[1]) if return_outputs else loss

    def _extra_divisor(self, num_items_in_batch) -> int:
        """The accumulation steps where the trainer's own loss is already divided by them, else 1."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = scaled or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._calibration is not None and self.model.training:
            logs |= self._calibration.take_metrics()
        super().log(logs, start_time)


class _StopWhenMet(TrainerCallback):
    """Ends the run where the objective says that the ceiling is met (`stop_when_met`)."""

    def __init__(self, objective: Objective):
        self.objective = objective

    def on_step_end(self, args, state, control, **_):
        if self.objective.met:
            control.should_training_stop = True
            control.should_save = False  # a run that goes on from here would make a step before it can stop

    on_epoch_end = on_step_end


class CalibratedDPOTrainer(CalibrationMixin, DPOTrainer):
    """TRL's `DPOTrainer` with the calibration terms; see `CalibrationMixin`."""

    _tag_names = ["trl", "dpo", "calibrate"]


class CalibratedSFTTrainer(CalibrationMixin, SFTTrainer):
    """TRL's `SFTTrainer` with the calibration terms; see `CalibrationMixin`."""

    _tag_names = ["trl", "sft", "calibrate"]


class CalibratedGRPOTrainer(CalibrationMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` with readings in the reward, in the loss, or both; see `CalibrationMixin` and `rewards`."""

    _tag_names = ["trl", "grpo", "calibrate"]

    def __init__(self, *positional, reward_funcs, **options):
        self._reading = rewards.ReadingReward()
        functions = list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
        in_reward = options["args"].in_reward()
        model = options.get("model", positional[0] if positional else None)
        adapted = options.get("peft_config") or hasattr(model, "disable_adapter")
        if in_reward and options["args"].reading_by == "reference" and not adapted:
            raise ValueError(
                "`reading_by: reference` needs an adapter that can be switched off; set `use_peft: true`, or "
                "`reading_by: policy`"
            )
        if (kwargs := options["args"].chat_template_kwargs) and options["args"].uses_vectors():
            raise ValueError(
                f"`chat_template_kwargs` is {kwargs!r}, but readings render prompts without them; leave it out or put "
                "them into the tokenizer's chat template"
            )
        for name in ("tools", "environment_factory", "rollout_func"):
            if in_reward and options.get(name):
                raise ValueError(
                    f"`{name}` may put tokens into completions that are not the model's own, which the reward's "
                    "reading would take for its own; leave it out, or set `reading_use: aux`"
                )
        super().__init__(*positional, reward_funcs=[*functions, *([self._reading] if in_reward else [])], **options)
        if in_reward:
            self._reading.bind(self)
