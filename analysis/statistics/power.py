"""Number of seeds that a gap between two configurations needs, and the gap that a number of seeds resolves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from analysis.statistics.seed_blocks import MIN_SEEDS

TARGET = 0.8
TWO_SIDED = 0.05
MAX_SEEDS = 100_000

# The trapezoid rule converges faster than any power of the step for a smooth integrand that vanishes at both ends.
_Z = np.arange(-8.5, 8.5, 0.01)
_Z_WEIGHTS = stats.norm.pdf(_Z) * 0.01
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(64)


def gap_power(gap: float, n: int, sd: float, correlation: float | None = None, level: float = TWO_SIDED) -> float:
    """Probability that a two-sided t test of n seeds detects a true gap of either sign.

    Args:
        gap: difference between the two true means, in the unit of `sd`.
        n: number of seeds of each configuration.
        sd: standard deviation over seeds of each configuration; the noise is normal, and sd is equal for both.
        correlation: correlation of the two results of one seed, for the paired t test. None: the runs share no seeds,
            and the test is Welch's.
        level: level of the test, in (0, 1); for Bonferroni's bound over m tests, level / m.
    Returns:
        Power in [0, 1]; NaN for n < 3, because nothing is claimed there.
    Raises:
        ValueError: `sd` is not above 0, the correlation is outside [−1, 1), or `level` is not inside (0, 1).
    Error: below 1e-6 for n up to 1,000. The noncentral t is integrated here, over the normal of its numerator and the
        χ² of its denominator, because `scipy.stats.nct` is NaN or wrong at large noncentrality. Welch's degrees of
        freedom depend only on the ratio of the two sample variances, which is independent of their sum. So the power is
        an average over that ratio's beta distribution.
    Source: Student 1908; Welch 1938, The significance of the difference between two means when the population
        variances are unequal.
    """
    _check(sd, correlation, level)
    if n < MIN_SEEDS:
        return float("nan")
    if correlation is not None:
        noncentrality = gap / (sd * np.sqrt(2 * (1 - correlation) / n))
        return float(_rejection(noncentrality, n - 1, stats.t.ppf(1 - level / 2, n - 1)))
    share = stats.beta.ppf((1 + _NODES) / 2, (n - 1) / 2, (n - 1) / 2)  # s₁² / (s₁² + s₂²)
    critical = stats.t.ppf(1 - level / 2, (n - 1) / (share**2 + (1 - share) ** 2))
    return float(_NODE_WEIGHTS / 2 @ _rejection(gap / (sd * np.sqrt(2 / n)), 2 * (n - 1), critical))


def seeds_needed(
    gap: float, sd: float, correlation: float | None = None, power: float = TARGET, level: float = TWO_SIDED
) -> int:
    """The smallest number of seeds, at least 3, whose test detects a true gap with this power.

    Arguments as in `gap_power`.

    Raises:
        ValueError: as `gap_power`; `power` is not inside (level, 1); or 100,000 seeds are not enough.
    """
    _check(sd, correlation, level, power)
    few, many = MIN_SEEDS - 1, MIN_SEEDS
    while not gap_power(gap, many, sd, correlation, level) >= power:
        if many >= MAX_SEEDS:
            raise ValueError(f"a gap of {gap} at sd={sd} needs more than {MAX_SEEDS} seeds for a power of {power}")
        few, many = many, min(2 * many, MAX_SEEDS)
    while many - few > 1:
        middle = (few + many) // 2
        if gap_power(gap, middle, sd, correlation, level) >= power:
            many = middle
        else:
            few = middle
    return many


def resolved_gap(
    n: int, sd: float, correlation: float | None = None, power: float = TARGET, level: float = TWO_SIDED
) -> float:
    """The smallest true gap, in the unit of `sd`, that n seeds detect with this power. Arguments as in `gap_power`.

    Returns:
        NaN for n < 3, because nothing is claimed there.
    Raises:
        ValueError: as `gap_power`, or `power` is not inside (level, 1).
    Error: below 1e-6 of sd.
    """
    _check(sd, correlation, level, power)
    if n < MIN_SEEDS:
        return float("nan")
    high = 1.0
    while gap_power(high, n, 1.0, correlation, level) < power:
        high *= 2
    found = optimize.root_scalar(
        lambda gap: gap_power(gap, n, 1.0, correlation, level) - power, bracket=(0, high), xtol=1e-7
    )
    return sd * found.root


def _rejection(noncentrality: float, df: int, critical: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(|T| > critical), with the shape of critical: T² > c² if χ²_df < df (Z + δ)²/c², averaged over Z."""
    limit = df * (_Z + noncentrality) ** 2 / np.square(critical)[..., None]
    return np.minimum(stats.chi2.cdf(limit, df) @ _Z_WEIGHTS, 1)


def _check(sd: float, correlation: float | None, level: float, power: float | None = None) -> None:
    if not sd > 0:
        raise ValueError(f"`sd > 0` must hold, but got sd={sd}")
    if correlation is not None and not -1 <= correlation < 1:
        raise ValueError(f"`-1 <= correlation < 1` must hold, but got correlation={correlation}")
    if not 0 < level < 1:
        raise ValueError(f"`0 < level < 1` must hold, but got level={level}")
    if power is not None and not level < power < 1:
        raise ValueError(f"`level < power < 1` must hold, but got level={level}, power={power}")
