import contextlib
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM
from trl import ModelConfig

from calibrate import corpora, models
from calibrate.training import adapters, runs
from calibrate.training.configs import CalibratedDPOConfig, CalibratedGRPOConfig
from calibrate.vectors import load_vectors


def claimed(folder, vectors, data=("data",), **options):
    options = {"use_cpu": True, "bf16": False, "vectors": str(vectors), "output_dir": str(folder)} | options
    args = CalibratedDPOConfig(**options)
    return runs.claim(args, ModelConfig(model_name_or_path="tiny"), list(data))


def test_an_output_folder_belongs_to_one_configuration(tmp_path, tiny_vectors):
    folder = tmp_path / "run"
    folder.mkdir()  # an empty folder is as good as none
    # A run that is refused before it begins leaves nothing but its claim; put right, it may have the folder.
    assert claimed(folder, tiny_vectors, anchor_weight=7.0) is None
    assert claimed(folder, tiny_vectors) is None
    (folder / "calibration" / "state.json").write_text("{}")
    assert claimed(folder, tiny_vectors, logging_steps=5) is None  # how it reports is no other run
    for options, differing in (
        ({"penalty_share": 0.1}, "penalty_share"),
        ({"learning_rate": 1e-5, "arm": "random"}, "arm, learning_rate"),
        ({"data": ("other",)}, "data"),
    ):
        message = rf"another configuration .*differing: {differing}\); choose another `output_dir`"
        with pytest.raises(ValueError, match=message):
            claimed(folder, tiny_vectors, **options)
    changed, turned = (load_vectors(str(tiny_vectors)) for _ in range(2))
    changed.recipe = changed.recipe | {"seed": 7}
    turned.directions = -turned.directions
    for name, vectors in (("changed", changed), ("turned", turned)):
        vectors.save(tmp_path / name)
        with pytest.raises(ValueError, match=r"differing: vectors\)"):
            claimed(folder, tmp_path / name)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path, tiny_vectors):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} is not empty and holds no run of this recipe"):
        claimed(tmp_path, tiny_vectors)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("section", "name", "value"), [("model", "load_in_4bit", True), ("training", "resume_from_checkpoint", "x")]
)
def test_options_that_would_be_ignored_are_refused(tmp_path, section, name, value):
    training = CalibratedDPOConfig(vectors="v", output_dir=str(tmp_path), use_cpu=True, bf16=False)
    model = ModelConfig("tiny", use_peft=True, lora_r=4)
    runs.refuse_unused(training, model)
    setattr(model if section == "model" else training, name, value)
    with pytest.raises(ValueError, match=f"`{name}` is .*which this recipe does not use"):
        runs.refuse_unused(training, model)


def test_a_launcher_with_another_precision_is_refused(tmp_path, monkeypatch):
    """transformers takes the launcher's where neither option is true, and the options' where one is."""
    options = {"vectors": "v", "output_dir": str(tmp_path), "use_cpu": True}
    for launched, own, refused in (
        ("bf16", {"bf16": False}, True),
        ("fp16", {"bf16": True}, True),
        ("bf16", {"bf16": True}, False),
        ("bf16", {}, False),  # TRL's default
        ("no", {"bf16": True}, False),  # what accelerate passes on where nobody chose
        ("no", {"bf16": False}, False),
    ):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        args = CalibratedDPOConfig(**options, **own)
        message = f"the launcher's `mixed_precision` is '{launched}', but `bf16` is {args.bf16} and `fp16` is False; "
        with pytest.raises(ValueError, match=message) if refused else contextlib.nullcontext():
            runs.refuse_unused(args, ModelConfig("tiny"))


