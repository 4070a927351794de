"""Number of seeds that a gap between two configurations needs, and the gap that a number of seeds resolves."""

from __future__ import annotations

import numpy as np
from scipy import optimize, stats

from analysis.statistics.seed_blocks import MIN_SEEDS

TARGET = 0.8
"""Power that is asked for."""
MAX_SEEDS = 100_000

# The trapezoid rule converges faster than any power of the step for a smooth integrand that vanishes at both ends.
_Z = np.arange(-8.5, 8.5, 0.01)
_Z_WEIGHTS = stats.norm.pdf(_Z) * 0.01


def gap_power(gap: float, n: int, sd: float, correlation: float) -> float:
    """Probability that a two-sided paired t test of n seeds at .05 detects a true gap of either sign.

    Args:
        gap: difference between the two true means, in the unit of `sd`.
        n: number of seeds of each configuration, at least 3.
        sd: standard deviation over seeds of each configuration, > 0; the noise is normal, and sd is equal for both.
        correlation: correlation of the two results of one seed, in [−1, 1).
    Error: below 1e-6 for n up to 1,000. The noncentral t is integrated here, over the normal of its numerator and the
        χ² of its denominator, because `scipy.stats.nct` is NaN or wrong at large noncentrality.
    Source: Student 1908, The probable error of a mean.
    """
    noncentrality, df = gap / (sd * np.sqrt(2 * (1 - correlation) / n)), n - 1
    # |T| > c if χ²_df < df (Z + δ)²/c², averaged over Z.
    limit = df * (_Z + noncentrality) ** 2 / stats.t.ppf(0.975, df) ** 2
    return float(np.minimum(stats.chi2.cdf(limit, df) @ _Z_WEIGHTS, 1))


def seeds_needed(gap: float, sd: float, correlation: float) -> int:
    """The smallest number of seeds, at least 3, whose test detects a true gap with the power `TARGET`.

    Arguments as in `gap_power`.

    Raises:
        ValueError: 100,000 seeds are not enough.
    """
    few, many = MIN_SEEDS - 1, MIN_SEEDS
    while not gap_power(gap, many, sd, correlation) >= TARGET:
        if many >= MAX_SEEDS:
            raise ValueError(f"a gap of {gap} at sd={sd} needs more than {MAX_SEEDS} seeds for a power of {TARGET}")
        few, many = many, min(2 * many, MAX_SEEDS)
    while many - few > 1:
        middle = (few + many) // 2
        if gap_power(gap, middle, sd, correlation) >= TARGET:
            many = middle
        else:
            few = middle
    return many


def resolved_gap(n: int, sd: float, correlation: float) -> float:
    """The smallest true gap, in the unit of `sd`, that n seeds detect with the power `TARGET`.

    Arguments as in `gap_power`.

    Error: below 1e-6 of sd.
    """
    high = 1.0
    while gap_power(high, n, 1.0, correlation) < TARGET:
        high *= 2
    found = optimize.root_scalar(lambda gap: gap_power(gap, n, 1.0, correlation) - TARGET, bracket=(0, high), xtol=1e-7)
    return sd * found.root
