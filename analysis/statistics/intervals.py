"""Intervals of means and of ratios of means over seeds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis.statistics.seed_blocks import MIN_SEEDS, complete_seeds, complete_table, marginal_variance, two_way

LEVEL = 0.95


class MeanInterval(NamedTuple):
    """Means over seeds with their intervals `mean ± half_width`; every array has the shape (...)."""

    mean: NDArray[np.float64]
    half_width: NDArray[np.float64]
    std: NDArray[np.float64]
    n: int


def mean_interval(values: ArrayLike, level: float = LEVEL) -> MeanInterval:
    """Mean over seeds and its own t interval, mean ± t_{n−1} s / √n.

    Each configuration's interval rests only on its own seeds. With 3 to 10 normal seeds it covers at its nominal level;
    percentile and BCa bootstraps do not (.75 instead of .95 at n = 3).

    Args:
        values: (..., n), one value per seed along the last axis; a NaN makes its mean and interval NaN.
        level: coverage, in (0, 1).
    Returns:
        Arrays of shape (...); std is the sample standard deviation (n − 1). For n < 2 std and half_width are NaN, for
        n = 0 the mean is as well.
    Raises:
        ValueError: `level` is not inside (0, 1), or `values` has no axis.
    Source: Student 1908, The probable error of a mean.
    """
    check_level(level)
    samples = np.asarray(values, dtype=np.float64)
    if samples.ndim == 0:
        raise ValueError("`values` must have an axis of seeds, but got a single number")
    n = samples.shape[-1]
    undefined = np.full(samples.shape[:-1], np.nan)
    mean = samples.mean(axis=-1) if n else undefined
    if n < 2:
        return MeanInterval(mean, undefined, undefined, n)
    std = samples.std(axis=-1, ddof=1)
    return MeanInterval(mean, stats.t.ppf((1 + level) / 2, n - 1) * std / np.sqrt(n), std, n)


class MarginalInterval(NamedTuple):
    """Means with intervals that share one pooled variance. Arrays have the shape (..., C); variance and df, (...)."""

    mean: NDArray[np.float64]
    half_width: NDArray[np.float64]
    variance: NDArray[np.float64]
    df: NDArray[np.float64]
    n: int


def marginal_interval(values: ArrayLike, level: float = LEVEL) -> MarginalInterval:
    """Means with a variance pooled over configurations that share seeds. Opt-in: a figure with it states it.

    In the model y_cs = μ_c + b_s + ε_cs (see `seed_blocks`) a mean over n seeds has the variance (σ_b² + σ²) / n. Two
    independent mean squares estimate the sum. V, the sample variance of the n seed means, has the expectation
    σ_b² + σ²/C and n − 1 degrees of freedom. s²_res has the expectation σ² and (C − 1)(n − 1) degrees of freedom. So

        s²_marg = V + s²_res (C − 1)/C

    has the expectation σ_b² + σ². Satterthwaite's degrees of freedom match the first two moments of a scaled χ²:

        df = s²_marg² / [V²/(n − 1) + s²_res² (C − 1)/(C²(n − 1))],

    between n − 1 (all variance shared; also C = 1, which is `mean_interval`) and C(n − 1) (none shared).

    The interval assumes one variance for all configurations, so it is too short for the noisiest, as block contrasts
    are (`contrasts.headline`). At n = 3 it also covers less than a nominal .95 if much of the variance is shared: with
    40 configurations it covers .94 at a correlation of .5, and .92 at .8.

    Args:
        values: (..., C, n), configurations × the same seeds.
        level: coverage, in (0, 1).
    Returns:
        As described in its class. For n < 3 half_width is NaN.
    Raises:
        ValueError: `level` is not inside (0, 1), rows have unequal seeds, or a value is missing.
    Source: Satterthwaite 1946, An approximate distribution of estimates of variance components.
    """
    check_level(level)
    table = complete_table(values)
    n = table.shape[-1]
    if n < MIN_SEEDS:
        undefined = np.full(table.shape[:-2], np.nan)
        return MarginalInterval(table.mean(axis=-1), np.full(table.shape[:-1], np.nan), undefined, undefined, n)
    block = two_way(table)
    variance, df = marginal_variance(block)
    half_width = stats.t.ppf((1 + level) / 2, df) * np.sqrt(variance / n)
    return MarginalInterval(block.means, np.broadcast_to(half_width[..., None], block.means.shape), variance, df, n)


class RatioInterval(NamedTuple):
    """Ratios of means with their intervals, which are not symmetric; every array has the shape (...)."""

    ratio: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    n: int


def ratio_interval(values: ArrayLike, reference: ArrayLike, level: float = LEVEL) -> RatioInterval:
    """Mean of `values` over mean of `reference`, paired by seed, with Fieller's interval: retained accuracy.

    For the true ratio R the differences y_s − R d_s have mean zero, so the interval is every R that their t test does
    not reject. For normal pairs the coverage is exact, whatever their variances and correlation. The set is an interval
    only if the denominator itself differs from zero at this level, |d̄| > t s_d/√n. Otherwise it is unbounded (all
    numbers, or all except an interval), and both limits are NaN: the seeds do not bound the ratio, and no limit is
    claimed.

    Args:
        values: (..., n), one value per seed.
        reference: (n,) or (..., n), values of the denominator on the same seeds.
        level: coverage, in (0, 1).
    Returns:
        Arrays of shape (...), without unit (1 is "all retained"). For n < 3, or a mean reference of 0, limits are NaN.
        A ratio with denominator 0 is NaN.
    Raises:
        ValueError: `level` is not inside (0, 1), the seeds differ in number, or a value is missing.
    Source: Fieller 1954, Some problems in interval estimation.
    """
    check_level(level)
    y, d = complete_seeds(values), complete_seeds(reference, "reference")
    if y.shape[-1] != d.shape[-1]:
        raise ValueError(f"`values` and `reference` must have the same seeds, but got {y.shape[-1]} and {d.shape[-1]}")
    y, d = np.broadcast_arrays(y, d)
    n, y_mean, d_mean = y.shape[-1], y.mean(axis=-1), d.mean(axis=-1)
    undefined = np.full(y_mean.shape, np.nan)
    ratio = np.divide(y_mean, d_mean, out=undefined.copy(), where=d_mean != 0)
    if n < MIN_SEEDS:
        return RatioInterval(ratio, undefined, undefined, n)
    y_off, d_off = y - y_mean[..., None], d - d_mean[..., None]
    scale = stats.t.ppf((1 + level) / 2, n - 1) ** 2 / (n * (n - 1))  # t² / n, and the n − 1 of a variance
    # The set of R with a R² − 2 b R + c ≤ 0.
    a = d_mean**2 - scale * (d_off**2).sum(axis=-1)
    b = y_mean * d_mean - scale * (y_off * d_off).sum(axis=-1)
    c = y_mean**2 - scale * (y_off**2).sum(axis=-1)
    a = np.where(a > 0, a, np.nan)
    root = np.sqrt(np.maximum(b**2 - a * c, 0))  # the ratio itself is in the set, so a negative value is rounding
    return RatioInterval(ratio, (b - root) / a, (b + root) / a, n)


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`0 < level < 1` must hold, but got level={level}")
