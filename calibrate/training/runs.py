"""A training run: its texts and model, and its output folder: claimed, resumed after a stop, finished once."""

import contextlib
import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig
from yaml import YAMLError

from calibrate import corpora, models
from calibrate.corpora import Pair
from calibrate.models import Checkpoint
from calibrate.training import adapters, arms, estimate
from calibrate.training.configs import CalibratedDPOConfig, CalibratedGRPOConfig
from calibrate.training.objective import Data
from calibrate.training.options import default, option
from calibrate.transcripts import for_template
from calibrate.vectors import load_vectors

logger = logging.getLogger(__name__)
FINISHED = "finished"
# What users' mistakes raise, in TRL and transformers too: a folder for a file, a package that is not there.
USER_ERRORS = (ValueError, OSError, YAMLError, ImportError, NotImplementedError)
# Options that change where and how a run reports, not what it computes.
_NO_MATTER = {
    "output_dir",
    "run_name",
    "report_to",
    "logging_steps",
    "resume_from_checkpoint",
    "hub_model_id",
    "hub_token",
}
_NO_MATTER |= {"push_to_hub", "save_total_limit", "disable_tqdm", "project", "trackio_space_id", "logging_dir"}
_NO_MATTER |= {"dry_run"}


@dataclass
class ModelOptions(ModelConfig):
    """TRL's options of the model; `refuse_model_options` says which of them recipes use."""

    # TRL's default is a value that a user may mean: given, it could not be told from not given.
    dtype: str | None = option(None, "Not used: a model has its checkpoint's dtype, float32 on most CPUs and in full.")


class Run(NamedTuple):
    """What a recipe trains: model, adapter, texts, and the checkpoint to resume from (`FINISHED` where it is done)."""

    checkpoint: Checkpoint
    reference: Any  # a second copy of the model where there is no adapter to switch off, for DPO
    peft_config: Any
    data: Data
    pairs: list[Pair]
    resume_from: str | None


def prepare(args: Any, model_args: Any) -> Run:
    """Loads the train split's texts and the model, and claims the output folder (in a dry run, a temporary one).

    Raises:
        ValueError: an option is not used, a text file does not fit, or the folder holds another run.
    """
    refuse_unused(args, model_args)
    if unused := args.unused():  # a file of options may serve several arms, so this is said and not refused
        logger.info("`arm: %s` does not use %s", args.arm, ", ".join(unused))
    if args.dry_run:
        estimate.set_aside(args)
    every = [twin for twin in corpora.load_twins(args.twins) if twin[0].split == "train"]
    twins = corpora.of_tasks(every, args.max_tasks)
    # The pairs go with the contexts, where they are of the same conversations; a user's transcripts may have none.
    left_out = {failing.task for failing, _ in every} - {failing.task for failing, _ in twins}
    pairs = [p for p in corpora.load_pairs(args.pairs) if p.split == "train" and p.task not in left_out]
    pairs = arms.prompts_of(args.arm, pairs)
    if isinstance(args, CalibratedDPOConfig) and args.hinge_reply == "chosen":
        twins = with_chosen(twins, pairs)
    pairs = corpora.spread(pairs, args.max_pairs)
    if not pairs and not isinstance(args, CalibratedGRPOConfig):
        raise ValueError(
            f'`arm: {args.arm}` finds no pairs of its kind with `"split": "train"`; give others in `pairs`'
        )
    dialogues = [dialogue for dialogue in corpora.load_neutral(args.neutral) if dialogue.split == "train"]
    stories = [story for story in corpora.load_stories(args.stories) if story.split == "train"]
    checkpoint, reference = _models(args, model_args)
    pairs = [p._replace(prompt=for_template(checkpoint.tokenizer, p.prompt)) for p in pairs]
    from trl import get_peft_config

    peft_config = get_peft_config(model_args)
    if peft_config:
        peft_config.revision = model_args.model_revision  # of the base, which PEFT does not look up
    adapters.keep_below_band(peft_config, args)
    adapters.refuse_unmatched(peft_config, checkpoint.model)
    data = Data(twins, dialogues, stories, prepared=True)
    content = [twins, dialogues, stories, pairs, checkpoint.weight_hash]
    if isinstance(args, CalibratedGRPOConfig):
        content.append(corpora.load_repairs(args.repairs))
    if args.arm == arms.Arm.SHUFFLED:
        content.append(load_vectors(args.shuffled_vectors).recipe)
    resume_from = claim(args, model_args, content)
    return Run(checkpoint, reference, peft_config, data, pairs, resume_from)


