"""Intervals over seeds: arrays in, arrays out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95


class MeanInterval(NamedTuple):
    """Means over seeds with their intervals `mean ± half_width`; every array has the shape (...)."""

    mean: NDArray[np.float64]
    half_width: NDArray[np.float64]
    std: NDArray[np.float64]
    n: int


def mean_interval(values: ArrayLike, level: float = LEVEL) -> MeanInterval:
    """Mean over seeds and its own t interval, mean ± t_{n−1} s / √n.

    Each configuration's interval rests on its own seeds alone. Over 3 to 10 normal seeds it covers at its nominal
    level, where percentile and BCa bootstraps do not (.75 instead of .95 at n = 3).

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
    if not 0 < level < 1:
        raise ValueError(f"`0 < level < 1` must hold, but got level={level}")
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
