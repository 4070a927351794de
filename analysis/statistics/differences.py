"""Differences between means over seeds, of two configurations or of two groups of them, with their t tests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis.run_schema import MIN_SEEDS, Direction

FLOOR = 0.5
"""Values that are rounded to a step have a standard deviation of at least this share of it."""


class TTest(NamedTuple):
    """Differences with their standard errors, degrees of freedom and two-sided p values of "no difference", (P,).

    n: seeds of each difference, of the configuration with fewest. Everything except difference and n is NaN if n < 3.
    """

    difference: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    df: NDArray[np.float64]
    p: NDArray[np.float64]
    n: NDArray[np.int64]

    def at(self, which: ArrayLike) -> TTest:
        """Some of the tests, by a mask or by numbers."""
        chosen = np.asarray(which)
        return TTest(
            self.difference[chosen], self.standard_error[chosen], self.df[chosen], self.p[chosen], self.n[chosen]
        )

    def half_width(self, level: ArrayLike = 0.05) -> NDArray[np.float64]:
        """Half the width of the two-sided intervals that miss with this probability; infinite at level 0."""
        with np.errstate(invalid="ignore"):
            return stats.t.isf(np.asarray(level) / 2, self.df) * self.standard_error


def rounding_step(values: ArrayLike) -> float:
    """The step to which values are rounded: the smallest difference between two, if some are equal; else 0.

    Args:
        values: of any shape; NaN if a value is missing.
    """
    known = np.asarray(values, dtype=np.float64)
    known = np.sort(known[np.isfinite(known)])
    gaps = np.diff(known)
    return float(gaps[gaps > 0].min()) if (gaps == 0).any() and (gaps > 0).any() else 0.0


def pair_tests(
    values: ArrayLike, first: ArrayLike, second: ArrayLike, paired: ArrayLike, *, step: float = 0.0
) -> TTest:
    """Test each difference between the means of two configurations over their seeds.

    Paired: Student's t test of the differences on the seeds that both have. It is for runs that share more than the
    seed, such as the weights that they start from: what they share cancels. Otherwise Welch's test, with all seeds of
    both: independent runs gain nothing by pairing, and Welch's has up to twice the degrees of freedom.

    Args:
        values: (C, S), configurations × seeds; NaN if a configuration lacks the seed.
        first, second: (P,), the rows of each pair; the difference is first − second.
        paired: (P,) or one for all.
        step: that of `rounding_step`. A sample standard deviation counts as at least half of it: rounded values can
            agree by chance.
    Returns:
        As described in its class. Without noise the limit of vanishing noise: p = 0, or 1 if the difference is 0.
    Source: Student 1908, The probable error of a mean; Welch 1947, The generalization of "Student's" problem.
    """
    table = np.asarray(values, dtype=np.float64)
    first, second = np.asarray(first, dtype=np.intp), np.asarray(second, dtype=np.intp)
    paired = np.broadcast_to(np.asarray(paired, dtype=np.bool_), first.shape)
    floor = (FLOOR * step) ** 2
    mean, of_mean, n = _means(table, floor)
    a, b = of_mean[first], of_mean[second]
    with np.errstate(invalid="ignore", divide="ignore"):
        welch_df = (a + b) ** 2 / (a**2 / (n[first] - 1) + b**2 / (n[second] - 1))
    fewest = np.minimum(n[first], n[second])
    welch_df = np.where(a + b == 0, fewest - 1, welch_df)
    shared_mean, of_shared, shared = _means(table[first] - table[second], 2 * floor)
    return t_test(
        np.where(paired, shared_mean, mean[first] - mean[second]),
        np.sqrt(np.where(paired, of_shared, a + b)),
        np.where(paired, shared - 1.0, welch_df),
        np.where(paired, shared, fewest),
    )


def group_test(values: ArrayLike, coefficients: ArrayLike, blocks: ArrayLike, *, step: float = 0.0) -> TTest:
    """Test one weighted sum of the means of several configurations, such as the mean difference over several sizes.

    Configurations whose runs of one seed begin from the same weights share noise. Such a block counts by the weighted
    sums of its single seeds, on the seeds that all of the block have. Blocks are independent. With one block it is the
    paired test of `pair_tests`, and with a block for each configuration Welch's.

    Args:
        values: (C, S), configurations × seeds; NaN if a configuration lacks the seed.
        coefficients: (C,), the weight of each mean.
        blocks: (C,), the number of each configuration's block.
        step: as in `pair_tests`.
    Returns:
        Arrays of shape (1,).
    Source: Satterthwaite 1946, An approximate distribution of estimates of variance components.
    """
    table, weights = np.asarray(values, dtype=np.float64), np.asarray(coefficients, dtype=np.float64)
    kinds, block_of = np.unique(np.asarray(blocks), return_inverse=True)
    is_in = block_of.reshape(-1) == np.arange(kinds.size)[:, None]
    weighted = weights[:, None] * table
    sums = np.array([weighted[own].sum(axis=0) for own in is_in])
    means, parts, n = _means(sums, (is_in * weights**2).sum(axis=1) * (FLOOR * step) ** 2)
    variance = parts.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        df = np.where(variance == 0, n.min() - 1, variance**2 / (parts**2 / (n - 1)).sum())
    one = np.ones(1)
    return t_test(means.sum() * one, np.sqrt(variance) * one, df * one, np.array([n.min()]))


def not_inferior(test: TTest, margin: float, direction: Direction) -> NDArray[np.float64]:
    """One-sided p values of "worse by the margin or more", (P,).

    Args:
        margin: how much worse does not yet count as a loss, > 0, in the unit of the values; fixed beforehand.
        direction: what is better in this metric.
    Source: Schuirmann 1987, A comparison of the two one-sided tests procedure, of which this is one side.
    """
    gain = test.difference if direction == "maximize" else -test.difference
    return _sf(gain + margin, test.standard_error, test.df)


def compatible_intervals(
    test: TTest, adjusted: ArrayLike, shares: ArrayLike, level: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of intervals that exclude zero exactly where `multiplicity.graphical` rejects, (P,) each.

    Each interval is that of its share of the level. If the difference is rejected, it ends at zero, which it excludes.
    `benchmarks.calibration` measures how often all of them hold together.

    Args:
        adjusted: (P,), adjusted p values.
        shares: (P,), the share of the level that a test has left; of a rejected test, the share that it had at first.
        level: (P,) or one for all.
    Source: Guilbaud 2008, Simultaneous confidence regions corresponding to Holm's step-down procedure and other
        closed-testing procedures.
    """
    levels = np.asarray(level, dtype=np.float64)
    rejected, half = np.asarray(adjusted) <= levels, test.half_width(levels * np.asarray(shares, dtype=np.float64))
    low = np.where(rejected & (test.difference > 0), 0.0, test.difference - half)
    high = np.where(rejected & (test.difference < 0), 0.0, test.difference + half)
    return low, high


