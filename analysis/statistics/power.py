"""The gap that a number of seeds finds in most studies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from analysis.run_schema import LEVEL
from analysis.statistics.multiplicity import family

TARGET = 0.8
"""Power that is asked for."""
N_DRAWS = 4096
PAIR = (1.0, -1.0)
"""Weights of a difference between two independent means."""
PAIRED = (np.sqrt(2.0),)
"""Weight of a mean over differences of single seeds, if they have √2 standard deviations, as independent runs have."""


def gap_power(gap: float, n: int, weights: Sequence[float] = PAIR, *, level: float = LEVEL) -> float:
    """Probability that a two-sided t test detects a true gap, a weighted sum of means, of either sign.

    It is Welch's test, with Satterthwaite's degrees of freedom for several means
    (`statistics.differences.pair_tests`, `group_test`). Given the sample variances, the power is a normal probability.
    It is averaged over 4,096 points of a scrambled Sobol sequence of these variances.

    Args:
        gap: in standard deviations over seeds, which are equal for all means; the noise is normal.
        n: seeds of each mean, at least 3.
        weights: of the means in the gap.
    Error: below .003.
    Source: Owen 1998, Scrambling Sobol' and Niederreiter–Xing points.
    """
    squares = np.square(weights)
    parts = squares[:, None] * _variances(n, len(squares)) / n
    variance = parts.sum(axis=0)
    df = variance**2 / (parts**2 / (n - 1)).sum(axis=0)
    reach = stats.t.isf(level / 2, df) * np.sqrt(variance)
    error = np.sqrt(squares.sum() / n)
    return float((stats.norm.cdf((gap - reach) / error) + stats.norm.cdf((-gap - reach) / error)).mean())


def resolved_gap(n: int, weights: Sequence[float] = PAIR, *, level: float = LEVEL) -> float:
    """The smallest true gap, in standard deviations over seeds, that n seeds detect with the power `TARGET`.

    Arguments as in `gap_power`.
    """
    high = 1.0
    while gap_power(high, n, weights, level=level) < TARGET:
        high *= 2
    found = optimize.root_scalar(lambda gap: gap_power(gap, n, weights, level=level) - TARGET, bracket=(0, high))
    return float(found.root)


class Contrast(NamedTuple):
    """A declared contrast: its number of sizes, whether all are compared with one trial, and whether pairs share their
    start."""

    n_sizes: int
    one_rival: bool = False
    paired: bool = False


class Resolved(NamedTuple):
    """Gaps that a contrast finds in `TARGET` of studies, in standard deviations over seeds (see `family_gaps`).

    of_arms: gap of the mean over its sizes; None if it has one size. If pairs share their start, it is an upper limit,
    computed as if the differences at all sizes were the same. of_sizes: gap at one size.
    """

    of_arms: float | None
    of_sizes: float


def family_gaps(n: int, contrasts: Sequence[Contrast], n_chains: int, *, level: float = LEVEL) -> list[Resolved]:
    """The gaps that declared contrasts find with the part of the level that they have at first.

    Tests that reject pass their part on, so a study with large gaps finds more than this.

    Args:
        n: seeds of each trial, at least 3.
        contrasts: each counts for both measures.
        n_chains: number of contrasts with tests of non-inferiority; each counts for both measures.
        level: the level of the whole family, or of one look if there are several.
    Returns:
        Of contrasts whose pairs share their start, in standard deviations of a difference by √2.
    """
    tests = family([each.n_sizes for each in contrasts for _ in range(2)], [1] * (2 * n_chains))
    shares = tests.graph.shares_of_tests()
    resolved = []
    for contrast, whole, sizes in zip(contrasts, tests.overall[::2], tests.sizes[::2], strict=True):
        of_whole, of_size = level * shares[whole], level * shares[sizes[0]]
        rival = (1.0,) if contrast.one_rival else _over(contrast.n_sizes)
        over_sizes = PAIRED if contrast.paired else _over(contrast.n_sizes) + rival
        resolved.append(
            Resolved(
                resolved_gap(n, over_sizes, level=of_whole) if contrast.n_sizes > 1 else None,
                resolved_gap(n, PAIRED if contrast.paired else PAIR, level=of_size),
            )
        )
    return resolved


def _over(n_sizes: int) -> tuple[float, ...]:
    """Weights of a mean over sizes; many are counted as 16 with the same variance of the mean."""
    counted = min(n_sizes, 16)
    return ((n_sizes * counted) ** -0.5,) * counted


@lru_cache(maxsize=8)
def _variances(n: int, rows: int) -> NDArray[np.float64]:
    """Sample variances of n values of unit variance, (rows, N_DRAWS), from a fixed sequence."""
    points = stats.qmc.Sobol(rows, rng=np.random.default_rng(0)).random(N_DRAWS)
    return stats.chi2.ppf(np.clip(points.T, 1e-12, 1 - 1e-12), n - 1) / (n - 1)
