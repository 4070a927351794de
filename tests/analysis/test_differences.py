from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from analysis.statistics.differences import group_test, not_inferior, pair_tests, rounding_step

NAN = np.nan


@pytest.fixture
def table():
    """Eight configurations on at most six seeds; two lack some."""
    values = 40 + np.random.default_rng(3).normal(size=(8, 6))
    values[2, 4:] = values[5, :2] = NAN
    return values


def known(row):
    return row[~np.isnan(row)]


def test_unpaired_tests_are_scipys_welch_tests_with_all_seeds(table):
    first, second = [0, 2, 5], [1, 3, 2]
    found = pair_tests(table, first, second, False)
    for at, (one, other) in enumerate(zip(first, second, strict=True)):
        expected = stats.ttest_ind(known(table[one]), known(table[other]), equal_var=False)
        interval = expected.confidence_interval(0.95)
        assert (found.p[at], found.df[at]) == pytest.approx((expected.pvalue, expected.df))
        assert found.difference[at] - found.half_width()[at] == pytest.approx(interval.low)
        assert found.difference[at] + found.half_width()[at] == pytest.approx(interval.high)
    assert found.n.tolist() == [6, 4, 4]


def test_paired_tests_are_scipys_on_the_seeds_that_both_have(table):
    first, second = [0, 2, 5], [1, 3, 0]
    found = pair_tests(table, first, second, True)
    for at, (one, other) in enumerate(zip(first, second, strict=True)):
        both = ~np.isnan(table[one] - table[other])
        expected = stats.ttest_rel(table[one, both], table[other, both])
        interval = expected.confidence_interval(0.95)
        assert (found.p[at], found.df[at], found.n[at]) == pytest.approx((expected.pvalue, expected.df, both.sum()))
        assert found.difference[at] + found.half_width()[at] == pytest.approx(interval.high)
        assert found.half_width(0.01)[at] == pytest.approx(
            (expected.confidence_interval(0.99).high - expected.confidence_interval(0.99).low) / 2
        )


def test_each_pair_is_tested_in_its_own_way(table):
    both = pair_tests(table, [0, 0], [1, 1], [True, False])
    assert both.p[0] == pair_tests(table, [0], [1], True).p[0]
    assert both.p[1] == pair_tests(table, [0], [1], False).p[0]


@pytest.mark.parametrize("paired", [False, True])
def test_a_group_of_two_is_a_pair(table, paired):
    one, pair = group_test(table[[2, 3]], [1, -1], [0, int(not paired)]), pair_tests(table, [2], [3], paired)
    for found, expected in zip(one, pair, strict=True):
        assert found == pytest.approx(expected)


def test_a_paired_group_is_one_sample_of_weighted_sums(table):
    weights = np.array([0.5, 0.5, -1.0])
    found = group_test(table[[0, 2, 3]], weights, ["start"] * 3)
    sums = known(weights @ table[[0, 2, 3]])
    expected = stats.ttest_1samp(sums, 0)
    assert (found.p[0], found.df[0], found.n[0]) == pytest.approx((expected.pvalue, len(sums) - 1, len(sums)))


def test_an_unpaired_group_adds_the_variances_of_its_means(table):
    weights = np.array([0.5, 0.5, -1.0])
    rows = [known(row) for row in table[[0, 2, 3]]]
    parts = [weight**2 * row.var(ddof=1) / len(row) for weight, row in zip(weights, rows, strict=True)]
    df = sum(parts) ** 2 / sum(part**2 / (len(row) - 1) for part, row in zip(parts, rows, strict=True))
    found = group_test(table[[0, 2, 3]], weights, [0, 1, 2])
    assert found.standard_error[0] == pytest.approx(np.sqrt(sum(parts)))
    assert found.df[0] == pytest.approx(df)
    assert found.difference[0] == pytest.approx(weights @ [row.mean() for row in rows])


def test_a_block_of_a_group_counts_by_its_weighted_sums(table):
    weights = np.array([0.5, 0.5, -1.0])
    found = group_test(table[[0, 2, 3]], weights, [0, 0, 1])
    both = known(0.5 * table[0] + 0.5 * table[2])
    expected = stats.ttest_ind(both, known(table[3]), equal_var=False)
    assert (found.p[0], found.df[0]) == pytest.approx((expected.pvalue, expected.df))


