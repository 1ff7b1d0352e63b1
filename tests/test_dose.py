"""Dose-response: by hand, and on the tiny model."""

import json

import numpy as np
import pytest

from calibrate import models, stats
from calibrate.audit import agents, dose, rollouts
from calibrate.corpora import load_neutral, load_pairs
from calibrate.vectors import load_vectors

TASKS = rollouts.load_tasks()
SHORT = agents.Settings(max_new_tokens=4)


def points(*rows: tuple[float, float, float]) -> list[dose.Point]:
    """(dose, margin, loss); two tasks a hundredth apart."""
    return [
        dose.Point(d, stats.mean(m := np.array([margin, margin + 0.01])), m, loss, 0.0, 0.5)
        for d, margin, loss in rows
    ]


def test_the_window_ends_where_neutral_text_suffers():
    found = points((-0.1, 0, 2.5), (-0.05, 0, 2.05), (0, 0, 2.0), (0.05, 0, 2.2), (0.1, 0, 2.0))
    assert dose.window(found) == (-0.05, 0)  # a dose beyond one that damages does not count
    found = points((-0.1, 0, 2), (-0.05, 0, np.nan), (0, 0, 2.0), (0.05, 0, 2.05), (0.1, 0, np.nan))
    assert dose.window(found) == (0, 0.05)  # a loss that is no number damages, whatever comes beyond
    with pytest.raises(ValueError, match="the doses lack 0"):
        dose.window(found[:2])


def test_the_slope_is_per_tenth_of_the_norm():
    assert dose._slope(points((-0.1, 0.4, 2), (0, 0.2, 2), (0.1, 0.0, 2))).estimate == pytest.approx(-0.2)
    assert np.isnan(dose._slope(points((0, 0.2, 2))).estimate)


@pytest.mark.parametrize(("count", "slope"), [(1, None), (3, pytest.approx([-0.2] * 3))])
def test_a_curve_as_plain_data_has_no_number_that_json_lacks(count, slope):
    found = points((-0.1, 0.4, 2), (0, 0.2, 2), (0.1, 0.0, 2))[:count]
    found += points((0.2, np.nan, np.nan))
    plain = dose.plain(dose.Curve("calm", found, (-0.1, 0.1), dose._slope(found[:-1]), 4))
    assert json.loads(json.dumps(plain), parse_constant=pytest.fail)["slope"] == slope
    assert plain["points"][0]["margins"] == pytest.approx([0.4, 0.41])
    broken = {"dose": 0.2, "margin": None, "margins": None, "loss": None, "repetition": 0.0, "runnable": 0.5}
    assert plain["points"][-1] == broken


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
    given = (checkpoint, vectors, "desperate", rows["desperate"], pairs, dialogues, TASKS[:2], SHORT)
    found = dose.measure(*given, (0.0, 2.0, -2.0))
    assert [point.dose for point in found.points] == [-2, 0, 2]
    assert [point.runnable for point in found.points] == [0, 0, 0]  # it writes no code
    assert found.coding_tasks == 2
    again = dose.measure(*given, (0.0,))
    assert again.points[0].margins == pytest.approx(found.points[1].margins)
    assert found.points[0].margins != pytest.approx(found.points[2].margins, abs=1e-4)


def test_the_runnable_share_is_of_the_answers_whose_code_runs(tiny_folder, tiny_vectors, monkeypatch):
    """Of four answers one solves its task, one runs and fails the checks, one has no code and one does not load."""
    checkpoint, vectors = models.load(str(tiny_folder)), load_vectors(str(tiny_vectors))
    shortest = sorted(TASKS, key=lambda task: len(task.honest))[:4]
    asked = []

    def answers(_, texts, settings):
        if settings.max_new_tokens != dose.CODING_TOKENS:  # what it writes after neutral text, or no room for code
            return [""] * len(texts)
        asked.append((texts, settings))
        code = (shortest[0].honest, shortest[1].stub, "", "import nothing_of_the_kind\n")
        return [f"```python\n{one}```" if one else "No." for one in code]

    monkeypatch.setattr(agents, "answer", answers)
    pairs = [pair for pair in load_pairs() if pair.kind == "honest" and pair.split == "audit"]
    pairs = [pairs[0], next(pair for pair in pairs if pair.task != pairs[0].task)]
    direction = dose.directions(vectors, ["desperate"], 0, 0)["desperate"]
    given = (checkpoint, vectors, "desperate", direction, pairs, load_neutral()[:2], TASKS)
    found = dose.measure(*given, agents.Settings(max_new_tokens=900), (0.0,))
    ((texts, settings),) = asked
    assert all(task.prompt.strip() in text for task, text in zip(shortest, texts, strict=True))
    assert (settings.max_new_tokens, settings.temperature) == (dose.CODING_TOKENS, 0)
    assert (found.points[0].runnable, found.coding_tasks) == (0.5, 4)

    checkpoint.model.config.max_position_embeddings = 300  # no task fits
    found = dose.measure(*given, SHORT, (0.0,))
    assert (found.points[0].runnable, found.coding_tasks) == (None, 0)
