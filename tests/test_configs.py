import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import DPOConfig, ModelConfig, TrlParser

from calibrate.training.arms import Arm
from calibrate.training.configs import CalibratedDPOConfig, CalibratedGRPOConfig, CalibratedSFTConfig

ROOT = Path(__file__).parents[1]
RECIPES = [path for path in sorted(ROOT.glob("recipes/**/*.yaml")) if "pretrain" not in path.stem]  # those are run
LAUNCHERS = sorted(ROOT.glob("accelerate_configs/**/*.yaml"))
# The first word of a recipe's file name says which script reads it.
CONFIGS = {"dpo": CalibratedDPOConfig, "sft": CalibratedSFTConfig, "grpo": CalibratedGRPOConfig}
ANCHORS = ["anchor_weight", "side_weight", "norm_weight", "kl_weight", "concept_weight", "concept_kl_weight"]
NO_ANCHORS = dict.fromkeys(ANCHORS, 0.0)


def parse(folder: Path, kind: str = "dpo", **options):
    """What the recipe makes of a YAML file with these options."""
    path = folder / "options.yaml"
    path.write_text(
        yaml.safe_dump({"vectors": "somewhere", "use_cpu": True, "bf16": False} | options), encoding="utf-8"
    )
    return TrlParser((CONFIGS[kind], ModelConfig)).parse_args_and_config(["--config", str(path)])[0]


