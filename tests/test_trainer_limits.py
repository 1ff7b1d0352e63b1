"""Which contexts are read, how the penalty is weighed, when a run stops, and what is refused; on DPO."""

import contextlib
import copy
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from test_trainers import NO_ANCHORS, TWINS, make, train, weights  # noqa: F401  (`make` is a fixture)
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from trl import DPOTrainer

from calibrate import default_model, models
from calibrate.training import adapters, readings
from calibrate.training.objective import Data
from calibrate.vectors import load_vectors


def test_contexts_that_are_too_long_are_left_out_with_their_twins(make):  # noqa: F811
    every = make("every")._calibration
    longest = [max(len(f.ids), len(p.ids)) for f, p in zip(every.failing, every.passing, strict=True)]
    second = sorted(longest)[1]
    some = make("some", max_context_tokens=second)._calibration
    kept = [row for row, length in enumerate(longest) if length <= second]
    assert 0 < len(kept) < len(longest)
    assert some.failing == [every.failing[row] for row in kept]
    assert some.passing == [every.passing[row] for row in kept]
    with pytest.raises(
        ValueError, match=f"`max_context_tokens` is 3, but the shortest .* have {min(longest)}; raise it"
    ):
        make("none", max_context_tokens=3)


def test_the_penalty_is_weighed_over_several_batches_of_contexts(make):  # noqa: F811
    """The share of gradients, computed here from the model's own gradients one context at a time."""
    trainer = make(penalty_share=0.5, max_steps=1, **NO_ANCHORS)
    objective, model, tasks = trainer._calibration, trainer.model, []
    norms = []
    for micro_step in range(4):
        objective._context_terms(model, micro_step)["penalty"].backward()
        norms.append(gradient_norm(model))
    plain, trained = DPOTrainer.compute_loss, [part for part in model.parameters() if part.requires_grad]

    def compute_loss(self, *positional, **named):
        loss = plain(self, *positional, **named)
        tasks.append(torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPOTrainer, "compute_loss", compute_loss)
        trainer.train()
    task = math.sqrt(sum(float(gradient.square().sum()) for gradient in tasks[0] if gradient is not None))
    assert len(set(norms)) > 1
    assert objective.penalty_weight == pytest.approx(0.5 * task / (sum(norms) / 4), rel=1e-5)
    logged = [row for row in trainer.state.log_history if "calibration/norm_ratio" in row]
    assert len(logged) == 1


def test_the_weight_of_an_earlier_run_is_taken_where_it_is_resumed_alone(make, tmp_path):  # noqa: F811
    """In one folder: twice the share has twice the weight. What a resumed run takes is what stands in the file."""
    options, found = {"save_strategy": "steps", "save_steps": 1, "penalty_warmup_steps": 0}, []
    for share in (0.5, 1.0):
        trainer = make(penalty_share=share, max_steps=1, **options)
        found.append(train(trainer)[0]["calibration/penalty_weight"])
    assert found[1] == pytest.approx(2 * found[0], rel=1e-6)
    path = tmp_path / "run" / "calibration" / "state.json"
    state = json.loads(path.read_text())
    assert state["penalty_weight"] == pytest.approx(found[1])
    path.write_text(json.dumps(state | {"penalty_weight": 7.5}))
    resumed = make(penalty_share=1.0, max_steps=2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    logged = [row["calibration/penalty_weight"] for row in resumed.state.log_history if "loss" in row]
    assert logged == [pytest.approx(found[1]), 7.5]


def gradient_norm(model) -> float:
    parts = [part.grad.square().sum() for part in model.parameters() if part.grad is not None]
    model.zero_grad()
    return math.sqrt(float(torch.stack(parts).sum()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_free": True}, "`padding_free` is not supported with calibration terms; leave it out"),
        ({"arm": "ablation", "lora": False}, r"`arm: ablation` steers policy and reference alike, which needs LoRA"),
        (
            {"arm": "preventative-steering", "precompute_ref_log_probs": True},
            "`arm: preventative-steering` steers the reference too; set `precompute_ref_log_probs: false`",
        ),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "gives no gradient norms for `penalty_share`; set `use_reentrant: false`, or `penalty_weight`",
        ),
        (
            {"hinge_reply": "chosen", "prepared": False},
            r"`hinge_reply: chosen` changes the texts of a run, which recipes do .*`Data\(\.\.\., prepared=True\)`",
        ),
        *(
            ({"arm": arm, "prepared": False}, f"`arm: {arm}` changes the texts of a run, which recipes do")
            for arm in ("inoculation", "exit-option", "calm-dpo")
        ),
        (
            {"arm": "consistency", "twins": [(f._replace(reply="Other."), p) for f, p in TWINS[:1]] + TWINS[1:]},
            f"`arm: consistency` compares the same reply .* 1 contexts differ in it .first: task '{TWINS[0][0].task}'",
        ),
        ({"twins": []}, 'there are no failing and passing contexts with `"split": "train"`; give some with `twins`'),
    ],
)
def test_combinations_that_would_change_a_result_are_refused(make, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=re.escape(message) if message[0] != "`" else message):
        make(**options)


