import json
import math
import re
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, ModelConfig

from calibrate import activations, corpora, extraction, models, shards
from calibrate.training import adapters, readings, runs
from calibrate.training.configs import CalibratedDPOConfig
from calibrate.training.objective import Data
from calibrate.training.trainers import CalibratedDPOTrainer
from calibrate.vectors import load_vectors


def short(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content[-160:]}]


# The shipped texts, cut short: a width of 32 reads them in no time.
TWINS = [
    tuple(context._replace(messages=short(context.messages[-1]["content"])) for context in twin)
    for twin in corpora.load_twins()
    if twin[0].split == "train"
][:4]
PLACES = {(failing.task, failing.context) for failing, _ in TWINS}
PAIRS = [
    {"prompt": short(pair.prompt[-1]["content"]), "chosen": pair.chosen, "rejected": pair.rejected}
    for pair in corpora.load_pairs()
    if (pair.task, pair.context) in PLACES and pair.kind == "honest"
]
TEXTS = {
    "dialogues": [
        row._replace(messages=[message | {"content": message["content"][:100]} for message in row.messages[:2]])
        for row in corpora.load_neutral()[:5]
    ],
    "stories": [story._replace(text=story.text[:150]) for story in corpora.load_stories()[:48]],
}
NO_TEXTS = {"kl_weight": 0.0, "concept_weight": 0.0, "concept_kl_weight": 0.0}
NO_ANCHORS = {"anchor_weight": 0.0, "side_weight": 0.0, "norm_weight": 0.0} | NO_TEXTS
TERMS = ("penalty", "anchor", "side", "norm", "kl", "concept", "concept_kl")
TRL = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_length": 256, "learning_rate": 1e-3,
    "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True, "max_steps": 3,
}  # fmt: skip


@pytest.fixture
def make(tiny_folder, tiny_vectors, tmp_path):
    """Builds a trainer of a fresh tiny model with LoRA; options are those of the YAML file."""

    def make(
        folder: str = "run", *, kind=CalibratedDPOTrainer, lora=True, twins=TWINS, stories=TEXTS["stories"],
        weight_hash=None, callbacks=(), eval_dataset=None, prepared=True, **options,
    ):  # fmt: skip
        checkpoint = models.load(str(tiny_folder))
        options = TRL | {"output_dir": str(tmp_path / folder)} | options
        shared = {
            "model": checkpoint.model,
            "processing_class": checkpoint.tokenizer,
            "train_dataset": Dataset.from_list(PAIRS),
            "eval_dataset": eval_dataset,
            "peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None,
            "callbacks": list(callbacks),
        }
        if kind is DPOTrainer:
            if lora:
                shared["peft_config"].layers_to_transform = [0, 1, 2]  # up to the band, as in every arm
            return DPOTrainer(args=DPOConfig(**options), **shared)
        args = CalibratedDPOConfig(**{"vectors": str(tiny_vectors)} | options)
        adapters.keep_below_band(shared["peft_config"], args)
        weight_hash = weight_hash or checkpoint.weight_hash
        data = Data(twins, TEXTS["dialogues"], stories, prepared)
        return kind(args=args, data=data, weight_hash=weight_hash, **shared)

    return make


@pytest.fixture(scope="session")
def shuffled_vectors(tiny_folder, tiny_vectors, tokenizer, tmp_path_factory) -> str:
    """What `calibrate extract --recipes shuffled` makes of a few stories of the tiny model."""
    vectors, checkpoint = load_vectors(str(tiny_vectors)), models.load(str(tiny_folder))
    stories = [s for s in corpora.load_stories() if s.split == "train" and s.concept in vectors.concepts]
    topics = list(dict.fromkeys(story.topic for story in stories))[:4]
    stories = [story for story in stories if story.topic in topics]
    items = {"stories": extraction.story_items(tokenizer, stories)}
    groups = shards.read(checkpoint, items, vectors.layers, tmp_path_factory.mktemp("states"))
    read = extraction.Read(stories, groups["stories"], vectors.neutral("token"), vectors.concepts)
    vectors.directions = extraction.by_recipe("shuffled", read)
    vectors.recipe = vectors.recipe | {"recipe": "shuffled"}
    vectors.save(folder := tmp_path_factory.mktemp("vectors") / "train-shuffled")
    return str(folder)


