"""SFT and GRPO with the calibration terms; DPO is in test_trainers.py."""

import contextlib
import json

import pytest
import torch
from conftest import write_jsonl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_trainers import (  # noqa: F401  (`shuffled_vectors` is a fixture)
    NO_ANCHORS,
    PAIRS,
    TEXTS,
    TRL,
    TWINS,
    Killed,
    assert_same_weights,
    shuffled_vectors,
    train,
    weights,
)
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from calibrate import corpora, models
from calibrate.training import adapters, arms, rewards
from calibrate.training.configs import CalibratedGRPOConfig, CalibratedSFTConfig
from calibrate.training.objective import Data
from calibrate.training.trainers import CalibratedGRPOTrainer, CalibratedSFTTrainer
from calibrate.vectors import load_vectors

SFT_ROWS = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
GRPO = {"num_generations": 2, "max_completion_length": 8, "per_device_train_batch_size": 4, "temperature": 1.0}


def length(completions, **_):
    """A reward that needs no task: the share of vowels."""
    return [sum(c in "aeiou" for c in turn[-1]["content"]) / 10 for turn in completions]


@pytest.fixture
def make(tiny_folder, tiny_vectors, tmp_path):
    def make(kind, folder: str = "run", lora=True, parts=None, **options):
        checkpoint = models.load(str(tiny_folder))
        options = {k: v for k, v in TRL.items() if k != "max_length" or "SFT" in kind.__name__} | options
        options |= {"output_dir": str(tmp_path / folder)}
        grpo = issubclass(kind, GRPOTrainer)
        rows = [{"prompt": row["prompt"]} for row in SFT_ROWS] if grpo else SFT_ROWS
        shared = {
            "model": checkpoint.model, "processing_class": checkpoint.tokenizer,
            "train_dataset": Dataset.from_list(rows),
            "peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None,
        } | ({"reward_funcs": length} if grpo else {})  # fmt: skip
        if grpo:
            options = GRPO | options
        if kind in (SFTTrainer, GRPOTrainer):
            shared["peft_config"].layers_to_transform = [0, 1, 2]  # up to the band, as in every arm
            return kind(args=(GRPOConfig if grpo else SFTConfig)(**options), **shared)
        config = CalibratedGRPOConfig if grpo else CalibratedSFTConfig
        args = config(**{"vectors": str(tiny_vectors)} | options)
        adapters.keep_below_band(shared["peft_config"], args)
        shared["data"] = Data(TWINS, TEXTS["dialogues"], TEXTS["stories"], prepared=True)
        return kind(args=args, weight_hash=checkpoint.weight_hash, **shared | (parts or {}))

    return make


@pytest.mark.parametrize(
    ("plain", "calibrated"), [(SFTTrainer, CalibratedSFTTrainer), (GRPOTrainer, CalibratedGRPOTrainer)]
)
def test_arm_none_is_plain_trl_bit_for_bit(make, plain, calibrated):
    one = make(plain)
    expected = [row["loss"] for row in train(one)]  # before the other is made: each seeds the sampling anew
    other = make(calibrated, arm="none")
    assert [row["loss"] for row in train(other)] == expected
    assert_same_weights(one, other)


@pytest.mark.parametrize("lora", [True, False])
def test_sft_adds_the_terms_with_an_adapter_and_in_full(make, lora):
    """In full fine-tuning the reference is the model before its first step."""
    first, *_, last = train(make(CalibratedSFTTrainer, lora=lora, max_steps=4, text_anchor_every=1))
    assert all(first[f"calibration/{name}"] < 1e-6 for name in ("anchor", "side", "norm", "kl"))
    assert last["calibration/penalty"] > 0
    assert last["calibration/anchor"] > 1e-9


def test_under_bf16_the_reference_is_read_as_the_training_passes_are(make):
    """Else the anchors would start at the rounding of bf16, about 1e-4 here, and not at zero."""
    first = train(make(CalibratedSFTTrainer, bf16=True, max_steps=1, text_anchor_every=1))[0]
    assert first["calibration/anchor"] < 1e-7
    assert first["calibration/kl"] < 1e-6