def test_values_of_the_right_type_arrive(tmp_path):
    # YAML reads a bare 2e-1 as a string, an integral weight as an integer.
    parsed = parse(
        tmp_path, penalty_share="2e-1", penalty_weight="5e-2", anchor_weight=2, layers=[3, 4], max_tasks=None
    )
    assert (parsed.penalty_share, parsed.penalty_weight, parsed.anchor_weight) == (0.2, 0.05, 2)
    assert (parsed.layers, parsed.max_tasks, parsed.concepts) == ([3, 4], None, ["desperate"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hinge_wieght": 0.3}, "Unknown arguments.*--hinge_wieght"),
        ({"layers": 3}, r"`layers` is 3 \(int\); allowed: list\[int\] or nothing"),
        ({"layers": ["2"]}, r"`layers` is \['2'\] \(list\); allowed: list\[int\] or nothing"),
        ({"layers": [-1, 2]}, r"`layers` is \[-1, 2\]; allowed: 0 or more, the blocks after which is read"),
        ({"layers": []}, r"`layers` is \[\]; allowed: at least one, each once"),
        ({"layers": [2, 2]}, r"`layers` is \[2, 2\]; allowed: at least one, each once"),
        ({"concepts": "calm"}, r"`concepts` is 'calm' \(str\); allowed: list\[str\]"),
        ({"concepts": []}, r"`concepts` is \[\]; allowed: at least one, each once"),
        ({"penalty_share": [0.1, 0.3]}, r"`penalty_share` is \[0.1, 0.3\] \(list\); allowed: float"),
        ({"kl_weight": True}, r"`kl_weight` is True \(bool\); allowed: float"),
        ({"contexts_per_step": True}, r"`contexts_per_step` is True \(bool\); allowed: int"),
        ({"contexts_per_step": 1.5}, r"`contexts_per_step` is 1.5 \(float\); allowed: int"),
        ({"arm": "hinge"}, "`arm` is 'hinge'; allowed: none, hinge-frozen, hinge-refit"),
        ({"vectors": ""}, "`vectors` is not set; give the folder that `calibrate extract` wrote"),
        ({"ceiling_quantile": 50}, "`ceiling_quantile` is 50; allowed: 0 to 1"),
        ({"ceiling_quantile": float("nan")}, "`ceiling_quantile` is nan; allowed: 0 to 1"),
        ({"anchor_weight": -1.0}, "`anchor_weight` is -1.0; allowed: 0 or more"),
        ({"penalty_weight": float("inf")}, "`penalty_weight` is inf; allowed: 0 or more"),
        ({"penalty_warmup_steps": -1}, "`penalty_warmup_steps` is -1; allowed: 0 or more"),
        ({"huber_delta": 0}, "`huber_delta` is 0; allowed: above 0"),
        ({"huber_delta": float("inf")}, "`huber_delta` is inf; allowed: above 0"),
        ({"contexts_per_step": 0}, "`contexts_per_step` is 0; allowed: 1 or more"),
        ({"max_pairs": 0}, "`max_pairs` is 0; allowed: 1 or more"),
        ({"penalty": "l2"}, "`penalty` is 'l2'; allowed: hinge, absolute, squared, change, set-point, cosine"),
        ({"ceiling": "low"}, "`ceiling` is 'low'; allowed: reduce, prevent, both"),
        ({"hinge_reply": "rejected"}, "`hinge_reply` is 'rejected'; allowed: opening, chosen"),
        ({"tool_weight": 0.5}, "`tool_weight` is 0.5; allowed: 0 to 0.25"),
        ({"tool_weight": -0.1}, "`tool_weight` is -0.1; allowed: 0 to 0.25"),
        ({"rank": 9}, "`rank` is 9; allowed: 1 to 8"),
        ({"rank": 0}, "`rank` is 0; allowed: 1 to 8"),
        ({"concepts": ["sad", "sad"]}, r"`concepts` is \['sad', 'sad'\]; allowed: at least one, each once"),
        ({"stop_when_met": 1}, r"`stop_when_met` is 1 \(int\); allowed: bool"),
        ({"twins": 3}, r"`twins` is 3 \(int\); allowed: str or nothing"),
        ({"raise_concepts": ["calm", "calm"]}, "`raise_concepts` is .*; allowed: at least one, each once"),
        ({"raise_concepts": ["desperate"]}, "`concepts` and `raise_concepts` both hold desperate; allowed: one of"),
        ({"levels": {"calm": 1.0}}, "`levels` names calm; allowed: the targets desperate"),
        ({"levels": {"desperate": "low"}}, r"`levels` is .* \(dict\); allowed: dict\[str, float\]"),
        ({"levels": {1: 1.0}}, r"`levels` is \{1: 1.0\} \(dict\); allowed: dict\[str, float\]"),
        ({"levels": {"desperate": float("nan")}}, r"`levels` is \{'desperate': nan\}; allowed: finite numbers"),
        ({"levels": {"desperate": 1.0}, "ceiling": "both"}, "`levels` are ceilings of the targets in mode `reduce`"),
        ({"levels": {"desperate": 1.0}, "arm": "random"}, "`levels` are ceilings.*remove them, or the other option"),
        ({"arm": "shuffled"}, "`arm: shuffled` needs `shuffled_vectors`; make them with `calibrate extract MODEL"),
        ({"arm": "other-emotion", "other_concept": "desperate"}, "`other_concept` is 'desperate', a target itself"),
        (
            {"arm": "other-emotion", "raise_concepts": ["nostalgic"]},
            "`other_concept` is 'nostalgic', a target itself; give another emotion",
        ),
        (
            {"arm": "random", "penalty": "squared"},
            "`arm: random` is matched by its hinge; `penalty: squared` has none",
        ),
        (
            {"penalty": "squared", "ceiling": "both"},
            "`ceiling: both` is of the hinge; `penalty: squared` has no ceiling",
        ),
        *(
            (
                {"arm": "hinge-union"} | more,
                "`arm: hinge-union` adds directions up to 8 in all.*; lower `rank`",
            )
            for more in ({"rank": 8}, {"rank": 4, "raise_concepts": ["calm"]}, {"concepts": list("abcdefgh")})
        ),
        ({"penalty": "change"}, "`penalty: change` is 0 at the first step, so `penalty_share` cannot set its weight"),
        (
            {"ceiling": "prevent", "penalty_weight": 1.0, "stop_when_met": True},
            "`stop_when_met` waits for a ceiling.*`ceiling: prevent` has none",
        ),
        ({"arm": "output-kl", "stop_when_met": True}, "`stop_when_met` waits for .*; `arm: output-kl` with"),
        (
            NO_ANCHORS | {"penalty_share": 0.0, "stop_when_met": True, "logging_steps": 1},
            "`stop_when_met` waits for readings .* nothing is added to the loss .*every weight is 0.; set it to false",
        ),
        *(
            ({"stop_when_met": True} | logging, "`stop_when_met` needs `logging_steps: 1` and `logging_strategy: step")
            for logging in ({}, {"logging_steps": 5}, {"logging_steps": 1, "logging_strategy": "epoch"})
        ),
        (
            {"ceiling": "prevent"},
            "`ceiling: prevent` is 0 at the first step, so `penalty_share` cannot set its weight",
        ),
    ],
)
def test_a_bad_option_is_named_with_what_is_allowed(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, **options)


