from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from least_squares import anova_residual
from scipy import stats

from analysis.statistics.intervals import marginal_interval, mean_interval, ratio_interval


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042)])
def test_mean_interval_uses_published_t_quantiles(n, quantile):
    """Two-sided 95 % quantiles as in any printed table of Student's t."""
    values = np.arange(n, dtype=float)
    interval = mean_interval(values)
    assert interval.half_width * np.sqrt(n) / values.std(ddof=1) == pytest.approx(quantile, abs=5e-4)


@given(hnp.arrays(float, st.integers(3, 12), elements=st.floats(-100, 100)), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_mean_interval_matches_scipy(values, level):
    spread = values.std(ddof=1)
    if spread < 1e-6:
        return
    low, high = stats.t.interval(level, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    interval = mean_interval(values, level)
    assert interval.mean - interval.half_width == pytest.approx(low, abs=1e-9)
    assert interval.mean + interval.half_width == pytest.approx(high, abs=1e-9)
    assert interval.std == pytest.approx(spread)


def test_mean_interval_of_one_or_no_value_is_nan():
    one = mean_interval([1.5])
    assert one.mean == 1.5
    assert np.isnan(one.half_width)
    assert np.isnan(one.std)
    assert one.n == 1
    none = mean_interval([])
    assert np.isnan(none.mean)
    assert none.n == 0


def test_mean_interval_works_along_the_last_axis():
    values = np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0], [1.0, np.nan, 2.0]])
    interval = mean_interval(values)
    assert interval.mean[:2].tolist() == [2.0, 4.0]
    assert interval.half_width[1] == 0
    assert np.isnan(interval.mean[2])
    assert np.isnan(interval.half_width[2])
    assert interval.half_width[0] == mean_interval(values[0]).half_width


@pytest.mark.parametrize("level", [0, 1, 95])
def test_mean_interval_refuses_a_level_outside_0_to_1(level):
    with pytest.raises(ValueError, match=f"`0 < level < 1` must hold, but got level={level}"):
        mean_interval([1, 2, 3], level)


def test_mean_interval_refuses_a_single_number():
    with pytest.raises(ValueError, match="axis of seeds"):
        mean_interval(1.0)


# marginal_interval ----------------------------------------------------------------------------------------------------


def test_marginal_interval_adds_the_two_mean_squares():
    """The mean squares from a least-squares fit of both factors, as an ANOVA table has them."""
    values = np.random.default_rng(0).normal(size=(4, 5)) + np.arange(5)
    rows, n = values.shape
    residual = anova_residual(values)
    interval = marginal_interval(values)
    between_seeds = rows * values.mean(axis=0).var(ddof=1)  # its mean square, of expectation C σ_b² + σ²
    assert interval.variance == pytest.approx(between_seeds / rows + residual * (rows - 1) / rows)
    df = interval.variance**2 / (
        (between_seeds / rows) ** 2 / (n - 1) + (residual * (rows - 1) / rows) ** 2 / ((rows - 1) * (n - 1))
    )
    assert interval.df == pytest.approx(df)
    assert interval.half_width == pytest.approx([stats.t.ppf(0.975, df) * np.sqrt(interval.variance / n)] * rows)
    assert interval.mean == pytest.approx(values.mean(axis=1))


def test_marginal_interval_variance_is_unbiased():
    rng = np.random.default_rng(1)
    values = 0.8 * rng.normal(size=(40_000, 1, 3)) + 0.6 * rng.normal(size=(40_000, 4, 3))
    variance = marginal_interval(values).variance
    assert variance.mean() == pytest.approx(1, abs=4 * variance.std() / np.sqrt(40_000))


def test_marginal_interval_of_one_configuration_is_its_own():
    values = np.array([[1.0, 4.0, 2.0, 7.0]])
    assert marginal_interval(values).half_width == pytest.approx(mean_interval(values).half_width)
    assert marginal_interval(values).df == 3


