"""The same contexts in another template and tool format: a fall that stays behind is told apart."""

import pytest
import torch
from records import LEVELS, make_record

from calibrate import activations, corpora, stats, transcripts
from calibrate.audit import harness, probes, readers
from calibrate.vectors import load_vectors


@pytest.fixture
def twins():
    return [twin for twin in corpora.load_twins() if twin[0].split == "audit"][:2]


def test_contexts_are_read_in_another_template_and_tool_format(tiny, tiny_vectors, twins):
    """The same messages by hand; the tokenizer keeps its own template."""
    own = tiny.tokenizer.chat_template
    found = harness.read(tiny, load_vectors(str(tiny_vectors)), twins)
    assert tiny.tokenizer.chat_template == own
    contexts = [context for twin in twins for context in twin]
    assert found.ids == [context.id for context in contexts]
    assert found.kinds == ["failing", "passing"] * 2
    names = {"system": "Instructions", "user": "User", "assistant": "Assistant", "tool": "User"}
    last = contexts[3]
    text = ""
    for message in last.messages:
        content = message["content"]
        if message["role"] == "tool":
            content = f"The command printed:\n```\n{content}\n```"
        text += f"{names[message['role']]}:\n{content}\n\n"
    header = len(tiny.tokenizer(text)["input_ids"])
    encoded = transcripts.encode_text(tiny.tokenizer, text + "Assistant:\n")
    layers = load_vectors(str(tiny_vectors)).layers
    ((_, states),) = activations.states(tiny.model, [encoded.ids], layers)
    torch.testing.assert_close(found.states[3, 0], states[:, header:].mean(1), atol=1e-5, rtol=1e-4)
    assert "tool" in {message["role"] for message in last.messages}


def test_a_context_that_does_not_fit_is_named(tiny, tiny_vectors, twins):
    tiny.model.config.max_position_embeddings = 50
    with pytest.raises(ValueError, match=rf"context '{twins[0][0].id}' has \d+ tokens in the other template, and the"):
        harness.read(tiny, load_vectors(str(tiny_vectors)), twins)


@pytest.mark.parametrize(
    ("had", "left", "expected"), [(2, 0, 1.0), (2, 1, 0.5), (2, 2, 0.0), (2, 3, -0.5), (4, 2, 1.0), (1, 0, 1.0)]
)
def test_the_share_that_falls_elsewhere_by_hand(planted, monkeypatch, had, left, expected):
    """In its own template 2 sigma fall; in the other one `had` - `left`, of 2 or of as many as there were to fall."""
    monkeypatch.setattr(stats, "RESAMPLES", 50)
    monkeypatch.setattr(probes, "STEPS", 1)
    planted.set_band([2], "by hand")
    other = {"failing": {0: LEVELS + had}, "passing": {0: LEVELS}}
    before = make_record(planted, {"failing": {0: LEVELS + 2}, "passing": {0: LEVELS}}, elsewhere=other)
    gone = {"failing": {0: LEVELS}, "passing": {0: LEVELS}}
    after = make_record(planted, gone, elsewhere={"failing": {0: LEVELS + left}, "passing": {0: LEVELS}})
    figures = readers.compare(before, after).figures
    assert figures["contrast_elsewhere"].estimate == pytest.approx(had, abs=1e-4)
    assert figures["fall_elsewhere"].estimate == pytest.approx(had - left, abs=1e-4)
    assert figures["elsewhere"].estimate == pytest.approx(expected, abs=1e-4)


def test_without_a_premise_elsewhere_the_share_is_not_formed(planted, monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 50)
    monkeypatch.setattr(probes, "STEPS", 1)
    planted.set_band([2], "by hand")
    same = {"failing": {0: LEVELS}, "passing": {0: LEVELS}}
    before = make_record(planted, {"failing": {0: LEVELS + 2}, "passing": {0: LEVELS}}, elsewhere=same)
    figures = readers.compare(before, make_record(planted, same)).figures
    assert figures["elsewhere"] is None
    assert figures["fall_elsewhere"].estimate == pytest.approx(0, abs=1e-4)
