import json
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
from passages import passages

from data_curation import evaluation, fit, kernels, ridge
from data_curation.scorer import load_scorer


def test_auc_and_ranks_by_hand():
    """Of six pairs 0.9 wins three, and 0.5 wins one, ties one and loses one: 4.5 of 6."""
    assert evaluation.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert evaluation.auc(np.array([0.9, 0.5]), np.array([0.1, 0.5, 0.6])) == pytest.approx((3 + 1 + 0.5) / 6)
    assert np.isnan(evaluation.auc(np.array([]), np.array([1.0])))
    assert evaluation.spearman(np.array([1.0, 2, 3]), np.array([5.0, 4, 1])) == pytest.approx(-1)


def test_the_calibration_error_is_freed_of_sampling_noise():
    """Labels 0 or 1 with the chance that the score says: the plain error is noise alone. A shift of 0.2 is found."""
    generator = np.random.default_rng(0)
    score = generator.uniform(0.1, 0.7, 4000)
    label = (generator.uniform(size=4000) < score).astype(float)
    assert evaluation.calibration_error(score, label) < 0.02
    assert evaluation.calibration_error(score + 0.2, label) == pytest.approx(0.2, abs=0.02)
    # Bins of 20 labels err by about 0.1 by chance alone.
    parts = [evaluation.calibration_error(score[at : at + 100], label[at : at + 100]) for at in range(0, 4000, 100)]
    assert np.mean(parts) < 0.06


