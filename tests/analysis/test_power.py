from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.statistics.differences import group_test
from analysis.statistics.power import PAIR, PAIRED, Contrast, family_gaps, gap_power, resolved_gap

OVER_FOUR = (0.25,) * 4 + (-0.25,) * 4


def simulated_power(gap, n, weights, level, studies=4000):
    """Share of simulated studies whose test of a weighted sum of means rejects, and its standard error."""
    rng = np.random.default_rng(10)
    values = rng.normal(size=(studies, len(weights), n))
    values[:, 0] += gap / weights[0]
    share = np.mean([group_test(own, weights, range(len(weights))).p[0] <= level for own in values])
    return share, np.sqrt(share * (1 - share) / studies)


@pytest.mark.parametrize("level", [0.05, 0.005])
@pytest.mark.parametrize("weights", [PAIR, PAIRED, OVER_FOUR, (0.5, 0.5, -1.0)], ids=["pair", "paired", "four", "one"])
@pytest.mark.parametrize("n", [3, 5, 8])
def test_gap_power_is_the_share_of_simulated_studies_that_find_it(n, weights, level):
    gap = resolved_gap(n, weights, level=level)
    share, error = simulated_power(gap, n, weights, level)
    assert gap_power(gap, n, weights, level=level) == pytest.approx(0.8, abs=1e-4)
    assert share == pytest.approx(0.8, abs=4 * error + 0.003)


@pytest.mark.parametrize("n", [3, 5, 10, 100])
@pytest.mark.parametrize("noncentrality", [0.5, 2.0, 4.0])
def test_gap_power_matches_the_noncentral_t(n, noncentrality):
    gap, critical = noncentrality / np.sqrt(n), stats.t.ppf(0.975, n - 1)
    expected = stats.nct.sf(critical, n - 1, noncentrality) + stats.nct.cdf(-critical, n - 1, noncentrality)
    assert gap_power(gap, n, (1.0,)) == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("n", [3, 5, 30])
def test_gap_power_without_a_gap_is_the_level_and_with_a_large_one_certain(n):
    assert gap_power(0, n, (1.0,)) == pytest.approx(0.05, abs=0.003)
    assert gap_power(0, n) <= 0.053  # Welch's test is a little conservative
    assert gap_power(1e6, n) == 1


def test_gaps_of_a_family_are_those_of_its_first_levels():
    # Two contrasts and a chain for each of two measures: six parts of the level.
    arms, single = family_gaps(5, [Contrast(4), Contrast(1)], 1)
    assert arms.of_arms == resolved_gap(5, OVER_FOUR, level=0.05 / 12)
    assert arms.of_sizes == resolved_gap(5, level=0.05 / 48)
    assert single == (None, resolved_gap(5, level=0.05 / 6))


def test_one_rival_for_all_sizes_resolves_less_and_more_seeds_more():
    of_each, of_one, of_start = family_gaps(5, [Contrast(4), Contrast(4, one_rival=True), Contrast(4, paired=True)], 0)
    assert of_each.of_arms < of_one.of_arms < of_one.of_sizes
    assert of_start.of_sizes > of_each.of_sizes  # fewer degrees of freedom, in units of its own noise
    more = family_gaps(8, [Contrast(4), Contrast(4, one_rival=True), Contrast(4, paired=True)], 0)
    assert all(new < old for new, old in zip(more[0], of_each, strict=True))
