import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard, hub_mixin
from safetensors.torch import load_file, save_file

from calibrate.vectors import POOLINGS, EmotionVectors, check_rows, load_vectors


def make(layers=(1, 2), depth=4, band=None) -> EmotionVectors:
    """Two concepts, width 2 and two neutral samples."""
    samples = dict.fromkeys(POOLINGS, 2)
    return EmotionVectors(["desperate", "calm"], list(layers), 2, depth, samples, "some/model", "abc", {}, band=band)


def test_save_and_load_give_the_same_vectors(planted, tmp_path):
    planted.recipe = {"split": "train", "layers": [1, 2]}
    planted.set_band([2], "found by the test", {"contrast": [0.1, 0.2]})
    planted.save(tmp_path / "deep" / "vectors")
    loaded = load_vectors(str(tmp_path / "deep" / "vectors"))
    assert loaded.config() == planted.config()
    assert (loaded.band, loaded.band_reason) == ([2], "found by the test")
    assert loaded.band_search == {"contrast": [0.1, 0.2]}
    buffers = dict(planted.named_buffers())
    assert set(buffers) == {"directions", *(f"neutral_{pooling}" for pooling in POOLINGS)}
    for name, tensor in loaded.named_buffers():
        assert torch.equal(tensor, buffers[name])
    states = torch.randn(3, 2, 8)
    assert torch.equal(loaded.readings(states, "header"), planted.readings(states, "header"))


def test_the_folder_opens_without_this_project(planted, tmp_path):
    planted.recipe = {"split": "train"}
    planted.set_band([1, 2], "Set by the test.")
    planted.save(tmp_path / "vectors")
    assert sorted(path.name for path in (tmp_path / "vectors").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert json.loads((tmp_path / "vectors" / "config.json").read_text())["concepts"] == ["desperate", "calm"]
    tensors = load_file(tmp_path / "vectors" / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"directions": (2, 2, 8)} | {f"neutral_{pooling}": (4000, 2, 8) for pooling in POOLINGS}
    card = ModelCard.load(tmp_path / "vectors" / "README.md")
    assert (card.data.library_name, card.data.tags) == ("calibrate", ["emotion-vectors"])
    for fact in (
        "(weights 0)",
        "layers 1 to 2 of 5",
        "Band for training: 1 to 2. Set by the test.",
        '| split | "train" |',
    ):
        assert fact in card.text


@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub", "both"])
def test_the_mixins_own_ways_to_save_carry_what_came_after_construction(planted, way, tmp_path, monkeypatch):
    """Band, reason and checks of now in the config and the card, also over a folder with older ones."""
    folder = tmp_path / "someone" / "vectors"

    class Hub:
        def __init__(self, token=None): ...

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **_):
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(hub_mixin, "HfApi", Hub)
    planted.save_pretrained(folder)
    planted.set_band([2], "found later", {"contrast": [0.1, 0.2]})
    planted.checks, planted.recipe = {"top 1, chance": 0.5}, {"split": "train"}
    if way == "save_pretrained":
        planted.save_pretrained(folder)
    elif way == "push_to_hub":
        planted.push_to_hub("someone/vectors")
    else:
        planted.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="someone/vectors")
    loaded = EmotionVectors.from_pretrained(folder)
    assert loaded.config() == planted.config()
    assert (loaded.band, loaded.checks) == ([2], {"top 1, chance": 0.5})
    assert torch.equal(loaded.directions, planted.directions)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Band for training: 2 to 2. found later" in card
    assert "| top 1, chance | 0.5 |" in card
    assert planted.generate_model_card().text == ModelCard.load(folder / "README.md").text


