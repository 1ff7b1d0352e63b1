import numpy as np
import pytest

from calibrate import stats


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([3, 3, 3], (3, 3, 3), id="no spread"),
        # Of the four draws of two tasks, 00 and 11 come up in a quarter each: both lie outside the central 95 %.
        pytest.param([0, 1], (0.5, 0, 1), id="two tasks"),
        # Ones among 10 draws: binomial. P(at most 1) = 11/1024 = 1.1 %, P(at most 2) = 56/1024 = 5.5 %, so the
        # 2.5 % point is 2 of 10, and 8 of 10 by symmetry.
        pytest.param([0, 1] * 5, (0.5, 0.2, 0.8), id="ten tasks"),
    ],
)
def test_mean_by_hand(values, expected):
    assert stats.mean(np.array(values, dtype=float)) == pytest.approx(expected)


def test_interval_covers_a_planted_mean(monkeypatch):
    """Of 200 sets of 30 tasks around 0.7, about 95 % contain it (binomial deviation 3); a 90 % interval has 180."""
    monkeypatch.setattr(stats, "RESAMPLES", 400)
    generator = np.random.default_rng(1)
    intervals = [stats.mean(generator.normal(0.7, 2, 30)) for _ in range(200)]
    covered = sum(interval.low <= 0.7 <= interval.high for interval in intervals)
    assert 183 <= covered <= 198
    estimates = [interval.estimate for interval in intervals]
    assert np.mean(estimates) == pytest.approx(0.7, abs=0.1)  # its deviation is 2 / sqrt(200 * 30) = 0.03


def test_arrays_are_resampled_together():
    """A difference of exactly 1 in each task is 1 in every draw, however far the tasks are apart."""
    before = np.array([-50.0, 0.0, 3.0, 700.0])
    interval = stats.bootstrap(lambda one, other: np.abs(one - other).mean(), before + 1, before)
    assert interval == pytest.approx((1, 1, 1))


def test_tasks_are_drawn_whole():
    """Each task's two values cancel; a draw of single values would not."""
    values = np.array([[1.0, -1.0], [20.0, -20.0], [300.0, -300.0]])
    assert stats.bootstrap(np.sum, values) == (0, 0, 0)


@pytest.mark.parametrize(("value", "above"), [(0.9, True), (1, False), (2.5, False)])
def test_an_interval_excludes_what_lies_outside_it(value, above):
    assert stats.Interval(2, 1, 3).above(value) is above


@pytest.mark.parametrize(
    ("arrays", "lengths"), [([[1.0]], r"\[1\]"), ([[]], r"\[0\]"), ([[1.0, 2.0], [1.0, 2.0, 3.0]], r"\[2, 3\]")]
)
def test_a_bootstrap_refuses_too_few_or_unequal_tasks(arrays, lengths):
    with pytest.raises(ValueError, match=f"same tasks in every array and at least 2; got {lengths}"):
        stats.bootstrap(lambda *each: 0.0, *map(np.array, arrays))


def test_max_statistic_by_hand():
    """Of the 8 ways to flip three tasks only the two with equal signs reach |t|: p = 2/8 (deviation 1 %)."""
    column = np.array([[0.9], [1.0], [1.1]])
    (alone,) = stats.max_statistic(column)
    assert alone == pytest.approx(0.25, abs=0.04)
    # Whole tasks are flipped, so a copy of a column, in another unit and turned round, changes nothing.
    assert stats.max_statistic(np.hstack([column, -10 * column])) == pytest.approx([alone, alone])


def test_max_statistic_controls_the_family_of_columns(monkeypatch):
    """Of 100 sets of noise in 30 columns about 5 have any p below 0.05; tested one by one 1 - 0.95^30 = 79 would."""
    monkeypatch.setattr(stats, "RESAMPLES", 200)
    generator = np.random.default_rng(2)
    smallest = [stats.max_statistic(generator.normal(0, 1, (12, 30))).min() for _ in range(100)]
    assert 1 <= sum(p < 0.05 for p in smallest) <= 11


def test_max_statistic_finds_the_planted_column():
    """A fall of two deviations in 20 tasks has t = -2 * sqrt(20) = -9 or so; the noise beside it stays unnamed."""
    differences = np.random.default_rng(3).normal(0, 1, (20, 30))
    differences[:, 7] -= 2
    p = stats.max_statistic(differences)
    assert np.flatnonzero(p < 0.05).tolist() == [7]
    assert p[7] < 0.005


def test_max_statistic_refuses_one_task():
    with pytest.raises(ValueError, match="a permutation test needs at least 2 tasks; got 1"):
        stats.max_statistic(np.ones((1, 3)))


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        # With z^2 = 3.8415: nothing of 12 leaves z^2 / (12 + z^2) = 0.2425; half of 4 is 1/2 +- z / 2 / sqrt(4 + z^2).
        ([0] * 12, (0, 0, 0.2425)),
        ([1] * 12, (1, 0.7575, 1)),
        ([0, 1, 1, 0], (0.5, 0.1500, 0.8500)),
        # (1/4 + z^2/8) / (1 + z^2/4) = 0.3725; z sqrt(3/16/4 + z^2/64) / (1 + z^2/4) = 0.3269
        ([0, 0, 1, 0], (0.25, 0.0456, 0.6994)),
    ],
)
def test_the_interval_of_a_share_by_hand(outcomes, expected):
    assert stats.wilson(np.array(outcomes, dtype=float)) == pytest.approx(expected, abs=1e-4)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a share needs at least one outcome"):
        stats.wilson(np.array([]))


def test_the_mean_is_bootstrapped_as_any_statistic_is():
    values = np.random.default_rng(3).normal(size=13)
    assert stats.mean(values, seed=5) == pytest.approx(stats.bootstrap(np.mean, values, seed=5), abs=1e-12)
    with pytest.raises(ValueError, match=r"at least 2; got \[1\]"):
        stats.mean(np.ones(1))
