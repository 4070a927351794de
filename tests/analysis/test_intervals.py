from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from analysis.statistics.intervals import mean_interval, ratio_interval


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042)])
def test_mean_interval_uses_published_t_quantiles(n, quantile):
    """Two-sided 95 % quantiles as in any printed table of Student's t."""
    values = np.arange(n, dtype=float)
    interval = mean_interval(values)
    assert interval.half_width * np.sqrt(n) / values.std(ddof=1) == pytest.approx(quantile, abs=5e-4)


@given(hnp.arrays(float, st.integers(3, 12), elements=st.floats(-100, 100)))
def test_mean_interval_matches_scipy(values):
    spread = values.std(ddof=1)
    if spread < 1e-6:
        return
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    interval = mean_interval(values)
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


# ratio_interval -------------------------------------------------------------------------------------------------------


@given(
    hnp.arrays(float, st.integers(3, 8), elements=st.floats(0, 100)),
    st.integers(0, 2**32 - 1),
)
def test_ratio_interval_ends_where_the_t_test_begins_to_reject(values, seed):
    reference = 50 + np.random.default_rng(seed).normal(size=len(values))
    interval = ratio_interval(values, reference)
    assert interval.ratio == pytest.approx(values.mean() / reference.mean())
    assert interval.low - 1e-9 <= interval.ratio <= interval.high + 1e-9
    for limit in (interval.low, interval.high):
        gap = mean_interval(values - limit * reference)
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