def test_a_model_that_cannot_be_read_truly_is_refused(make):  # noqa: F811
    trainer = make()
    trainer.args.use_liger_kernel = True
    with pytest.raises(ValueError, match="`use_liger_kernel` is not supported with readings; set it to false"):
        trainer._check_supported()
    trainer.args.use_liger_kernel = False
    trainer.model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"the model's config has .*attention_dropout.*: dropout is a floor"):
        trainer._check_supported()
    trainer.model.config.attention_dropout, trainer.model.config.hidden_dropout_prob = 0.0, 0.1
    with pytest.raises(ValueError, match=r"the model's config has .*hidden_dropout_prob.*: dropout is a floor"):
        trainer._check_supported()
    trainer.model.config.hidden_dropout_prob = 0.0
    body = models.decoder(trainer.model)
    whole, body.config = body.config, copy.deepcopy(body.config)  # as where text is a part of the model
    body.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"the model's config has .*attention_dropout.*: dropout is a floor"):
        trainer._check_supported()
    body.config = whole
    trainer.model.is_quantized = True
    with pytest.raises(ValueError, match="the base is quantised, so its readings are not those of its vectors"):
        trainer._check_supported()


def test_ways_of_sharing_the_work_that_would_change_a_result_are_refused(make, monkeypatch):  # noqa: F811
    """Each is set on a trainer that was made without it: none can be had on one process without a GPU."""
    trainer = make()
    trainer._check_supported()
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs in one process .*DataParallel.*`accelerate launch`"):
        trainer._check_supported()
    trainer.args._n_gpu = 1
    trainer.args.activation_offloading = True
    with pytest.raises(ValueError, match=r"`activation_offloading` frees what .*`penalty_share`.*`penalty_weight`"):
        trainer._check_supported()
    trainer.args.penalty_weight = 1.0
    trainer._check_supported()
    state = trainer.accelerator.state
    for sizes, refused in (({"dp_replicate_size": 2}, False), ({"cp_size": 2}, True), ({"tp_size": 2}, True)):
        monkeypatch.setattr(state, "parallelism_config", ParallelismConfig(**sizes), raising=False)
        if not refused:
            trainer._check_supported()
            continue
        with pytest.raises(ValueError, match=r"`parallelism_config` with .*`cp_size`, `sp_size` and `tp_size` at 1"):
            trainer._check_supported()
    monkeypatch.setattr(state, "parallelism_config", None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as the launcher does; on CPUs accelerate then runs DDP
    with pytest.raises(
        ValueError, match=r"the launcher asks for FSDP, .* would be NO; set `use_cpu: false`, or take an"
    ):
        trainer._check_supported()
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.FSDP)
    trainer._check_supported()
    monkeypatch.setattr(state, "fsdp_plugin", SimpleNamespace(fsdp_version=1), raising=False)
    with pytest.raises(ValueError, match="`fsdp_version: 1` is not supported; set it to 2"):
        trainer._check_supported()
    shipped = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False}
    shipped |= {"cpu_offload": OffloadPolicy()}
    for change, message in (
        ({}, None),
        ({"cpu_ram_efficient_loading": True}, "`fsdp_cpu_ram_efficient_loading: true` leaves .*; set it to false"),
        ({"activation_checkpointing": True}, "`fsdp_activation_checkpointing: true` is not tested .*; set it to fal"),
        ({"cpu_offload": CPUOffloadPolicy()}, "`fsdp_offload_params: true` is not tested; set it to false"),
    ):
        monkeypatch.setattr(state, "fsdp_plugin", SimpleNamespace(**shipped | change))
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            trainer._check_supported()


