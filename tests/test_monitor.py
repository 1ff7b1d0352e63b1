"""The monitor on a plain transformers trainer, one of TRL's and one of ours: planted shifts, alerts, nothing moved."""

import logging

import pytest
import torch
from conftest import write_jsonl
from datasets import Dataset
from peft import LoraConfig
from test_trainers import PAIRS, TEXTS, TRL, TWINS
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from calibrate import ReadingMonitor, activations, models
from calibrate.training import monitor, readings
from calibrate.training.configs import CalibratedDPOConfig
from calibrate.training.monitor import Level, Rise
from calibrate.training.objective import Data
from calibrate.training.trainers import CalibratedDPOTrainer
from calibrate.vectors import load_vectors

KINDS = (Trainer, SFTTrainer, CalibratedDPOTrainer)
HEADER = "desperate/failing_header"
STILL = {"learning_rate": 0.0, "max_steps": 8}
COMMON = {name: value for name, value in TRL.items() if name != "max_length"}


class Ramp(TrainerCallback):
    """Adds the direction to the output of block 2 at every token, so many sigma of the header by optimiser step."""

    def __init__(self, model, vectors, sigma: dict[int, float]):
        row, at = vectors.index("desperate"), vectors.positions([2])[0]
        self.unit = vectors.directions[row, at] * vectors.scale("header")[1][row, at].float()
        self.sigma, self.now = sigma, 0.0
        models.blocks(model)[2].register_forward_hook(self.add)

    def add(self, module, inputs, output):
        return output + self.now * self.unit

    def on_step_end(self, args, state, control, **_):
        self.now = self.sigma.get(state.global_step, self.now)


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """Four tasks' contexts, cut short."""
    rows = [context._asdict() for twin in TWINS for context in twin]
    return str(write_jsonl(tmp_path_factory.mktemp("twins") / "twins.jsonl", rows))