def with_chosen(twins: list, pairs: list) -> list:
    """The twins, each failing context with the chosen reply of its conversation's first pair, where there is one.

    The passing twin keeps its opening: the ceiling stands where it stood.

    Raises:
        ValueError: no failing context has a pair.
    """
    chosen = {(pair.task, pair.context): pair.chosen[0]["content"] for pair in reversed(pairs)}
    replies = [chosen.get((failing.task, failing.context), failing.reply) for failing, _ in twins]
    if all(reply == failing.reply for reply, (failing, _) in zip(replies, twins, strict=True)):
        raise ValueError(
            "`hinge_reply` is 'chosen', but no pair has the `task` and `context` of a failing context; set it to "
            "`opening`, or give pairs of these conversations"
        )
    if without := sum((failing.task, failing.context) not in chosen for failing, _ in twins):
        said = "`hinge_reply: chosen`: %d of %d contexts have no pair and keep their opening"
        logger.info(said, without, len(twins))
    return [(failing._replace(reply=reply), twin) for reply, (failing, twin) in zip(replies, twins, strict=True)]


def _models(args: Any, model_args: Any) -> tuple[Checkpoint, Any]:
    """The model, and for DPO in full the reference: TRL would load it by a name that need not be the same weights."""

    def load() -> Checkpoint:
        with whole_model(args):
            return models.load(
                model_args.model_name_or_path,
                revision=model_args.model_revision,
                trust_remote_code=args.trust_remote_code,
                block_list=args.blocks,
            )

    checkpoint = load()
    if checkpoint.adapter_hash is not None:
        raise ValueError(f"{checkpoint.name!r} is an adapter; merge it into its base first, and train that")
    if model_args.use_peft:
        return checkpoint, None
    checkpoint.model.float()  # steps of an optimiser vanish in pure bf16; `bf16: true` computes in it all the same
    other = checkpoint.name == "default" or model_args.model_revision not in (None, "main")
    if isinstance(args, CalibratedGRPOConfig) and args.beta and other:
        raise ValueError(
            f"`beta` is {args.beta}: TRL loads GRPO's reference by the name of the model, which need not be these "
            "weights; set `use_peft: true` or `beta: 0.0`"
        )
    # In the policy's precision, as TRL loads its own: rounding would be a difference between the two.
    return checkpoint, load().model.float() if isinstance(args, CalibratedDPOConfig) else None


@contextlib.contextmanager
def whole_model(args: Any) -> Generator[None]:
    """Inside, a model is loaded whole under ZeRO-3 too: its hash and the reference are read before it is sharded."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    plugin = args.deepspeed_plugin
    if plugin:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin:
            set_hf_deepspeed_config(plugin.dschf)


def refuse_unused(args: Any, model_args) -> None:
    """Raises ValueError where an option is set that the recipe would not use: nothing is ignored in silence."""
    refuse_model_options(model_args)
    if args.adapt_above_band and not model_args.use_peft:
        raise ValueError("`adapt_above_band` is True, which is of LoRA; set `use_peft: true`, or remove it")
    refuse_training_options(args)


def refuse_training_options(args: Any) -> None:
    """Raises ValueError where one of the trainer's own options would do nothing, or change what resuming gives."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()  # "no" where nobody chose
    if launched not in ("no", "fp16" if args.fp16 else "bf16" if args.bf16 else "no"):
        # transformers takes the options' where one of them is true, and else the launcher's, without a word.
        raise ValueError(
            f"the launcher's `mixed_precision` is {launched!r}, but `bf16` is {args.bf16} and `fp16` is {args.fp16}; "
            "make them agree, in the recipe's YAML or with another file of accelerate_configs/"
        )
    if args.save_only_model:
        raise ValueError(
            "`save_only_model` is True, but this recipe resumes by itself, from checkpoints that hold the optimiser "
            "too; remove it"
        )
    available = {*get_available_reporting_integrations(), "flyte", "azure_ml", None}  # it never lists these
    if missing := sorted({*args.report_to} - available):
        raise ValueError(f"`report_to` names {', '.join(missing)}, which is not installed; install it, or remove it")
    for name in ("resume_from_checkpoint", "model_init_kwargs"):
        if value := getattr(args, name):
            raise ValueError(
                f"`{name}` is {value!r}, which this recipe does not use (it resumes by itself, and loads the model as "
                "`calibrate.load` does); remove it"
            )