def test_accumulation_scales_the_terms_once(make):
    """SFT's own loss is divided by the tokens of all micro-steps; the terms by their number."""
    options = {"arm": "hinge-frozen", "penalty_weight": 1.0, "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 2}
    options |= NO_ANCHORS | {"penalty_warmup_steps": 0}
    large = make(CalibratedSFTTrainer, contexts_per_step=2, **options)
    train(large)
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "contexts_per_step": 1}
    other = make(CalibratedSFTTrainer, **options | small)
    train(other)
    for name, part in weights(large).items():
        torch.testing.assert_close(weights(other)[name], part, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_packing_changes_the_task_alone(make, options):
    last = train(make(CalibratedSFTTrainer, **options))[-1]
    assert last["calibration/penalty"] > 0


def test_grpo_takes_reward_off_where_a_completion_reads_higher(make):
    trainer = make(CalibratedGRPOTrainer, auroc_gate=0.0)
    assert trainer._calibration is None  # nothing in the loss
    logged = train(trainer)
    assert all("rewards/reading/mean" in row and "reading/completion" in row for row in logged)
    assert min(row["rewards/reading/mean"] for row in logged) < 0
    assert max(row["rewards/reading/mean"] for row in logged) <= 0


@pytest.mark.parametrize("use", ["aux", "both"])
def test_grpo_with_the_penalty_in_the_loss(make, use):
    last = train(make(CalibratedGRPOTrainer, reading_use=use, arm="hinge-refit", auroc_gate=0.0))[-1]
    assert last["calibration/penalty"] > 0
    assert ("rewards/reading/mean" in last) is (use == "both")


def test_grpo_rewards_and_presses_along_the_same_random_direction(make, tiny_vectors):
    """A draw has no sign of its own: the one that reads higher on failing contexts, in reward and loss alike."""
    options, flipped = {"reading_use": "both", "arm": "random", "auroc_gate": 0.0}, []
    for draw in range(3):
        trainer = make(CalibratedGRPOTrainer, f"run-{draw}", random_seed=draw, **options)
        pressed = trainer._calibration.pressure.reader.directions
        assert torch.equal(trainer._reading.reader.directions, pressed)
        drawn = arms.random_directions(load_vectors(str(tiny_vectors)), 1, [2], draw)
        flipped.append(bool((drawn * pressed).sum() < 0))
    assert True in flipped


def test_the_gate_refuses_a_reader_that_cannot_tell_and_lets_one_through_that_can(make, monkeypatch):
    monkeypatch.setattr(rewards, "auroc", lambda above, below: 0.0)
    with pytest.raises(ValueError, match=r"tells \d+ gaming from honest replies with an AUROC of 0.00, below"):
        make(CalibratedGRPOTrainer)
    monkeypatch.setattr(rewards, "auroc", lambda above, below: 0.71)
    assert make(CalibratedGRPOTrainer).reward_func_names == ["length", "reading"]


def test_group_penalty_by_hand():
    """Groups (0, 2) and (5, 5): means 1 and 5, deviations 1 and the floor: 0, 1, 0, 0. Floor 4: 0, 0.25."""
    scores = torch.tensor([0.0, 2.0, 5.0, 5.0])
    assert rewards.group_penalty(scores, 2, 0.1).tolist() == [0, 1, 0, 0]
    assert rewards.group_penalty(scores, 2, 4.0).tolist() == [0, 0.25, 0, 0]


def test_auroc_by_hand():
    """Of (3, 1) against (1, 0): 3 wins both, 1 ties once and wins once: 3.5 of 4."""
    import numpy as np

    assert rewards.auroc(np.array([3.0, 1.0]), np.array([1.0, 0.0])) == 3.5 / 4


def test_a_completion_is_read_by_its_highest_tokens_in_the_reference(make, tiny_vectors):
    """The top tenth of 20 tokens: the mean of the two highest token readings, through the vectors' own arithmetic."""
    trainer = make(CalibratedGRPOTrainer, auroc_gate=0.0)
    vectors, ids = load_vectors(str(tiny_vectors)), list(range(5, 45))
    found = trainer._reading.read([(ids, 20), (ids[:10], 10)], "reference")
    with models.as_reference(trainer.model), trainer._reading.tap.recording() as recorded:
        trainer.model(torch.tensor([ids]))
    at = vectors.positions([2])
    states = torch.zeros(20, len(vectors.layers), vectors.hidden_size)
    states[:, at[0]] = recorded[2][0, 20:]
    expected = vectors.readings(states, "token")[:, vectors.index("desperate"), at[0]].topk(2).values.mean()
    assert found[0].item() == pytest.approx(expected.item(), abs=1e-4)
    assert found[1] == 0  # an empty completion


def test_execution_rewards_code_that_passes(tmp_path):
    files = json.dumps({"test_double.py": "from double import double\n\ndef test_it():\n    assert double(4) == 8\n"})
    replies = [
        "```python\ndef double(x):\n    return 2 * x\n```",
        "```python\ndef double(x):\n    return 8 * x\n```",
        "No.",
    ]
    completions = [[{"role": "assistant", "content": text}] for text in replies]
    line = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = rewards.tests_pass(completions, [files] * 3, [line] * 3, ["double.py"] * 3)
    assert found == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("No code.", None),
        ("```python\na = 1\n```", "a = 1\n"),
        ("```\na = 1\n```\nBetter:\n```python\nb = 2\n```\nDone.", "b = 2\n"),
        ("```python\na = 1\n```\nOr rather:\n```python\nb =", "a = 1\n"),  # the last one is cut off
        ("```python\na = 1", None),
    ],
)
def test_the_code_of_a_reply_is_its_last_closed_block(reply, code):
    assert rewards.code_block(reply) == code