def train(trainer) -> list[dict]:
    """Trains; what was logged at every step."""
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: part.detach() for name, part in trainer.model.named_parameters() if part.requires_grad}


def assert_same_weights(one, other):
    assert weights(one).keys() == weights(other).keys()
    assert all(torch.equal(part, weights(other)[name]) for name, part in weights(one).items())


def test_without_weights_it_is_plain_trl_bit_for_bit(make):
    plain = make(kind=DPOTrainer)
    expected = [row["loss"] for row in train(plain)]
    assert len(expected) == 3
    for options in ({"arm": "none"}, {"penalty_share": 0.0} | NO_ANCHORS):
        same = make(**options)
        assert [row["loss"] for row in train(same)] == expected
        assert_same_weights(plain, same)
    assert [row["loss"] for row in train(make())] != expected


def test_the_logged_loss_is_the_task_plus_every_weighted_term(make, monkeypatch):
    tasks, plain = [], DPOTrainer.compute_loss

    def compute_loss(*positional, **named):
        tasks.append(plain(*positional, **named))
        return tasks[-1]

    monkeypatch.setattr(DPOTrainer, "compute_loss", compute_loss)
    given = {"anchor_weight": 2.0, "side_weight": 0.5, "norm_weight": 1.5}
    given |= {"kl_weight": 3.0, "concept_weight": 0.7, "concept_kl_weight": 0.6}
    logged = train(make(penalty_weight=0.4, penalty_warmup_steps=2, text_anchor_every=2, learning_rate=1e-2, **given))
    for step, (row, task) in enumerate(zip(logged, tasks, strict=True)):
        terms = {name: row.get(f"calibration/{name}") for name in TERMS}
        # A text anchor at every second step: a neutral text, then a story.
        assert [name for name in ("kl", "concept", "concept_kl") if terms[name] is not None] == (
            [["kl"], [], ["concept", "concept_kl"]][step]
        )
        at = {"penalty": 0.2 if step == 0 else 0.4}  # half-way through the warm-up
        at |= {name: given[f"{name}_weight"] for name in TERMS[1:]}
        extra = sum(at[name] * term for name, term in terms.items() if term is not None)
        assert extra > 0.01
        assert row["loss"] == pytest.approx(task.item() + extra, rel=1e-5)
    # By the last step every term has something to say, but the guard.
    assert all(terms[name] > 0 for name in ("penalty", "anchor", "side", "concept", "concept_kl"))


def test_two_small_micro_steps_equal_one_large_step_and_checkpointing_changes_nothing(make):
    """The same four pairs and contexts; plain gradient descent, as Adam would magnify the last digit."""
    options = {"penalty_weight": 1.0, "optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0, "max_steps": 2}
    options |= NO_TEXTS  # one text each micro-step, so not the same texts
    large = make(contexts_per_step=2, **options)
    expected = train(large)
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "contexts_per_step": 1}
    for change in (small, {"gradient_checkpointing": True}):
        other = make(**{"contexts_per_step": 2} | options | change)
        for row, wanted in zip(train(other), expected, strict=True):
            for name in ("loss", *(key for key in wanted if key.startswith(("calibration/", "reading/")))):
                # The task's loss is made of log-probabilities of hundreds of nats, which float32 knows to 6e-5.
                assert row[name] == pytest.approx(wanted[name], abs=2e-5 if name == "loss" else 2e-6), name
        for name, part in weights(large).items():
            torch.testing.assert_close(weights(other)[name], part, rtol=0, atol=1e-6)


def read_headers(trainer, vectors) -> float:
    """Mean header reading of the failing contexts, through code that training does not use."""
    probes = readings.prepare(trainer.processing_class, [failing for failing, _ in TWINS], 8)
    pools, ids = [[probe.header] for probe in probes], [probe.ids for probe in probes]
    states = activations.pooled(trainer.model.eval(), ids, pools, vectors.layers)[:, 0]
    row, at = vectors.index("desperate"), vectors.positions([2])[0]
    return vectors.readings(states, "header")[:, row, at].mean().item()


