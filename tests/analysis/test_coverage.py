"""Simulated studies with known truth: do the intervals cover, and do the tests err, as often as they say?

Every share of hits is asserted against its own Monte-Carlo error, over studies: four standard errors. Where a method
misses its nominal rate, the rate that the docstrings state is asserted, not a wider band around the nominal one.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.statistics.differences import TTest, not_inferior, pair_tests, rounding_step
from analysis.statistics.intervals import mean_interval, ratio_interval
from analysis.statistics.ranking import rank_intervals

STUDIES = 10_000
ROUNDING = 0.005
"""Docstrings state rates to two digits."""


def rate(hits, studies=None):
    """Share of hits and four standard errors of it; hits of one study (the first axis) may depend on each other.

    `studies` of weights 0 and 1 counts only some of the hits.
    """
    hits = np.asarray(hits, dtype=float).reshape(len(hits), -1)
    counted = np.ones_like(hits) if studies is None else np.asarray(studies, dtype=float).reshape(len(hits), -1)
    share = (hits * counted).sum() / counted.sum()
    # Of a ratio of sums over studies, by the delta method.
    deviations = ((hits - share) * counted).sum(axis=1)
    error = 4 * np.sqrt((deviations**2).sum()) / counted.sum()
    assert 0 < error < 0.03, "too few studies to tell"
    return share, error


def assert_rate(hits, expected, studies=None, rounding=0.0):
    share, error = rate(hits, studies)
    assert share == pytest.approx(expected, abs=error + rounding)


def assert_at_most(hits, level):
    share, error = rate(hits)
    assert share <= level + error


def compared_with_first(values, paired, step=0.0):
    """Tests of each row against the first, in each study; arrays of shape (studies, rows − 1)."""
    studies, rows, n = values.shape
    at = np.arange(studies * rows).reshape(studies, rows)
    first, second = at[:, 1:].ravel(), np.repeat(at[:, 0], rows - 1)
    found = pair_tests(values.reshape(-1, n), first, second, paired, step=step)
    return TTest(*(each.reshape(studies, rows - 1) for each in found))


def covered(test, truth=0.0):
    return np.abs(test.difference - truth) <= test.half_width()


def simulate(seed, n, correlation=0.0, rows=21, studies=STUDIES, log_sd=0.0, noise="normal"):
    """(studies, rows, n) without any true difference, of unit variance, and the scale of each row's residuals."""
    rng = np.random.default_rng(seed)
    shape = (studies, rows, n)
    residual = rng.normal(size=shape) if noise == "normal" else rng.exponential(size=shape) - 1
    scale = np.exp(log_sd * rng.normal(size=(studies, rows, 1)))
    shared = rng.normal(size=(studies, 1, n))
    return np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * scale * residual, scale[..., 0]


# One interval ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 10])
def test_own_t_covers_at_its_level(n):
    values = np.random.default_rng(7).normal(2.0, 0.4, size=(20_000, n))
    interval = mean_interval(values)
    assert_rate(np.abs(interval.mean - 2) <= interval.half_width, 0.95)


@pytest.mark.parametrize(("n", "welch"), [(3, 0.963), (5, 0.955), (8, 0.952)])
def test_tests_of_pairs_cover_as_stated(n, welch):
    values, _ = simulate(11, n)
    values = values + np.arange(21)[:, None]  # true differences 1, 2, …
    assert_rate(covered(compared_with_first(values, False), np.arange(1, 21)), welch, rounding=ROUNDING)
    values, _ = simulate(12, n, correlation=0.9)
    assert_rate(covered(compared_with_first(values, True)), 0.95)


@pytest.mark.parametrize(("n", "rate_of_welch"), [(3, 0.96), (5, 0.95), (8, 0.95)])
def test_welch_covers_where_variances_differ(n, rate_of_welch):
    values, scale = simulate(13, n, log_sd=0.5)
    found = compared_with_first(values, False)
    noisy = scale[:, 1:] >= np.exp(0.5 * stats.norm.ppf(0.9))
    assert_rate(covered(found), rate_of_welch, rounding=ROUNDING)
    assert_rate(covered(found), rate_of_welch, noisy, 2 * ROUNDING)


@pytest.mark.parametrize(("n", "alike", "quiet_reference"), [(3, 0.98, 0.88), (5, 0.97, 0.88), (10, 0.96, 0.90)])
def test_skewed_noise_cancels_unless_the_reference_is_quiet(n, alike, quiet_reference):
    values, _ = simulate(14, n, noise="exponential")
    assert_rate(covered(compared_with_first(values, False)), alike, rounding=2 * ROUNDING)
    values[:, 0] = 0
    found = compared_with_first(values, False)
    assert_rate(covered(found), quiet_reference, rounding=ROUNDING)
    # Nearly all misses are on the side of the long tail.
    assert_rate(found.difference + found.half_width() < 0, 1 - quiet_reference, rounding=2 * ROUNDING)


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("paired", [False, True])
def test_values_rounded_to_their_deviation_err_no_more_often(n, paired):
    values = np.round(simulate(15, n)[0])
    step = rounding_step(values[0])
    assert step == 1
    assert_at_most((compared_with_first(values, paired, step).p <= 0.05).mean(axis=1), 0.05)
    if n == 3:  # without the floor, equal values would count as free of noise
        assert (compared_with_first(values, paired).p <= 0.001).mean() > 2 * (
            compared_with_first(values, paired, step).p <= 0.001
        ).mean()


@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("n", [3, 10])
def test_ratio_covers_at_its_level_whatever_the_variances(n, correlation):
    rng = np.random.default_rng(12)
    shared, own = rng.normal(size=(2, 20_000, n))
    dense = 5 + shared
    values = 0.9 * 5 + 3 * (correlation * shared + np.sqrt(1 - correlation**2) * own)
    interval = ratio_interval(values, dense)
    bounded = np.isfinite(interval.low)
    # Where the set is unbounded it holds the truth as often as a t test of y − R d accepts it.
    accepted = stats.ttest_1samp(values - 0.9 * dense, 0, axis=1).pvalue > 0.05
    assert_rate(np.where(bounded, (interval.low <= 0.9) & (interval.high >= 0.9), accepted), 0.95)
    assert bounded.mean() > 0.9


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize(("paired", "error"), [(False, 0.021), (True, 0.025)])
def test_non_inferiority_errs_at_its_level_where_the_loss_is_the_margin(paired, error, direction):
    values, _ = simulate(16, 4, 0.5 if paired else 0.0)
    values[:, 1:] += 0.7 if direction == "minimize" else -0.7
    found = not_inferior(compared_with_first(values, paired), 0.7, direction)
    assert_rate(found < 0.025, error, rounding=ROUNDING)


# Ranks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spread", "low", "high"), [(1e-6, 0.77, 0.80), (1.0, 0.95, 1.0), (3.0, 0.95, 1.0)])
def test_rank_intervals_cover_as_stated(spread, low, high):
    rng = np.random.default_rng(23)
    hits = []
    for _ in range(800):
        truth = spread * rng.normal(size=20)
        values = truth[:, None] + rng.normal(size=5) + rng.normal(size=(20, 5))
        result = rank_intervals(values, "minimize", rng, n_draws=1000)
        true_rank = stats.rankdata(truth)
        hits.append((result.low <= true_rank) & (true_rank <= result.high))
    share, error = rate(hits)
    assert low - error <= share <= high + error