AT_LEAST_ONE = ["text_anchor_every", "reply_tokens", "contexts_per_step", "max_tasks", "max_pairs", "anchor_texts"]
AT_LEAST_ONE += ["refit_every", "refit_stories", "max_context_tokens"]
ABOVE_ZERO = ["huber_delta", "header_weight", "reply_weight"]
NOT_NEGATIVE = [*ANCHORS, "same_kl_weight", "penalty_share", "penalty_weight", "penalty_warmup_steps", "corridor"]
NOT_NEGATIVE += ["ceiling_margin", "refit_turns", "steer_dose", "set_point"]


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [(name, 0, "1 or more") for name in AT_LEAST_ONE]
    + [(name, 0.0, "above 0") for name in ABOVE_ZERO]
    + [(name, -1, "0 or more") for name in NOT_NEGATIVE],
)
def test_every_number_has_a_range(tmp_path, option, value, allowed):
    with pytest.raises(ValueError, match=f"`{option}` is {value}; allowed: {allowed}$"):
        parse(tmp_path, **{option: value})
    assert getattr(parse(tmp_path, **{option: value + 1}), option) == value + 1


@pytest.mark.parametrize(
    "options",
    [
        {"penalty": "change", "penalty_weight": 0.1},
        {"penalty": "change", "arm": "none"},
        {"penalty": "change", "penalty_share": 0.0},
        {"ceiling": "prevent", "penalty_share": 0.0},
        {"penalty": "set-point"},
        {"ceiling": "prevent", "penalty_weight": 0.1},
        {"ceiling": "prevent", "arm": "output-kl"},
        {"ceiling": "both", "ceiling_margin": 0.5},
        {"arm": "shuffled", "shuffled_vectors": "v"},
        {"arm": "other-emotion", "other_concept": "sad"},
        {"other_concept": "desperate"},  # of another arm, so never used
        {"stop_when_met": True, "logging_steps": 1},
        {"arm": "hinge-union", "rank": 7},
        {"arm": "hinge-refit", "rank": 8},
    ],
)
def test_what_fits_together_is_taken(tmp_path, options):
    parsed = parse(tmp_path, **options)
    assert {name: getattr(parsed, name) for name in options} == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reading_use": "loss"}, "`reading_use` is 'loss'; allowed: reward, aux, both"),
        ({"reading_by": "judge"}, "`reading_by` is 'judge'; allowed: reference, policy"),
        ({"reading_reward": 0.0}, "`reading_reward` is 0.0; allowed: above 0"),
        ({"group_sd_floor": 0.0}, "`group_sd_floor` is 0.0; allowed: above 0"),
        ({"top_share": 0.0}, "`top_share` is 0.0; allowed: above 0"),
        ({"top_share": 1.5}, "`top_share` is 1.5; allowed: 0 to 1"),
        ({"auroc_gate": True}, r"`auroc_gate` is True \(bool\); allowed: float"),
        ({"auroc_gate": -0.1}, "`auroc_gate` is -0.1; allowed: 0 to 1"),
        ({"auroc_gate": 2.0}, "`auroc_gate` is 2.0; allowed: 0 to 1"),
        *(
            ({"arm": arm}, f"`arm: {arm}` works through the loss.*set `reading_use: aux`, or `arm: hinge-frozen`$")
            for arm in ("hinge-refit", "hinge-retrain", "hinge-union", "consistency", "output-kl")
        ),
        ({"penalty": "l2"}, "`penalty` is 'l2'; allowed"),
        *(
            ({"arm": arm}, f"`arm: {arm}` is not for GRPO; use it with recipes/dpo.py or recipes/sft.py$")
            for arm in ("calm-dpo", "preventative-steering", "ablation")
        ),
        (
            {"stop_when_met": True, "logging_steps": 1},
            "`stop_when_met` waits for readings of the loss's own contexts.*`reading_use: reward`.*; set it to false",
        ),
        *(
            ({"reading_use": "both", "arm": arm}, f"`arm: {arm}` presses no direction.*set `reading_use: aux`")
            for arm in ("consistency", "output-kl")
        ),
        ({"max_pairs": 3}, "`max_pairs` is 3, but GRPO trains on no pairs; leave it out"),
    ],
)
def test_a_bad_option_of_grpo_is_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, "grpo", **options)


