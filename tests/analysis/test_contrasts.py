from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from least_squares import anova_residual
from scipy import stats

from analysis.statistics.contrasts import block_tests, contrasts, fixed_sequence, non_inferiority


@pytest.fixture
def study():
    """Seven configurations and their reference on five seeds."""
    rng = np.random.default_rng(3)
    shared = rng.normal(size=5)
    return 40 + shared + rng.normal(size=(7, 5)), 41 + shared + rng.normal(size=5)


# contrasts ------------------------------------------------------------------------------------------------------------


def test_pair_matches_scipy(study):
    values, reference = study
    result = contrasts(values, reference)
    expected = stats.ttest_rel(values, reference, axis=1)
    interval = expected.confidence_interval(0.95)
    assert result.pair.p == pytest.approx(expected.pvalue)
    assert result.difference - result.pair.half_width == pytest.approx(interval.low)
    assert result.difference + result.pair.half_width == pytest.approx(interval.high)
    assert result.pair.df == expected.df[0] == 4


def test_block_matches_least_squares(study):
    values, reference = study
    result = contrasts(values, reference)
    error = np.sqrt(2 * anova_residual(np.vstack((values, reference))) / 5)
    difference = values.mean(axis=1) - reference.mean()
    assert result.block.df == 7 * 4
    assert result.difference == pytest.approx(difference)
    assert result.block.standard_error == pytest.approx([error] * 7)
    assert result.block.half_width == pytest.approx([stats.t.ppf(0.975, 28) * error] * 7)
    assert result.block.p == pytest.approx(2 * stats.t.sf(abs(difference) / error, 28))


@given(
    hnp.arrays(float, st.tuples(st.integers(1, 5), st.integers(3, 6)), elements=st.integers(-50, 50)),
    hnp.arrays(float, 6, elements=st.integers(-1000, 1000)),
)
def test_what_seeds_share_cancels(values, shared):
    reference, shared = np.arange(values.shape[1]) % 2, shared[: values.shape[1]]
    plain, shifted = contrasts(values, reference), contrasts(values + shared, reference + shared)
    for before, after in ((plain.block, shifted.block), (plain.pair, shifted.pair)):
        assert after.half_width == pytest.approx(before.half_width, abs=1e-9)


@given(hnp.arrays(float, st.integers(3, 8), elements=st.floats(-100, 100)))
def test_with_one_pair_block_and_pair_are_the_same(values):
    result = contrasts([values], np.sin(np.arange(len(values))))
    assert result.block.df == result.pair.df == len(values) - 1
    assert result.block.half_width == pytest.approx(result.pair.half_width, rel=1e-9)


def test_contrasts_work_along_leading_axes():
    rng = np.random.default_rng(4)
    values, reference = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 3, 5))
    result = contrasts(values, reference)
    one = contrasts(values[1, 2], reference[1, 2])
    assert result.block.p.shape == (2, 3, 4)
    assert result.block.p[1, 2] == pytest.approx(one.block.p)
    assert result.pair.half_width[1, 2] == pytest.approx(one.pair.half_width)


def test_block_tests_are_those_of_contrasts_for_each_pair(study):
    table = np.vstack(study)
    rows, references = [0, 3, 7, 2], [7, 2, 0, 3]
    tests = block_tests(table, rows, references)
    for at, (row, reference) in enumerate(zip(rows, references, strict=True)):
        others = [row, *(other for other in range(len(table)) if other not in (row, reference))]
        expected = contrasts(table[others], table[reference]).block
        assert tests.df == expected.df
        for found, wanted in zip(tests[:3], expected[:3], strict=True):
            assert found[at] == pytest.approx(wanted[0])


def test_block_tests_refuse_fewer_than_three_seeds(study):
    with pytest.raises(ValueError, match="at least 3 seeds, but got 2"):
        block_tests(study[0][:, :2], [0], [1])


def test_below_three_seeds_there_are_differences_and_no_claims():
    result = contrasts([[1.0, 2.0], [3.0, 4.0]], [1.0, 1.0])
    assert result.difference.tolist() == [0.5, 2.5]
    for test in (result.block, result.pair):
        assert np.isnan([test.standard_error, test.half_width, test.p]).all()
        claim = non_inferiority(result.difference, test, 1, "maximize")
        assert np.isnan([claim.bound, claim.p]).all()
        assert not claim.holds.any()