def test_the_hinge_lowers_readings_on_failing_contexts(make, tiny_vectors):
    vectors, found = load_vectors(str(tiny_vectors)), {}
    options = {"max_steps": 10, "penalty_weight": 1.0, "optim": "sgd", "learning_rate": 6e-3, "contexts_per_step": 4}
    options |= {"ceiling_quantile": 0.0} | NO_ANCHORS
    for arm in ("none", "hinge-frozen"):
        trainer = make(arm=arm, **options)
        before = read_headers(trainer, vectors)
        train(trainer)
        found[arm] = before - read_headers(trainer, vectors)
    assert found["hinge-frozen"] > found["none"] + 0.5
    assert found["hinge-frozen"] > 0.5


def test_both_arms_start_at_the_reference_with_the_same_hinge(make, tmp_path):
    """All four tasks in the first step: its hinge is that of the reference, and nothing has changed yet."""
    hinges, directions = [], []
    for arm in ("hinge-frozen", "random"):
        first = train(make(arm, arm=arm, contexts_per_step=4, max_steps=1))[0]
        kept = json.loads((tmp_path / arm / "calibration" / "state.json").read_text())
        assert first["calibration/penalty"] == pytest.approx(kept["initial_hinge"], abs=1e-4)
        assert all(first[f"calibration/{name}"] < 1e-9 for name in ("anchor", "side", "norm"))
        assert first["calibration/kl"] < 1e-6
        hinges.append(kept["initial_hinge"])
        directions.append(load_file(tmp_path / arm / "calibration" / "tensors.safetensors")["directions"][0])
    assert hinges[0] == hinges[1] > 0
    assert (directions[0] * directions[1]).sum().abs() < 1e-4


class Killed(Exception):
    pass


class KillAfterSaving(TrainerCallback):
    def on_save(self, args, state, control, **_):
        if state.global_step == 2:
            raise Killed


def test_a_run_that_is_killed_half_way_ends_as_an_unbroken_one(make, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2}
    options |= {"contexts_per_step": 1, "text_anchor_every": 3}
    unbroken = make("unbroken", **options)
    expected = train(unbroken)

    folder = tmp_path / "broken"
    args = CalibratedDPOConfig(**TRL | options | {"vectors": unbroken.args.vectors, "output_dir": str(folder)})
    assert runs.claim(args, ModelConfig(), PAIRS) is None
    with pytest.raises(Killed):
        make("broken", callbacks=[KillAfterSaving()], **options).train()
    # A stop while a checkpoint is written leaves one without its last file: it is passed over.
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-3")
    (folder / "checkpoint-3" / "trainer_state.json").unlink()

    resumed = make("broken", **options)
    checkpoint = runs.claim(args, ModelConfig(), PAIRS)
    assert checkpoint == str(folder / "checkpoint-2")
    resumed.train(resume_from_checkpoint=checkpoint)
    logged = [row for row in resumed.state.log_history if "loss" in row]
    names = [name for name in expected[-1] if name.startswith(("loss", "calibration/", "reading/", "logps/"))]
    assert len(names) > 8
    for row, wanted in zip(logged, expected, strict=True):
        assert {name: row.get(name) for name in names} == {name: wanted.get(name) for name in names}
    assert_same_weights(resumed, unbroken)
    for name in ("state.json", "tensors.safetensors"):  # hinge weight, directions and ceilings
        kept, wanted = [(tmp_path / run / "calibration" / name).read_bytes() for run in ("broken", "unbroken")]
        assert kept == wanted
    runs.finish(resumed)
    assert runs.claim(args, ModelConfig(), PAIRS) == runs.FINISHED