def _means(table: NDArray[np.float64], floor: ArrayLike) -> tuple[NDArray, NDArray, NDArray[np.int64]]:
    """Mean of each row over its seeds, the variance of that mean, and the number of seeds; NaN where it is unknown."""
    n = (~np.isnan(table)).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.nansum(table, axis=-1) / np.where(n > 0, n, np.nan)
        squares = np.nansum((table - mean[:, None]) ** 2, axis=-1)
        variance = np.where(n > 1, np.maximum(squares / (n - 1), floor) / n, np.nan)
    return mean, variance, n


def t_test(difference: NDArray, standard_error: NDArray, df: NDArray, n: NDArray) -> TTest:
    """The tests of differences; those with fewer than 3 seeds have none."""
    enough = n >= MIN_SEEDS
    standard_error, df = (np.where(enough, each, np.nan) for each in (standard_error, df))
    p = np.minimum(2 * _sf(np.abs(difference), standard_error, df), 1)
    return TTest(difference, standard_error, df, p, n)


def _sf(difference: NDArray, standard_error: NDArray, df: NDArray) -> NDArray[np.float64]:
    """P(T > difference / standard error); without noise 0, ½ or 1, by the sign of the difference."""
    limit = np.where(difference > 0, np.inf, np.where(difference < 0, -np.inf, 0))
    limit = np.where(np.isnan(difference) | np.isnan(standard_error), np.nan, limit)
    t = np.divide(difference, standard_error, out=limit, where=standard_error > 0)
    return stats.t.sf(t, df)