def refuse_model_options(model_args) -> None:
    """Raises ValueError where the model is not named, or one of its options would not be used."""
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not given; name a folder, a model on the Hub, or `default`")
    used = {"model_name_or_path", "model_revision", "use_peft"}
    for field in fields(model_args):
        value = getattr(model_args, field.name)
        lora = field.name.startswith("lora_") or field.name in ("use_rslora", "use_dora")
        if field.name in used or (lora and model_args.use_peft) or value == default(field):
            continue
        wants = "is of LoRA; set `use_peft: true`, or remove it" if lora else "this recipe does not use; remove it"
        raise ValueError(f"`{field.name}` is {value!r}, which {wants}")
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if revision not in (None, "main") and (name == "default" or Path(str(name)).is_dir()):
        raise ValueError(
            f"`model_revision` is {revision!r}, which is of models on the Hub; {name!r} is none of them, so remove it"
        )


def claim(args: Any, model_args, data: list) -> str | None:
    """Takes the output folder for this configuration and data.

    Returns:
        The checkpoint to resume from, `FINISHED` where the run is complete, or None for a new run.

    Raises:
        ValueError: the folder holds a run with another configuration.
    """
    options = {key: value for key, value in args.to_dict().items() if key not in _NO_MATTER}
    options |= {f"model.{key}": value for key, value in vars(model_args).items()}
    options["data"] = config_hash({"data": data})
    options["processes"] = args.world_size  # which contexts a step reads depends on it
    options["vectors"] = load_vectors(args.vectors).content_hash() + config_hash(load_vectors(args.vectors).recipe)
    options = json.loads(json.dumps(options, default=str))
    folder = Path(str(args.output_dir))
    path = folder / "calibration" / "options.json"
    # A run that was refused before it began (wrong vectors, say) has left nothing but its claim: that is taken over.
    if not any(item.is_file() and item != path for item in folder.rglob("*")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(options, indent=2), encoding="utf-8")
        return None
    if not path.is_file():
        raise ValueError(
            f"output folder {folder} is not empty and holds no run of this recipe; choose another `output_dir`"
        )
    kept = json.loads(path.read_text(encoding="utf-8"))
    if differing := sorted(key for key in kept.keys() | options.keys() if kept.get(key) != options.get(key)):
        raise ValueError(
            f"output folder {folder} holds a run with another configuration (hash {config_hash(kept)}, now "
            f"{config_hash(options)}; differing: {', '.join(differing[:6])}); choose another `output_dir` or delete it"
        )
    if (folder / "calibration" / "finished.json").is_file():
        return FINISHED
    return last_complete_checkpoint(folder)


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that holds the file that is written last: a stop while saving leaves one without."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def finish(trainer) -> None:
    """Marks the run as complete, with its log, after everything else is written."""
    folder = Path(trainer.args.output_dir)
    if trainer.accelerator.is_main_process:
        aside = folder / "calibration" / "finished.json.partial"
        aside.write_text(json.dumps(trainer.state.log_history, indent=2), encoding="utf-8")
        os.replace(aside, folder / "calibration" / "finished.json")


def config_hash(options: dict) -> str:
    """A short hash of a run's options."""
    return hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()[:12]


def train(trainer: Any, run: Run) -> None:
    """Trains from where the run stands, saves the model, and marks the run as finished; a dry run is only measured."""
    if trainer.args.dry_run:
        found = estimate.measure(trainer)
        if trainer.accelerator.is_main_process:
            sys.stdout.write(found.text())
        return trainer.end()
    trainer.train(resume_from_checkpoint=run.resume_from)
    trainer.save_model(trainer.args.output_dir)
    finish(trainer)
    trainer.end()


def main(recipe: Callable[[Any, Any], None], config: type) -> None:
    """Parses `--config FILE.yaml` and options, runs the recipe, and ends with one line where the user erred."""
    from trl import TrlParser

    # PEFT looks the base model's vocabulary up on the Hub at every save, to see whether it was resized; it was not.
    warnings.filterwarnings("ignore", message="(Unable to fetch remote file|Could not find a config file)")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    main_process = os.environ.get("RANK", "0") == "0"
    logging.getLogger("calibrate").setLevel(logging.INFO if main_process else logging.WARNING)
    parser = TrlParser([config, ModelOptions])  # ty: ignore[invalid-argument-type]
    try:
        recipe(*parser.parse_args_and_config())
    except USER_ERRORS as error:
        message = " ".join(str(error).split())  # on one line
        if "--chat-template" in message:  # the library names it, whoever calls it
            message += " (an option of `calibrate`; recipes have none of them)"
        sys.exit(f"error: {message}")
