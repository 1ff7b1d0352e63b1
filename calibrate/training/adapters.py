"""Which blocks a LoRA adapts: those up to the band, unless the user chose others."""

import copy
import re

from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from calibrate.training.configs import CalibrationConfig
from calibrate.vectors import load_vectors


def keep_below_band(peft_config, args: CalibrationConfig) -> None:
    """Restricts a LoRA configuration to the blocks up to the band's last layer, unless the user chose the blocks.

    Adapters above the band could undo there what the penalty does below (BLOCK-EM: 38 to 3 % against a return). In
    every arm alike, so that arms differ in nothing else.
    """
    if peft_config is None or args.adapt_above_band or peft_config.layers_to_transform is not None:
        return
    if peft_config.target_parameters:  # PEFT finds them by name in every block
        raise ValueError(
            f"`lora_target_parameters` is {peft_config.target_parameters}, which LoRA adapts above the band too; use "
            "`lora_target_modules`, or set `adapt_above_band: true`"
        )
    if peft_config.modules_to_save:
        raise ValueError(
            f"`lora_modules_to_save` is {peft_config.modules_to_save}, which are trained whole, "
            "above the band too; remove it, or set `adapt_above_band: true`"
        )
    if isinstance(peft_config.target_modules, str) and peft_config.target_modules != "all-linear":
        raise ValueError(
            f"`lora_target_modules` is {peft_config.target_modules!r}, which PEFT takes for a pattern and matches in "
            "every block, above the band too; give two or more names of modules, or `all-linear`"
        )
    band = args.layers or load_vectors(args.vectors).used_band()
    peft_config.layers_to_transform = list(range(max(band) + 1))


def refuse_unmatched(peft_config, model) -> None:
    """Raises ValueError where PEFT would leave out a named module without a word: no adapted block has one."""
    if peft_config is None or isinstance(peft_config.target_modules, str):
        return
    asked, blocks = copy.deepcopy(peft_config), peft_config.layers_to_transform
    convert_peft_config_for_transformers(asked, model, None)  # an MoE's experts are parameters now, and no modules
    for target in asked.target_modules or ():
        found = {block_of(name) for name, _ in model.named_modules() if f".{name}".endswith(f".{target}")}
        if not found & set(found if blocks is None else blocks):
            raise ValueError(
                f"`lora_target_modules` has {target!r}, and no block that is adapted has a module of that name; leave "
                "it out"
            )


def refuse_outside(model, anywhere: bool) -> None:
    """Raises ValueError where an adapter leaves its blocks, or has none to stay in and may not be `anywhere`."""
    for config in getattr(model, "peft_config", {}).values():
        blocks = getattr(config, "layers_to_transform", None)
        if blocks is None and anywhere:
            continue
        if blocks is None:
            raise ValueError(
                "the adapter has no `layers_to_transform`, so it adapts blocks above the band too; call "
                "`calibrate.training.adapters.keep_below_band(peft_config, args)` first, or set "
                "`adapt_above_band: true`"
            )
        blocks = [blocks] if isinstance(blocks, int) else blocks
        adapted = [name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name]
        outside = [name for name in adapted if block_of(name) not in blocks]
        if outside:  # PEFT adapts a module that is named in full, and an MoE's experts, wherever they are
            raise ValueError(
                f"the adapter is to stay in blocks {min(blocks)} to {max(blocks)}, but adapts {outside[0]!r}; name "
                "modules by their last part alone and no experts, or "
                + ("remove `layers_to_transform`" if anywhere else "set `adapt_above_band: true`")
            )


def block_of(name: str) -> int | None:
    """The block that a module or parameter is of, by its name; None where it is of no block."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None
