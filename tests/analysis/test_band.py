from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.statistics.band import mean_frontier_band
from analysis.statistics.posterior import Posterior


def band_of(sizes, values, direction="minimize", n_draws=2_000):
    return mean_frontier_band(
        sizes, Posterior.of(sizes, values), np.random.default_rng(0), direction=direction, n_draws=n_draws
    )


def test_band_of_one_configuration_is_its_t_interval():
    values = np.random.default_rng(3).normal(2, 0.4, (4, 1))
    band = band_of([7], values, n_draws=100_000)
    half_width = stats.t.ppf(0.975, 3) * values.std(ddof=1) / 2
    assert band.sizes.tolist() == [7]
    assert band.observed == pytest.approx(values.mean())
    assert band.low == pytest.approx(values.mean() - half_width, abs=0.02)
    assert band.high == pytest.approx(values.mean() + half_width, abs=0.02)


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1), ("maximize", -1)])
def test_band_lies_at_worse_values_where_near_equals_compete(direction, sign):
    values = np.random.default_rng(4).normal(size=(5, 30))
    band = band_of(np.arange(1, 31), values, direction)
    assert (sign * ((band.low + band.high) / 2 - band.observed))[-1] > 0.05


def test_band_is_that_of_the_drawn_frontiers():
    rng = np.random.default_rng(5)
    sizes, values = rng.integers(1, 20, 23), rng.normal(size=(3, 23))
    drawn = np.vstack(list(Posterior.of(sizes, values).draws(300, np.random.default_rng(0))))
    band = band_of(sizes, values, n_draws=300)
    frontiers = np.array([[row[sizes <= size].min() for size in band.sizes] for row in drawn])
    low, high = np.quantile(frontiers, [0.025, 0.975], axis=0)
    np.testing.assert_array_equal(band.low, low)
    np.testing.assert_array_equal(band.high, high)


def test_band_without_noise_is_the_frontier():
    band = band_of([1, 2, 2, 3], [[4, 3, 5, 6]] * 3)
    assert band.observed.tolist() == band.low.tolist() == band.high.tolist() == [4, 3, 3]
