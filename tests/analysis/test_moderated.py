from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.statistics.differences import TTest, pair_tests, rounding_step
from analysis.statistics.moderated import MOST_DF, moderated_tests
from benchmarks.calibration import KINDS, noise


def welch(values, n_pairs, **settings):
    return pair_tests(values, np.arange(n_pairs), np.arange(n_pairs, 2 * n_pairs), False, **settings)


def rejects(p):
    """Whether Holm's procedure rejects each of a family, at .05."""
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    return adjusted <= 0.05


def test_variances_are_drawn_towards_what_is_usual():
    rng = np.random.default_rng(0)
    test = welch(rng.normal(size=(40, 5)), 20)
    found = moderated_tests(test, 2 / 5)
    np.testing.assert_array_equal(found.difference, test.difference)
    np.testing.assert_allclose(found.df, test.df + MOST_DF)
    assert found.standard_error.std() < test.standard_error.std()
    order = np.argsort(test.standard_error**2 * test.df)
    assert found.standard_error[order[0]] > test.standard_error[order[0]]
    np.testing.assert_allclose(found.p, 2 * stats.t.sf(abs(found.difference) / found.standard_error, found.df))


def test_prior_is_that_of_the_source_where_it_is_not_capped():
    """Variances from a prior of 1 degree of freedom and scale 3: both are found again."""
    rng = np.random.default_rng(1)
    n_pairs, df = 40_000, 8.0
    true = 3.0 / rng.chisquare(1, size=n_pairs)
    variances = true * rng.chisquare(df, size=n_pairs) / df
    test = TTest(np.zeros(n_pairs), np.sqrt(variances), np.full(n_pairs, df), np.ones(n_pairs), np.full(n_pairs, 9))
    found = moderated_tests(test, 1.0)
    assert found.df[0] - df == pytest.approx(1.0, rel=0.05)
    own = found.df[0] - df
    scale = (found.standard_error**2 * found.df - df * variances) / own
    np.testing.assert_allclose(scale, 3.0, rtol=0.05)


def test_few_pairs_and_pairs_without_noise_are_left_out():
    rng = np.random.default_rng(2)
    test = welch(rng.normal(size=(12, 3)), 6)
    assert np.isnan(moderated_tests(test, 2 / 3).p).all()
    values = rng.normal(size=(16, 3))
    values[0], values[8] = 1.0, 2.0
    found = moderated_tests(welch(values, 8), 2 / 3)
    assert (found.p[0], found.df[0]) == (0, 2)
    assert np.isfinite(found.p).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_pairs", [7, 12, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("n", [3, pytest.param(5, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("one_rival", [True, False])
def test_a_family_errs_in_few_studies_and_finds_more(kind, n_pairs, n, one_rival):
    rng, n_studies, level = np.random.default_rng(3), 200, 0.05
    errors, plain, moderated = 0, 0.0, 0.0
    for _ in range(n_studies):
        values = noise(rng, kind, (2 * n_pairs, n))
        values = np.round(values) if kind == "ties" else values
        first, second = np.arange(n_pairs), n_pairs + (0 if one_rival else 1) * np.arange(n_pairs)
        step = rounding_step(values)
        errors += rejects(moderated_tests(pair_tests(values, first, second, False, step=step), 2 / n).p).any()
        values[:n_pairs] += 4
        test = pair_tests(values, first, second, False, step=step)
        plain += rejects(test.p).mean() / n_studies
        moderated += rejects(moderated_tests(test, 2 / n).p).mean() / n_studies
    assert errors / n_studies <= level + 4 * np.sqrt(level * (1 - level) / n_studies)
    assert moderated >= plain
    if n == 3:
        assert moderated > 1.15 * plain
