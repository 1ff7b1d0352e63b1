import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import ModelConfig, TrlParser

from calibrate.training.configs import CalibratedDPOConfig

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))
LAUNCHERS = sorted(ROOT.glob("accelerate_configs/**/*.yaml"))
# The first word of a recipe's file name says which script reads it.
CONFIGS = {"dpo": CalibratedDPOConfig}
NO_ANCHORS = dict.fromkeys(["anchor_weight", "side_weight", "kl_weight", "concept_weight"], 0.0)


def parse(folder: Path, **options) -> CalibratedDPOConfig:
    """What the recipe makes of a YAML file with these options."""
    path = folder / "options.yaml"
    path.write_text(
        yaml.safe_dump({"vectors": "somewhere", "use_cpu": True, "bf16": False} | options), encoding="utf-8"
    )
    return TrlParser((CalibratedDPOConfig, ModelConfig)).parse_args_and_config(["--config", str(path)])[0]


def test_values_of_the_right_type_arrive(tmp_path):
    # YAML reads a bare 2e-1 as a string, an integral weight as an integer.
    parsed = parse(tmp_path, hinge_share="2e-1", hinge_weight="5e-2", anchor_weight=2, layers=[3, 4], max_tasks=None)
    assert (parsed.hinge_share, parsed.hinge_weight, parsed.anchor_weight) == (0.2, 0.05, 2)
    assert (parsed.layers, parsed.max_tasks, parsed.concepts) == ([3, 4], None, ["desperate"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hinge_wieght": 0.3}, "Unknown arguments.*--hinge_wieght"),
        ({"layers": 3}, r"`layers` is 3 \(int\); allowed: list\[int\] or nothing"),
        ({"layers": ["2"]}, r"`layers` is \['2'\] \(list\); allowed: list\[int\] or nothing"),
        ({"layers": []}, r"`layers` is \[\]; allowed: at least one, each once"),
        ({"layers": [2, 2]}, r"`layers` is \[2, 2\]; allowed: at least one, each once"),
        ({"concepts": "calm"}, r"`concepts` is 'calm' \(str\); allowed: list\[str\]"),
        ({"concepts": []}, r"`concepts` is \[\]; allowed: at least one, each once"),
        ({"hinge_share": [0.1, 0.3]}, r"`hinge_share` is \[0.1, 0.3\] \(list\); allowed: float"),
        ({"kl_weight": True}, r"`kl_weight` is True \(bool\); allowed: float"),
        ({"contexts_per_step": 1.5}, r"`contexts_per_step` is 1.5 \(float\); allowed: int"),
        ({"arm": "hinge"}, "`arm` is 'hinge'; allowed: none, hinge-frozen, random"),
        ({"vectors": ""}, "`vectors` is not set; give the folder that `calibrate extract` wrote"),
        ({"ceiling_quantile": 50}, "`ceiling_quantile` is 50; allowed: 0 to 1"),
        ({"ceiling_quantile": float("nan")}, "`ceiling_quantile` is nan; allowed: 0 to 1"),
        ({"anchor_weight": -1.0}, "`anchor_weight` is -1.0; allowed: 0 or more"),
        ({"hinge_weight": float("inf")}, "`hinge_weight` is inf; allowed: 0 or more"),
        ({"hinge_warmup_steps": -1}, "`hinge_warmup_steps` is -1; allowed: 0 or more"),
        ({"huber_delta": 0}, "`huber_delta` is 0; allowed: above 0"),
        ({"huber_delta": float("inf")}, "`huber_delta` is inf; allowed: above 0"),
        ({"contexts_per_step": 0}, "`contexts_per_step` is 0; allowed: 1 or more"),
        ({"max_pairs": 0}, "`max_pairs` is 0; allowed: 1 or more"),
    ],
)
def test_a_bad_option_is_named_with_what_is_allowed(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, False),
        ({"arm": "none"}, True),
        ({"hinge_weight": 0.0}, False),  # the anchors are left
        (NO_ANCHORS, False),
        (NO_ANCHORS | {"hinge_share": 0.0}, True),
        (NO_ANCHORS | {"hinge_weight": 0.0}, True),  # overrides the share
        (NO_ANCHORS | {"hinge_share": 0.0, "hinge_weight": 0.1}, False),
        (NO_ANCHORS | {"hinge_share": 0.0, "concept_weight": 1.0}, False),
    ],
)
def test_only_a_run_without_terms_is_plain(tmp_path, options, plain):
    assert parse(tmp_path, **options).is_plain() is plain


def test_there_are_recipes_and_launcher_files():
    assert RECIPES
    assert LAUNCHERS


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_recipe_parses(path):
    config = CONFIGS[re.split("[-_]", path.stem)[0]]
    options, _ = TrlParser((config, ModelConfig)).parse_args_and_config(["--config", str(path), "--use_cpu", "true"])
    assert options.vectors
    assert not options.is_plain() or options.arm == "none"


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_accelerate_loads_every_launcher_file(path):
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes == yaml.safe_load(path.read_text())["num_processes"]
