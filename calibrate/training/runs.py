"""A training run's output folder: claimed by a configuration, resumed after a stop, finished once."""

import hashlib
import json
import os
from dataclasses import MISSING, fields
from pathlib import Path

from calibrate.training.configs import CalibratedDPOConfig
from calibrate.vectors import load_vectors

FINISHED = "finished"
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


def refuse_unused(args: CalibratedDPOConfig, model_args) -> None:
    """Raises ValueError where an option is set that the recipe would not use: nothing is ignored in silence."""
    used = {"model_name_or_path", "model_revision", "use_peft", "use_rslora", "use_dora"}
    for option in fields(model_args):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        value = getattr(model_args, option.name)
        if option.name not in used and not option.name.startswith("lora_") and value != default:
            raise ValueError(f"`{option.name}` is {value!r}, which this recipe does not use; remove it")
    for name in ("resume_from_checkpoint", "model_init_kwargs"):
        if value := getattr(args, name):
            raise ValueError(
                f"`{name}` is {value!r}, which this recipe does not use (it resumes by itself, and loads the model as "
                "`calibrate.load` does); remove it"
            )


def keep_below_band(peft_config, args: CalibratedDPOConfig) -> None:
    """Restricts a LoRA configuration to the blocks up to the band's last layer, unless the user chose the blocks.

    Adapters above the band could undo there what the penalty does below (BLOCK-EM: 38 to 3 % against a return).
    """
    if peft_config is None or args.is_plain() or peft_config.layers_to_transform is not None:
        return
    band = args.layers or load_vectors(args.vectors).used_band()
    peft_config.layers_to_transform = list(range(max(band) + 1))


def claim(args: CalibratedDPOConfig, model_args, data: list) -> str | None:
    """Takes the output folder for this configuration and data.

    Returns:
        The checkpoint to resume from, `FINISHED` where the run is complete, or None for a new run.

    Raises:
        ValueError: the folder holds a run with another configuration.
    """
    options = {key: value for key, value in args.to_dict().items() if key not in _NO_MATTER}
    options |= {f"model.{key}": value for key, value in vars(model_args).items()}
    options["data"] = config_hash({"data": data})
    options["vectors"] = load_vectors(args.vectors).weight_hash + config_hash(load_vectors(args.vectors).recipe)
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
    return _last_complete_checkpoint(folder)


def _last_complete_checkpoint(folder: Path) -> str | None:
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