@pytest.fixture
def make(tiny_folder, tiny_vectors, twins, tmp_path):
    """A trainer of a fresh tiny model, and its monitor unless `every` is None."""

    def make(kind=Trainer, folder="run", every=2, sigma=None, lora=False, dropout=0.0, watch=None, **options):
        checkpoint = models.load(str(tiny_folder))
        model, tokenizer, vectors = checkpoint.model, checkpoint.tokenizer, load_vectors(str(tiny_vectors))
        for block in models.blocks(model):
            block.self_attn.attention_dropout = dropout
        ramp = [Ramp(model, vectors, sigma)] if sigma else []
        options = COMMON | {"output_dir": str(tmp_path / folder)} | options
        shared = {"model": model, "processing_class": tokenizer, "callbacks": ramp}
        peft = {"peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None}
        if kind is Trainer:
            rows = [{"input_ids": tokenizer(pair["chosen"][0]["content"])["input_ids"][:64]} for pair in PAIRS]
            collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
            trainer = Trainer(
                args=TrainingArguments(**options),
                train_dataset=Dataset.from_list(rows),
                data_collator=collator,
                **shared,
            )
        elif kind is SFTTrainer:
            rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
            args = SFTConfig(max_length=256, **options)
            trainer = SFTTrainer(args=args, train_dataset=Dataset.from_list(rows), **shared, **peft)
        else:
            args = CalibratedDPOConfig(
                vectors=str(tiny_vectors), max_length=256, penalty_weight=1.0, adapt_above_band=True, **options
            )
            data = {"data": Data(TWINS, TEXTS["dialogues"], TEXTS["stories"]), "weight_hash": checkpoint.weight_hash}
            trainer = kind(args=args, train_dataset=Dataset.from_list(PAIRS), **shared, **peft, **data)
        if every is None:
            return trainer, None
        found = ReadingMonitor(trainer, str(tiny_vectors), every=every, twins=twins, **(watch or {}))
        trainer.add_callback(found)
        return trainer, found

    return make


def rows_of(trainer) -> list[dict]:
    """What the monitor logged."""
    return [row for row in trainer.state.log_history if "monitor/norm" in row]


def losses_of(trainer) -> list[dict]:
    """The trainer's own rows."""
    return [row for row in trainer.state.log_history if "loss" in row]


def test_a_planted_shift_is_read_in_sigma_and_raises_its_alerts(make, tiny_vectors, caplog):
    """0, 0.4, 0.8, 1.2 and 1.6 sigma at steps 0 to 8 and a learning rate of 0.

    A level of 1 sigma above the start is passed at steps 6 and 8; a rise of 1 within three readings is seen at 6 (1.2
    over 0) and 8 (1.6 over 0.4), and within one reading (0.4) never. A level that the reference itself is off is seen
    from the first reading of the training on.
    """
    start = rows_of(trained(make(**STILL | {"max_steps": 1})[0]))[0][f"monitor/{HEADER}"]
    rules = [Level(HEADER, above=start + 1.0), Rise(HEADER, by=1.0, readings=3), Rise(HEADER, by=1.0, readings=1)]
    rules += [Level(HEADER, below=start - 0.1), Rise("desperate/passing_header", by=9.0), Level("norm", above=0.0)]
    trainer, found = make(sigma={2: 0.4, 4: 0.8, 6: 1.2, 8: 1.6}, watch={"rules": rules}, **STILL)
    with caplog.at_level(logging.WARNING, "calibrate.training.monitor"):
        trainer.train()
    rows = rows_of(trainer)
    for side in ("failing", "passing"):
        moved = [row[f"monitor/desperate/{side}_header"] - rows[0][f"monitor/desperate/{side}_header"] for row in rows]
        assert moved == pytest.approx([0, 0.4, 0.8, 1.2, 1.6], abs=1e-4)
    # A reply's tokens are read in their own sigma.
    vectors = load_vectors(str(tiny_vectors))
    row, at = vectors.index("desperate"), vectors.positions([2])[0]
    share = float(vectors.scale("header")[1][row, at] / vectors.scale("token")[1][row, at])
    moved = rows[-1]["monitor/desperate/failing_reply"] - rows[0]["monitor/desperate/failing_reply"]
    assert moved == pytest.approx(1.6 * share, abs=1e-4)
    expected = [(step, rule) for step in (2, 4, 6, 8) for rule in (*rules[: 2 if step > 4 else 0], rules[-1])]
    assert [(alert.step, alert.rule) for alert in found.alerts] == expected
    assert [row["monitor/alerts"] for row in rows] == [0, 1, 1, 3, 3]
    lines = [record.message for record in caplog.records if "norm" not in record.message]
    assert lines[0].startswith(f"monitor: step 6: {HEADER} is {start + 1.2:.3f}; allowed: -inf to")
    assert lines[1:2] == [f"monitor: step 6: {HEADER} is {start + 1.2:.3f}, up 1.200 within 3 reading(s)"]
    assert len(lines) == 4


def test_without_a_shift_there_is_no_alert(make, caplog):
    trainer, found = make(watch={"rules": [Level(HEADER, above=50.0), Rise(HEADER, by=0.01)]}, **STILL)
    trainer.train()
    assert found.alerts == []
    assert not [record for record in caplog.records if record.name == "calibrate.training.monitor"]
    assert all(row["monitor/norm_ratio"] == 1 for row in rows_of(trainer))


def test_the_default_rules_see_a_rise_while_it_is_new_and_a_norm_as_long_as_it_is_off(make):
    trainer, found = make(sigma={2: 40.0}, **STILL)
    trainer.train()
    steps = {metric: [a.step for a in found.alerts if a.rule.metric == metric] for metric in found._names}
    assert {metric: seen for metric, seen in steps.items() if seen} == {
        HEADER: [2, 4, 6],
        "desperate/failing_reply": [2, 4, 6],
        "norm_ratio": [2, 4, 6, 8],
    }


@pytest.mark.parametrize("stop", [True, False])
def test_it_stops_the_run_only_where_asked(make, stop):
    trainer, found = make(sigma={4: 2.0}, watch={"rules": [Rise(HEADER)], "stop": stop}, **STILL)
    trainer.train()
    assert found.alerts[0].step == 4
    assert trainer.state.global_step == (4 if stop else 8)


def trained(trainer):
    trainer.train()
    return trainer


def test_readings_are_those_of_the_vectors_on_either_side(make, tiny, tiny_vectors):
    """Through code that the monitor does not use: mean states of header and reply, read by the vectors."""
    row = rows_of(trained(make(max_steps=1)[0]))[0]
    vectors = load_vectors(str(tiny_vectors))
    concept, at = vectors.index("desperate"), vectors.positions([2])[0]
    norms = []
    for side in (0, 1):
        probes = readings.prepare(tiny.tokenizer, [twin[side] for twin in TWINS], 64)
        pools, ids = [[probe.header, probe.reply] for probe in probes], [probe.ids for probe in probes]
        states = activations.pooled(tiny.model, ids, pools, vectors.layers)
        for place, (role, pooling) in enumerate((("header", "header"), ("reply", "token"))):
            expected = vectors.readings(states[:, place], pooling)[:, concept, at].mean().item()
            name = f"monitor/desperate/{monitor.SIDES[side]}_{role}"
            assert row[name] == pytest.approx(expected, abs=1e-4)
        for number, hidden in activations.states(tiny.model, ids, [2]):
            header, reply = hidden[0, probes[number].header], hidden[0, probes[number].reply]
            norms += [header.mean(0).norm().log(), reply.norm(dim=-1).log().mean()]
    assert row["monitor/norm"] == pytest.approx(torch.stack(norms).mean().exp().item(), rel=1e-5)
    assert row["monitor/desperate/failing_header"] != pytest.approx(row["monitor/desperate/passing_header"], abs=0.1)


def logged(row: dict) -> dict:
    return {name: value for name, value in row.items() if name.startswith("monitor/")}


def test_every_kind_of_trainer_logs_the_same(make):
    found = [rows_of(trained(make(kind, watch={"concepts": ["desperate", "calm"]}, **STILL)[0])) for kind in KINDS]
    sides = ("failing_header", "failing_reply", "passing_header", "passing_reply")
    names = [f"{concept}/{side}" for concept in ("desperate", "calm") for side in sides]
    assert list(logged(found[0][0])) == [f"monitor/{name}" for name in [*names, "norm", "norm_ratio", "alerts"]]
    for rows in found:
        assert [row["step"] for row in rows] == [0, 2, 4, 6, 8]
        assert [logged(row) for row in rows] == [logged(row) for row in found[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_bit_for_bit_and_so_are_the_trainers_own_rows(make, kind):
    """With dropout, so that a pass in training mode would draw random numbers; rows also between the steps logged."""
    options = {"dropout": 0.2, "max_steps": 6, "logging_steps": 3, "lora": kind is not Trainer}
    runs = [trained(make(kind, every=every, **options)[0]) for every in (None, 1)]
    assert losses_of(runs[0]) == losses_of(runs[1])
    assert [row["step"] for row in losses_of(runs[0])] == [3, 6]
    assert len(rows_of(runs[1])) == 7
    weights = [dict(run.model.named_parameters()) for run in runs]
    assert all(torch.equal(part, weights[1][name]) for name, part in weights[0].items())
    assert runs[0].model.training == runs[1].model.training


def test_it_reads_at_its_steps_only_and_in_evaluation_mode_without_gradients(make):
    passes, later = [], []
    trainer, found = make(every=3, max_steps=7)

    def note(module, inputs, output):
        if not module.training:
            passes.append((trainer.state.global_step, output.requires_grad))

    models.blocks(trainer.model)[2].register_forward_hook(note)
    models.blocks(trainer.model)[3].register_forward_hook(lambda module, *_: later.append(module.training))
    trainer.train()
    assert passes == [(step, False) for step in (0, 3, 6)]  # one pass holds all texts
    assert later == [True] * 7  # cut after the band
    assert [row["step"] for row in rows_of(trainer)] == [0, 3, 6]
    assert len(found._probes) == 8


def test_the_reference_is_the_base_below_an_adapter(make):
    base = rows_of(trained(make(SFTTrainer, **STILL)[0]))
    trainer, _ = make(SFTTrainer, lora=True, **STILL)
    for name, part in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(part, std=0.3)
    rows = rows_of(trained(trainer))
    assert logged(rows[0]) == logged(base[0])
    assert abs(rows[1]["monitor/norm_ratio"] - 1) > 0.01


def test_a_resumed_run_goes_on_with_its_first_reference(make, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "learning_rate": 1e-2}
    whole = rows_of(trained(make(folder="whole", **options)[0]))
    trainer, _ = make(folder="again", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    again = rows_of(trainer)
    assert [logged(row) for row in again] == [logged(row) for row in whole]
    assert again[-1]["monitor/norm_ratio"] != 1
    make(folder="bare", every=None, **options)[0].train()
    with pytest.raises(ValueError, match="checkpoint at step 4 has no log of these readings from its start"):
        make(folder="other", **options)[0].train(resume_from_checkpoint=str(tmp_path / "bare" / "checkpoint-4"))


def test_it_reads_a_reward_model_which_has_no_vocabulary(tiny_folder, tiny_vectors, twins, tmp_path, tokenizer):
    from transformers import Qwen2ForSequenceClassification

    model = Qwen2ForSequenceClassification.from_pretrained(tiny_folder, num_labels=1, dtype=torch.float32)
    options = COMMON | {"output_dir": str(tmp_path), "max_length": 256, "max_steps": 2}
    trainer = RewardTrainer(
        model=model, args=RewardConfig(**options), processing_class=tokenizer, train_dataset=Dataset.from_list(PAIRS)
    )
    trainer.add_callback(ReadingMonitor(trainer, str(tiny_vectors), every=2, twins=twins))
    trainer.train()
    assert [row["step"] for row in rows_of(trainer)] == [0, 2]


def test_the_default_texts_are_few_and_short():
    """Eight texts of the selection split; at 3.3 characters or more a token, at most 2,400 tokens."""
    twins = monitor.probe_twins(None)
    assert len(twins) == 4
    assert {(c.split, c.context) for twin in twins for c in twin} == {("selection", "plain")}
    texts = [[*(message["content"] for message in c.messages), c.reply[:200]] for twin in twins for c in twin]
    assert sum(len(part) for text in texts for part in text) <= 2400 * 3.3


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        (
            {"rules": [Level("norm_ration")]},
            "a rule is about 'norm_ration'; allowed: desperate/failing_header, ",
        ),
        ({"rules": [Rise(HEADER, readings=0)]}, "a rise over 0 readings; allowed: 1 or more"),
        ({"concepts": ["serene"]}, "no concept 'serene'; they have .*calm"),
    ],
)
def test_what_does_not_fit_is_refused(make, watch, message):
    with pytest.raises(ValueError, match=message):
        make(watch=watch)


def test_a_trainer_that_does_not_fit_is_refused(make, tiny_folder):
    with pytest.raises(ValueError, match="`every` is 0; allowed: 1 or more"):
        make(every=0)
    trainer, _ = make()
    trainer.model_init = lambda: models.load(str(tiny_folder)).model
    with pytest.raises(ValueError, match=r"another model \(`model_init`\)"):
        trainer.train()
    trainer.processing_class = None
    with pytest.raises(ValueError, match="no `processing_class`"):
        ReadingMonitor(trainer, "nowhere")
