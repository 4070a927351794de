from __future__ import annotations

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from analysis.statistics.attainment import attainment_surfaces, mean_frontier_band
from analysis.statistics.intervals import mean_interval
from analysis.statistics.nondominated import frontier_mask

DIRECTIONS = st.sampled_from(["minimize", "maximize"])
PERCENTILES = [0, 10, 25, 33, 50, 75, 90, 100]


@st.composite
def seeds(draw):
    """Few distinct values, so that ties, equal sizes and single points are common."""
    n, n_configurations = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    sizes = draw(hnp.arrays(float, n_configurations, elements=st.integers(1, 6)))
    values = draw(hnp.arrays(float, (n, n_configurations), elements=st.integers(-5, 5)))
    return sizes, values


@given(seeds(), DIRECTIONS)
def test_attainment_surfaces_equal_moocore(study, direction):
    sizes, values = study
    sign = 1 if direction == "minimize" else -1
    points = np.column_stack((np.tile(sizes, len(values)), sign * values.ravel()))
    expected = moocore.eaf(points, np.repeat(np.arange(len(values)), sizes.size), percentiles=PERCENTILES)
    surfaces = attainment_surfaces(sizes, values, PERCENTILES, direction)
    for q, surface in zip(PERCENTILES, surfaces.values, strict=True):
        corners = frontier_mask(surfaces.sizes, surface, ("minimize", direction))
        ours = np.column_stack((surfaces.sizes, surface))[corners]
        theirs = expected[expected[:, 2] == q, :2]
        assert ours.tolist() == (theirs[np.argsort(theirs[:, 0])] * [1, sign]).tolist()


def test_attainment_surfaces_of_three_seeds_by_hand():
    surfaces = attainment_surfaces([10, 20, 30], [[3, 1, 2], [2, 2, 0], [5, 4, 4]], [33, 50, 100])
    assert surfaces.sizes.tolist() == [10, 20, 30]
    assert surfaces.values.tolist() == [[2, 1, 0], [3, 2, 1], [5, 4, 4]]


@pytest.mark.parametrize(
    ("values", "percentiles", "message"),
    [
        ([1, 2], [50], "n >= 1"),
        ([[1, 2, 3]], [50], "must hold, but got"),
        (np.zeros((0, 2)), [50], "n >= 1"),
        ([[1, np.nan]], [50], "must be finite"),
        ([[1, 2]], [101], "percentiles"),
        ([[1, 2]], [-1], "percentiles"),
    ],
)
def test_attainment_surfaces_refuses(values, percentiles, message):
    with pytest.raises(ValueError, match=message):
        attainment_surfaces([1, 2], values, percentiles)


# The band -------------------------------------------------------------------------------------------------------------


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


def test_band_does_not_depend_on_the_chunk():
    rng = np.random.default_rng(5)
    sizes, values = rng.integers(1, 20, 23), rng.normal(size=(3, 23))
    whole, *others = (
        mean_frontier_band(sizes, values, np.random.default_rng(0), n_draws=101, chunk=chunk)
        for chunk in (101, 1, 7, 1000, None)
    )
    for other in others:
        assert np.array_equal(whole.low, other.low)
        assert np.array_equal(whole.high, other.high)


def test_band_without_noise_is_the_frontier():
    band = mean_frontier_band([1, 2, 2, 3], [[4, 3, 5, 6]] * 3, np.random.default_rng(0))
    assert band.observed.tolist() == band.low.tolist() == band.high.tolist() == [4, 3, 3]


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([[1, 2]], {}, "n >= 2"),
        ([[1, 2, 3], [1, 2, 4]], {}, "must hold, but got"),
        ([[1, np.inf], [1, 2]], {}, "must be finite"),
        ([[1, 2], [1, 3]], {"level": 95}, "level=95"),
        ([[1, 2], [1, 3]], {"n_draws": 0}, "n_draws"),
        ([[1, 2], [1, 3]], {"chunk": 0}, "chunk"),
        ([[1, 2], [1, 3]], {"direction": "max"}, "direction"),
    ],
)
def test_band_refuses(values, options, message):
    with pytest.raises(ValueError, match=message):
        mean_frontier_band([1, 2], values, np.random.default_rng(0), **options)
