"""Intervals of means and of ratios of means over seeds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis.run_schema import MIN_SEEDS
from analysis.statistics.seed_blocks import complete_seeds


def t_quantile(df: float) -> float:
    """Student's quantile for a two-sided interval of 95 %."""
    return float(stats.t.ppf(0.975, df))


class MeanInterval(NamedTuple):
    """Means over seeds with their intervals `mean ± half_width`; every array has the shape (...)."""

    mean: NDArray[np.float64]
    half_width: NDArray[np.float64]
    std: NDArray[np.float64]
    n: int


def mean_interval(values: ArrayLike) -> MeanInterval:
    """Mean over seeds and its own 95 % t interval, mean ± t_{n−1} s / √n.

    Each configuration's interval rests only on its own seeds. With 3 to 10 normal seeds it covers at its nominal level;
    percentile and BCa bootstraps do not (.75 instead of .95 at n = 3).

    Args:
        values: (..., n), one value per seed along the last axis; a NaN makes its mean and interval NaN.
    Returns:
        Arrays of shape (...); std is the sample standard deviation (n − 1). For n < 2 std and half_width are NaN, for
        n = 0 the mean is as well.
    Source: Student 1908, The probable error of a mean.
    """
    samples = np.asarray(values, dtype=np.float64)
    n = samples.shape[-1]
    undefined = np.full(samples.shape[:-1], np.nan)
    mean = samples.mean(axis=-1) if n else undefined
    if n < 2:
        return MeanInterval(mean, undefined, undefined, n)
    std = samples.std(axis=-1, ddof=1)
    return MeanInterval(mean, t_quantile(n - 1) * std / np.sqrt(n), std, n)


class RatioInterval(NamedTuple):
    """Ratios of means with their intervals, which are not symmetric; every array has the shape (...)."""

    ratio: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    n: int


def ratio_interval(values: ArrayLike, reference: ArrayLike) -> RatioInterval:
    """Mean of `values` over mean of `reference`, paired by seed, with Fieller's 95 % interval: retained accuracy.

    For the true ratio R the differences y_s − R d_s have mean zero, so the interval is every R that their t test does
    not reject. For normal pairs the coverage is exact, whatever their variances and correlation. The set is an interval
    only if the denominator itself differs from zero, |d̄| > t s_d/√n. Otherwise it is unbounded (all
    numbers, or all except an interval), and both limits are NaN: the seeds do not bound the ratio, and no limit is
    claimed.

    Args:
        values: (..., n), one value per seed.
        reference: (n,) or (..., n), values of the denominator on the same seeds.
    Returns:
        Arrays of shape (...), without unit (1 is "all retained"). For n < 3, or a mean reference of 0, limits are NaN.
        A ratio with denominator 0 is NaN.
    Raises:
        ValueError: the seeds differ in number, or a value is missing.
    Source: Fieller 1954, Some problems in interval estimation.
    """
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
    scale = t_quantile(n - 1) ** 2 / (n * (n - 1))  # t² / n, and the n − 1 of a variance
    # The set of R with a R² − 2 b R + c ≤ 0.
    a = d_mean**2 - scale * (d_off**2).sum(axis=-1)
    b = y_mean * d_mean - scale * (y_off * d_off).sum(axis=-1)
    c = y_mean**2 - scale * (y_off**2).sum(axis=-1)
    a = np.where(a > 0, a, np.nan)
    root = np.sqrt(np.maximum(b**2 - a * c, 0))  # the ratio itself is in the set, so a negative value is rounding
    return RatioInterval(ratio, (b - root) / a, (b + root) / a, n)
