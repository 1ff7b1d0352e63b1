"""What a comparison takes off for control arms, and which audits can be compared."""

import copy

import numpy as np
import pytest
from records import BASELINE, TASKS, make_record
from test_audit import quick, wide  # noqa: F401  (fixtures)

from calibrate import stats
from calibrate.audit import effects, readers

WITHIN = np.array([-0.2, -0.1, 0.1, 0.2])  # of four tasks, alike in every arm


def by_task(fall: float, own: float = 0.0, gain: float = 0.0, spread: np.ndarray = WITHIN) -> readers.ByTask:
    return {name: list(value + spread) for name, value in (("fall_failing", fall), ("fall_own", own), ("gain", gain))}


def test_figures_beyond_the_largest_control():
    """Falls: 2 less the larger of 0.4 and -1, task by task, so that what tasks share has no width. Gains: both
    controls lost, so 0.5 less nothing, with its own interval."""
    controls = {"random": by_task(0.4, gain=-0.4), "shuffled": by_task(-1.0, gain=-0.3)}
    figures = readers.beside_controls(by_task(2.0, gain=0.5), controls)
    assert figures["fall_over_controls"] == pytest.approx((1.6, 1.6, 1.6))
    assert figures["gain_over_controls"] == pytest.approx(stats.mean(0.5 + WITHIN))
    assert "evasion_over_none" not in figures  # there is no arm of that name


def test_evasion_beyond_training_without_a_penalty():
    """Frozen 2 - 0.5 = 1.5 and own 1 - 0.4 = 0.6 on every task: 1 - 0.6 / 1.5 = 0.6. Beside two runs of `none`, their
    mean: frozen 2 - 0.75, own 1 - 0.25, 1 - 0.75 / 1.25 = 0.4."""
    arm = by_task(2.0, own=1.0)
    none, other = by_task(0.5, own=0.4), by_task(1.0, own=0.1)
    figures = readers.beside_controls(arm, {"none": none, "nonesuch": by_task(9.0)})
    assert figures["evasion_over_none"] == pytest.approx((0.6, 0.6, 0.6))
    figures = readers.beside_controls(arm, {"none-1": none, "none_seed-2": other})
    assert figures["evasion_over_none"] == pytest.approx((0.4, 0.4, 0.4))
    for control in ({"none": by_task(1.75)}, {}):  # 0.25 sigma are left: too few for a ratio
        assert "evasion_over_none" not in readers.beside_controls(arm, control)
    # An arm that did not fall itself has no index, however far `none` rose.
    assert "evasion_over_none" not in readers.beside_controls(by_task(0.0), {"none": by_task(-2.0)})


def test_propagation_beyond_training_without_a_penalty():
    """Of a contrast of 2 the band lost 1.5 and, beyond what `none` raised, 2: all. Above, of 1.5, 0.3 and 0.9: 60
    percent."""
    above = {"contrast": [2.0] * 4, "fall_above": [0.3] * 4, "contrast_above": [1.5] * 4}
    raised = {"contrast": [2.0] * 4, "fall_above": [-0.6] * 4, "contrast_above": [1.5] * 4}
    arm, none = by_task(1.5) | above, by_task(-0.5) | raised
    assert readers.beside_controls(arm, {"none": none})["propagation"] == pytest.approx((0.6, 0.6, 0.6))
    assert "propagation" not in readers.beside_controls(arm, {"random": none})  # the change's own stands
    fallen = by_task(1.25) | above  # 0.25 sigma are left: too few for a ratio
    assert readers.beside_controls(arm, {"none": fallen})["propagation"] is None
    # Too little to lose there, on the mean of its layers or for sure.
    for held in ([0.14] * 4, [1.8, -1.2, 1.8, -1.2]):
        assert readers.beside_controls(arm | {"contrast_above": held}, {"none": none})["propagation"] is None


def test_without_controls_nothing_is_beyond_them():
    assert readers.beside_controls(by_task(2.0), {}) == {}


# ---- what is compared


def played(hacks: list[bool], false: list[bool], cut: int | None = None) -> dict:
    """Rollouts of one impossible form of tasks 0, 1, ... and one solvable."""
    rows = [
        {"key": [f"t{i}", impossible, False, 0], "cut": i == cut,
         "outcome": {"strict_hack": impossible and hack, "false_success": lie}}
        for impossible in (True, False) for i, (hack, lie) in enumerate(zip(hacks, false, strict=True))
    ]  # fmt: skip
    return {"rollouts": rows}


def test_played_tasks_are_compared_task_by_task(planted):
    """Hacks go from 3 of 4 to 1 of 4; false success, over both forms, from none to one task of four. Without gaming
    the share is 0 with an interval."""
    before = make_record(planted, more=played([True, True, True, False], [False] * 4))
    after = make_record(planted, more=played([True, False, False, False], [False, False, False, True]))
    figures = readers.compare(before, after).figures
    assert (figures["hacks"].estimate, figures["hack_change"].estimate) == (0.75, -0.5)
    assert figures["false_success_change"].estimate == 0.25
    none = readers.compare(make_record(planted, more=played([False] * 4, [False] * 4)), after).figures["hacks"]
    assert none == stats.wilson(np.zeros(4))
    assert readers.compare(make_record(planted), after).figures["hacks"] is None


def test_a_conversation_that_was_cut_counts_in_neither_audit(planted):
    """Task 3 was cut before: 3 of 3 games. And where impossible tasks are called done by both models, solvable ones by
    neither, and the solvable are cut after, nothing has changed."""
    cut = make_record(planted, more=played([True] * 4, [False] * 4, cut=3))
    after = make_record(planted, more=played([True, False, False, False], [False, False, False, True]))
    figures = readers.compare(cut, after).figures
    assert (figures["hacks"].estimate, figures["hack_change"].estimate) == (1, pytest.approx(-2 / 3))
    told = [played([False] * 4, [True] * 4) for _ in range(2)]
    for rows in told:
        for row in rows["rollouts"][4:]:
            row["outcome"]["false_success"] = False
    for row in told[1]["rollouts"][4:]:
        row["cut"] = True
    records = [make_record(planted, more=more) for more in told]
    assert readers.compare(*records).figures["false_success_change"].estimate == 0