@given(hnp.arrays(float, st.tuples(st.integers(1, 6), st.integers(3, 6)), elements=st.integers(-100, 100)))
def test_marginal_interval_has_its_df_between_all_and_nothing_shared(values):
    rows, n = values.shape
    assert (n - 1) * (1 - 1e-9) <= marginal_interval(values).df <= rows * (n - 1) * (1 + 1e-9)


def test_marginal_interval_below_three_seeds_is_nan():
    interval = marginal_interval([[1.0, 2.0], [3.0, 5.0]])
    assert interval.mean.tolist() == [1.5, 4.0]
    assert np.isnan(interval.half_width).all()
    assert np.isnan(interval.df)


# ratio_interval -------------------------------------------------------------------------------------------------------


@given(
    hnp.arrays(float, st.integers(3, 8), elements=st.floats(0, 100)),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.5, 0.95]),
)
def test_ratio_interval_ends_where_the_t_test_begins_to_reject(values, seed, level):
    reference = 50 + np.random.default_rng(seed).normal(size=len(values))
    interval = ratio_interval(values, reference, level)
    assert interval.ratio == pytest.approx(values.mean() / reference.mean())
    assert interval.low - 1e-9 <= interval.ratio <= interval.high + 1e-9
    for limit in (interval.low, interval.high):
        gap = mean_interval(values - limit * reference, level)
        assert abs(gap.mean) == pytest.approx(gap.half_width, rel=1e-5, abs=1e-5)


def test_ratio_interval_of_a_reference_without_noise_is_the_scaled_mean():
    values = [30.0, 31.0, 33.0, 29.0]
    own, interval = mean_interval(values), ratio_interval(values, [40.0] * 4)
    assert interval.low == pytest.approx((own.mean - own.half_width) / 40)
    assert interval.high == pytest.approx((own.mean + own.half_width) / 40)


def test_ratio_interval_is_nan_where_the_reference_is_not_clearly_off_zero():
    reference = np.array([1.0, 2.0, 3.0])
    # Its own interval is 2 ± 2.48: zero is inside.
    assert mean_interval(reference).half_width > 2
    interval = ratio_interval([1.0, 1.1, 1.2], reference)
    assert interval.ratio == pytest.approx(0.55)
    assert np.isnan([interval.low, interval.high]).all()
    # At a level of which it is outside there is an interval.
    assert np.isfinite(ratio_interval([1.0, 1.1, 1.2], reference, 0.5).low)
    assert np.isnan(ratio_interval([1.0, 1.1, 1.2], [-1.0, 0.0, 1.0]).ratio)


def test_ratio_interval_works_along_the_last_axis():
    rng = np.random.default_rng(2)
    values, reference = 40 + rng.normal(size=(2, 3, 4)), 50 + rng.normal(size=4)
    interval = ratio_interval(values, reference)
    assert interval.low.shape == (2, 3)
    assert interval.low[1, 2] == ratio_interval(values[1, 2], reference).low
    assert np.isnan(ratio_interval(values[..., :2], reference[:2]).high).all()


@pytest.mark.parametrize(
    ("values", "reference", "message"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0], "must have the same seeds, but got 3 and 2"),
        ([1.0, np.nan, 3.0], [1.0, 2.0, 3.0], "`values` must have every seed of every configuration, but 1 value"),
        ([1.0, 2.0, 3.0], [1.0, np.inf, 3.0], "`reference` must have every seed"),
        (3.0, [1.0, 2.0, 3.0], r"`values` must be \(\.\.\., seeds\), but its shape is \(\)"),
        ([[1.0, 2.0], [1.0]], [1.0, 2.0], "every row of `values` must have the same seeds"),
    ],
)
def test_ratio_interval_refuses_seeds_that_do_not_pair(values, reference, message):
    with pytest.raises(ValueError, match=message):
        ratio_interval(values, reference)
