"""Dose-response: by hand, and on the tiny model."""

import json

import numpy as np
import pytest

from calibrate import models, stats
from calibrate.audit import dose
from calibrate.corpora import load_neutral, load_pairs
from calibrate.vectors import load_vectors


def points(*rows: tuple[float, float, float]) -> list[dose.Point]:
    """(dose, margin, loss); two tasks a hundredth apart."""
    return [
        dose.Point(d, stats.mean(m := np.array([margin, margin + 0.01])), m, loss, 0.0) for d, margin, loss in rows
    ]


def test_the_window_ends_where_neutral_text_suffers():
    found = points((-0.1, 0, 2.5), (-0.05, 0, 2.05), (0, 0, 2.0), (0.05, 0, 2.2), (0.1, 0, 2.0))
    assert dose.window(found) == (-0.05, 0)  # a dose beyond one that damages does not count
    with pytest.raises(ValueError, match="the doses lack 0"):
        dose.window(found[:2])


def test_the_slope_is_per_tenth_of_the_norm():
    assert dose._slope(points((-0.1, 0.4, 2), (0, 0.2, 2), (0.1, 0.0, 2))).estimate == pytest.approx(-0.2)
    assert np.isnan(dose._slope(points((0, 0.2, 2))).estimate)


@pytest.mark.parametrize(("count", "slope"), [(1, None), (3, pytest.approx([-0.2] * 3))])
def test_a_curve_as_plain_data_has_no_number_that_json_lacks(count, slope):
    found = points((-0.1, 0.4, 2), (0, 0.2, 2), (0.1, 0.0, 2))[:count]
    plain = dose.plain(dose.Curve("calm", found, (-0.1, 0.1), dose._slope(found)))
    assert json.loads(json.dumps(plain), parse_constant=pytest.fail)["slope"] == slope
    assert plain["points"][0]["margins"] == pytest.approx([0.4, 0.41])


def test_repetition_by_hand():
    assert dose.repetition("a b c d a b c d") == pytest.approx(1 - 4 / 5)
    assert dose.repetition("a b c") == 0
    assert dose.repetition("a " * 10) == pytest.approx(1 - 1 / 7)


def test_a_curve_of_the_tiny_model_leaves_it_as_it_was(tiny_folder, tiny_vectors):
    checkpoint, vectors = models.load(str(tiny_folder)), load_vectors(str(tiny_vectors))
    pairs = [pair for pair in load_pairs() if pair.kind == "honest" and pair.split == "audit"]
    pairs = [pairs[0], next(pair for pair in pairs if pair.task != pairs[0].task)]
    dialogues = load_neutral()[:2]
    rows = dose.directions(vectors, ["desperate"], 1, 0)
    assert list(rows) == ["desperate", "random 1"]
    for direction in rows.values():
        assert direction.norm(dim=-1) == pytest.approx(1, abs=1e-5)
    found = dose.measure(checkpoint, vectors, "desperate", rows["desperate"], pairs, dialogues, (0.0, 2.0, -2.0))
    assert [point.dose for point in found.points] == [-2, 0, 2]
    again = dose.measure(checkpoint, vectors, "desperate", rows["desperate"], pairs, dialogues, (0.0,))
    assert again.points[0].margins == pytest.approx(found.points[1].margins)
    assert found.points[0].margins != pytest.approx(found.points[2].margins, abs=1e-4)