def test_every_config_takes_the_calibration_options(tmp_path):
    options = {"levels": {"desperate": -0.5, "calm": 1}, "raise_concepts": ["calm"], "vectors": "v"}
    for kind in CONFIGS:
        parsed = parse(tmp_path, kind, **options)
        assert (parsed.levels, parsed.raise_concepts) == ({"desperate": -0.5, "calm": 1}, ["calm"])
        assert parsed.arm == ("hinge-frozen" if kind == "grpo" else "hinge-refit")
    assert parse(tmp_path, "grpo").is_plain()  # readings in the reward alone
    for use in ("aux", "both"):
        assert not parse(tmp_path, "grpo", reading_use=use, arm="hinge-refit").is_plain()
        assert parse(tmp_path, "grpo", reading_use=use, arm="none").is_plain()


def test_arms_without_terms_are_plain(tmp_path):
    needs = {Arm.SHUFFLED: {"shuffled_vectors": "s"}}
    plain = {arm for arm in Arm if parse(tmp_path, arm=str(arm), **needs.get(arm, {})).is_plain()}
    assert plain == {
        Arm.NONE, Arm.INOCULATION, Arm.CALM_DPO, Arm.INFERENCE_STEERING, Arm.EXIT_OPTION, Arm.STEER, Arm.ABLATE
    }  # fmt: skip
    # Of the KL alone nothing is left without its weights, whatever the penalty has.
    assert parse(tmp_path, arm="output-kl", kl_weight=0.0, penalty_weight=1.0).is_plain()
    assert not parse(tmp_path, arm="output-kl", kl_weight=0.0, same_kl_weight=1.0).is_plain()


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, False),
        ({"arm": "none"}, True),
        ({"penalty_weight": 0.0}, False),  # the anchors are left
        (NO_ANCHORS, False),
        (NO_ANCHORS | {"penalty_share": 0.0}, True),
        (NO_ANCHORS | {"penalty_weight": 0.0}, True),  # overrides the share
        (NO_ANCHORS | {"penalty_share": 0.0, "penalty_weight": 0.1}, False),
        *((NO_ANCHORS | {"penalty_share": 0.0, name: 1.0}, False) for name in [*ANCHORS, "same_kl_weight"]),
    ],
)
def test_only_a_run_without_terms_is_plain(tmp_path, options, plain):
    assert parse(tmp_path, **options).is_plain() is plain


