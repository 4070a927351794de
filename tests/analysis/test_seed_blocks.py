from __future__ import annotations

import numpy as np
import pytest
from least_squares import anova_residual
from scipy import stats

from analysis.statistics.seed_blocks import two_way, uneven_two_way

NAN = np.nan


def gaps(rng, rows, seeds):
    """A table in which every configuration has 3 seeds or more, not all the same."""
    table = rng.normal(size=(rows, seeds)) + 2 * rng.normal(size=seeds) + np.arange(rows)[:, None]
    for row in table:
        row[rng.permutation(seeds)[: rng.integers(0, seeds - 2)]] = NAN
    return table


def test_of_a_complete_table_it_is_the_two_way_layout():
    table = np.random.default_rng(0).normal(size=(6, 4)) + np.array([0.0, 3, 1, 2])
    model, uneven = two_way(table), uneven_two_way(table)
    assert uneven.means == pytest.approx(model.means)
    assert (uneven.residual_variance, uneven.df) == pytest.approx((float(model.residual_variance), model.df))
    # A variance over seeds of the mean of 6 configurations is that of the seeds, and a sixth of the residual.
    assert uneven.seed_variance == pytest.approx(model.seed_means.var(ddof=1) - model.residual_variance / 6)
    assert uneven.seed_df == pytest.approx(3)


@pytest.mark.parametrize("seed", range(8))
def test_residual_is_that_of_least_squares(seed):
    table = gaps(np.random.default_rng(seed), 7, 6)
    found = uneven_two_way(table)
    assert found.residual_variance == pytest.approx(anova_residual(table))
    assert found.means == pytest.approx(np.nanmean(table, axis=1))


def test_seeds_that_nobody_shares_leave_no_residual_and_all_variance_to_the_seeds():
    table = np.array([[1.0, 2, 4, NAN, NAN, NAN], [NAN, NAN, NAN, 5, 5, 8]])
    found = uneven_two_way(table)
    assert (found.df, found.residual_variance) == (0, 0)
    assert found.seed_df == pytest.approx(4)
    within = np.nanvar(table, axis=1, ddof=1).mean()
    assert found.seed_variance == pytest.approx(within)


def test_variances_are_unbiased():
    rng, n_draws = np.random.default_rng(1), 2_000
    mask = np.isnan(gaps(np.random.default_rng(2), 6, 5))
    found = []
    for _ in range(n_draws):
        table = rng.normal(size=mask.shape) + 2 * rng.normal(size=mask.shape[1])
        table[mask] = NAN
        model = uneven_two_way(table)
        found.append((model.residual_variance, model.seed_variance))
    errors = stats.sem(found)
    assert np.mean(found, axis=0) == pytest.approx([1, 4], abs=4 * errors.max())
    assert errors.max() < 0.1


def test_seeds_that_one_configuration_has_do_not_make_the_variance_of_the_seeds_sure():
    table = 0.3 * np.random.default_rng(4).normal(size=(40, 13)) + np.random.default_rng(5).normal(size=13)
    table[1:, 3:] = NAN
    assert 2 < uneven_two_way(table).seed_df < 3  # 40 have three seeds, and what ten more of one say counts little


@pytest.mark.parametrize(
    "table", [[1.0, 2], [[1.0, NAN], [1, 2]], [[1.0, 2, np.inf], [1, 2, NAN]], np.empty((0, 3)), [[NAN, NAN, NAN]]]
)
def test_table_of_too_few_or_infinite_values_is_refused(table):
    with pytest.raises(ValueError, match="2 seeds or more"):
        uneven_two_way(table)