def test_kl_is_kept_only_where_it_is_against_before(planted):
    base, adapter = {"weight_hash": "a"}, {"weight_hash": "a", "adapter": "x"}
    merged, further = {"weight_hash": "b", "reference": ["a", None]}, {"weight_hash": "b", "reference": ["a", "x"]}
    for before, after, kept in (
        (base, adapter, True), (base, merged, True), ({"weight_hash": "c"}, merged, False), (adapter, adapter, False),
        (base, {"weight_hash": "b"}, False), (adapter, further, True), (base, further, False),
        (adapter, merged, False), ({"weight_hash": "a", "adapter": "y"}, further, False),
    ):  # fmt: skip
        records = make_record(planted, options=before), make_record(planted, options=after, kl=0.2)
        assert (readers.compare(*records).figures["kl"] is not None) is kept
    with pytest.raises(ValueError, match=r"adapter of a base with other weights \(a\) than 'planted' \(c\); give"):
        readers.compare(make_record(planted, options={"weight_hash": "c"}), make_record(planted, options=adapter))


def test_states_that_are_no_numbers_are_not_kept(planted, tmp_path):
    record = make_record(planted)
    record.profile.states[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="planted: states hold values that are not finite, though its weights are"):
        record.save(tmp_path / "audit")
    assert list(tmp_path.iterdir()) == []


def test_too_few_texts_are_not_called_a_matter_of_precision(planted, tmp_path):
    """One neutral text has no interval; all its figures are finite."""
    record = make_record(planted)
    kept = [id_ for id_ in record.profile.ids if not id_.endswith("/neutral")] + ["north/neutral"]
    profile = record.profile.only({*kept})
    with pytest.raises(ValueError, match=r"^a bootstrap needs .* at least 2"):
        record._replace(contexts=record.contexts._replace(profile=profile)).save(tmp_path / "audit")


@pytest.mark.parametrize(
    ("what", "fields", "edit"),
    [
        ("texts", {}, lambda record: record.profile.ids.reverse()),
        ("content of the corpora", {"options": {"corpora": "edited"}}, None),
        ("chat template", {"options": {"chat_template": "other"}}, None),
        ("stories of the own vectors", {"options": {"own_stories": "fewer"}}, None),
        ("layers", {}, lambda record: record.vectors.layers.reverse()),
        ("concepts", {}, lambda record: record.vectors.concepts.reverse()),
        ("target concept", {"concept": "calm"}, None),
        ("base weights", {}, lambda record: setattr(record.vectors, "weight_hash", "1")),
        ("pairs", {"pair_tasks": TASKS[::-1]}, None),
        ("band", {}, lambda record: record.vectors.set_band([record.vectors.layers[0]], "another")),
        ("length of answers", {"options": {"max_new_tokens": 5}}, None),
        ("different vectors", {}, lambda record: record.vectors.directions.mul_(-1)),
        ("different vectors", {}, lambda record: record.vectors.neutral("header").mul_(2)),
    ],
)
def test_audits_of_different_things_are_refused(planted, what, fields, edit):
    before, after = make_record(planted), make_record(copy.deepcopy(planted), **fields)
    if edit:
        edit(after)
    with pytest.raises(ValueError, match=what):
        readers.compare(before, after)


def steered(slopes: list[float], unsteered: float, usable: tuple[float, float] = (-0.1, 0.1)) -> dict:
    """`more` of a full audit: the margin of every task along the target, one number a task and 0.1 of the norm."""
    points = [
        {"dose": dose, "margins": [unsteered + slope * dose / 0.1 for slope in slopes]}
        for dose in (-0.1, -0.05, 0.0, 0.05, 0.1)
    ]
    return {"dose": [{"name": "random 1"}, {"name": "desperate", "usable": usable, "points": points}]}


def test_dose_response_shift_against_slope(wide):  # noqa: F811
    """Slopes of -2 and -4 before: half as steep after is a change of 1.5; a margin of 6 more is two doses down."""
    before, after = (make_record(wide, BASELINE, more=more) for more in (steered([-2, -4], 1), steered([-1, -2], 7)))
    figures = readers.compare(before, after).figures
    assert figures["slope_change"] == pytest.approx((1.5, 1, 2))
    assert figures["dose_shift"] == pytest.approx((-2, -3, -1.5))
    assert effects.dosed(before, before)["slope_change"] == pytest.approx((0, 0, 0))


def test_dose_response_over_doses_that_both_can_be_used_at(wide):  # noqa: F811
    """After, -0.1 is damage: a kink there does not count. One usable dose has no slope, and a flat one no shift."""
    more = steered([-2, -4], 1, (-0.05, 0.1))
    more["dose"][1]["points"][0]["margins"] = [90, 90]
    before, bent = make_record(wide, BASELINE, more=steered([-2, -4], 1)), make_record(wide, BASELINE, more=more)
    assert effects.dosed(before, bent)["slope_change"] == pytest.approx((0, 0, 0))
    narrow, flat = steered([-2, -4], 1, (0.0, 0.0)), steered([0, 0], 1)
    assert effects.dosed(before, make_record(wide, BASELINE, more=narrow)) == {}
    assert [*effects.dosed(make_record(wide, BASELINE, more=flat), before)] == ["slope_change"]
    assert effects.dosed(before, make_record(wide, BASELINE)) == {}
