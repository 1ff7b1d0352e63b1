import json
import re

import numpy as np
import pytest
import torch
from test_cli import calibrate
from test_extraction import CONCEPTS, make_world

from calibrate import checks, corpora, extraction, geometry
from calibrate.corpora import Ladder, Story
from calibrate.extraction import by_recipe
from calibrate.vectors import POOLINGS, EmotionVectors, load_vectors


def vectors_of(world, found: torch.Tensor) -> EmotionVectors:
    """The world's directions as vectors of a model of two layers, read at both."""
    samples = dict.fromkeys(POOLINGS, 4)
    vectors = EmotionVectors(CONCEPTS, [0, 1], found.shape[2], 2, samples, "planted", "0", {}, band=[0, 1])
    vectors.directions.copy_(found)
    return vectors


def test_decoding_finds_what_is_planted_and_nothing_in_noise(tmp_path):
    """240 held-out stories of six concepts; chance is 1/6 at the top, 3/6 among three."""
    for signal, low, high in ((1, 0.95, 1), (0, 0.07, 0.27)):
        world = make_world(tmp_path, signal)
        shares = checks.decoding(vectors_of(world, by_recipe("paper", world.train)), world.train, world.held_out)
        assert low <= shares["top 1"].estimate <= high
        assert shares["top 1"].estimate <= shares["top 3"].estimate
        assert shares["top 1"].low <= shares["top 1"].estimate <= shares["top 1"].high
        assert shares["family"] == shares["top 1"]  # concepts of no known family are families of one


def test_shares_by_hand():
    """Two stories of calm (Peaceful Contentment) and two of sad; `serene` is of calm's family.

    Ranks 0, 2 and 1, 5: top 1 is (1/2 + 0) / 2, top 3 (1 + 1/2) / 2. First: serene, sad, sad, angry: family
    (1/2 + 1/2) / 2.
    """
    found = checks._shares(np.array([0, 2, 1, 5]), ["serene", "sad", "sad", "angry"], ["calm", "calm", "sad", "sad"])
    assert [found[name].estimate for name in ("top 1", "top 3", "family")] == [0.25, 0.75, 0.5]


def test_chance_by_hand():
    """calm and serene are of one family, sad of another: (2/3)^2 + (1/3)^2 = 5/9."""
    assert checks.chance(["calm", "serene", "sad"]) == pytest.approx({"top 1": 1 / 3, "top 3": 1, "family": 5 / 9})


def test_bag_of_words_by_hand():
    """Words of calm: quiet x2, lake; of sad: rain x2, lake. A held-out rainy lake is sad, a quiet one calm."""
    told = [("calm", "Quiet, quiet lake."), ("sad", "Rain, rain, lake.")]
    train = [Story("", concept, "t", "train", text) for concept, text in told]
    held = [
        Story("", c, "u", "audit", t) for c, t in (("sad", "Rain on the lake"), ("calm", "quiet"), ("calm", "rain"))
    ]
    ranks, first = checks.naive_bayes(train, held, ["calm", "sad"])
    assert (ranks.tolist(), first.tolist()) == ([0, 0, 1], [1, 0, 1])


def test_reliability_is_high_where_something_is_planted(tmp_path):
    strong, none = (checks.reliability(make_world(tmp_path, signal).train, "paper") for signal in (1, 0))
    assert strong.min() > 0.95
    assert none.abs().mean() < 0.2


def test_ladders_read_the_rungs_in_order(tiny, tiny_vectors):
    """The readings of a made ladder, turned round, give the opposite correlation and the opposite share."""
    vectors = load_vectors(str(tiny_vectors))
    up = Ladder("l", "audit", "I have {value} left.", [1, 22, 333, 4444, 55555, 666666], {"calm": "up", "sad": "down"})
    down = up._replace(values=up.values[::-1])
    other = up._replace(id="m", expected={"serene": "up"})  # these vectors lack it
    one, two = (checks.ladder_shares(tiny, vectors, [ladder, ladder, other]) for ladder in (up, down))
    assert one["l calm up"] == pytest.approx(-two["l calm up"])
    assert one["share"].estimate == pytest.approx(1 - two["share"].estimate)
    assert not any("serene" in key for key in one)
    assert checks.ladder_shares(tiny, vectors, [up, other])["share"] is None


def test_logit_lens_gives_the_tokens_that_a_direction_raises(tiny, tiny_vectors):
    vectors = load_vectors(str(tiny_vectors))
    weight = tiny.model.get_output_embeddings().weight.detach()
    for token in (50, 90):
        vectors.directions[vectors.index("desperate"), vectors.positions(vectors.used_band())[0]] = (
            weight[token] / weight[token].norm() ** 2
        )
        found = checks.logit_lens(tiny, vectors)
        assert len(found["desperate"]) == 5
        assert tiny.tokenizer.decode([token]) in found["desperate"]


