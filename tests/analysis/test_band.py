from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import draws
from analysis.statistics.band import mean_frontier_band
from analysis.statistics.intervals import mean_interval


def test_band_of_one_configuration_is_its_t_interval():
    values = np.random.default_rng(3).normal(2, 0.4, (4, 1))
    interval = mean_interval(values.T)
    band = mean_frontier_band([7], values, np.random.default_rng(0), n_draws=10)
    assert band.sizes.tolist() == [7]
    assert band.observed == pytest.approx(interval.mean)
    assert band.low == pytest.approx(interval.mean - interval.half_width)
    assert band.high == pytest.approx(interval.mean + interval.half_width)


def test_band_is_moved_to_worse_values_where_near_equals_compete():
    """The best of k equal normal means is too good by their standard error times the mean of k normals' largest."""
    values = np.random.default_rng(4).normal(size=(5, 8))
    values += -values.mean(axis=0)  # all observed means are equal, so that the redrawn ones decide
    se = np.sqrt(((values - values.mean(axis=1)[:, None]) ** 2).sum() / (4 * 7) / 5)
    grid = np.linspace(-8, 8, 4001)
    for direction, sign in (("minimize", 1), ("maximize", -1)):
        band = mean_frontier_band(np.arange(8), values, np.random.default_rng(0), direction=direction, n_draws=20_000)
        moved = sign * ((band.low + band.high) / 2 - band.observed) / se
        for k in range(1, 9):
            density = k * stats.norm.pdf(grid) * stats.norm.cdf(grid) ** (k - 1)
            expected = np.trapezoid(grid * density, grid)
            assert moved[k - 1] == pytest.approx(expected, abs=4 / np.sqrt(20_000))


def test_band_does_not_depend_on_the_number_drawn_at_once(monkeypatch):
    rng = np.random.default_rng(5)
    sizes, values = rng.integers(1, 20, 23), rng.normal(size=(3, 23))
    bands = []
    for n_values in (draws.CHUNK_VALUES, 1, 7 * 23):
        monkeypatch.setattr(draws, "CHUNK_VALUES", n_values)
        bands.append(mean_frontier_band(sizes, values, np.random.default_rng(0), n_draws=101))
    for other in bands[1:]:
        assert np.array_equal(bands[0].low, other.low)
        assert np.array_equal(bands[0].high, other.high)


def test_band_without_noise_is_the_frontier():
    band = mean_frontier_band([1, 2, 2, 3], [[4, 3, 5, 6]] * 3, np.random.default_rng(0))
    assert band.observed.tolist() == band.low.tolist() == band.high.tolist() == [4, 3, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2]], "n >= 2"),
        ([[1, 2, 3], [1, 2, 4]], "must hold, but got"),
        ([[1, np.inf], [1, 2]], "must be finite"),
    ],
)
def test_band_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        mean_frontier_band([1, 2], values, np.random.default_rng(0))
