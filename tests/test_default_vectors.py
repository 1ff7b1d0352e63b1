"""The vectors that ship for the default model: what is in the package, without the model, and how they get there."""

import sys

import pytest
import torch
from records import make_vectors

from calibrate import cli, vectors
from calibrate.commands.vectors import _texts, corpora_digest
from calibrate.concepts import load_concepts
from calibrate.default_vectors import __main__ as shipping
from calibrate.extraction import later_layers
from calibrate.vectors import POOLINGS, SHIPPED, load_vectors


def test_the_package_carries_whole_vectors_of_every_concept():
    """At the layers that are read or pressed, and at two above them, where an audit looks for what is rebuilt."""
    shipped = load_vectors("default")
    assert shipped.recipe["split"] == "train"
    assert len(shipped.concepts) == 171
    assert set(shipped.concepts) == set(load_concepts())
    torch.testing.assert_close(
        shipped.directions.norm(dim=-1), torch.ones(171, len(shipped.layers)), atol=1e-3, rtol=0
    )
    assert all((shipped.scale(pooling)[1] > 0).all() for pooling in POOLINGS)
    later = later_layers(shipped.depth)
    assert set(shipped.used_band()) | set(shipped.reading_layers()) | set(later) == set(shipped.layers)
    assert max(shipped.used_band()) < min(later)
    assert shipped.checks is not None
    assert [path.name for path in SHIPPED.iterdir() if path.is_dir() and path.name[0] != "_"] == ["train"]
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= shipping.LIMIT == 6_000_000


def test_the_shipped_vectors_come_from_the_shipped_corpora():
    """Where this fails the corpora have changed since: `make vectors` extracts again."""
    arguments = cli._parser().parse_args(["extract", "default", "--out", "nowhere"])
    assert load_vectors("default").recipe["corpora"] == corpora_digest(_texts(arguments))


def test_there_are_no_vectors_of_the_audit_stories_in_the_package():
    """An audit makes them anew from each checkpoint; the name of the old ones is a Hub id now, which is not there."""
    with pytest.raises(ValueError, match="vectors 'default/audit' cannot be loaded"):
        load_vectors("default/audit")


def test_the_digest_follows_what_is_read_and_nothing_else():
    texts = _texts(cli._parser().parse_args(["extract", "default", "--out", "nowhere"]))
    whole = corpora_digest(texts)
    [failing, passing], *others = texts["twins"]
    story, dialogue = texts["stories"][-1], texts["neutral"][-1]
    for same in (
        {"twins": [(failing._replace(reply="Other.", traits=["other"]), passing), *others]},
        {"stories": [*texts["stories"][:-1], story._replace(id="other")]},
        {"deflection": [1]},
    ):
        assert corpora_digest(texts | same) == whole, same.keys()
    for other in (
        {"twins": [(failing, passing._replace(messages=failing.messages)), *others]},
        {"stories": [*texts["stories"][:-1], story._replace(text=story.text + " Then it rained.")]},
        {"stories": [*texts["stories"][:-1], story._replace(concept="other")]},
        {"neutral": [*texts["neutral"][:-1], dialogue._replace(messages=dialogue.messages[:1])]},
    ):
        assert corpora_digest(texts | other) != whole, other.keys()


@pytest.fixture
def ship(tmp_path, monkeypatch):
    """The script with vectors of five layers (band 3, read at 2, stored at 1 and 4 too), into a folder of our own."""
    stored = make_vectors(["desperate", "calm", "angry", "sad", "happy"], [1, 2, 3, 4], [3])
    stored.save(tmp_path / "source" / "train")
    for module in (shipping, vectors):
        monkeypatch.setattr(module, "SHIPPED", tmp_path / "shipped")

    def run(source="source"):
        monkeypatch.setattr(sys, "argv", ["shipping", str(tmp_path / source), "--map", str(tmp_path / "map.png")])
        shipping.main()

    return run


def test_extracted_vectors_are_put_into_the_package(ship, tmp_path):
    ship()
    whole, found = load_vectors(str(tmp_path / "source" / "train")), load_vectors("default")
    assert (found.layers, found.band) == ([2, 3, 4], [3])
    assert torch.cosine_similarity(found.directions, whole.directions[:, 1:], dim=-1).min() > 0.999
    assert [path.name for path in (tmp_path / "shipped").iterdir()] == ["train"]
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_vectors_that_are_missing_or_too_large_are_not_shipped(ship, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: vectors '.*nowhere/train': no model\.safetensors there"):
        ship("nowhere")
    assert not (tmp_path / "shipped").exists()
    monkeypatch.setattr(shipping, "LIMIT", 1000)
    with pytest.raises(
        SystemExit, match=r"^error: [\d,]+ bytes in .*shipped; the package takes 1,000: take the old ones"
    ):
        ship()
    assert not (tmp_path / "map.png").exists()