def test_on_several_processes_checkpointing_must_not_be_reentrant(make, monkeypatch):  # noqa: F811
    trainer = make(penalty_weight=1.0)
    trainer.args.gradient_checkpointing, trainer.args.gradient_checkpointing_kwargs = True, {"use_reentrant": True}
    trainer._check_supported()  # on one process it works
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.MULTI_CPU)
    with pytest.raises(ValueError, match=r"use_reentrant: true.*breaks the second forward pass on several processes"):
        trainer._check_supported()
    trainer.args.gradient_checkpointing_kwargs = None
    trainer._check_supported()
    assert trainer.args.gradient_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize("given", [True, False])
def test_reentrant_checkpointing_that_a_user_asked_for_is_refused_under_zero3_too(make, monkeypatch, given):  # noqa: F811
    """There TRL sets it by itself with LoRA, which is taken back; the plugin is a double."""
    kwargs = {"use_reentrant": True}
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs if given else None}
    trainer = make(penalty_weight=1.0, **options)
    trainer.args.gradient_checkpointing_kwargs = kwargs
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.DEEPSPEED)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", SimpleNamespace(zero_stage=3))
    refused = pytest.raises(ValueError, match=r"use_reentrant: true.*breaks the second forward pass on several")
    with refused if given else contextlib.nullcontext():
        trainer._check_supported()
    assert trainer.args.gradient_checkpointing_kwargs == {"use_reentrant": given}


def test_what_recipes_alone_use_is_refused_by_a_trainer(make):  # noqa: F811
    trainer, data = make(prepared=False), Data([], [], [])
    values = dict.fromkeys(("twins", "pairs", "neutral", "stories"), "own.jsonl")
    values |= {"dry_run": True, "max_tasks": 2, "max_pairs": 2, "blocks": "layers"}
    for name, value in values.items():
        before = getattr(trainer.args, name)
        setattr(trainer.args, name, value)
        with pytest.raises(
            ValueError, match=f"`{name}` is {value!r}, which recipes use and the trainer does not; use"
        ):
            trainer._check_prepared(data)
        trainer._check_prepared(data._replace(prepared=True))
        setattr(trainer.args, name, before)


def test_an_adapter_above_the_band_is_refused_unless_it_is_asked_for(make, monkeypatch):  # noqa: F811
    monkeypatch.setattr(adapters, "keep_below_band", lambda *_: None)
    for arm in ("none", "hinge-refit"):
        with pytest.raises(ValueError, match=r"the adapter has no `layers_to_transform`.*`adapt_above_band: true`"):
            make(arm=arm)
    make(adapt_above_band=True)


def test_reference_states_are_of_these_weights_and_serve_every_adapter(make, monkeypatch):  # noqa: F811
    """One edited row of the embedding lies between the values that the vectors' hash looks at."""
    folder = default_model.cache_folder()

    def cached() -> list[int]:
        return [len(list((folder / name).iterdir())) for name in ("reference-states", "reference-anchors")]

    make("one")
    make("above", adapt_above_band=True, arm="hinge-frozen")
    make("full", lora=False)
    assert cached() == [1, 1]
    load, hashes = models.load, []

    def edited(name):
        found = load(name)
        found.model.get_input_embeddings().weight.data[65] += 1
        hashes.append((found.weight_hash, models.hash_weights(found.model)))
        return found

    monkeypatch.setattr(models, "load", edited)
    make("edited")
    assert len(set(hashes[0])) == 1
    assert cached() == [2, 2]


