from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.statistics.power import gap_power, resolved_gap, seeds_needed


def simulated_power(gap, n, sd, correlation, replicates=40_000):
    """Share of simulated studies in which scipy's test rejects, and its standard error."""
    rng = np.random.default_rng(10)
    shared = rng.normal(size=(replicates, n)) * np.sqrt(correlation or 0)
    own = rng.normal(size=(2, replicates, n)) * np.sqrt(1 - (correlation or 0))
    first, second = sd * (shared + own)
    if correlation is None:
        p = stats.ttest_ind(first + gap, second, axis=1, equal_var=False).pvalue
    else:
        p = stats.ttest_rel(first + gap, second, axis=1).pvalue
    share = (p < 0.05).mean()
    return share, np.sqrt(share * (1 - share) / replicates)


@pytest.mark.parametrize("n", [3, 4, 12])
@pytest.mark.parametrize("correlation", [None, 0.0, 0.5])
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
    assert gap_power(1e6, 3, 1) == pytest.approx(1)


@pytest.mark.parametrize("n", [3, 5, 30])
def test_gap_power_without_a_gap_is_the_level(n):
    assert gap_power(0, n, 1, 0.5) == pytest.approx(0.05, abs=1e-6)
    # Welch's test is not exact: conservative at few seeds.
    share, error = simulated_power(0, n, 1, None)
    assert gap_power(0, n, 1) == pytest.approx(share, abs=4 * error)
    assert gap_power(0, n, 1) <= 0.05


@pytest.mark.parametrize(
    ("gap", "sd", "welch", "paired"), [(1.2, 0.3, 3, 3), (1.2, 0.5, 5, 4), (0.3, 0.4, 29, 16)], ids=str
)
def test_seeds_that_a_study_of_this_size_needs(gap, sd, welch, paired):
    assert seeds_needed(gap, sd) == welch
    assert seeds_needed(gap, sd, correlation=0.5) == paired


@pytest.mark.parametrize(("tests", "low", "high"), [(20, 5, 8), (200, 7, 11)])
def test_seeds_needed_under_bonferroni(tests, low, high):
    assert seeds_needed(1.2, 0.3, level=0.05 / tests) == low
    assert seeds_needed(1.2, 0.5, level=0.05 / tests) == high


@pytest.mark.parametrize("correlation", [None, 0.0, 0.7])
@pytest.mark.parametrize("gap", [0.1, 0.4, 1.0])
def test_seeds_needed_are_the_fewest(gap, correlation):
    n = seeds_needed(gap, 0.5, correlation, power=0.9)
    assert gap_power(gap, n, 0.5, correlation) >= 0.9
    assert n == 3 or gap_power(gap, n - 1, 0.5, correlation) < 0.9


@pytest.mark.parametrize("correlation", [None, 0.5])
@pytest.mark.parametrize("n", [3, 10])
def test_resolved_gap_has_the_power_asked_for(n, correlation):
    gap = resolved_gap(n, 0.4, correlation, power=0.9)
    assert gap_power(gap, n, 0.4, correlation) == pytest.approx(0.9, abs=1e-5)
    assert resolved_gap(n, 0.8, correlation, power=0.9) == pytest.approx(2 * gap, rel=1e-6)


def test_below_three_seeds_nothing_is_resolved():
    assert np.isnan(gap_power(1, 2, 0.1))
    assert np.isnan(resolved_gap(2, 0.1, 0.5))
    assert seeds_needed(1e6, 1) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sd": 0}, "`sd > 0` must hold, but got sd=0"),
        ({"correlation": 1}, "`-1 <= correlation < 1` must hold, but got correlation=1"),
        ({"level": 5}, "`0 < level < 1` must hold, but got level=5"),
        ({"power": 80}, "`level < power < 1` must hold, but got level=0.05, power=80"),
        ({"gap": 0}, "a gap of 0 at sd=0.4 needs more than 100000 seeds for a power of 0.8"),
    ],
)
def test_seeds_needed_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        seeds_needed(**{"gap": 0.3, "sd": 0.4, **arguments})
