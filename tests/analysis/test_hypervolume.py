from __future__ import annotations

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from analysis.statistics import draws
from analysis.statistics.hypervolume import HypervolumeReference, hypervolume_interval

DIRECTIONS = st.sampled_from(["minimize", "maximize"])
REFERENCE = HypervolumeReference(worst_value=0.0, largest_size=1e6, base=10, direction="maximize")


def hypervolume(sizes, values, reference):
    """The area of the frontier of means without noise."""
    rng = np.random.default_rng(0)
    return hypervolume_interval(sizes, np.vstack((values, values)), reference, rng, n_draws=1).observed


def by_moocore(log_sizes, values, largest, worst, direction):
    points = np.column_stack((log_sizes, values))
    return moocore.hypervolume(points, ref=[largest, worst], maximise=[False, direction == "maximize"])


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(
            hnp.arrays(int, n, elements=st.integers(0, 6)), hnp.arrays(float, n, elements=st.integers(-4, 4))
        )
    ),
    st.integers(0, 7),
    st.integers(-5, 5),
    DIRECTIONS,
)
def test_hypervolume_equals_moocore_exactly(points, largest, worst, direction):
    """Sizes are powers of ten, so that neither sum rounds."""
    exponents, values = points
    reference = HypervolumeReference(worst_value=worst, largest_size=10.0**largest, base=10, direction=direction)
    expected = by_moocore(exponents, values, largest, worst, direction)
    assert hypervolume(10.0**exponents, values, reference) == expected


@given(st.integers(0, 2**32), st.integers(1, 60), DIRECTIONS, st.sampled_from([2.0, np.e, 10.0]))
def test_hypervolume_matches_moocore_on_any_sizes(seed, n, direction, base):
    rng = np.random.default_rng(seed)
    sizes, values = rng.integers(1, 1000, n), rng.normal(size=n)
    reference = HypervolumeReference(worst_value=0.3, largest_size=700, base=base, direction=direction)
    expected = by_moocore(np.log(sizes) / np.log(base), values, np.log(700) / np.log(base), 0.3, direction)
    assert hypervolume(sizes, values, reference) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_interval_of_one_configuration_is_its_t_interval():
    """One configuration of a tenth of the largest size: its area is its mean."""
    values = np.random.default_rng(1).normal(50, 0.4, (4, 1))
    interval = hypervolume_interval([1e5], values, REFERENCE, np.random.default_rng(0), n_draws=100_000)
    half_width = stats.t.ppf(0.975, 3) * values.std(ddof=1) / 2
    assert interval.observed == pytest.approx(values.mean())
    # Four Monte-Carlo errors of a t quantile, sqrt(p (1 − p) / draws) / density.
    error = 4 * np.sqrt(0.975 * 0.025 / 100_000) / stats.t.pdf(stats.t.ppf(0.975, 3), 3) * values.std(ddof=1) / 2
    assert interval.low == pytest.approx(values.mean() - half_width, abs=error)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=error)


def test_interval_lies_below_the_observed_area_where_near_equals_compete():
    values = np.random.default_rng(4).normal(size=(5, 8))
    values += 50 - values.mean(axis=0)  # all observed means are equal: any redrawn frontier is better
    values -= values.mean(axis=1)[:, None] - 50  # no shift that seeds share
    interval = hypervolume_interval(np.geomspace(1, 10, 8), values, REFERENCE, np.random.default_rng(0))
    assert interval.observed == pytest.approx(50 * 6)
    assert interval.low < interval.high < interval.observed


def test_interval_does_not_depend_on_the_number_drawn_at_once(monkeypatch):
    rng = np.random.default_rng(5)
    sizes, values = rng.integers(1, 10**6, 37), rng.normal(3, 1, size=(3, 37))
    intervals = set()
    for n_values in (draws.CHUNK_VALUES, 1, 7 * 37):
        monkeypatch.setattr(draws, "CHUNK_VALUES", n_values)
        intervals.add(hypervolume_interval(sizes, values, REFERENCE, np.random.default_rng(0), n_draws=101))
    assert len(intervals) == 1


def test_interval_is_never_negative():
    values = np.random.default_rng(5).normal(0, 1, size=(3, 4))
    values += 0.1 - values.mean(axis=0)  # observed means are all as little better than the worst value
    interval = hypervolume_interval([1, 2, 3, 4], values, REFERENCE, np.random.default_rng(0))
    assert 0 == interval.low < interval.observed


def test_interval_refuses_a_single_seed():
    with pytest.raises(ValueError, match="n >= 2"):
        hypervolume_interval([1, 2], [[1, 2]], REFERENCE, np.random.default_rng(0))
