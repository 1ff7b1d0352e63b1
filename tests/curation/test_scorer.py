import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from passages import passages

from calibrate.vectors import EmotionVectors
from data_curation import facets, features, reader, scorer
from data_curation.fit import fit
from data_curation.scorer import COLUMNS, Head, Tier, documents, load_scorer

LABELS = Path(facets.__file__).parent / "labels/passages.jsonl"
STRAIGHT = Head([0.0, 1.0], [0.0, 1.0], [0.5, 0.9], [0.0, 0.8], [0.2, 1.0])
NAMES = ["regulation", "affect_present", "corner_cutting", "invalidation", "acceptance", "panic"]
STANCES = ["modelled", "described", "criticised"]


@pytest.fixture(scope="module")
def folder(tiny_folder, tiny_vectors, tmp_path_factory):
    """A scorer of both tiers, fitted on made-up passages with the tiny model."""
    out = tmp_path_factory.mktemp("scorer") / "out"
    fit(passages(40), out, str(tiny_folder), str(tiny_vectors))
    return out


def test_without_gating_facets_every_document_is_for_tier_two():
    for edges, row, again in (({"panic": 0.5}, {"panic": 0.4}, False), ({"panic": 0.5}, {"panic": 0.5}, True)):
        assert scorer.escalates(SimpleNamespace(settings={"escalate": edges}), row) is again
    assert scorer.escalates(SimpleNamespace(settings={"escalate": {}}), {"panic": 0.0})


@pytest.fixture(scope="module")
def texts():
    rows = passages()
    texts = [row["text"] for row in rows[::7]]
    return [
        *texts,
        " ".join(texts),
        "Why?",
        "x" * 6000,
        "\u4f60\u597d " * 50,
        " ".join(row["text"] for row in rows[:12]),
    ]


def test_windows_cover_the_text_in_parts_of_about_200_words():
    assert features.windows("one two") == [(0, 7)]
    assert len(features.windows("word " * 250)) == 1
    long = "word " * 2000
    spans = features.windows(long)
    assert len(spans) == 10
    assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]
    assert (spans[0][0], spans[-1][1]) == (0, len(long))
    assert all(195 <= len(long[a:b].split()) <= 205 for a, b in spans)
    assert all(b - a <= features.WINDOW_CHARACTERS for a, b in features.windows("x" * 50_001))


def test_words_and_pairs_of_three_passages_have_features():
    """idf: log(4/3) for what stands in three of four texts, log(4/4) = 0 for what stands in all."""
    vocabulary, idf = features.build(["I can't stop", "I can't go", "i can\u2019t. stay", "I must go"])
    assert list(vocabulary.words) == ["can't", "i"]
    assert vocabulary.size == 4  # two words, the pair "i can't", the empty feature
    np.testing.assert_allclose(idf, [np.log(4 / 3), 0, np.log(4 / 3), 0], rtol=1e-6)
    assert vocabulary.features("I can't wait").tolist() == [1, 0, 3, 2, 3]
    assert vocabulary.features("").tolist() == []
    assert features.tokens('He said "No 12!"') == ["he", "said", '"', "no", "1", "2", "!", '"']


def test_sums_over_thirds_add_up_to_the_row_of_the_matrix():
    rows = [row["text"] for row in passages()]
    vocabulary, idf = features.build(rows)
    weights = np.random.default_rng(0).normal(size=(vocabulary.size, 3)).astype(np.float32)
    table = np.concatenate([idf[:, None] * weights, idf[:, None] ** 2], 1)
    text = rows[5]
    found = features.sums(vocabulary, table, text, features.windows(text))
    assert found.shape == (1, 3, 4)
    whole = found.sum((0, 1))
    expected = features.matrix(vocabulary, idf, [text])[0] @ weights
    np.testing.assert_allclose(whole[:3] / np.sqrt(whole[3]), expected, rtol=1e-4)


def tier(**settings) -> Tier:
    heads = dict.fromkeys(NAMES, STRAIGHT)
    gates = {"affect_present": 0.3, "corner_cutting": 0.5, "invalidation": 0.5}
    return Tier(1, NAMES + STANCES, heads, np.zeros(0), {"gates": gates, **settings})


def raw(*windows: dict) -> np.ndarray:
    """Raw numbers [windows, 4, heads]: the window's own, and its thirds, whose regulation is `thirds`."""
    result = np.zeros((len(windows), 4, len(NAMES + STANCES)), np.float32)
    for row, window in enumerate(windows):
        for name, value in window.items():
            if name == "thirds":
                result[row, 1:, 0] = value
            else:
                result[row, 0, (NAMES + STANCES).index(name)] = value
    return result