def test_a_resumed_run_keeps_its_first_ceilings_unless_they_differ_for_good(make, tmp_path):
    make()
    path = tmp_path / "run" / "calibration" / "tensors.safetensors"
    first = load_file(path)
    for shift in (1e-5, 1.0):
        save_file(first | {"ceilings": first["ceilings"] + shift}, path)
        if shift < 1e-3:  # the last digits of another machine
            assert torch.equal(make()._calibration.pressure.ceilings, first["ceilings"] + shift)
        else:
            with pytest.raises(ValueError, match=r"the ceilings differ.*use another `output_dir`"):
                make()


def test_evaluation_has_the_trainers_own_loss_and_moves_nothing(make):
    alone = make()
    train(alone)
    dataset = Dataset.from_list(PAIRS[:3])
    evaluated = make(eval_dataset=dataset, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    train(evaluated)
    assert_same_weights(alone, evaluated)
    first = next(row for row in evaluated.state.log_history if "eval_loss" in row)
    assert first["eval_loss"] == pytest.approx(math.log(2))  # at the reference DPO cannot tell two replies apart
    assert not any(name.startswith("eval_calibration") for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [0]}, r"layers \[0\] are out of range; these vectors hold layers 1 to 3"),
        ({"concepts": ["serene"]}, "no concept 'serene'; they have .*calm"),
        ({"vectors": "nowhere"}, "'nowhere': no model.safetensors there"),
        ({"max_length": 16}, "no training example is left: with `max_length` 16 every prompt is cut"),
        (
            {"stories": [story for story in TEXTS["stories"] if story.concept == "calm"]},
            "the stories have none about desperate.*set `concept_weight` and",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_training(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_a_hinge_that_starts_at_zero_cannot_set_its_weight(make):
    """The failing contexts are their own twins, and the ceiling is the highest reading."""
    trainer = make(twins=[(failing, failing) for failing, _ in TWINS], ceiling_quantile=1.0)
    with pytest.raises(ValueError, match=r"the penalty is 0 at the first step.*give `penalty_weight`, or a lower"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "top"), [({}, 2), ({"layers": [1]}, 1), ({"arm": "none"}, 2), ({"adapt_above_band": True}, 4)]
)
def test_lora_stays_at_or_below_the_band(make, options, top):
    trained = {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in weights(make(**options))}
    assert trained == set(range(top + 1))


def test_the_tool_result_is_pressed_where_it_has_weight(make, tiny_vectors):
    """Weights 1, 1 and 0.25 of header, reply and tool: P' (2 + 0.25) = P 2 + T 0.25, T by the vectors' readings."""
    with pytest.raises(ValueError, match=r"`tool_weight` is 0.25, but a context has no tool result; set it to 0"):
        make(tool_weight=0.25)
    twins = [
        tuple(c._replace(messages=[*c.messages, {"role": "tool", "content": f"{c.outcome}: {c.task}"}]) for c in twin)
        for twin in TWINS
    ]
    options = {"twins": twins, "arm": "hinge-frozen", "contexts_per_step": 4, "max_steps": 1} | NO_ANCHORS
    pressed = {w: train(make(f"{w}", tool_weight=w, **options))[0]["calibration/penalty"] for w in (0.0, 0.25)}
    trainer, vectors = make("fresh", **options), load_vectors(str(tiny_vectors))
    row, at = vectors.index("desperate"), vectors.positions([2])[0]
    tokens = []
    for side in (0, 1):
        probes = readings.prepare(trainer.processing_class, [twin[side] for twin in twins], 64, tool=True)
        found = []
        for probe in probes:
            pools = [[slice(token, token + 1) for token in range(probe.tool.start, probe.tool.stop)]]
            states = activations.pooled(trainer.model.eval(), [probe.ids], pools, vectors.layers)[0]
            found.append(vectors.readings(states, "token")[:, row, at])
        tokens.append(found)
    excess = [(read - torch.cat(tokens[1]).median()).clamp(min=0) for read in tokens[0]]
    hinge = torch.stack([torch.where(e > 1, e - 0.5, e**2 / 2).mean() for e in excess]).mean().item()
    assert hinge > 0.01
    assert 2.25 * pressed[0.25] == pytest.approx(2 * pressed[0.0] + 0.25 * hinge, rel=0.02)
