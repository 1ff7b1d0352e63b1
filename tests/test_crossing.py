"""Two readers of two models' replies: what changed, the text or the state."""

import numpy as np
import peft
import pytest
import torch
from records import make_record
from transformers import AutoModelForCausalLM

from calibrate import corpora
from calibrate.audit import crossing, effects
from calibrate.audit.agents import Settings
from calibrate.models import Checkpoint, hash_weights
from calibrate.vectors import load_vectors


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(crossing, "SETTINGS", Settings(max_new_tokens=6, temperature=0, batch=2))


@pytest.fixture
def contexts():
    return [failing for failing, _ in corpora.load_twins() if failing.split == "audit"][:3]


@pytest.fixture(scope="module")
def lively(tiny_folder, tokenizer, tmp_path_factory):
    """The tiny model with a last block that outweighs the token it stands on: it writes words, not the last token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.model.layers[4].mlp.down_proj.weight.data *= 300
    model.save_pretrained(folder := tmp_path_factory.mktemp("lively"))
    tokenizer.save_pretrained(folder)
    return folder


def tuned(folder, tokenizer, block: int) -> Checkpoint:
    """The tiny model with an adapter of one block's down projection."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(target_modules=["down_proj"], layers_to_transform=[block])
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 5)
    return Checkpoint(model.eval(), tokenizer, "tuned", "tuned", hash_weights(base), "0")


def test_an_adapter_above_the_band_changes_the_text_alone(lively, tokenizer, tiny_vectors, contexts):
    """Block 4 is above the band, layer 2: whoever reads a reply there reads the same; the two replies differ."""
    vectors = load_vectors(str(tiny_vectors))
    found = crossing.read(tuned(lively, tokenizer, 4), vectors, contexts, "desperate")
    readings = np.array(found["readings"])
    assert found["tasks"] == [context.task for context in contexts]
    assert all(before != after for before, after in found["replies"])
    assert readings[:, 0] == pytest.approx(readings[:, 1], abs=1e-3)
    assert np.abs(readings[:, :, 0] - readings[:, :, 1]).min() > 1e-3


def test_an_adapter_below_the_band_changes_the_state_of_any_text(lively, tokenizer, tiny_vectors, contexts):
    vectors = load_vectors(str(tiny_vectors))
    found = crossing.read(tuned(lively, tokenizer, 1), vectors, contexts, "desperate")
    readings = np.array(found["readings"])
    assert np.abs(readings[:, 0] - readings[:, 1]).min() > 1e-3


def test_a_merged_model_and_its_reference_are_read_as_the_adapter_is(lively, tokenizer, tiny_vectors, contexts):
    vectors = load_vectors(str(tiny_vectors))
    adapted = tuned(lively, tokenizer, 1)
    by_adapter = crossing.read(adapted, vectors, contexts, "desperate")
    merged = adapted._replace(model=adapted.model.merge_and_unload())
    assert crossing.read(merged, vectors, contexts, "desperate") is None  # nothing to switch off and no reference
    base = AutoModelForCausalLM.from_pretrained(lively)
    by_reference = crossing.read(merged, vectors, contexts, "desperate", base)
    assert by_reference["replies"] == by_adapter["replies"]
    np.testing.assert_allclose(by_reference["readings"], by_adapter["readings"], atol=1e-3)


def test_an_empty_reply_and_a_context_without_room_are_left_out(
    lively, tokenizer, tiny_vectors, contexts, monkeypatch, caplog
):
    caplog.set_level("INFO")
    vectors, checkpoint = load_vectors(str(tiny_vectors)), tuned(lively, tokenizer, 1)
    replies = iter([["a", " \n"], ["b"], ["c", "d"], ["e"]])
    monkeypatch.setattr(crossing.agents, "answer", lambda *given: next(replies))
    found = crossing.read(checkpoint, vectors, contexts, "desperate")
    assert found["tasks"] == [contexts[0].task, contexts[2].task]
    assert found["replies"] == [["a", "c"], ["b", "e"]]
    assert "1 of 3 contexts left out, 0 because they do not fit" in caplog.messages[-1]
    monkeypatch.undo()
    checkpoint.model.config.max_position_embeddings = 300
    assert crossing.read(checkpoint, vectors, contexts, "desperate") is None
    assert "3 of 3 contexts left out, 3 because they do not fit the window of 300" in caplog.messages[-1]


def test_the_parts_by_hand(planted):
    """Reader before: 3 and 2; reader after: 2 and 0 (of the texts before, after).

    Text ((3 - 2) + (2 - 0)) / 2 = 1.5, state ((3 - 2) + (2 - 0)) / 2 = 1.5, whole 3 - 0 = 3. In the second task the
    reader after reads 1 and 0: text (1 + 1) / 2 = 1, state (2 + 2) / 2 = 2. Means 1.25, 1.75 and 3.
    """
    planted.set_band([2], "by hand")
    readings = [[[3, 2], [2, 0]], [[3, 2], [1, 0]]]
    before = make_record(planted, options={"weight_hash": "a"})
    record = before._replace(options={"weight_hash": "a", "adapter": "x"}, more={"crossing": {"readings": readings}})
    found = effects.crossed(before, record)
    assert [found[name].estimate for name in ("fall_written", "fall_text", "fall_state")] == [3, 1.25, 1.75]
    assert effects.crossed(before, before) == effects.crossed(before, record._replace(more={"crossing": None})) == {}
