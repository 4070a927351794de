from __future__ import annotations

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from analysis.statistics.hypervolume import HypervolumeReference, hypervolume_interval
from analysis.statistics.posterior import Posterior

DIRECTIONS = st.sampled_from(["minimize", "maximize"])
REFERENCE = HypervolumeReference(worst_value=0.0, largest_size=1e6, base=10, direction="maximize")


def hypervolume(sizes, values, reference):
    """The area of the frontier of means without noise."""
    return interval_of(sizes, np.vstack((values, values)), reference, n_draws=1).observed


def interval_of(sizes, values, reference=REFERENCE, n_draws=2_000):
    given_them = Posterior.of(sizes, values)
    return hypervolume_interval(sizes, given_them, reference, np.random.default_rng(0), n_draws=n_draws)


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
    interval = interval_of([1e5], values, n_draws=100_000)
    half_width = stats.t.ppf(0.975, 3) * values.std(ddof=1) / 2
    assert interval.observed == pytest.approx(values.mean())
    # Four Monte-Carlo errors of a t quantile, sqrt(p (1 − p) / draws) / density.
    error = 4 * np.sqrt(0.975 * 0.025 / 100_000) / stats.t.pdf(stats.t.ppf(0.975, 3), 3) * values.std(ddof=1) / 2
    assert interval.low == pytest.approx(values.mean() - half_width, abs=error)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=error)


def test_interval_lies_below_the_observed_area_where_near_equals_compete():
    values = 50 + np.random.default_rng(4).normal(size=(5, 30))
    interval = interval_of(np.geomspace(1, 10, 30), values)
    assert (interval.low + interval.high) / 2 < interval.observed - 0.5


def test_interval_is_never_negative():
    values = np.random.default_rng(5).normal(0, 1, size=(3, 4))
    values += 0.1 - values.mean(axis=0)  # observed means are all as little better than the worst value
    interval = interval_of([1, 2, 3, 4], values)
    assert 0 == interval.low < interval.observed