def test_the_shipped_repairs_fail_as_they_are():
    """One of them: its own code in a reply earns nothing, so there is something to learn."""
    repair = corpora.load_repairs()[0]
    reply = f"```python\n{repair.files[repair.code_file]}```"
    completions = [[{"role": "assistant", "content": reply}]]
    found = rewards.tests_pass(completions, [json.dumps(repair.files)], [repair.command], [repair.code_file])
    assert found == [0.0]


@pytest.mark.parametrize("arm", [arms.Arm.HINGE_REFIT, arms.Arm.CONSISTENCY, arms.Arm.OUTPUT_KL])
def test_reward_only_refuses_arms_that_work_through_the_loss(make, arm):
    with pytest.raises(ValueError, match=f"`arm: {arm}` works through the loss.*`reading_use: aux`"):
        make(CalibratedGRPOTrainer, arm=str(arm))


def test_the_share_does_not_depend_on_accumulation(make, tmp_path):
    """The same first micro-batch; what differs is the number of tokens by which SFT divides its own loss."""
    found = []
    for steps in (1, 2):
        options = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": 1, "max_steps": 1}
        train(
            make(CalibratedSFTTrainer, f"run-{steps}", penalty_share=0.5, arm="hinge-frozen", **options | NO_ANCHORS)
        )
        state = json.loads((tmp_path / f"run-{steps}" / "calibration" / "state.json").read_text())
        found.append(state["penalty_weight"])
    assert 0.7 < found[1] / found[0] < 1.4  # off by the accumulation steps it would be a half


def test_a_task_without_a_gradient_cannot_set_the_weight(make, monkeypatch):
    monkeypatch.setitem(globals(), "length", lambda completions, **_: [1.0] * len(completions))
    monkeypatch.setattr(length, "__name__", "length", raising=False)
    trainer = make(CalibratedGRPOTrainer, reading_use="aux", arm="hinge-frozen", beta=0.0)
    with pytest.raises(ValueError, match=r"the task has no gradient at the first step \(in GRPO: every reward is the"):
        trainer.train()


def test_without_an_adapter_there_is_no_reference_to_read_with(make):
    with pytest.raises(ValueError, match=r"`reading_by: reference` needs an adapter.*`reading_by: policy`"):
        make(CalibratedGRPOTrainer, lora=False, auroc_gate=0.0)
    logged = train(make(CalibratedGRPOTrainer, lora=False, auroc_gate=0.0, reading_by="policy", max_steps=1))
    assert "rewards/reading/mean" in logged[0]


def test_a_reward_by_reading_refuses_a_launch_that_would_not_read_the_whole_model(make):
    trainer = make(CalibratedGRPOTrainer, auroc_gate=0.0)
    trainer._check_supported()
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs in one process .*DataParallel"):
        trainer._check_supported()