def test_axes_by_hand():
    """Directions whose first axis is the rated valence and whose second, weaker one is the rated arousal."""
    rated = geometry.load_concepts()
    names = list(rated)[:60]
    values = torch.tensor([[rated[name].valence, rated[name].arousal] for name in names]).double()
    values = values - values.mean(0)
    values[:, 1] -= values[:, 0] * (values[:, 0] @ values[:, 1]) / values[:, 0].square().sum()
    flat = torch.cat([-3 * values[:, :1], values[:, 1:], torch.zeros(60, 6)], 1)
    found = geometry.axes(flat, names)
    assert found.valence == pytest.approx(1)
    by_hand = geometry.correlation(values[:, 1], torch.tensor([rated[name].arousal for name in names]))
    assert found.arousal == pytest.approx(abs(by_hand))
    assert found.explained[0] > 0.8
    assert geometry.correlation(found.scores[:, 0], values[:, 0]) == pytest.approx(1)  # signed to rise with valence
    with pytest.raises(ValueError, match=r"2 of the concepts have ratings in concepts.yaml; the axes need at least 3"):
        geometry.axes(flat[:4], ["calm", "sad", "made up", "other"])


def test_ratings_are_read_with_each_concept_left_out():
    """Against plain ridge regression fitted to the others, with the penalty in the same place."""
    generator = torch.Generator().manual_seed(0)
    rows, ratings = torch.randn(12, 5, generator=generator).double(), torch.randn(12, generator=generator).double()
    found = geometry.left_out(rows, ratings)
    centred = rows - rows.mean(0)
    penalty = 0.3 * centred.square().sum(1).mean()
    for out in (0, 7):
        kept = [row for row in range(12) if row != out]
        x, y = centred[kept] - centred[kept].mean(0), ratings[kept] - ratings[kept].mean()
        weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(5), x.T @ y)
        by_hand = (centred[out] - centred[kept].mean(0)) @ weights + ratings[kept].mean()
        assert float(found[out]) == pytest.approx(float(by_hand), abs=1e-6)


def test_families_by_hand():
    """calm and serene (one family) at cosine 1, sad at 0 from both: 1 - 0."""
    rows = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    assert geometry._families(rows, ["calm", "serene", "sad"]) == pytest.approx(1)


def test_the_map_is_drawn(tmp_path):
    names = list(geometry.load_concepts())[:20]
    found = geometry.axes(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), names)
    geometry.plot_map(found, names, tmp_path / "map.png", "A map")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_checks_every_recipe_and_keeps_what_it_found(tiny_folder, tmp_path, capsys, monkeypatch):
    """Neutral states, the largest thing in memory, are put together once for all of them."""
    states, calls = extraction.neutral_states, []
    monkeypatch.setattr(extraction, "neutral_states", lambda group: calls.append(group) or states(group))
    concepts = ["desperate", "calm", "proud", "afraid"]
    out = tmp_path / "out"
    recipes = ["paper", "plain", "contrastive", "logistic", "random", "shuffled"]
    calibrate(
        "extract", tiny_folder, "--out", out, "--concepts", *concepts, "--recipes", *recipes, "--check", "--deflection"
    )
    assert len(calls) == 1
    printed = capsys.readouterr().out
    folders = ["train", *(f"train-{recipe}" for recipe in recipes[1:])]
    assert {path.name for path in out.iterdir()} == {"states", "deflection", *folders}
    for folder in folders:
        vectors = load_vectors(str(out / folder))
        assert f"Checks of {folder}:" in printed
        assert vectors.checks["held-out stories"] == 4 * 4
        assert vectors.checks["top 1, chance"] == 0.25
        assert set(vectors.layer_choice.layers) <= set(vectors.layers)
        assert len(vectors.layer_choice.accuracy) == 5
        assert set(vectors.checks["logit lens"]) == set(concepts)
    for row in ("split-half reliability, lowest", "ladder/failing-tests: expected", "logit lens, proud"):
        assert re.search(rf"^  {row}", printed, re.MULTILINE), row
    card = (out / "train" / "README.md").read_text()
    assert "| top 1 (share, 95 % interval) | [" in card
    hidden = load_vectors(str(out / "deflection"))
    assert len(hidden.concepts) >= 15
    assert json.loads((out / "deflection" / "config.json").read_text())["recipe"]["recipe"] == "deflection"
    assert len(corpora.load_deflection()) >= 150
