"""Simulated studies with known truth: do the intervals cover, and do the tests err, as often as they say?

Every share of hits is asserted against its own Monte-Carlo error, over studies: four standard errors. Where a method
misses its nominal rate, the rate that the docstrings state is asserted, not a wider band around the nominal one.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.statistics.contrasts import contrasts, fixed_sequence, non_inferiority
from analysis.statistics.intervals import mean_interval, ratio_interval
from analysis.statistics.multiplicity import holm
from analysis.statistics.ranking import rank_intervals
from analysis.statistics.seed_blocks import two_way

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


def covered(difference, test, truth=0.0):
    return np.abs(difference - truth) <= test.half_width


def simulate(seed, n, correlation=0.0, rows=21, studies=STUDIES, log_sd=0.0, noise="normal"):
    """(studies, rows, n) without any true difference, of unit variance, and the scale of each row's residuals."""
    rng = np.random.default_rng(seed)
    shape = (studies, rows, n)
    residual = rng.normal(size=shape) if noise == "normal" else rng.exponential(size=shape) - 1
    scale = np.exp(log_sd * rng.normal(size=(studies, rows, 1)))
    shared = rng.normal(size=(studies, 1, n))
    return np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * scale * residual, scale[..., 0]


# Where the assumptions hold -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 10])
def test_own_t_covers_at_its_level(n):
    values = np.random.default_rng(7).normal(2.0, 0.4, size=(20_000, n))
    interval = mean_interval(values)
    assert_rate(np.abs(interval.mean - 2) <= interval.half_width, 0.95)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("rows", [3, 21])
def test_block_and_pair_cover_at_their_level(rows, n, correlation):
    values, _ = simulate(11, n, correlation, rows)
    values = values + np.arange(rows)[:, None]  # true differences 1, 2, …
    result = contrasts(values[:, 1:], values[:, 0])
    for test in (result.block, result.pair):
        assert_rate(covered(result.difference, test, np.arange(1, rows)), 0.95)
    variance = result.block.standard_error[:, -1] ** 2
    assert variance.mean() == pytest.approx(2 * (1 - correlation) / n, abs=4 * variance.std() / np.sqrt(STUDIES))


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


@pytest.mark.parametrize("correlation", [0.0, 0.5])
@pytest.mark.parametrize("n", [3, 5])
def test_holm_holds_the_family_wise_error(n, correlation):
    values, _ = simulate(13, n, correlation)
    values[:, 1:11] += 3
    result = contrasts(values[:, 1:], values[:, 0])
    for test in (result.block, result.pair):
        assert_at_most((holm(test.p)[:, 10:] <= 0.05).any(axis=1), 0.05)


def test_benjamini_hochberg_holds_the_false_discovery_rate():
    values, _ = simulate(14, 5, 0.5)
    values[:, 1:11] += 3
    result = contrasts(values[:, 1:], values[:, 0])
    for test in (result.block, result.pair):
        found = stats.false_discovery_control(test.p, axis=-1) <= 0.05
        false_share = found[:, 10:].sum(axis=1) / np.maximum(found.sum(axis=1), 1)
        assert_at_most(false_share, 0.05 * 10 / 20)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("which", ["block", "pair"])
def test_non_inferiority_errs_at_its_level_where_the_loss_is_the_margin(which, direction):
    values, _ = simulate(15, 4, 0.5)
    values[:, 1:] += 0.7 if direction == "minimize" else -0.7
    result = contrasts(values[:, 1:], values[:, 0])
    claim = non_inferiority(result.difference, getattr(result, which), 0.7, direction)
    assert_rate(claim.holds, 0.025)


def test_fixed_sequence_holds_the_error_of_all_its_claims():
    """χ = 64, 32, 16 lose nothing, 8 the margin itself, 4 and 2 a little more: a claim of any of these is an error."""
    values, _ = simulate(16, 5, 0.5, rows=7)
    values[:, 1:] -= np.array([0, 0, 0, 3, 3.2, 3.4])[:, None]
    result = contrasts(values[:, 1:], values[:, 0])
    p = non_inferiority(result.difference, result.pair, 3, "maximize").p
    claims = np.array([fixed_sequence(row, [64, 32, 16, 8, 4, 2]) for row in p])
    assert_at_most(claims[:, 3:].any(axis=1), 0.025)
    assert rate(claims[:, 2])[0] > 0.8
    # The same tests without the sequence err more often: it is what holds the level.
    share, error = rate((p[:, 3:] < 0.025).any(axis=1))
    assert share - error > 0.025