def test_the_card_shows_the_concepts_own_checks_in_short():
    """Of five concepts three lowest, the middle one and three highest; ladders by name; `|` must not end a cell."""
    vectors = make()
    vectors.checks = {
        "top 1, chance": 0.5,
        "split-half reliability": {"a": 0.3, "b": -0.1, "c": 0.9, "d": 0.5, "e": 0.4},
        "ladders": {"dose calm down": -1.0, "dose at ease up": 0.25, "age sad up": 0.5},
        "logit lens": {"calm": [" lake", "|"], "desperate": ["\n", "run"], "other": ["x"]},
    }
    for row in (
        "| top 1, chance | 0.5 |",
        "| split-half reliability, lowest | b -0.10, a 0.30, e 0.40 |",
        "| split-half reliability, median | e 0.40 |",
        "| split-half reliability, highest | e 0.40, d 0.50, c 0.90 |",
        "| dose: expected, rank correlation | calm down -1.00, at ease up 0.25 |",
        "| age: expected, rank correlation | sad up 0.50 |",
        '| logit lens, desperate | ["\\n", "run"] |',
        '| logit lens, calm | [" lake", "\\|"] |',
    ):
        assert f"\n{row}\n" in vectors.card()
    assert [row for row, _ in check_rows(vectors.checks, vectors.concepts) if "lens" in row] == [
        "logit lens, desperate", "logit lens, calm",
    ]  # fmt: skip
    assert check_rows({"split-half reliability": {}, "ladders": {}, "logit lens": {}}, ["calm"]) == []


def test_readings_by_hand():
    """(<h, d> - <mu, d>) / sigma, where sigma is the deviation (n - 1) of two neutral samples along d.

    Layer 1: neutral (0, 1) and (4, 1), mu (2, 1), h (5, 7), h - mu (3, 6).
      d (1, 0): 3; neutral -2 and 2, variance 8; reading 3 / sqrt(8).
      d (0.6, 0.8): 1.8 + 4.8 = 6.6; neutral -1.2 and 1.2, variance 2.88; reading 6.6 / sqrt(2.88).
    Layer 2: neutral (1, 0) and (1, 6), mu (1, 3), h (1, 0), h - mu (0, -3).
      d (0, 1): -3; neutral -3 and 3, variance 18; reading -3 / sqrt(18).
      d (0.6, -0.8): 2.4; neutral 2.4 and -2.4, variance 11.52; reading 2.4 / sqrt(11.52).
    """
    vectors = make()
    vectors.directions.copy_(torch.tensor([[[1, 0], [0, 1]], [[0.6, 0.8], [0.6, -0.8]]]))
    vectors.neutral("header").copy_(torch.tensor([[[0, 1], [1, 0]], [[4, 1], [1, 6]]]))
    by_hand = torch.tensor([[3 / 8**0.5, -3 / 18**0.5], [6.6 / 2.88**0.5, 2.4 / 11.52**0.5]], dtype=torch.float64)
    states = torch.tensor([[5.0, 7.0], [1.0, 0.0]])
    torch.testing.assert_close(vectors.readings(states, "header"), by_hand, atol=1e-6, rtol=0)
    batch = vectors.readings(states.expand(4, 3, 2, 2), "header")
    torch.testing.assert_close(batch, by_hand.expand(4, 3, 2, 2), atol=1e-6, rtol=0)
    own = vectors.readings(states, "header", vectors.directions[1:])
    torch.testing.assert_close(own, by_hand[1:], atol=1e-6, rtol=0)


def test_the_unit_is_the_deviation_of_the_references_own_pooling(planted):
    """Planted: mean 0, deviation 2 along every axis (4,000 samples: sigma within 0.1, mu within 0.15)."""
    planted.neutral("reply").mul_(3)
    for pooling, deviation in (("token", 2), ("header", 2), ("reply", 6), ("text", 2)):
        mu, sigma = planted.scale(pooling)
        assert mu.abs().max() < 0.075 * deviation
        assert (sigma - deviation).abs().max() < 0.05 * deviation
    oblique = torch.full((1, 2, 8), 8**-0.5)
    assert (planted.scale("header", oblique)[1] - 2).abs().max() < 0.1
    # A model whose states are ten times larger reads ten times more: its own spread plays no part.
    states = torch.randn(5, 2, 8, dtype=torch.float64)
    change = planted.readings(10 * states, "text") - planted.readings(0 * states, "text")
    torch.testing.assert_close(change, 10 * states[..., :2].transpose(1, 2) / planted.scale("text")[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((9, 5, "0"), r"planted \(width 8, 5 layers\); model 'M' has width 9 and 5 layers; .*`calibrate extract M`"),
        ((8, 6, "0"), r"planted \(width 8, 5 layers\); model 'M' has width 8 and 6 layers; .*`calibrate extract M`"),
    ],
)
def test_vectors_of_another_model_are_refused(planted, given, message):
    planted.check(8, 5, "0", "M")
    with pytest.raises(ValueError, match=message):
        planted.check(*given, "M")