FILES = {"twins": "t", "stories": "s", "neutral": "n"}
NO_TEXTS = {"kl_weight": 0.0, "concept_weight": 0.0, "concept_kl_weight": 0.0}
TEXTS = {"text_anchor_every": 3, "anchor_texts": 9}


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ({}, []),
        ({"corridor": 0.3, "refit_every": 5}, []),
        ({"arm": "hinge-frozen", "refit_every": 5, "corridor": 0.3}, ["refit_every 5"]),
        *(
            (
                {"corridor": 0.3, "ceiling_quantile": 0.3, "penalty_warmup_steps": 9, "refit_every": 5} | change,
                ["ceiling_quantile 0.3", "corridor 0.3", "penalty_warmup_steps 9", *also],
            )
            for change, also in (
                ({"penalty_weight": 0.0}, []),  # the anchor on passing twins follows the refits
                ({"penalty_weight": 0.0, "anchor_weight": 0.0}, ["refit_every 5"]),
            )
        ),
        (
            {"penalty_share": 0.0, "ceiling": "prevent", "ceiling_margin": 0.1},
            ["ceiling 'prevent'", "ceiling_margin 0.1"],
        ),
        (
            {
                "penalty_share": 0.0,
                "ceiling": "both",
                "ceiling_margin": 0.1,
                "stop_when_met": True,
                "logging_steps": 1,
            },
            [],  # the run ends by it
        ),
        ({"arm": "consistency", "corridor": 0.3, "ceiling": "both"}, ["ceiling 'both'", "corridor 0.3"]),
        ({"arm": "none", "penalty_share": 0.5, "rank": 2}, ["penalty_share 0.5", "rank 2"]),
        (FILES | {"arm": "none"}, ["neutral 'n'", "stories 's'", "twins 't'"]),
        (FILES | {"arm": "none", "max_tasks": 3}, ["neutral 'n'", "stories 's'"]),  # whose pairs are trained on
        (FILES, []),
        (FILES | {"arm": "output-kl"}, ["stories 's'"]),
        (FILES | NO_TEXTS | {"arm": "hinge-frozen"}, ["neutral 'n'", "stories 's'"]),
        (FILES | NO_TEXTS, ["neutral 'n'"]),  # refits read the stories
        (NO_TEXTS | TEXTS, ["anchor_texts 9", "text_anchor_every 3"]),
        (NO_TEXTS | TEXTS | {"same_kl_weight": 1.0}, ["anchor_texts 9"]),  # it reads every context
        (TEXTS | {"arm": "output-kl"}, []),
        ({"concepts": ["sad"], "raise_concepts": ["calm"]}, []),
        ({"concepts": ["sad"], "raise_concepts": ["calm"], "arm": "ablation"}, []),
        (
            {"concepts": ["sad"], "raise_concepts": ["calm"], "arm": "inoculation"},
            ["concepts ['sad']", "raise_concepts ['calm']"],
        ),
        (
            dict.fromkeys([*ANCHORS, "penalty_share"], 0.5) | {"arm": "output-kl", "reply_tokens": 9, "rank": 2},
            [
                "anchor_weight 0.5",
                "concept_kl_weight 0.5",
                "concept_weight 0.5",
                "norm_weight 0.5",
                "penalty_share 0.5",
                "rank 2",
                "reply_tokens 9",
                "side_weight 0.5",
            ],
        ),
        ({"arm": "output-kl", "reply_tokens": 9, "same_kl_weight": 1.0, "max_context_tokens": 90}, []),
        ({"arm": "output-kl", "contexts_per_step": 2, "tool_weight": 0.1}, ["contexts_per_step 2", "tool_weight 0.1"]),
        ({"arm": "output-kl", "hinge_reply": "chosen"}, ["hinge_reply 'chosen'"]),
        ({"penalty_weight": 1.0, "penalty_share": 0.5}, ["penalty_share 0.5"]),
        ({"penalty": "squared", "ceiling_quantile": 0.3}, ["ceiling_quantile 0.3"]),
        ({"penalty": "squared", "ceiling_quantile": 0.3, "stop_when_met": True, "logging_steps": 1}, []),
        ({"ceiling": "prevent", "penalty_weight": 1.0, "ceiling_quantile": 0.3}, ["ceiling_quantile 0.3"]),
        ({"layers": [2], "arm": "preventative-steering"}, []),  # LoRA ends there
        ({"refit_turns": 3, "concepts": ["sad"]}, ["refit_turns 3"]),  # they show the concept `desperate`
        ({"refit_turns": 3, "concepts": ["sad", "desperate"]}, []),
        ({"arm": "ablation", "rank": 2, "anchor_weight": 4.0}, ["anchor_weight 4.0", "rank 2"]),
        ({"penalty": "squared", "corridor": 0.3, "set_point": 2.0}, ["corridor 0.3", "set_point 2.0"]),
        ({"ceiling_margin": 0.5}, ["ceiling_margin 0.5"]),
        ({"hinge_reply": "chosen"}, []),
        ({"hinge_reply": "chosen", "arm": "none"}, ["hinge_reply 'chosen'"]),
        ({"random_seed": 3, "other_concept": "sad"}, ["other_concept 'sad'", "random_seed 3"]),
    ],
)
def test_what_the_arm_does_not_use_is_named(tmp_path, options, unused):
    ignored = [f"{name} 0.0" for name in ANCHORS]  # a weight of 0 is no wish
    assert sorted(set(parse(tmp_path, **options).unused()) - set(ignored)) == unused