# What the docstrings state of the rest --------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "block", "pair"), [(3, 0.98, 0.07), (5, 1.0, 0.66), (6, 1.0, 0.91)])
def test_block_finds_more_than_pairs_where_variances_are_equal(n, block, pair):
    values, _ = simulate(18, n, 0.5)
    values[:, 1:11] += 3
    result = contrasts(values[:, 1:], values[:, 0])
    for test, expected in ((result.block, block), (result.pair, pair)):
        found = (holm(test.p)[:, :10] <= 0.05).mean()
        error = 4 * (holm(test.p)[:, :10] <= 0.05).mean(axis=1).std() / np.sqrt(STUDIES)
        assert found == pytest.approx(expected, abs=error + ROUNDING)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_block_misses_where_variances_differ_and_pairs_do_not(n):
    values, scale = simulate(19, n, 0.5, log_sd=0.5)
    result = contrasts(values[:, 1:], values[:, 0])
    noisy = scale[:, 1:] >= np.exp(0.5 * stats.norm.ppf(0.9))
    assert_rate(covered(result.difference, result.block), 0.94, rounding=ROUNDING)  # on average it hardly shows
    assert_rate(covered(result.difference, result.block), 0.82, noisy, ROUNDING)
    assert_rate((holm(result.block.p) <= 0.05).any(axis=1), 0.12, rounding=ROUNDING)
    assert_rate(covered(result.difference, result.pair), 0.95)
    assert_rate(covered(result.difference, result.pair), 0.95, noisy)
    assert_at_most((holm(result.pair.p) <= 0.05).any(axis=1), 0.05)


@pytest.mark.parametrize(("rows", "found", "errs"), [(21, 0.51, 0.14), (7, 0.14, 0.08)])
def test_testing_variances_first_does_not_mend_the_block(rows, found, errs):
    values, _ = simulate(20, 3, 0.5, rows, log_sd=0.5)
    result = contrasts(values[:, 1:], values[:, 0])
    unequal = bartlett_p(values) < 0.05
    assert_rate(unequal, found, rounding=ROUNDING)
    wrong = (holm(result.block.p) <= 0.05).any(axis=1)
    assert_rate(wrong, errs, ~unequal, ROUNDING)


def bartlett_p(values):
    """Bartlett's test on the residuals of the two-way model, by its χ² approximation."""
    model = two_way(values)
    rows, n = values.shape[1:]
    grand_mean = model.means.mean(axis=1)[:, None, None]
    residuals = values - model.means[..., None] - model.seed_means[:, None] + grand_mean
    variances = (residuals**2).sum(axis=2) / (n - 1) * rows / (rows - 1)
    statistic = (n - 1) * (rows * np.log(variances.mean(axis=1)) - np.log(variances).sum(axis=1))
    return stats.chi2.sf(statistic / (1 + (rows + 1) / (3 * rows * (n - 1))), rows - 1)


@pytest.mark.parametrize("n", [3, 5])
def test_skew_that_both_share_cancels_in_pairs(n):
    values, _ = simulate(21, n, 0.5, noise="exponential")
    result = contrasts(values[:, 1:], values[:, 0])
    assert_rate(covered(result.difference, result.pair), 0.97, rounding=ROUNDING)


@pytest.mark.parametrize(("n", "rate_of_pair", "misses"), [(3, 0.88, 0.11), (5, 0.88, 0.11), (10, 0.90, 0.10)])
def test_skew_that_the_reference_lacks_stays_in_pairs(n, rate_of_pair, misses):
    values, _ = simulate(22, n, noise="exponential")
    result = contrasts(values, np.zeros(n))
    assert_rate(covered(result.difference, result.pair), rate_of_pair, rounding=ROUNDING)
    # The truth lies above the interval, on the side of the long tail.
    assert_rate(result.difference + result.pair.half_width < 0, misses, rounding=ROUNDING)


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