def test_another_revision_of_the_model_warns(planted, caplog):
    planted.check(8, 5, "0", "M")
    assert caplog.text == ""
    planted.check(8, 5, "1", "M")
    assert "come from planted (weights 0, revision None); model 'M' has other base weights (1)" in caplog.text


def test_unknown_concepts_and_layers_are_refused(planted):
    assert (planted.index("calm"), planted.positions([2, 1])) == (1, [1, 0])
    assert torch.equal(planted.neutral_at("text", [2]), planted.neutral("text")[:, [1]])
    with pytest.raises(ValueError, match="no concept 'angry'; they have desperate, calm"):
        planted.index("angry")
    for layers in ([0, 2, 3], [0, 3]):
        with pytest.raises(ValueError, match=r"layers \[0, 3\] are out of range; these vectors hold layers 1 to 2"):
            planted.positions(layers)
    with pytest.raises(ValueError, match=r"layers \[0\] are out of range"):
        planted.neutral_at("text", [0])


@pytest.mark.parametrize(
    ("depth", "layers", "band", "used"),
    [
        (30, range(8, 24), [9, 10], [9, 10]),
        (30, range(8, 24), None, [17, 18, 19, 20]),  # 18/30 = 0.6 to 21/30 = 0.7
        (5, [1, 2, 3], None, [2]),  # 0.4, 0.6, 0.8
        (4, [0, 1, 3], None, [1]),  # 0.25, 0.5, 1: none between 0.6 and 0.7; 0.5 is nearest to 2/3
    ],
)
def test_the_band_that_is_used(depth, layers, band, used):
    assert make(layers=layers, depth=depth, band=band).used_band() == used


@pytest.mark.parametrize("name", ["missing", "no/where", "./missing", "a/b/c", "/"])
def test_a_missing_folder_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=f"vectors '{name}'.*give the folder that `calibrate extract` wrote, or a Hub"
    ):
        load_vectors(name)


def test_a_folder_that_holds_something_else_is_refused(planted, tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be loaded .*missing .*'concepts'.*give the folder that"):
        load_vectors(str(tiny_folder))
    planted.save(tmp_path / "vectors")
    weights = tmp_path / "vectors" / "model.safetensors"
    save_file({"directions": planted.directions}, weights)
    with pytest.raises(ValueError, match=r"cannot be loaded .*neutral_header"):  # not read as zeros
        load_vectors(str(tmp_path / "vectors"))
    weights.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"cannot be loaded .*give the folder"):
        load_vectors(str(tmp_path / "vectors"))
    weights.unlink()
    torch.save(planted.state_dict(), tmp_path / "vectors" / "pytorch_model.bin")  # a pickle
    with pytest.raises(ValueError, match=r"no model\.safetensors there"):
        load_vectors(str(tmp_path / "vectors"))


@pytest.mark.parametrize("before", [True, False])
def test_an_error_while_saving_leaves_no_half_folder(planted, tmp_path, monkeypatch, before):
    folder = tmp_path / "vectors"
    if before:
        planted.save(folder)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(self, aside, **_):
        Path(aside, "config.json").write_text("{}")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(EmotionVectors, "save_pretrained", fail)
        planted.set_band([1], "another band")
        with pytest.raises(OSError, match="No space left"):
            planted.save(folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept
    assert list(tmp_path.iterdir()) == ([folder] if before else [])
    planted.save(folder)
    assert load_vectors(str(folder)).band == [1]
    shutil.rmtree(folder)
    assert list(tmp_path.iterdir()) == []