def test_a_checkpoint_without_its_optimiser_is_refused(tmp_path):
    options = {"vectors": "v", "output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    with pytest.raises(ValueError, match=r"`save_only_model` is True, but this recipe resumes by itself.*; remove it"):
        runs.refuse_unused(CalibratedDPOConfig(**options, save_only_model=True), ModelConfig("tiny", use_peft=True))


def test_a_model_must_be_named_and_what_reports_installed(tmp_path, monkeypatch):
    options = {"vectors": "v", "output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    with pytest.raises(ValueError, match="`model_name_or_path` is not given; name a folder, a model on the Hub, or"):
        runs.refuse_unused(CalibratedDPOConfig(**options), ModelConfig())
    args = CalibratedDPOConfig(**options, report_to=["wandb", "trackio"])
    for installed, message in (
        (["wandb", "trackio", "mlflow"], None),
        (["trackio"], "`report_to` names wandb, which is not installed; install it, or remove it"),
    ):
        monkeypatch.setattr(runs, "get_available_reporting_integrations", lambda found=installed: found)
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            runs.refuse_unused(args, ModelConfig("tiny"))
    for known in (None, "flyte"):  # never listed: transformers says what is wrong with them
        runs.refuse_unused(CalibratedDPOConfig(**options, report_to=known), ModelConfig("tiny"))


@pytest.mark.parametrize(
    "change",
    [{"lora_r": 4}, {"lora_dropout": 0.0}, {"use_dora": True}, {"use_rslora": True}, {"lora_target_modules": "x"}],
)
def test_options_of_lora_without_lora_are_refused(tmp_path, change):
    options = {"vectors": "v", "output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    runs.refuse_unused(
        CalibratedDPOConfig(**options, adapt_above_band=True), ModelConfig("tiny", use_peft=True, **change)
    )
    runs.refuse_unused(CalibratedDPOConfig(**options), ModelConfig("tiny"))
    for config, model, name in (
        (CalibratedDPOConfig(**options), ModelConfig("tiny", **change), next(iter(change))),
        (CalibratedDPOConfig(**options, adapt_above_band=True), ModelConfig("tiny"), "adapt_above_band"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is .*, which is of LoRA; set `use_peft: true`, or remove it"):
            runs.refuse_unused(config, model)


def test_parameters_that_lora_would_adapt_in_every_block_are_refused(tiny, tiny_vectors, tmp_path):
    """PEFT looks for them by name alone, wherever `layers_to_transform` ends."""
    wanted = {"target_parameters": ["mlp.up_proj.weight"], "target_modules": [], "layers_to_transform": [0, 1, 2]}
    escaped = get_peft_model(tiny.model, LoraConfig(**wanted))
    assert any("layers.4." in name for name, part in escaped.named_parameters() if part.requires_grad)
    args = CalibratedDPOConfig(vectors=str(tiny_vectors), output_dir=str(tmp_path), use_cpu=True, bf16=False)
    lora = LoraConfig(**wanted | {"layers_to_transform": None})
    with pytest.raises(
        ValueError, match=r"`lora_target_parameters` is .*adapts above the band too; use `lora_target_m"
    ):
        adapters.keep_below_band(lora, args)
    args.adapt_above_band = True
    adapters.keep_below_band(lora, args)


def test_modules_that_are_trained_whole_above_the_band_are_refused(tiny_vectors, tmp_path):
    args = CalibratedDPOConfig(vectors=str(tiny_vectors), output_dir=str(tmp_path), use_cpu=True, bf16=False)
    lora = LoraConfig(modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"`lora_modules_to_save` is \['lm_head'\], .* above the band too; remove it"):
        adapters.keep_below_band(lora, args)
    args.adapt_above_band = True
    adapters.keep_below_band(lora, args)


def test_a_pattern_of_modules_is_refused_because_peft_matches_it_in_every_block(tiny_folder, tiny_vectors, tmp_path):
    escaped = LoraConfig(target_modules=r".*\.q_proj")
    escaped.layers_to_transform = [0, 1, 2]  # PEFT itself refuses the two together, where both are given at once
    found = get_peft_model(models.load(str(tiny_folder)).model, escaped)
    assert any("layers.4." in name for name, part in found.named_parameters() if part.requires_grad)
    args = CalibratedDPOConfig(vectors=str(tiny_vectors), output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=r"`lora_target_modules` is '.*q_proj', which PEFT takes for a pattern"):
        adapters.keep_below_band(LoraConfig(target_modules=r".*\.q_proj"), args)
    args.adapt_above_band = True
    adapters.keep_below_band(LoraConfig(target_modules=r".*\.q_proj"), args)


@pytest.mark.parametrize(
    ("name", "blocks", "refused"),
    [
        ("k_proj", [0, 1], False),
        ("layers.1.self_attn.k_proj", [0, 1], False),
        ("layers.3.self_attn.k_proj", [0, 1], True),
        ("embed_tokens", [0, 1], True),  # of no block
        ("embed_tokens", None, False),
        ("c_attn", [0, 1], True),
        ("c_attn", None, True),
    ],
)
def test_a_module_that_peft_would_leave_out_is_refused(tiny, name, blocks, refused):
    lora = LoraConfig(target_modules=["q_proj", name], layers_to_transform=blocks)
    message = f"`lora_target_modules` has '{name}', and no block that is adapted has a module of that name; leave it"
    with pytest.raises(ValueError, match=message) if refused else contextlib.nullcontext():
        adapters.refuse_unmatched(lora, tiny.model)


def test_experts_that_peft_adapts_as_parameters_are_no_missing_modules():
    shape = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3}
    model = MixtralForCausalLM(MixtralConfig(**shape, num_attention_heads=2, num_key_value_heads=2))
    lora = LoraConfig(target_modules=["q_proj", "w1", "w2", "w3"], layers_to_transform=[0, 1])
    adapters.refuse_unmatched(lora, model)
    assert lora.target_modules == {"q_proj", "w1", "w2", "w3"}  # PEFT changes it itself
    with pytest.raises(
        ValueError, match=r"but adapts '.*experts.*'; name modules by their last part alone and no exp"
    ):
        adapters.refuse_outside(get_peft_model(model, lora), anywhere=False)


def test_an_adapter_that_leaves_its_blocks_is_refused(tiny_folder):
    """A module that is named in full is adapted in whatever block it is."""
    for name, blocks, refused in (
        ("model.layers.2.self_attn.k_proj", [0, 1, 2], False),
        ("model.layers.4.self_attn.k_proj", [0, 1, 2], True),
        ("model.layers.4.self_attn.k_proj", 2, True),
        ("v_proj", 2, False),
    ):
        lora = LoraConfig(target_modules=["q_proj", name], layers_to_transform=blocks)
        found = get_peft_model(models.load(str(tiny_folder)).model, lora)
        message = r"the adapter is to stay in blocks \d to 2, but adapts '.*layers.4.self_attn.k_proj'; .* remove `lay"
        with pytest.raises(ValueError, match=message) if refused else contextlib.nullcontext():
            adapters.refuse_outside(found, anywhere=True)


def test_a_recipe_can_name_the_blocks(tiny_folder, tiny_vectors, tmp_path):
    """Of the model and, in full, of the reference too."""
    options = {"vectors": str(tiny_vectors), "output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    model = ModelConfig(model_name_or_path=str(tiny_folder), use_peft=False)
    checkpoint, reference = runs._models(CalibratedDPOConfig(**options, blocks="layers"), model)
    for one in (checkpoint.model, reference):
        assert models.decoder(one).calibrate_blocks == "layers"
    with pytest.raises(ValueError, match="no list of 5 blocks named 'rotary_emb'"):
        runs._models(CalibratedDPOConfig(**options, blocks="rotary_emb"), model)


def test_the_hinge_may_read_the_chosen_reply_never_the_rejected(caplog):
    caplog.set_level("INFO")
    twins, pairs = corpora.load_twins()[:4], corpora.load_pairs()
    for kept, (failing, twin) in zip(twins, runs.with_chosen(twins, pairs), strict=True):
        of_it = [p for p in pairs if (p.task, p.context) == (failing.task, failing.context)]
        assert failing.reply == of_it[0].chosen[0]["content"]
        assert failing.reply not in [p.rejected[0]["content"] for p in of_it]
        assert (failing._replace(reply=kept[0].reply), twin) == kept  # nothing else changes, the twin not at all
    assert not caplog.messages
    other = [pair for pair in pairs if pair.task != twins[0][0].task]
    assert runs.with_chosen(twins[:1] + twins[-1:], other)[0] == twins[0]  # a context without a pair keeps its opening
    assert caplog.messages == ["`hinge_reply: chosen`: 1 of 2 contexts have no pair and keep their opening"]
    with pytest.raises(ValueError, match="`hinge_reply` is 'chosen', but no pair has the `task` and `context`"):
        runs.with_chosen(twins[:1], other)


def test_the_chosen_reply_is_read_by_a_run(tiny_folder, tiny_vectors, tmp_path):
    options = {"vectors": str(tiny_vectors), "use_cpu": True, "bf16": False, "max_tasks": 1, "hinge_reply": "chosen"}
    args = CalibratedDPOConfig(output_dir=str(tmp_path / "run"), **options)
    run = runs.prepare(args, ModelConfig(model_name_or_path=str(tiny_folder), use_peft=True))
    assert run.peft_config.revision == "main"  # of the base: the audit reads the adapter on it
    assert {failing.reply for failing, _ in run.data.twins} <= {pair.chosen[0]["content"] for pair in run.pairs}


@pytest.mark.parametrize(
    ("name", "revision", "refused"),
    [("owner/model", "main", False), ("owner/model", None, False), ("owner/model", "v1", True),
     ("default", "main", True)],
)  # fmt: skip
def test_grpo_in_full_has_the_reference_that_trl_loads_by_name(tiny, monkeypatch, tmp_path, name, revision, refused):
    monkeypatch.setattr(models, "load", lambda *_, **__: tiny._replace(name=name))
    options = {"vectors": "v", "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "beta": 0.1}
    model = ModelConfig(model_name_or_path=name, model_revision=revision)
    if not refused:
        assert runs._models(CalibratedGRPOConfig(**options), model)[0].name == name
        return
    with pytest.raises(ValueError, match=r"`beta` is 0.1: TRL loads GRPO's reference by the name .*`beta: 0.0`"):
        runs._models(CalibratedGRPOConfig(**options), model)
    runs._models(CalibratedGRPOConfig(**options | {"beta": 0.0}), model)


def test_in_full_the_reference_has_the_policys_precision(tiny_folder, tiny_vectors, monkeypatch, tmp_path):
    """Of a checkpoint in bf16, as on a GPU: neither is rounded where the other is not."""
    monkeypatch.setattr(models, "_dtype", lambda: torch.bfloat16)
    args = CalibratedDPOConfig(vectors=str(tiny_vectors), output_dir=str(tmp_path), use_cpu=True, bf16=False)
    checkpoint, reference = runs._models(args, ModelConfig(model_name_or_path=str(tiny_folder)))
    assert checkpoint.model.dtype == reference.dtype == torch.float32
    assert models.load(str(tiny_folder)).model.dtype == torch.bfloat16


def test_a_dtype_or_revision_that_would_do_nothing_is_refused(tiny_folder, tmp_path):
    args = CalibratedDPOConfig(vectors="v", output_dir=str(tmp_path), use_cpu=True, bf16=False)
    runs.refuse_unused(args, runs.ModelOptions(model_name_or_path="owner/model", model_revision="v1"))
    with pytest.raises(ValueError, match="`dtype` is 'float32', which this recipe does not use; remove it"):
        runs.refuse_unused(args, runs.ModelOptions("tiny", dtype="float32"))
    for name in ("default", str(tiny_folder)):
        runs.refuse_unused(args, runs.ModelOptions(model_name_or_path=name))
        with pytest.raises(ValueError, match=f"`model_revision` is 'v1', .* '{name}' is none of them, so remove it"):
            runs.refuse_unused(args, runs.ModelOptions(model_name_or_path=name, model_revision="v1"))