def test_a_document_by_hand():
    """Two windows of 30 and 10 characters.

    regulation: (30 * 0.8 * 0.9 + 10 * 0.4 * 0.1) / (30 * 0.8 + 10 * 0.4) = 22 / 28; low = 0.8 of it; high adds
    0.8 * regulation to 0.2. acceptance: (30 * 0.4 + 10 * 0.8) / 40 = 0.5. panic: the greater, 0.7; confidence: mean of
    0.5 + 0.4 * raw: 0.5 + 0.4 * (30 * 0.1 + 10 * 0.7) / 40 = 0.6. stance: described has 30 * 0.6 + 10 * 0.1 = 19
    against 30 * 0.4 + 10 * 0.5 = 17. arc: thirds 0 .2 .4 .5 .6 .9; (0.6 + 0.9) / 2 - (0 + 0.2) / 2 = 0.65.
    """
    first = {
        "regulation": 0.9,
        "affect_present": 0.8,
        "acceptance": 0.4,
        "panic": 0.1,
        "modelled": 0.4,
        "described": 0.6,
    }
    second = {
        "regulation": 0.1,
        "affect_present": 0.4,
        "acceptance": 0.8,
        "panic": 0.7,
        "modelled": 0.5,
        "described": 0.1,
    }
    numbers = raw(first | {"thirds": [0, 0.2, 0.4]}, second | {"thirds": [0.5, 0.6, 0.9]})
    (row,) = documents(tier(), [[(0, 30), (30, 40)]], numbers, [None])
    assert list(row) == list(COLUMNS)
    expected = {"regulation": 22 / 28, "regulation_low": 0.8 * 22 / 28, "regulation_high": 0.2 + 0.8 * 22 / 28}
    expected |= {"acceptance": 0.5, "panic": 0.7, "panic_confidence": 0.6, "affect_present": 0.8, "arc": 0.65}
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert (row["stance"], row["tier"], row["distress"], row["emotion_calm"]) == ("described", 1, None, None)
    assert [(w["start"], w["end"]) for w in row["windows"]] == [(0, 30), (30, 40)]
    assert [w["regulation"] for w in row["windows"]] == pytest.approx([0.9, 0.1], abs=1e-6)


