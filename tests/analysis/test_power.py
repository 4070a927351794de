from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.statistics.power import gap_power, resolved_gap, seeds_needed


def simulated_power(gap, n, sd, correlation, replicates=40_000):
    """Share of simulated studies in which scipy's test rejects, and its standard error."""
    rng = np.random.default_rng(10)
    shared = rng.normal(size=(replicates, n)) * np.sqrt(correlation)
    own = rng.normal(size=(2, replicates, n)) * np.sqrt(1 - correlation)
    first, second = sd * (shared + own)
    share = (stats.ttest_rel(first + gap, second, axis=1).pvalue < 0.05).mean()
    return share, np.sqrt(share * (1 - share) / replicates)


@pytest.mark.parametrize("n", [3, 4, 12])
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_gap_power_is_the_share_of_simulated_studies_that_find_it(n, correlation):
    share, error = simulated_power(0.8, n, 0.5, correlation)
    assert gap_power(0.8, n, 0.5, correlation) == pytest.approx(share, abs=4 * error)


@pytest.mark.parametrize("n", [3, 5, 10, 100, 1000])
@pytest.mark.parametrize("noncentrality", [0.5, 2.0, 4.0])
def test_gap_power_matches_the_noncentral_t_where_scipy_has_it(n, noncentrality):
    gap, critical = noncentrality / np.sqrt(n), stats.t.ppf(0.975, n - 1)
    expected = stats.nct.sf(critical, n - 1, noncentrality) + stats.nct.cdf(-critical, n - 1, noncentrality)
    assert gap_power(gap, n, 1, correlation=0.5) == pytest.approx(expected, abs=1e-6)


def test_gap_power_is_finite_where_the_noncentral_t_is_not():
    assert gap_power(20, 5, 1, 0.5) == pytest.approx(1)


@pytest.mark.parametrize("n", [3, 5, 30])
def test_gap_power_without_a_gap_is_the_level(n):
    assert gap_power(0, n, 1, 0.5) == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize(("gap", "sd", "n"), [(1.2, 0.3, 3), (1.2, 0.5, 4), (0.3, 0.4, 16), (1e6, 1, 3)], ids=str)
def test_seeds_that_a_study_of_this_size_needs(gap, sd, n):
    assert seeds_needed(gap, sd, correlation=0.5) == n


@pytest.mark.parametrize("correlation", [0.0, 0.7])
@pytest.mark.parametrize("gap", [0.1, 0.4, 1.0])
def test_seeds_needed_are_the_fewest(gap, correlation):
    n = seeds_needed(gap, 0.5, correlation)
    assert gap_power(gap, n, 0.5, correlation) >= 0.8
    assert n == 3 or gap_power(gap, n - 1, 0.5, correlation) < 0.8


@pytest.mark.parametrize("n", [3, 10])
def test_resolved_gap_has_the_power_asked_for(n):
    gap = resolved_gap(n, 0.4, 0.5)
    assert gap_power(gap, n, 0.4, 0.5) == pytest.approx(0.8, abs=1e-5)
    assert resolved_gap(n, 0.8, 0.5) == pytest.approx(2 * gap, rel=1e-6)


def test_no_number_of_seeds_finds_a_gap_of_zero():
    with pytest.raises(ValueError, match=r"a gap of 0 at sd=0\.4 needs more than 100000 seeds"):
        seeds_needed(0, 0.4, 0.5)
