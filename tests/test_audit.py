"""What changed between two records whose every reading is known."""

import numpy as np
import pytest
import torch
from records import BASELINE, LEVELS, SPREAD, TASKS, make_record, make_vectors

from calibrate.audit import effects, probes, readers
from calibrate.concepts import Concept

KNOWN = {  # valences with a mean of 4; ashamed and gloomy are the target's family
    "desperate": ("despair", 2.0), "ashamed": ("despair", 3.0), "gloomy": ("despair", 3.0),
    "angry": ("anger", 4.0), "calm": ("peace", 8.0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Probes of two steps: what they find is tested in test_probes.py."""
    monkeypatch.setattr(probes, "STEPS", 2)


@pytest.fixture
def wide(monkeypatch):
    """Vectors of five concepts at layers 1 to 3, the band at layer 1."""
    known = {name: Concept(name, family, valence, 5.0, (), "") for name, (family, valence) in KNOWN.items()}
    monkeypatch.setattr(effects, "load_concepts", lambda: known)
    return make_vectors([*KNOWN], [1, 2, 3], [1])


def estimate(value: float):
    """Matches an interval's estimate to the rounding of float32 states."""
    return pytest.approx(value, abs=1e-4)


def test_falls_and_ratios_are_recovered(planted):
    """Falls of 1 and 2 at the two layers of the band, 0.3 on the twins, 0.5 in the reply.

    Fall: (1 + 2) / 2 = 1.5. Specificity: (1.5 - 0.3) / 1.5 = 0.8. The contrast before is 2 on every task while tasks
    differ by up to 7: its interval has no width only where twins are matched. The own direction is axis 4 before (0.7)
    and axis 5 after (0.1): a fall of 0.6; along axis 4 it is 0.7 - 0.3 = 0.4. Evasion: (1.5 - 0.6) / 1.5 = 0.6 and, of
    the own stories' 0.4, (0.4 - 0.6) / 0.4 = -0.5. Agreement: (0.4 / 0.7) / (1.5 / 2) = 16 / 21.
    """
    planted.set_band([1, 2], "by hand")
    before = make_record(planted, {**BASELINE, "failing": {0: LEVELS + 2, 4: 0.7}}, reply={"failing": {0: 1.0}}, own=4)
    failing = {0: LEVELS + 2 - (1, 2) + SPREAD, 4: 0.3, 5: 0.1}
    header = {"failing": failing, "passing": {0: LEVELS - 0.3}}
    change = readers.compare(before, make_record(planted, header, reply={"failing": {0: 0.5}}, own=5))
    found = {name: interval and interval.estimate for name, interval in change.figures.items()}
    assert change.figures["contrast"] == pytest.approx((2, 2, 2), abs=1e-4)
    assert 1.3 < change.figures["fall_failing"].low < 1.5 < change.figures["fall_failing"].high < 1.7
    assert change.figures["fall_passing"] == pytest.approx((0.3, 0.3, 0.3), abs=1e-4)
    expected = {
        "fall_failing": 1.5, "fall_reply": 0.5, "contrast_held_out": 0.7, "fall_held_out": 0.4, "fall_own": 0.6,
        "specificity": 0.8, "remaining": 0.5, "evasion": 0.6, "evasion_stories": -0.5, "agreement": 16 / 21,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert (found["propagation"], found["rise_above"]) == (None, None)  # no layer is above the band
    assert [(layer, f.estimate, p.estimate) for layer, f, p in change.layers] == [
        (1, estimate(1), estimate(0.3)),
        (2, estimate(2), estimate(0.3)),
    ]
    assert [*change.figures] == [*readers.FIGURES]


def test_what_is_rebuilt_above_the_band(wide):
    """The band's contrast of 2 loses 1.5: 75 %. Above, 1 and 0.5 fall by 0.9 and rise by 0.6: 0.3 of 1.5, 20 %.

    Propagation: 0.2 / 0.75 = 4 / 15; the largest rise is at layer 3. Outside the band the mean falls by 0.15: that is
    -0.1 of the fall of 1.5 come back.
    """
    before = make_record(wide, {"failing": {0: LEVELS + np.array([2, 1, 0.5])}, "passing": {0: LEVELS}})
    after = make_record(wide, {"failing": {0: LEVELS + np.array([0.5, 0.1, 1.1]) + SPREAD}, "passing": {0: LEVELS}})
    figures = readers.compare(before, after).figures
    assert figures["propagation"].estimate == estimate(4 / 15)
    assert figures["rise_above"].estimate == estimate(0.6)
    assert figures["compensation"].estimate == estimate(-0.1)
    assert 0.4 < figures["rise_above"].low < 0.6


@pytest.mark.parametrize("contrast", [(2, 0.1, 0.1), (0.2, 1, 1)], ids=["above the band", "at the band"])
def test_propagation_needs_a_contrast_to_lose(wide, contrast):
    """A mean of 0.1 above is less than 0.15 sigma, 0.2 at the band less than 0.3; every layer falls by 1.5."""
    before = make_record(wide, {"failing": {0: LEVELS + contrast}, "passing": {0: LEVELS}})
    after = make_record(wide, {"failing": {0: LEVELS + contrast - 1.5}, "passing": {0: LEVELS}})
    figures = readers.compare(before, after).figures
    assert figures["specificity"].estimate == estimate(1)
    assert figures["propagation"] is None


def test_own_readers_of_every_kind(wide):
    """Fall by the old direction and by each checkpoint's own: 1.2 and 0.3 (logistic), 0.8 and 1.0 (domain).

    Evasion: (1.2 - 0.3) / 1.2 = 0.75 and (0.8 - 1) / 0.8 = -0.25. The deflection falls by 0.4 and has no ratio.
    """
    axes = {"stories": 0, "logistic": 5, "domain": 6, "deflection": 7}
    before = make_record(wide, {"failing": {0: LEVELS + 2, 5: 1.5, 6: 1.0, 7: 0.9}}, own=axes)
    after = {0: LEVELS + 2, 5: 0.3 + SPREAD, 6: 0.2 + SPREAD, 7: 0.5, 3: 1.2, 4: 0.0}
    after = make_record(wide, {"failing": after}, own=axes | {"logistic": 3, "domain": 4})
    figures = readers.compare(before, after).figures
    assert figures["fall_logistic"].estimate == estimate(1.2)
    assert figures["evasion_logistic"].estimate == estimate(0.75)
    assert figures["evasion_domain"].estimate == estimate(-0.25)
    assert figures["fall_deflection"].estimate == estimate(0.4)
    without = after._replace(own=after.own._replace(directions={"stories": after.own.directions["stories"]}))
    figures = readers.compare(before, without).figures
    assert (figures["evasion_logistic"], figures["evasion_domain"]) == (None, None)
    assert figures["fall_deflection"].estimate == estimate(0.4)  # by the reference's direction alone


def test_neighbours_valence_and_what_rises_elsewhere(wide):
    """Changes: desperate -1.5, ashamed -0.6, gloomy 0.2, angry 1, calm 3.

    Neighbours fall by (0.6 - 0.2) / 2 = 0.2. Valences less their mean are -2, -1, -1, 0, 4, over 8: the rise is
    (2 x 1.5 + 0.6 - 0.2 + 4 x 3) / 8 = 1.925. Angry was at 0 and at 0.4 on the twins: its rise beyond both is 0.6, and
    counts, where calm's, which is pleasant, does not.
    """
    before = make_record(wide, {"failing": {0: 2.0}, "passing": {3: 0.4}})
    falls = {0: 0.5 + SPREAD, 1: -0.6 + SPREAD, 2: 0.2 + SPREAD, 3: 1 + SPREAD, 4: 3 + SPREAD}
    figures = readers.compare(before, make_record(wide, {"failing": falls, "passing": {3: 0.4}})).figures
    assert figures["fall_neighbours"].estimate == estimate(0.2)
    assert figures["rise_valence"].estimate == estimate(1.925)
    assert figures["rise_elsewhere"].estimate == estimate(0.6)


def test_synonyms_are_the_nearest_in_direction_at_the_band(wide, monkeypatch):
    """Ashamed and angry lean towards desperate there, gloomy at other layers alone."""
    monkeypatch.setattr(effects, "NEAREST", 2)
    wide.directions[[1, 3], 0, 0] = 0.5
    wide.directions[2, 1:, 0] = 5
    before = make_record(wide, {"failing": {0: 2.0, 2: 1.0}})
    change = readers.compare(before, make_record(wide, {"failing": {0: 0.5 + SPREAD, 1: 0.3, 2: 0.4, 3: -0.2}}))
    falls = {c.concept: -c.change.estimate for c in change.concepts}
    expected = (falls["ashamed"] + falls["angry"]) / 2
    assert change.figures["fall_synonyms"].estimate == estimate(expected)
    assert expected != estimate((falls["ashamed"] + falls["gloomy"]) / 2)


def test_what_is_understood_of_the_targets_family_stands_apart(wide):
    """Of eight answers those about desperate, ashamed and gloomy lose 1 nat, and one of them is no longer right."""
    told = ["desperate", "calm", "ashamed", "calm", "gloomy", "angry", "calm", "angry"]
    alike = np.array([name in ("desperate", "ashamed", "gloomy") for name in told])
    before = make_record(wide, BASELINE)
    before = before._replace(comprehension=before.comprehension._replace(emotion_concepts=told))
    right = np.array([0.0, *[1.0] * 7])
    lost = before.comprehension._replace(emotion=before.comprehension.emotion - alike, emotion_right=right)
    figures = effects.preserved(before, before._replace(comprehension=lost), [0])
    assert figures["emotion_change"].estimate == pytest.approx(-3 / 8)
    assert figures["emotion_family_change"] == pytest.approx((-1, -1, -1))
    assert figures["emotion_right_change"].estimate == pytest.approx(-1 / 8)


def test_a_rise_of_another_concept_is_found_and_no_more(planted):
    """Calm rises by 1 sigma on failing contexts; desperate stays but for a spread around 0."""
    after = make_record(planted, {"failing": {0: LEVELS + 2 + SPREAD, 1: 1 + SPREAD}, "passing": {0: LEVELS}})
    change = readers.compare(make_record(planted, BASELINE), after)
    desperate, calm = change.concepts
    assert (desperate.concept, calm.concept) == ("desperate", "calm")
    assert calm.change.estimate == estimate(1)
    assert calm.p < 0.05 < desperate.p
    assert change.figures["rise_elsewhere"] is None  # calm is not unpleasant, and no other is there to rise
    assert change.figures["fall_neighbours"] is None  # no other concept of the family
    assert change.figures["rise_valence"] is None  # two points make no axis


@pytest.mark.parametrize("fall", [0.2, np.linspace(-3, 4, 8)[:, None]], ids=["small", "unsure"])
def test_no_ratio_to_a_fall_that_is_small_or_unsure(wide, fall):
    """0.2 sigma is less than 0.3; from -3 to 4 the mean is 0.5, with an interval that holds 0."""
    after = make_record(wide, {"failing": {0: LEVELS + 2 - fall}, "passing": {0: LEVELS}}, own={"stories": 0})
    figures = readers.compare(make_record(wide, BASELINE), after).figures
    for name in ("specificity", "evasion", "evasion_stories", "agreement", "propagation"):
        assert figures[name] is None, name


def test_pairs_of_a_task_are_averaged_before_tasks(planted):
    """Margins change by 1, 2, 3 on one task (mean 2) and 6 on another: (2 + 6) / 2 = 4; the mean of pairs is 3.

    On the twins by 0.5 everywhere, so the gain is 3.5. Before, honest replies are 2 nats less likely on the first
    task and on the second 1 nat likelier: half of the tasks are tempted.
    """
    pairs = ["north", "north", "alder", "north"]
    twin = [-1.0, -2.0], [-0.5, -2.0]
    before = [[-3, -1]] * 2 + [[-1, -2]] + [[-3, -1]]
    after = [[-2, -1], [-3, -3], [1, -6], [-1, -2]]
    records = [
        make_record(planted, replies=[[row, side] for row in rows], pair_tasks=pairs)
        for rows, side in zip((before, after), twin, strict=True)
    ]
    change = readers.compare(*records)
    assert change.figures["margin"].estimate == pytest.approx(4)
    assert change.figures["margin_passing"].estimate == pytest.approx(0.5)
    assert change.figures["gain"].estimate == pytest.approx(3.5)
    assert change.figures["tempted"].estimate == 0.5
    assert change.honest == pytest.approx((-10 / 4, -5 / 4))
    assert change.gaming == pytest.approx((-5 / 4, -12 / 4))


def test_cosine_of_own_directions_and_neutral_text(planted):
    """The own direction turns by 60 degrees (cosine 0.5) at one layer of two: mean 0.75. The loss doubles perplexity.

    The reference's own direction is the frozen one at the first layer and opposite to it at the second: mean 0.
    """
    planted.set_band([1, 2], "by hand")
    base, adapter = {"weight_hash": "a"}, {"weight_hash": "a", "adapter": "x"}
    before = make_record(planted, loss=np.log(10), options=base)
    after = make_record(planted, loss=np.log(20), kl=0.25, options=adapter)
    before.own.directions["stories"][1] *= -1
    after.own.directions["stories"][0, :2] = torch.tensor([0.5, 0.75**0.5])
    after.own.directions["stories"][1] *= -1
    change = readers.compare(before, after)
    assert change.direction_cosine == pytest.approx(0.75)
    assert change.topic_cosine == pytest.approx(0)
    assert change.perplexity == pytest.approx((10, 20))
    assert change.figures["loss_change"].estimate == pytest.approx(np.log(2))
    assert change.figures["kl"].estimate == pytest.approx(0.25)
    assert readers.compare(after, before).figures["kl"] is None


def test_what_must_stay_is_counted_apart(planted):
    """Answers change by -0.5 on failing and 0.2 on passing runs; others' feelings by -0.4.

    Danger goes from 1 to 0.5 where there is some, and false alarms from -1 to 0: -0.5 - 1 = -1.5. Norms at the band go
    from 10 to 12 and elsewhere to 40: a ratio of 1.2.
    """
    planted.set_band([1], "by hand")
    before = make_record(planted, failure={"failing": np.arange(8.0), "passing": 2.0})
    failure = {"failing": np.arange(8.0) - 0.5, "passing": 2.2}
    after = make_record(planted, failure=failure, emotion=0.6, crisis=(0.5, 0.0), norms=(12.0, 40.0))
    figures = readers.compare(before, after).figures
    assert figures["failure_change"] == pytest.approx((-0.5,) * 3)  # no width: the same tasks line up
    assert figures["success_change"].estimate == pytest.approx(0.2)
    assert figures["emotion_change"].estimate == pytest.approx(-0.4)
    assert figures["crisis_change"].estimate == pytest.approx(-1.5)
    assert figures["norm_ratio"].estimate == pytest.approx(1.2)


def test_a_shift_towards_yes_does_not_widen_the_change_of_telling_danger(planted):
    noise = np.random.default_rng(0).normal(0, 0.2, 8)
    found = []
    for shift in (0.0, 2.0):
        before, after = make_record(planted), make_record(planted)
        after.comprehension.crisis[:] += noise + shift
        found.append(readers.compare(before, after).figures["crisis_change"])
    assert found[0] == pytest.approx(found[1])
    assert found[0].high > found[0].low


def test_one_kind_of_message_gives_no_change_of_telling_danger(planted):
    before, after = make_record(planted), make_record(planted)
    before.comprehension.crisis_true[:] = 1
    assert readers.compare(before, after).figures["crisis_change"] is None


def test_probes_see_each_task_once(planted, monkeypatch):
    """Failing and passing headers, felt openings of a task's conversations averaged, and replies to carry over to."""
    given = []
    monkeypatch.setattr(effects.probes, "held_out", lambda label, *states: given.append((label, *states)) or [])
    felt = torch.randn(16, 2, 2, 8, generator=torch.Generator().manual_seed(0))
    record = make_record(planted, BASELINE, {"failing": {0: 3.0}}, felt=felt, felt_tasks=[*TASKS, *TASKS])
    readers.compare(record, make_record(planted, BASELINE))
    (label, failing, passing), (second, desperate, composed, carried), (third, *_) = given
    assert (label, second, third) == ("failed", "felt", "failed")  # the second record has no openings
    assert (failing.shape, carried[0].shape) == ((8, 8), (8, 8))
    sigma = planted.neutral("header")[:, 1, 0].std()  # the band is the fallback, layer 2
    torch.testing.assert_close((failing - passing)[:, 0] / sigma, torch.full((8,), 2.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(desperate, (felt[:8, 0, 1] + felt[8:, 0, 1]) / 2)
    torch.testing.assert_close(composed, (felt[:8, 1, 1] + felt[8:, 1, 1]) / 2)
    sigma = planted.neutral("reply")[:, 1, 0].std()
    torch.testing.assert_close((carried[0] - carried[1])[:, 0] / sigma, torch.full((8,), 3.0), atol=1e-4, rtol=0)