def test_only_where_nothing_is_to_be_regulated_is_regulation_null():
    flat = {"regulation": 0.5, "affect_present": 0.1}
    numbers = raw(flat, flat | {"corner_cutting": 0.9}, flat | {"invalidation": 0.9}, flat | {"affect_present": 0.9})
    found = documents(tier(), [[(0, 9)]] * 4, numbers, [None] * 4)
    assert [row["regulation"] for row in found] == [None, 0.5, 0.5, 0.5]
    assert [row["arc"] is None for row in found] == [True, False, False, False]
    assert found[0]["windows"][0]["regulation"] is None
    # A window that has nothing to regulate does not pull the others.
    mixed = raw(flat | {"regulation": 0.0}, flat | {"affect_present": 0.9, "regulation": 1.0})
    assert documents(tier(), [[(0, 9), (9, 18)]], mixed, [None])[0]["regulation"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("which", ["1", "2", "auto"])
def test_scores_are_the_same_whatever_texts_are_with_them(folder, texts, which):
    found = load_scorer(str(folder), which)
    together = found.score(texts)
    alone = [row for text in texts for row in found.score([text])]
    pairs = [row for start in range(0, len(texts), 2) for row in found.score(texts[start : start + 2])]
    assert json.dumps(together) == json.dumps(alone) == json.dumps(pairs)
    assert json.dumps(found.score(texts[::-1])[::-1]) == json.dumps(together)
    assert all(list(row) == list(COLUMNS) for row in together)
    assert all(0 <= row["affect_present"] <= 1 for row in together)


def test_the_planted_words_are_found_by_both_tiers(folder):
    rows = passages(per_cell=4)
    for which in ("1", "2"):
        scores = load_scorer(str(folder), which).score([row["text"] for row in rows])
        by_cell: dict = {row["cell"]: [] for row in rows}
        for row, found in zip(rows, scores, strict=True):
            by_cell[row["cell"]].append(found["regulation"])
        assert np.mean(by_cell["grief_processed"]) > 0.7 > 0.3 > np.mean(by_cell["corner_cutting"])
        assert by_cell["neutral"] == [None] * 4


def test_auto_asks_tier_2_where_tier_1_finds_something(folder):
    rows = passages(per_cell=4)
    found = load_scorer(str(folder), "auto").score([row["text"] for row in rows])
    tiers = {
        cell: {s["tier"] for s, row in zip(found, rows, strict=True) if row["cell"] == cell}
        for cell in ("neutral", "grief_processed")
    }
    assert tiers == {"neutral": {1}, "grief_processed": {2}}
    second = load_scorer(str(folder), "2").score([rows[0]["text"]])
    assert found[0] == second[0]


def test_emotions_are_the_vectors_readings_of_the_text_mean(folder, tiny, tiny_vectors):
    text = passages()[3]["text"]
    row = load_scorer(str(folder), "2").score([text])[0]
    vectors = EmotionVectors.from_pretrained(tiny_vectors)
    layers = vectors.reading_layers()
    states = reader.read(tiny, [text], vectors.layers)[0, 0]
    import torch

    readings = vectors.readings(torch.tensor(states), "text")[:, vectors.positions(layers)].mean(-1)
    assert row["emotion_calm"] == pytest.approx(float(readings[vectors.index("calm")]), abs=1e-3)
    assert row["emotion_hostile"] is None  # the tiny model's vectors lack it


def test_pools_are_means_over_the_tokens_after_the_first_and_over_their_thirds():
    """Tokens 1 to 6 hold 1 to 6; the sink holds 1000: mean 3.5, thirds 1.5, 3.5, 5.5."""
    import torch

    hidden = torch.tensor([1000.0, 1, 2, 3, 4, 5, 6])[None, :, None]
    assert reader._pool(hidden).flatten().tolist() == [3.5, 1.5, 3.5, 5.5]
    assert reader._pool(hidden[:, :2]).flatten().tolist() == [1.0] * 4
    assert reader._pool(hidden[:, 1:2]).flatten().tolist() == [1.0] * 4


def test_the_hash_follows_weights_tier_and_model(folder, tmp_path, tiny_folder):
    hashes = [load_scorer(str(folder), which).hash for which in ("1", "2", "auto")]
    assert len({*hashes}) == 3
    assert load_scorer(str(folder), "1").hash == hashes[0]
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert load_scorer(str(copy), "2").hash == hashes[1]
    content = bytearray((copy / "tier1.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "tier1.safetensors").write_bytes(content)
    assert load_scorer(str(copy), "1").hash != hashes[0]


def test_every_mistake_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`tier` '3' is none of 1, 2, auto"):
        load_scorer(tier="3")
    with pytest.raises(ValueError, match=r"no scorer.json there; give `default` or a folder that `curate fit` wrote"):
        load_scorer(str(tmp_path))
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "scorer.json").read_text())
    config["tier2"]["settings"]["shape"] = [64, 5]
    (copy / "scorer.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"has width and depth \[32, 5\], this scorer was fitted on .* with \[64, 5\]; fit"
    ):
        load_scorer(str(copy), "2")
    with pytest.raises(ValueError, match=r"`model` 'x': tier 1 reads with no model; leave it out"):
        load_scorer(str(copy), "1", model="x")
    del config["tier2"]
    (copy / "scorer.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no tier 2; use tier 1, or fit it with `--model`"):
        load_scorer(str(copy), "2")
    with pytest.raises(ValueError, match=r"`model` 'x': scorer '.*' has no tier 2; leave it out"):
        load_scorer(str(copy), "auto", model="x")
    (copy / "scorer.json").write_text(json.dumps(config | {"format": 0}))
    with pytest.raises(ValueError, match=r"has format 0, not 1; fit it again"):
        load_scorer(str(copy), "1")
    with pytest.raises(ValueError, match=r"text 1 is empty; leave it out"):
        load_scorer(str(folder), "1").score(["a", " \n"])
    assert load_scorer(str(folder), "1").score([]) == []


def test_the_columns_are_those_of_the_sidecar():
    assert list(COLUMNS)[:4] == ["regulation", "regulation_low", "regulation_high", "affect_present"]
    assert COLUMNS["panic"] == COLUMNS["panic_confidence"] == "float32"
    assert (COLUMNS["stance"], COLUMNS["tier"]) == ("string", "int8")
    assert tuple(name[8:] for name in COLUMNS if name.startswith("emotion_")) == scorer.EMOTIONS


def test_the_shipped_scorer_is_that_of_the_shipped_labels():
    rows = facets.load(LABELS)
    config = json.loads((scorer.SHIPPED / "scorer.json").read_text(encoding="utf-8"))
    assert config["labels"]["sha256"] == hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    assert (scorer.SHIPPED / "tier1.safetensors").stat().st_size < 10_000_000
    chosen = [row for row in rows if row["cell"] in ("grief_processed", "toxic_positivity", "neutral")][::9]
    scores = load_scorer(tier="1").score([row["text"] for row in chosen])
    for row, found in zip(chosen, scores, strict=True):
        if row["cell"] == "neutral":
            assert found["regulation"] is None
        else:
            assert (found["regulation"] > 0.5) == (row["cell"] == "grief_processed")


@pytest.mark.slow
def test_the_default_model_reads_the_labelled_passages_as_when_the_shipped_scorer_was_fitted():
    rows = facets.load(LABELS)
    second = load_scorer(tier="2").second
    for at in (0, 700, 1279):
        states = reader.read(second.checkpoint, [rows[at]["text"]], second.tier.settings["layers"])[0]
        point = second.embedding.project(reader.select(states, second.tier.settings))
        assert second.embedding.alike(point).argmax() == at
        assert second.embedding.alike(point)[at] > 0.99