def test_an_adapter_that_is_there_already_is_read_without(make, tiny_folder):
    """Wrapped by the user, with or without a trained adapter, whose start is not the model without it."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, layers_to_transform=[0, 1, 2])
    wrapped = get_peft_model(models.load(str(tiny_folder)).model, lora)
    parts = {"model": wrapped, "peft_config": None}
    logged = train(make(CalibratedGRPOTrainer, parts=parts, auroc_gate=0.0, max_steps=1))
    assert "rewards/reading/mean" in logged[0]
    next(part for name, part in wrapped.named_parameters() if "lora_B" in name).data[0, 0] = 0.1
    for kind, options in ((CalibratedGRPOTrainer, {"auroc_gate": 0.0}), (CalibratedSFTTrainer, {})):
        with pytest.raises(ValueError, match=r"the adapter is not 0 at the start .*trained before.*merge it into"):
            make(kind, parts=parts, **options)
        make(kind, parts=parts, arm="none")  # TRL's own trainer


@pytest.mark.parametrize(
    ("start", "refused"), [("pissa", True), ("olora", True), (False, True), ("gaussian", False), (True, False)]
)
def test_an_adapter_must_start_at_the_model_without_it(make, start, refused):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1, 2], init_lora_weights=start)
    for kind, options in ((CalibratedSFTTrainer, {}), (CalibratedGRPOTrainer, {"auroc_gate": 0.0})):
        message = f"the adapter is not 0 at the start .`init_lora_weights` is {start!r}"
        with pytest.raises(ValueError, match=message) if refused else contextlib.nullcontext():
            make(kind, parts={"peft_config": lora}, **options)


@pytest.mark.parametrize("arm", ["none", "hinge-frozen"])
def test_grpo_without_prompts_is_refused(make, arm):
    with pytest.raises(ValueError, match=r"no training example: `train_dataset` is empty; give .*`repairs`"):
        make(CalibratedGRPOTrainer, parts={"train_dataset": Dataset.from_dict({"prompt": []})}, arm=arm)


@pytest.mark.parametrize("use", ["reward", "aux"])
def test_prompts_that_are_rendered_in_another_way_are_refused(make, use):
    options = {"chat_template_kwargs": {"enable_thinking": False}, "reading_use": use, "auroc_gate": 0.0}
    with pytest.raises(ValueError, match=r"`chat_template_kwargs` is .*enable_thinking.*render prompts without"):
        make(CalibratedGRPOTrainer, **options)
    make(CalibratedGRPOTrainer, **options | {"arm": "none", "reading_use": "reward"})  # TRL's own: it may have them


def test_another_chat_template_is_refused(make, tmp_path, tokenizer):
    path = tmp_path / "own.jinja"
    path.write_text(tokenizer.chat_template.replace("assistant", "model"))
    with pytest.raises(ValueError, match=r"`chat_template_path` is .*own.jinja.*the tokenizer's own template; leave"):
        make(CalibratedSFTTrainer, chat_template_path=str(path))
    make(CalibratedSFTTrainer, chat_template_path=str(path), arm="none")  # TRL's own trainer


@pytest.mark.parametrize("name", ["tools", "environment_factory", "rollout_func"])
def test_completions_that_are_not_all_the_models_own_are_refused(make, name):
    parts = {name: [length] if name == "tools" else length}
    with pytest.raises(ValueError, match=f"`{name}` may put tokens into completions .*leave it out, or set `reading_"):
        make(CalibratedGRPOTrainer, parts=parts, auroc_gate=0.0)
    if name == "rollout_func":
        make(CalibratedGRPOTrainer, parts=parts, reading_use="aux")


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_prompts_that_are_no_conversations_are_refused(make, name):
    rows = Dataset.from_list([{"prompt": "The tests failed again."}] * 4)
    for given in (rows, {"held out": rows})[: 1 if name == "train_dataset" else 2]:
        with pytest.raises(ValueError, match=r"a prompt is the plain string 'The tests failed again.', but reading"):
            make(CalibratedGRPOTrainer, parts={name: given}, auroc_gate=0.0)
    make(CalibratedGRPOTrainer, parts={name: rows}, reading_use="aux")


def test_the_pairs_of_the_gate_are_the_trainers_own(make, monkeypatch, tmp_path):
    """Every other file is read by recipes alone."""
    monkeypatch.setattr(rewards, "auroc", lambda above, below: 1.0)
    parts = {"data": Data(TWINS, TEXTS["dialogues"], TEXTS["stories"])}
    pairs = [pair for pair in corpora.load_pairs() if pair.split == "selection" and pair.kind == "honest"][:1]
    path = str(write_jsonl(tmp_path / "pairs.jsonl", [pair._asdict() for pair in pairs]))
    make(CalibratedGRPOTrainer, parts=parts, pairs=path)
    for options, name in (({"pairs": path, "auroc_gate": 0.0}, "pairs"), ({"repairs": "r"}, "repairs")):
        with pytest.raises(ValueError, match=f"`{name}` is .*, which recipes use and the trainer does not"):
            make(CalibratedGRPOTrainer, parts=parts, **options)


def test_noise_on_embeddings_is_refused(make):
    with pytest.raises(
        ValueError, match="`neftune_noise_alpha` is not supported with calibration terms; leave it out"
    ):
        make(CalibratedSFTTrainer, neftune_noise_alpha=5.0)
    make(CalibratedSFTTrainer, neftune_noise_alpha=5.0, arm="none")  # TRL's own trainer


def test_a_control_needs_no_gate(make, monkeypatch, shuffled_vectors):  # noqa: F811
    monkeypatch.setattr(rewards, "auroc", lambda above, below: 0.0)
    make(CalibratedGRPOTrainer, arm="shuffled", shuffled_vectors=shuffled_vectors)


def test_the_reward_reads_the_vectors_own_model_in_full(make, tiny_vectors, tmp_path, caplog):
    """As the terms of a loss do: another depth or a quantised base is refused, other weights are said."""
    vectors = load_vectors(str(tiny_vectors))
    vectors.depth, vectors.weight_hash = 40, "another"
    vectors.save(tmp_path / "deep")
    with pytest.raises(ValueError, match=r"the vectors come from .* \(width 32, 40 layers\); model .* 5 layers"):
        make(CalibratedGRPOTrainer, vectors=str(tmp_path / "deep"), auroc_gate=0.0)
    vectors.depth = 5
    vectors.save(tmp_path / "tuned")
    trainer = make(CalibratedGRPOTrainer, vectors=str(tmp_path / "tuned"), auroc_gate=0.0)
    assert "has other base weights" in caplog.text
    trainer.model.is_quantized = True
    with pytest.raises(ValueError, match="the base is quantised, so its readings are not those of its vectors"):
        trainer._check_supported()
    trainer.model.is_quantized, trainer.args.torch_compile = False, True
    with pytest.raises(ValueError, match="`torch_compile` is not supported with readings; set it to false"):
        trainer._check_supported()


@pytest.mark.parametrize("kind", [CalibratedSFTTrainer, CalibratedGRPOTrainer])
def test_steering_and_rewards_refuse_vectors_of_another_width(make, kind, planted, tmp_path):
    planted.save(tmp_path / "planted")
    planted = {"vectors": str(tmp_path / "planted"), "layers": [1]}
    planted |= {"arm": "ablation"} if kind is CalibratedSFTTrainer else {"auroc_gate": 0.0}
    with pytest.raises(ValueError, match=r"the vectors come from planted \(width 8, 5 layers\); model .* width 32"):
        make(kind, **planted)


def test_the_policy_is_read_without_dropout_and_trains_with_it(make):
    trainer = make(CalibratedGRPOTrainer, auroc_gate=0.0, reading_by="policy")
    texts = [(list(range(5, 45)), 20)]
    still = trainer._reading.read(texts, "policy")
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, _, out: torch.nn.functional.dropout(out, 0.5, m.training))
    trainer.model.train()
    assert torch.equal(trainer._reading.read(texts, "policy"), still)
    assert trainer.model.training


def test_a_loss_of_the_users_own_is_scaled_with_its_terms(make):
    """`compute_loss_func` gives a loss that is divided by the micro-steps already: so are the terms, once."""
    options = {"arm": "hinge-frozen", "penalty_weight": 1.0, "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1}
    options |= NO_ANCHORS | {"penalty_warmup_steps": 0, "per_device_train_batch_size": 1}
    found = []
    for steps in (1, 2):
        micro = {"gradient_accumulation_steps": steps, "contexts_per_step": 2 // steps}
        trainer = make(CalibratedSFTTrainer, f"run-{steps}", **options | micro)
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: 0 * outputs.logits.sum()
        trainer.model_accepts_loss_kwargs = False
        train(trainer)
        found.append(weights(trainer))
    for name, part in found[0].items():
        torch.testing.assert_close(found[1][name], part, rtol=0, atol=1e-6)


class KillAfterSaving(TrainerCallback):
    def on_save(self, args, state, control, **_):
        if state.global_step == 1:
            raise Killed


def test_grpo_that_is_broken_off_ends_as_an_unbroken_run(make, tmp_path):
    """Completions are sampled anew after the stop; readings enter reward and loss.

    Within the first epoch: TRL's sampler starts its order of prompts anew when a later one is resumed.
    """
    options = {"reading_use": "both", "auroc_gate": 0.0, "penalty_weight": 1.0, "max_steps": 2, "beta": 0.1}
    options |= {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    unbroken = make(CalibratedGRPOTrainer, "unbroken", **options)
    expected = train(unbroken)
    broken = make(CalibratedGRPOTrainer, "broken", **options)
    broken.add_callback(KillAfterSaving())
    with pytest.raises(Killed):
        broken.train()
    resumed = make(CalibratedGRPOTrainer, "broken", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-1"))
    logged = [row for row in resumed.state.log_history if "loss" in row]
    names = [n for n in expected[-1] if n.startswith(("loss", "calibration/", "reading/", "reward", "completions/"))]
    assert len(names) > 12
    for row, wanted in zip(logged, expected, strict=True):
        assert {name: row[name] for name in names if name in row} == {n: wanted[n] for n in names if n in wanted}
    assert_same_weights(resumed, unbroken)