def test_the_digest_is_of_every_byte_and_of_the_configuration(tiny):
    found = [readings.digest(tiny.model)]
    adapted = get_peft_model(tiny.model, LoraConfig(r=2, target_modules="all-linear"))
    assert readings.digest(adapted) == found[0]
    model = adapted.unload()
    model.config.name_or_path = "elsewhere"
    assert readings.digest(model) == found[0]
    model.config.rms_norm_eps *= 2
    found.append(readings.digest(model))
    model.model.rotary_emb.inv_freq[-1] += 1e-3  # a buffer
    found.append(readings.digest(model))
    for dtype in (torch.bfloat16, torch.float16):
        found.append(readings.digest(model.to(dtype)))
    assert len(set(found)) == len(found)


def test_only_the_kl_needs_no_share_of_gradients(make, monkeypatch):  # noqa: F811
    """Under a launcher that shards, where the arms that press are refused without `penalty_weight`."""
    trainers = [make("kl", arm="output-kl"), make("hinge", arm="hinge-frozen")]
    monkeypatch.setattr(type(trainers[0].accelerator), "distributed_type", DistributedType.DEEPSPEED)
    vectors, data = load_vectors(trainers[0].args.vectors), Data(TWINS, [], [])
    assert trainers[0]._calibration._check(vectors, data) == [2]
    with pytest.raises(ValueError, match=r"`penalty_share` 0.3 compares gradients of whole parameters, which FSDP"):
        trainers[1]._calibration._check(vectors, data)


@pytest.mark.parametrize(
    ("options", "refits"),
    [
        ({"penalty_share": 0.0}, True),
        ({"penalty_share": 0.0, "anchor_weight": 0.0}, False),
        ({"penalty_weight": 0.0} | NO_ANCHORS | {"kl_weight": 1.0}, False),
        ({"anchor_weight": 0.0}, True),
    ],
)
def test_directions_are_refitted_where_a_term_reads_along_them(make, options, refits):  # noqa: F811
    """The penalty, or the anchor on passing twins."""
    logged = train(make(arm="hinge-refit", refit_every=1, refit_stories=2, max_steps=2, **options))
    assert ("refit/cosine_to_start" in logged[1]) is refits


def test_only_the_kl_reads_no_tool_result(make):  # noqa: F811
    make(arm="output-kl", tool_weight=0.25)  # where a context has none, every arm that reads contexts is refused


def test_a_run_stops_when_the_ceiling_is_met_and_resumed_it_stops_at_the_same_step(make, tmp_path):  # noqa: F811
    """A ceiling far above every reading is met after eight steps."""
    options = {"levels": {"desperate": 50.0}, "penalty_weight": 1.0, "stop_when_met": True, "max_steps": 20}
    options |= NO_ANCHORS | {"corridor": 1000.0, "save_strategy": "steps", "save_steps": 5}
    whole = make("whole", **options)
    train(whole)
    assert whole.state.global_step == 8
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "again" / "checkpoint-5")
    shutil.copytree(tmp_path / "whole" / "calibration", tmp_path / "again" / "calibration")
    again = make("again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-5"))
    assert again.state.global_step == 8
    # A run that went on from the step at which it stopped would make another one, so that step is not kept.
    third = make("third", **options | {"save_steps": 4})
    train(third)
    assert [path.name for path in (tmp_path / "third").glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize(
    "options",
    [
        {"raise_concepts": ["calm"], "levels": {"calm": 0.5}},
        {"rank": 2},
        {"ceiling": "prevent", "penalty_weight": 1.0, "ceiling_margin": 0.1},
        {"ceiling": "both"},
        {"same_kl_weight": 1.0},
        *({"penalty": shape} for shape in ("absolute", "squared", "set-point", "cosine")),
        {"penalty": "change", "penalty_weight": 1.0},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_two_steps_of_what_is_seldom_set(make, options):  # noqa: F811
    trainer = make(max_steps=2, **options)
    before = {name: part.clone() for name, part in weights(trainer).items()}
    logged = train(trainer)
    assert all(math.isfinite(row["loss"]) for row in logged)
    assert any(not torch.equal(part, before[name]) for name, part in weights(trainer).items())
    assert "calibration/penalty" in logged[-1]
