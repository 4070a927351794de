"""Differences from a reference that ran on the same seeds: the block model, and each pair's own t test."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis.run_schema import Direction
from analysis.statistics.intervals import t_quantile
from analysis.statistics.seed_blocks import (
    MIN_SEEDS,
    complete_seeds,
    complete_table,
    is_complete,
    two_way,
    uneven_two_way,
)

ONE_SIDED = 0.025
"""Level of a claim of non-inferiority; intervals are of 95 %."""


class TTest(NamedTuple):
    """Intervals difference ± half_width and two-sided p values of "no difference"; arrays of shape (..., C)."""

    standard_error: NDArray[np.float64]
    half_width: NDArray[np.float64]
    p: NDArray[np.float64]
    df: int


class Contrasts(NamedTuple):
    """Mean differences from the reference, of shape (..., C), in the unit of the values, tested in two ways."""

    difference: NDArray[np.float64]
    block: TTest
    pair: TTest
    n: int


def contrasts(values: ArrayLike, reference: ArrayLike) -> Contrasts:
    """Δ_c = mean over seeds of y_cs − y_0s, with the block interval and each pair's own.

    The shared part of the runs of a seed cancels in y_cs − y_0s. In the block model (see `seed_blocks`) the variance of
    Δ_c is 2σ²/n. σ² is estimated by the residual mean square of the table of all rows and the reference's,
    df = C(n − 1). So Δ_c ± t_df √(2 s²_res / n).

    The pair's interval is Student's, of the differences alone: Δ_c ± t_{n−1} s_c/√n. It assumes no common variance.
    With one pair, both intervals are the same. Claims rest on the pair's; the block's is shown beside it, labelled.

    Measured at a nominal .95, with 20 configurations and a correlation of .5 between runs of a seed (`test_coverage`):

    - Equal variances: block and pair cover .95. Under Holm at .05, with a gap of three sd, the block model finds .98 of
      the gaps at 3 seeds and 1.00 at 5. The pairs find .07 and .66, and .91 at 6 (power needs seeds, not a model).
    - Residual sd that vary by a log-sd of .5: the block interval covers .82 of the noisiest tenth, for any n. Holm on
      its p values errs in .12 of the studies (nominal .05). The pair covers .95 and errs in .05.
    - A preceding test of equal variances does not repair this. At n = 3 Bartlett's test (of the residuals) detects the
      log-sd of .5 in half the studies, and in one of seven with 6 configurations. In the studies that pass, Holm on the
      block errs in .14.
    - Skewed noise (exponential) that is alike in all rows cancels in pairs: .97. With a noiseless reference the skew
      stays, and the pair too covers only .88 at n = 3 to .90 at n = 10. Nearly all misses are on the side of the long
      tail.

    Args:
        values: (..., C, n), configurations × the same seeds.
        reference: (..., n), the reference's values on these seeds.
    Returns:
        As described in its class. For n < 3 everything except the difference is NaN. Seeds that agree exactly give the
        limit of vanishing noise: half width 0, and p = 0, or 1 if the difference is 0.
    Raises:
        ValueError: the seeds differ in number, or a value is missing.
    Source: Scheffé 1959, The Analysis of Variance, sections 3.5 and 4.2 (block); Student 1908 (pair).
    """
    table, own = complete_table(values), complete_seeds(reference, "reference")
    n = table.shape[-1]
    if own.shape[-1] != n:
        raise ValueError(f"`values` and `reference` must have the same seeds, but got {n} and {own.shape[-1]}")
    own = np.broadcast_to(own, (*table.shape[:-2], n))[..., None, :]
    differences = table - own
    mean = differences.mean(axis=-1)
    if n < MIN_SEEDS:
        nothing = np.full(mean.shape, np.nan)
        return Contrasts(mean, TTest(nothing, nothing, nothing, 0), TTest(nothing, nothing, nothing, 0), n)
    model = two_way(np.concatenate((own, table), axis=-2))
    block = np.broadcast_to(np.sqrt(2 * model.residual_variance[..., None] / n), mean.shape)
    pair = differences.std(axis=-1, ddof=1) / np.sqrt(n)
    return Contrasts(mean, _t_test(mean, block, model.df), _t_test(mean, pair, n - 1), n)


def block_tests(values: ArrayLike, rows: ArrayLike, references: ArrayLike) -> TTest:
    """The block model's tests of `contrasts` for many pairs of rows of one table at once.

    Args:
        values: (C, n), configurations × seeds, NaN if one lacks a seed; all values enter the estimate of the noise.
        rows, references: (P,), the two rows of each pair; they are compared on the seeds that both have.
    Returns:
        (P,) arrays. NaN for a pair that shares fewer than 3 seeds.
    Raises:
        ValueError: there are fewer than 3 seeds, or a value is infinite.
    """
    if not is_complete(values):
        return _uneven_block_tests(np.asarray(values, dtype=np.float64), np.asarray(rows), np.asarray(references))
    table = complete_table(values)
    n = table.shape[-1]
    if n < MIN_SEEDS:
        raise ValueError(f"`values` must have at least {MIN_SEEDS} seeds, but got {n}")
    model = two_way(table)
    difference = (table[np.asarray(rows)] - table[np.asarray(references)]).mean(axis=-1)
    standard_error = np.full(difference.shape, np.sqrt(2 * model.residual_variance / n))
    return _t_test(difference, standard_error, model.df)


def _uneven_block_tests(table: NDArray[np.float64], rows: NDArray[np.intp], references: NDArray[np.intp]) -> TTest:
    model = uneven_two_way(table)
    differences = table[rows] - table[references]
    counts = (~np.isnan(differences)).sum(axis=1)
    is_enough = (counts >= MIN_SEEDS) & (model.df > 0)
    n = np.maximum(counts, 1)
    difference = np.where(is_enough, np.nansum(differences, axis=1) / n, np.nan)
    standard_error = np.where(is_enough, np.sqrt(2 * model.residual_variance / n), np.nan)
    return _t_test(difference, standard_error, max(model.df, 1))


class NonInferiority(NamedTuple):
    """One-sided tests of "worse by the margin or more"; arrays of shape (..., C).

    bound: the worst difference that is not excluded, in the unit of the values: a lower limit if the metric is
    maximised, an upper one if it is minimised. p: p value of the test. holds: whether the bound is within the margin,
    which is equivalent to p < ONE_SIDED.
    """

    bound: NDArray[np.float64]
    p: NDArray[np.float64]
    holds: NDArray[np.bool_]


def non_inferiority(difference: ArrayLike, test: TTest, margin: float, direction: Direction) -> NonInferiority:
    """Test whether configurations are worse than the reference by less than a margin that was fixed beforehand.

    Args:
        difference: (..., C), configuration − reference.
        test: tests of these differences, `block` or `pair` of `contrasts`.
        margin: how much worse does not yet count as a loss, > 0, in the unit of the values.
        direction: what is better in this metric.
    Returns:
        As described in its class. A NaN in the input gives NaN, and the claim does not hold.
    Source: Schuirmann 1987, A comparison of the two one-sided tests procedure, of which this is one side.
    """
    sign = 1.0 if direction == "maximize" else -1.0
    gain = sign * np.asarray(difference, dtype=np.float64)
    bound = gain - stats.t.ppf(1 - ONE_SIDED, max(test.df, 1)) * test.standard_error
    p = stats.t.sf(_t(gain + margin, test.standard_error), max(test.df, 1))
    return NonInferiority(sign * bound, p, p < ONE_SIDED)


def fixed_sequence(p: ArrayLike, chi: ArrayLike) -> NDArray[np.bool_]:
    """The claims that hold if they are tested from the largest χ downwards, up to the first that fails.

    Each test has the level ONE_SIDED, and yet the chance of any false claim is at most that, for any dependence. The
    order was fixed before the data, and an error needs a rejection of the first true hypothesis that is reached.

    Args:
        p: (C,), one-sided p values; a NaN counts as a failure.
        chi: (C,), bond dimensions, all different.
    Returns:
        (C,) mask in the order of the input.
    Source: Maurer, Hothorn and Lehmacher 1995, Multiple comparisons in drug clinical trials and preclinical assays:
        a-priori ordered hypotheses.
    """
    p, chi = np.asarray(p, dtype=np.float64), np.asarray(chi, dtype=np.float64)
    order = np.argsort(-chi)
    holds = np.empty(p.size, dtype=np.bool_)
    holds[order] = np.logical_and.accumulate(p[order] < ONE_SIDED)
    return holds


def _t_test(difference: NDArray, standard_error: NDArray, df: int) -> TTest:
    p = 2 * stats.t.sf(np.abs(_t(difference, standard_error)), df)
    return TTest(standard_error, t_quantile(df) * standard_error, p, df)


def _t(difference: NDArray, standard_error: NDArray) -> NDArray[np.float64]:
    """Ratio of difference and standard error; without noise ±∞, or 0 if the difference is 0 as well."""
    limit = np.where(difference > 0, np.inf, np.where(difference < 0, -np.inf, 0))
    limit = np.where(np.isnan(difference) | np.isnan(standard_error), np.nan, limit)
    return np.divide(difference, standard_error, out=limit, where=standard_error > 0)