@pytest.mark.parametrize("one_rival", [False, True])
def test_groups_of_which_one_side_shares_its_start_reject_as_often_as_stated(one_rival):
    rng, n, weights = np.random.default_rng(0), 5, np.array([0.25] * 4 + ([-1.0] if one_rival else [-0.25] * 4))
    wrong = {False: 0, True: 0}
    for _ in range(1000):
        values = rng.normal(size=(len(weights), n))
        values[:4] = np.sqrt(0.1) * values[:4] + np.sqrt(0.9) * rng.normal(size=n)
        for known_to_share in wrong:
            blocks = [0] * 4 * known_to_share + list(range(1, len(weights) + 1 - 4 * known_to_share))
            wrong[known_to_share] += group_test(values, weights, blocks).p[0] <= 0.05
    assert wrong[True] <= 50 + 4 * np.sqrt(1000 * 0.05 * 0.95)
    assert wrong[False] > wrong[True]


@pytest.mark.parametrize("paired", [False, True])
def test_below_three_seeds_there_are_differences_and_no_claims(paired):
    found = pair_tests([[1.0, 2.0, NAN], [1.0, 1.0, 4.0]], [0], [1], paired)
    assert found.n.tolist() == [2]
    assert np.isfinite(found.difference).all()
    for missing in (found.standard_error, found.df, found.p, found.half_width(), not_inferior(found, 1, "maximize")):
        assert np.isnan(missing).all()
    nothing = pair_tests([[NAN, NAN], [1.0, 1.0]], [0], [1], paired)
    assert np.isnan(nothing.difference).all()
    assert nothing.n.tolist() == [0]


@pytest.mark.parametrize("paired", [False, True])
def test_seeds_that_agree_exactly_are_the_limit_of_little_noise(paired):
    found = pair_tests([[2.0] * 3, [1.0] * 3, [1.0] * 3], [0, 1], [1, 2], paired)
    assert found.half_width().tolist() == [0, 0]
    assert found.p.tolist() == [0, 1]
    assert not_inferior(found, 0.1, "minimize").tolist() == [1, 0]


def test_one_noiseless_side_leaves_the_other_its_degrees_of_freedom():
    found = pair_tests([[1.0, 2.0, 4.0, 4.0], [1.0] * 4], [0], [1], False)
    expected = stats.ttest_1samp([1.0, 2.0, 4.0, 4.0], 1)
    assert (found.p[0], found.df[0]) == pytest.approx((expected.pvalue, 3))


@given(hnp.arrays(float, (3, 4), elements=st.integers(-50, 50)), hnp.arrays(float, 4, elements=st.integers(-999, 999)))
def test_what_seeds_share_cancels_in_pairs(values, shared):
    plain, shifted = (pair_tests(table, [0, 1], [1, 2], True) for table in (values, values + shared))
    assert shifted.half_width() == pytest.approx(plain.half_width(), abs=1e-9)


def test_not_inferior_matches_scipy(table):
    found = pair_tests(table[[0, 1]], [0], [1], False)
    higher = stats.ttest_ind(table[0], table[1] - 0.5, equal_var=False, alternative="greater")
    lower = stats.ttest_ind(table[0], table[1] + 0.5, equal_var=False, alternative="less")
    assert not_inferior(found, 0.5, "maximize") == pytest.approx([higher.pvalue])
    assert not_inferior(found, 0.5, "minimize") == pytest.approx([lower.pvalue])


def test_the_step_of_rounded_values_is_found():
    values = np.random.default_rng(1).normal(size=(30, 5))
    assert rounding_step(values) == 0
    assert rounding_step(np.round(values, 1)) == pytest.approx(0.1)
    assert rounding_step([[1.0, NAN], [1.0, 1.0]]) == 0


@pytest.mark.parametrize("paired", [False, True])
def test_rounded_values_that_agree_have_the_noise_of_their_step(paired):
    found = pair_tests([[2.0] * 3, [1.0] * 3], [0], [1], paired, step=1.0)
    assert found.standard_error[0] == pytest.approx(np.sqrt(2 * 0.25 / 3))
    assert found.p[0] > 0.01
    free = pair_tests([[2.0, 9.0, 5.0], [1.0, 4.0, 8.0]], [0], [1], paired)
    assert pair_tests([[2.0, 9.0, 5.0], [1.0, 4.0, 8.0]], [0], [1], paired, step=1.0).p == free.p