def test_kappa_and_explained_variance_by_hand():
    """Ratings 0, 1 against 0, 1: no disagreement; against 1, 0: squares 1 where chance gives 0.5: kappa -1."""
    assert evaluation.weighted_kappa(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 1
    assert evaluation.weighted_kappa(np.array([0.0, 1.0]), np.array([1.0, 0.0])) == -1
    score = np.array([0.0, 0.0, 1.0, 1.0])
    assert evaluation.explained(score, np.array(["a", "a", "b", "b"])) == 1
    assert evaluation.explained(score, np.array(["a", "b", "a", "b"])) == pytest.approx(1 - 0.5 / (1 / 3))


def test_folds_hold_whole_writers_or_whole_events():
    rows = passages()
    folds = ridge.folds(rows)
    assert all(len({f for f, row in zip(folds, rows, strict=True) if row["writer"] == w}) == 1 for w in ("w0", "w3"))
    for row in rows:
        del row["writer"]
        row["pair"] = row["event"].split("-")[-1] + row["cell"]
    folds = ridge.folds(rows)
    assert len(set(folds.tolist())) == ridge.MAX_FOLDS
    assert len({(row["pair"], fold) for row, fold in zip(rows, folds.tolist(), strict=True)}) == len(
        {row["pair"] for row in rows}
    )


def test_ridge_recovers_a_planted_line_and_holds_a_column_constant():
    """label = x + 5 * held, where held and x go together: the number asked for is x's part and the mean of held."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 1))
    held = 0.8 * x + generator.normal(size=(300, 1))
    label = x + 5 * held
    dual, constant = ridge.solve(x @ x.T, label, held, 1e-6)
    found = x @ (x.T @ dual) + constant
    np.testing.assert_allclose(found, x + 5 * held.mean(), atol=1e-3)
    plain, _ = ridge.solve(x @ x.T, label, np.zeros((300, 0)), 1e-6)
    assert float((x.T @ plain)[0, 0]) == pytest.approx(5, abs=0.5)  # 1 + 5 * 0.8


def test_knots_rise_and_say_how_sure_they_are():
    generator = np.random.default_rng(0)
    raw = generator.uniform(-1, 1, 2000)
    label = np.clip((raw + 1) / 2 + generator.normal(0, 0.1, 2000), 0, 1)
    head = ridge.calibrate(raw, label)
    assert head.score == sorted(head.score)
    assert np.abs(head.at(np.array([-0.5, 0.0, 0.5]), "score") - [0.25, 0.5, 0.75]).max() < 0.03
    inside = (label >= head.at(raw, "low")) & (label <= head.at(raw, "high"))
    assert 0.88 <= inside.mean() <= 0.97
    assert min(head.confidence) > 0.95  # a spread of 0.1 is nearly always within one level, 0.25
    assert ridge._rising(np.array([1.0, 3.0, 2.0, 4.0]), np.array([1.0, 1.0, 3.0, 1.0])).tolist() == [1, 2.25, 2.25, 4]


def test_likeness_of_states_is_that_of_the_saved_points():
    states = np.random.default_rng(0).normal(size=(60, 30)).astype(np.float32)
    among, across = kernels.states(states)(np.arange(50))
    embedding = kernels.embed(states[:50])
    assert embedding.points.shape == (50, 10)  # a fifth of the passages
    np.testing.assert_allclose(embedding.alike(embedding.project(states[55])), across[55], rtol=1e-4)
    np.testing.assert_allclose(np.diag(among), 1, atol=0.02)  # points are kept in half precision
    assert np.median(-np.log(among[np.triu_indices(50, 1)])) == pytest.approx(1, abs=0.1)


def test_gates_find_what_is_null_and_spare_the_rest():
    """Five of 300 cheat coldly, at a score of 0.3; of the 100 null ones 30 seem to cheat at 0.5 and are given up."""
    generator = np.random.default_rng(0)
    rows = np.arange(400)
    null, cold, doubtful = rows < 100, rows >= 395, rows < 30
    affect = np.where(null | cold, 0.1, 0.8) + generator.normal(0, 0.05, 400)
    cheating = np.select([cold, doubtful], [0.3, 0.5], 0.05) + generator.normal(0, 0.02, 400)
    scores = {"regulation": affect, "affect_present": affect, "corner_cutting": cheating}
    gating = {name: scores[name] for name in ("affect_present", "corner_cutting")}
    found = fit.nothing(scores, fit.choose_gates(gating, null, [~null, cold]))
    assert 0.65 <= found[null].mean() <= 0.7
    assert not found[cold].any()
    assert found[~null].mean() <= fit.FALSE_NULLS
    careless = fit.nothing(scores, fit.choose_gates(gating, null, [~null]))
    assert careless[cold].any()
    assert fit.choose_gates({"corner_cutting": cheating}, null, [~null]) == {}
    assert not fit.nothing(scores, {}).any()


def test_the_threshold_lies_between_kept_grief_and_rejected_cheer():
    cells = np.array(["grief_processed"] * 40 + ["toxic_positivity"] * 40)
    score = np.concatenate([np.linspace(0.5, 0.9, 40), np.linspace(0.0, 0.4, 40)])
    assert 0.4 < fit.choose_threshold(score, np.zeros(80, bool), cells) < 0.5
    assert fit.choose_threshold(score[:40], np.zeros(40, bool), cells[:40]) == 0.5


def test_a_subset_of_facets_and_no_writers_are_enough(tmp_path):
    rows = passages()
    for row in rows:
        row["facets"] = {name: row["facets"][name] for name in ("affect_present", "invalidation")}
        del row["writer"], row["stance"], row["cell"]
    fit.fit(rows, tmp_path / "out", model=None)
    scored = load_scorer(str(tmp_path / "out"), "auto").score([rows[0]["text"]])[0]
    assert scored["tier"] == 1
    assert scored["invalidation"] is not None
    assert scored["panic"] is scored["panic_confidence"] is None


def test_the_command_prints_its_evaluation_and_writes_the_same_bytes_again(tmp_path, capsys):
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in passages()), encoding="utf-8")
    parser = ArgumentParser()
    fit.add_fit(parser)
    for out in ("a", "b"):
        arguments = parser.parse_args([str(labels), "--out", str(tmp_path / out), "--model", "none"])
        arguments.run(arguments)
    said = capsys.readouterr().out
    assert "Tier 1, cross-validated on 80 passages" in said
    for figure in (
        "AUC, high cells over low",
        "grief kept",
        "AUC without corner cutting in fitting",
        "calibration error",
    ):
        assert f"| {figure} | " in said
    area = next(line for line in said.splitlines() if line.startswith("| AUC, high cells over low"))
    assert float(area.split("|")[2]) > 0.95
    for file in ("scorer.json", "tier1.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("writers", [0, 1])
def test_labels_by_fewer_than_three_writers_are_judged_by_event(tmp_path, capsys, writers):
    """A bootstrap over one writer, or none, ended the command after the scorer was written."""
    labels = tmp_path / "labels.jsonl"
    rows = [{key: value for key, value in row.items() if key != "writer" or writers} for row in passages()]
    labels.write_text("".join(json.dumps(row | {"writer": "w"} if writers else row) + "\n" for row in rows))
    parser = ArgumentParser()
    fit.add_fit(parser)
    arguments = parser.parse_args([str(labels), "--out", str(tmp_path / "out"), "--model", "none"])
    arguments.run(arguments)
    said = capsys.readouterr().out
    assert [line.split("|")[-2].strip() for line in said.splitlines() if "AUC, high cells over low" in line] == [
        "by event"
    ]
    assert "Spearman with graded labels" in said
    assert "writer's world" not in said
    arguments = parser.parse_args([str(labels), "--out", str(tmp_path / "out"), "--model", "none", "--vectors", "v"])
    with pytest.raises(ValueError, match="`--vectors` v: `--model none` reads no emotions; leave it out"):
        arguments.run(arguments)


def test_every_mistake_is_named(tmp_path):
    rows = passages()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for scorer in (False, True):  # labels beside a scorer were removed with it
        if scorer:
            (tmp_path / "other" / "scorer.json").touch()
        with pytest.raises(
            ValueError, match=r"other holds 'file', which is no part of a scorer; choose another `--out`"
        ):
            fit.fit(rows, tmp_path / "other", model=None)
        assert (tmp_path / "other" / "file").exists()
    with pytest.raises(ValueError, match=r"file is a file; `--out` takes a folder"):
        fit.fit(rows, tmp_path / "other" / "file", model=None)
    with pytest.raises(ValueError, match=r"`--states` s: without a model no states are read; leave it out"):
        fit.fit(rows, tmp_path / "new", model=None, states=Path("s"))
    for change, message in (
        (
            {"facets": {"courage": 1}},
            r"row 'w0/grief_processed-0': `facets` must be some of affect_present, .*each 0 to 4",
        ),
        ({"facets": {"panic": 5}}, r"`facets` must be some of"),
        ({"facets": None}, r"`facets` must be some of"),
        ({"regulation": 11}, r"`regulation` is 11; give null or 0 to 10"),
        ({"stance": "approved"}, r"`stance` 'approved' is none of modelled, described, criticised"),
    ):
        with pytest.raises(ValueError, match=message):
            ridge.targets([rows[0] | change, *rows[1:]])
    with pytest.raises(ValueError, match=r"2 rows of 1 writers or events; cross-validation needs at least 3"):
        ridge.targets([rows[0], rows[0]])


def test_rare_stances_are_named_where_they_stand_out():
    """10 of 100 are described, at 0.32 where others are at 0.1; modelled is at 0.6 for all: from 0.3 on they part."""
    label = np.zeros((100, 3))
    label[:90, 0] = label[90:, 1] = 1
    raw = np.tile([0.6, 0.1, 0.0], (100, 1))
    raw[90:, 1] = 0.32
    offsets = ridge.stance_offsets(raw, label)
    assert offsets.tolist() == pytest.approx([0, 0.3, 0])
    assert ((raw + offsets).argmax(1) == label.argmax(1)).all()


def test_pairs_of_one_event_are_counted_where_they_are_the_right_way_round():
    """Events a (right), b (wrong), c (equal labels) and d (one row): one of two."""
    rows = [
        {"id": str(i), "pair": pair, "regulation": value, "cell": "", "writer": "w"}
        for i, (pair, value) in enumerate(zip("aabbccd", [9, 1, 2, 8, 5, 5, 3], strict=True))
    ]
    score = np.array([0.8, 0.3, 0.9, 0.4, 0.1, 0.2, 0.5])
    assert evaluation.swapped(score, evaluation.labelled(rows)).estimate == 0.5
    assert evaluation.swapped(score[4:], evaluation.labelled(rows[4:])) is None


def test_background_is_in_every_fit_and_never_judged():
    rows = passages()
    wanted = ridge.targets(rows, 2)
    assert wanted.folds[-2:].tolist() == [-1, -1]
    assert np.isnan(wanted.labels[-2:, 0]).all()
    assert not wanted.labels[-2:, 1:].any()
    fitted = []

    def alike(chosen):
        fitted.append(set(chosen.tolist()))
        return np.eye(len(chosen)), np.eye(len(rows) + 2)[:, chosen]

    raw = ridge.cross_validate(alike, wanted, [(1.0, 1.0)])[0]
    assert all({len(rows), len(rows) + 1} <= chosen for chosen in fitted)
    assert not raw[-2:].any()


def test_a_text_that_is_like_no_passage_has_nothing_to_regulate(tmp_path):
    rows = [row for row in passages() if row["cell"] != "neutral"][:60]
    fit.fit([*rows, passages()[-1]], tmp_path / "out", model=None)
    found = load_scorer(str(tmp_path / "out"), "1").score(["zxcv qwer " * 80, rows[0]["text"]])
    assert found[0]["affect_present"] < 0.3 < 0.6 < found[1]["affect_present"]


def test_harm_is_taken_off_the_regulation_that_is_learnt():
    """Rows that are like none: the constant is the mean. Half a facet off for panic 4, 0.75 where there is more."""
    rows = [row | {"facets": row["facets"] | {"panic": 4, "despair": 0}} for row in passages()]
    wanted = ridge.targets(rows)
    assert wanted.harm[0] == 0.5
    assert wanted.harm.max() == 0.75  # 1.5 facets at most: invalidation 4 and panic 4 are two
    _, constant = ridge.heads(np.zeros((80, 80)), wanted, np.arange(80), (1.0, 1.0))
    assert constant[0] == pytest.approx(np.nanmean(wanted.labels[:, 0] - wanted.harm))
    assert not constant[1:].any()


def test_two_kinds_of_likeness_are_heard_alike():
    def first(chosen):
        return np.eye(2), np.ones((3, 2))

    def second(chosen):
        return 8 * np.eye(2), 8 * np.ones((3, 2))

    among, across = kernels.together(first, second)(np.arange(2))
    assert among.tolist() == [[2, 0], [0, 2]]
    assert across.tolist() == [[2, 2]] * 3
