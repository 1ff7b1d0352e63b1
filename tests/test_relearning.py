"""Benign fine-tuning on top of a checkpoint: what it reads, what it leaves behind, what comes back by hand."""

import peft
import pytest
import torch
from records import make_record
from test_crossing import tuned

from calibrate import activations, corpora, stats, transcripts
from calibrate.audit import effects, relearning
from calibrate.vectors import load_vectors


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(relearning, "STEPS", (0, 2, 3))
    monkeypatch.setattr(stats, "RESAMPLES", 50)


@pytest.fixture
def contexts():
    return [failing for failing, _ in corpora.load_twins() if failing.split == "audit"][:2]


@pytest.fixture
def dialogues():
    return [row for row in corpora.load_neutral() if row.split == "train"][:3]


def scores(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


def weights(model) -> list[str]:
    """Names of the parameters; a matrix beside which an adapter was keeps its wrapper."""
    return [name.replace(".base_layer", "") for name, _ in model.named_parameters()]


@pytest.mark.parametrize("adapted", [False, True])
def test_the_checkpoint_is_read_trained_and_left_as_it_was(
    tiny, tiny_folder, tokenizer, tiny_vectors, contexts, dialogues, adapted, monkeypatch
):
    """Step 0 is the checkpoint's own reading, its adapter's too; a dialogue that comes again surprises less."""
    monkeypatch.setattr(relearning, "RATE", 1e-2)
    checkpoint = tuned(tiny_folder, tokenizer, 1) if adapted else tiny
    vectors, before = load_vectors(str(tiny_vectors)), scores(checkpoint.model)
    names = weights(checkpoint.model)
    state = torch.get_rng_state()
    found = relearning.read(checkpoint, vectors, contexts, dialogues[:1], "desperate")
    assert torch.get_rng_state().equal(state)
    assert scores(checkpoint.model).equal(before)
    assert weights(checkpoint.model) == names
    assert (found["tasks"], found["steps"]) == ([context.task for context in contexts], [0, 2, 3])
    assert found["losses"] == sorted(found["losses"], reverse=True)
    encoded = transcripts.encode(tokenizer, contexts[1].messages, "")
    ((_, hidden),) = activations.states(checkpoint.model, [encoded.ids], vectors.layers)
    header = hidden[:, encoded.last("header").start :].double().mean(1)
    reading = vectors.readings(header, "header")[vectors.index("desperate"), vectors.positions([2])]
    assert found["readings"][1][0] == pytest.approx(float(reading), abs=1e-3)
    assert all(row[0] != row[1] != row[2] for row in found["readings"])


def test_without_a_step_nothing_moves(tiny, tiny_vectors, contexts, dialogues, monkeypatch):
    monkeypatch.setattr(relearning, "RATE", 0.0)
    found = relearning.read(tiny, load_vectors(str(tiny_vectors)), contexts, dialogues, "desperate")
    assert all(row[0] == row[1] == row[2] for row in found["readings"])


def test_beside_an_adapter_of_another_kind_nothing_is_read(tiny, tiny_vectors, contexts, dialogues):
    model = peft.get_peft_model(tiny.model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    read = relearning.read(tiny._replace(model=model), load_vectors(str(tiny_vectors)), contexts, dialogues, "calm")
    assert read is None


def test_what_comes_back_by_hand(planted):
    """Before 3, after 1: a fall of 2. Trained on, before reads 3.5 and after 2.5: 1 is left of the 2, half is back."""
    planted.set_band([2], "by hand")
    records = [
        make_record(planted, more={"relearning": {"readings": [[first + shift, 9, last + shift] for shift in (0, 1)]}})
        for first, last in ((3, 3.5), (1, 2.5))
    ]
    assert effects.relearned(*records)["returned"] == pytest.approx((0.5, 0.5, 0.5))
    assert effects.relearned(records[0], records[0]) == {}  # no fall, no share of it
    assert effects.relearned(make_record(planted), records[1]) == {}
    assert effects.relearned(records[0], make_record(planted, more={"relearning": None})) == {}
