from __future__ import annotations

import numpy as np
import pytest
from least_squares import anova_residual
from scipy import stats

from analysis.statistics.contrasts import block_tests
from analysis.statistics.seed_blocks import marginal_variance, two_way, uneven_two_way

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
    variance, df = marginal_variance(model)
    assert uneven.means == pytest.approx(model.means)
    assert (uneven.residual_variance, uneven.df) == pytest.approx((float(model.residual_variance), model.df))
    assert (uneven.marginal_variance, uneven.marginal_df) == pytest.approx((float(variance), float(df)))
    assert uneven.variance == pytest.approx(table.var(axis=1, ddof=1).mean())


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
    assert found.seed_variance == found.marginal_variance == pytest.approx(within)
    assert found.marginal_df == pytest.approx(4)


def test_variances_are_unbiased():
    rng, n_draws = np.random.default_rng(1), 2_000
    mask = np.isnan(gaps(np.random.default_rng(2), 6, 5))
    found = []
    for _ in range(n_draws):
        table = rng.normal(size=mask.shape) + 2 * rng.normal(size=mask.shape[1])
        table[mask] = NAN
        model = uneven_two_way(table)
        found.append((model.residual_variance, model.marginal_variance))
    errors = stats.sem(found)
    assert np.mean(found, axis=0) == pytest.approx([1, 5], abs=4 * errors.max())
    assert errors.max() < 0.1


def test_seeds_that_one_configuration_has_do_not_make_the_variance_of_the_seeds_sure():
    rng, n_draws = np.random.default_rng(4), 1_500
    covered, df = [], []
    for _ in range(n_draws):
        table = 0.3 * rng.normal(size=(40, 13)) + rng.normal(size=13)
        table[1:, 3:] = NAN
        model = uneven_two_way(table)
        half_width = stats.t.ppf(0.975, model.marginal_df) * np.sqrt(model.marginal_variance / 3)
        covered.append(abs(model.means[1]) <= half_width)
        df.append(model.seed_df)
    assert 2 < np.mean(df) < 3  # 40 have three seeds, and what ten more of one say counts little
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    "table", [[1.0, 2], [[1.0, NAN], [1, 2]], [[1.0, 2, np.inf], [1, 2, NAN]], np.empty((0, 3)), [[NAN, NAN, NAN]]]
)
def test_table_of_too_few_or_infinite_values_is_refused(table):
    with pytest.raises(ValueError, match="2 seeds or more"):
        uneven_two_way(table)


def test_block_tests_of_unequal_seeds_are_on_those_that_a_pair_shares():
    table = gaps(np.random.default_rng(3), 8, 7)
    table[0, :5], table[1, 2:] = np.arange(5.0), np.arange(5.0) + 3
    table[0, 5:] = table[1, :2] = NAN
    found = block_tests(table, [0, 0], [1, 2])
    standard_error = np.sqrt(2 * anova_residual(table) / 3)
    assert found.standard_error[0] == pytest.approx(standard_error)
    difference = (table[0] - table[1])[2:5].mean()
    assert found.p[0] == pytest.approx(2 * stats.t.sf(abs(difference / standard_error), found.df))


def test_block_tests_of_a_pair_that_shares_fewer_than_three_seeds_are_missing():
    table = np.array([[1.0, 2, 3, NAN, NAN], [NAN, 2, 3, 4, NAN], [1, 2, 3, 3, 1], [NAN, NAN, 1, 2, 5]])
    found = block_tests(table, [0, 0, 1], [1, 2, 2])
    assert np.isnan(found.p).tolist() == [True, False, False]
    assert np.isnan(found.half_width).tolist() == [True, False, False]
