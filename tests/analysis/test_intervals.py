from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from analysis.statistics.intervals import mean_interval


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


@pytest.mark.parametrize("n", [3, 5])
def test_mean_interval_covers_at_its_level(n):
    rng = np.random.default_rng(7)
    interval = mean_interval(rng.normal(2.0, 0.4, size=(20_000, n)))
    covered = (np.abs(interval.mean - 2.0) <= interval.half_width).mean()
    # Four standard errors of the estimate.
    assert covered == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 20_000))


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