def test_what_grpo_does_not_use_is_named(tmp_path):
    assert parse(tmp_path, "grpo", reading_use="aux", top_share=0.5, anchor_weight=2.0).unused() == ["top_share 0.5"]
    assert parse(tmp_path, "grpo", top_share=0.5, anchor_weight=2.0).unused() == ["anchor_weight 2.0"]
    control = {"random": {"random_seed": 3}, "other-emotion": {"other_concept": "sad"}, "shuffled": {}}
    for arm, options in control.items():  # the reward reads along the control's directions
        assert parse(tmp_path, "grpo", arm=arm, shuffled_vectors="v", **options).unused() == (
            [] if arm == "shuffled" else ["shuffled_vectors 'v'"]
        )
        assert parse(tmp_path, "grpo", arm=arm, shuffled_vectors="v", auroc_gate=0.5, pairs="p").unused()[-2:] == [
            "auroc_gate 0.5", "pairs 'p'"
        ]  # fmt: skip
    assert parse(tmp_path, "grpo", pairs="p", concepts=["sad"], rank=2).unused() == []
    assert parse(tmp_path, "grpo", pairs="p", auroc_gate=0.0).unused() == ["pairs 'p'"]
    assert parse(tmp_path, "grpo", **FILES, max_tasks=2).unused() == ["twins 't'", "neutral 'n'", "stories 's'"]
    for use in ("aux", "both"):
        assert parse(tmp_path, "grpo", arm="none", reading_use=use).unused() == [f"reading_use '{use}'"]
        assert parse(tmp_path, "grpo", arm="hinge-refit", reading_use=use).unused() == []


def test_a_reference_that_is_sharded_before_it_is_read_is_refused(tmp_path, monkeypatch):
    """TRL computes the log-probabilities in an engine, which ZeRO-3 leaves sharded; the plugin is a double."""
    options, plain = {"precompute_ref_log_probs": True}, DPOConfig.__post_init__
    for stage, arm, refused in ((3, "none", False), (2, "hinge-refit", False), (3, "hinge-refit", True)):

        def launched(config, stage=stage):
            plain(config)
            config.deepspeed_plugin = SimpleNamespace(zero_stage=stage)

        monkeypatch.setattr(DPOConfig, "__post_init__", launched)
        if not refused:
            parse(tmp_path, arm=arm, **options)
            continue
        with pytest.raises(ValueError, match="`precompute_ref_log_probs` shards the model under ZeRO-3 before"):
            parse(tmp_path, arm=arm, **options)


def test_there_are_recipes_and_launcher_files():
    assert RECIPES
    assert LAUNCHERS


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_recipe_parses(path):
    config = CONFIGS[re.split("[-_]", path.stem)[0]]
    options, _ = TrlParser((config, ModelConfig)).parse_args_and_config(["--config", str(path), "--use_cpu", "true"])
    assert options.vectors
    assert not options.is_plain() or options.arm == "none" or options.reading_use == "reward"


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_accelerate_loads_every_launcher_file(path):
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes == yaml.safe_load(path.read_text())["num_processes"]