def test_seeds_that_agree_exactly_are_the_limit_of_little_noise():
    result = contrasts([[2.0, 3.0, 4.0], [1.0, 2.0, 3.0]], [1.0, 2.0, 3.0])
    for test in (result.block, result.pair):
        assert test.half_width == pytest.approx([0, 0], abs=1e-12)
        assert test.p == pytest.approx([0, 1], abs=1e-12)
        assert non_inferiority(result.difference, test, 0.1, "minimize").holds.tolist() == [False, True]


@pytest.mark.parametrize(
    ("values", "reference", "message"),
    [
        ([[1, 2, 3], [1, 2]], [1, 2, 3], "every row of `values` must have the same seeds, but their numbers differ"),
        ([[1, 2, 3]], [1, 2, 3, 4], "must have the same seeds, but got 3 and 4"),
        ([[1, 2, np.nan], [1, np.inf, 3]], [1, 2, 3], "every seed of every configuration, but 2 values are missing"),
        (
            [[1, 2, 3]],
            [1, np.nan, 3],
            "`reference` must have every seed of every configuration, but 1 value is missing",
        ),
        ([1, 2, 3], [1, 2, 3], r"must be \(\.\.\., configurations, seeds\), but its shape is \(3,\)"),
        ([[], []], [1], r"its shape is \(2, 0\)"),
    ],
)
def test_contrasts_refuse_seeds_that_do_not_pair(values, reference, message):
    with pytest.raises(ValueError, match=message) as refused:
        contrasts(values, reference)
    assert "\n" not in str(refused.value)


# non_inferiority ------------------------------------------------------------------------------------------------------


def test_non_inferiority_matches_scipy(study):
    values, reference = study
    result = contrasts(values, reference)
    higher = non_inferiority(result.difference, result.pair, 0.5, "maximize")
    expected = stats.ttest_rel(values, reference - 0.5, axis=1, alternative="greater")
    assert higher.p == pytest.approx(expected.pvalue)
    assert higher.bound == pytest.approx(expected.confidence_interval(0.975).low - 0.5)
    lower = non_inferiority(result.difference, result.pair, 0.5, "minimize")
    expected = stats.ttest_rel(values, reference + 0.5, axis=1, alternative="less")
    assert lower.p == pytest.approx(expected.pvalue)
    assert lower.bound == pytest.approx(expected.confidence_interval(0.975).high + 0.5)


@given(
    hnp.arrays(float, (3, 4), elements=st.floats(-10, 10)),
    st.floats(0.1, 30),
    st.sampled_from(["block", "pair"]),
)
def test_non_inferiority_holds_where_its_bound_is_within_the_margin(values, margin, which):
    result = contrasts(values, [0.0, 1.0, 0.5, -1.0])
    test = getattr(result, which)
    for direction, slack in (("maximize", lambda bound: bound + margin), ("minimize", lambda bound: margin - bound)):
        claim = non_inferiority(result.difference, test, margin, direction)
        clear = np.abs(slack(claim.bound)) > 1e-9
        assert (claim.holds == (slack(claim.bound) > 0))[clear].all()


def test_non_inferiority_turns_with_the_direction(study):
    values, reference = study
    up, down = contrasts(values, reference), contrasts(-values, -reference)
    maximised = non_inferiority(up.difference, up.pair, 0.5, "maximize")
    minimised = non_inferiority(down.difference, down.pair, 0.5, "minimize")
    assert minimised.p == pytest.approx(maximised.p)
    assert minimised.bound == pytest.approx(-maximised.bound)
    assert (maximised.bound < up.difference).all()


# fixed_sequence -------------------------------------------------------------------------------------------------------


def test_fixed_sequence_stops_at_the_first_failure_from_the_largest_chi():
    chi = [8, 32, 4, 16, 64]
    #                       stopped  first two  stopped  fails  holds
    assert fixed_sequence([0.001, 0.01, 0.001, 0.03, 0.02], chi).tolist() == [False, True, False, False, True]
    assert fixed_sequence([0.001, 0.01, 0.001, np.nan, 0.02], chi).tolist() == [False, True, False, False, True]
    assert not fixed_sequence([0, 0, 0, 0, 0.5], chi).any()
    assert fixed_sequence([], []).tolist() == []
