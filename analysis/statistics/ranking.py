"""Reliability of the ranking of configurations: across seeds, under noise, and against their true spread."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis.run_schema import Direction
from analysis.statistics.draws import SeedMeans
from analysis.statistics.intervals import LEVEL, check_level
from analysis.statistics.seed_blocks import MIN_SEEDS, complete_table, two_way


class RankAgreement(NamedTuple):
    """Kendall's τ_b of the rankings by each pair of seeds, (n, n) with 1 on its diagonal, and its mean over pairs."""

    tau: NDArray[np.float64]
    mean: float


def rank_agreement(values: ArrayLike) -> RankAgreement:
    """Agreement of two seeds' rankings of the configurations: 1 is the same order, 0 unrelated, −1 reversed.

    Args:
        values: (C, n), configurations × the same seeds, in any unit.
    Returns:
        As described in its class; NaN for a seed in which all configurations are equal. With a single seed, or with a
        NaN in any pair, the mean is NaN.
    Raises:
        ValueError: not a table, rows have unequal seeds, or a value is missing.
    Cost: O(C² n) memory, for the signs of all differences.
    Source: Kendall 1945, The treatment of ties in ranking problems.
    """
    table = _one_table(values)
    rows, n = table.shape
    first, second = np.triu_indices(rows, 1)
    signs = np.sign(table[first] - table[second])  # (pairs of configurations, n)
    concordance = signs.T @ signs
    untied = np.sqrt(np.diag(concordance))
    scale = np.outer(untied, untied)
    tau = np.divide(concordance, scale, out=np.full((n, n), np.nan), where=scale > 0)
    pairs = tau[np.triu_indices(n, 1)]
    return RankAgreement(tau, float(pairs.mean()) if n > 1 else float("nan"))


class RankInterval(NamedTuple):
    """Ranks from 1, the best, and their intervals; every array has the shape (C,)."""

    rank: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def rank_intervals(
    values: ArrayLike, direction: Direction, rng: np.random.Generator, level: float = LEVEL, n_draws: int = 10_000
) -> RankInterval:
    """Ranks of the means over seeds, and quantiles of their ranks over draws of the means.

    A draw is mean_c + √(s²_res/n) z_c with z standard normal; s²_res is the residual mean square of the block model
    (see `seed_blocks`). The shared part of a seed moves all means alike, and changes no rank. If configurations lack
    seeds it does change ranks, and the draws are those of `draws.SeedMeans.noise_draws`. The limits are drawn
    ranks: the outermost that leave at most (1 − level)/2 of the draws beyond.

    Args:
        values: (C, n), configurations × seeds, in any unit; NaN if a configuration lacks the seed.
        direction: what is better.
        rng: draws the means.
        level: level of the interval, in (0, 1).
        n_draws: number of draws; C × n_draws ranks are held in memory.
    Returns:
        As described in its class; ties share their mean rank. For n < 3, or one configuration, limits are NaN.
    Raises:
        ValueError: as `rank_agreement`; the direction is unknown, or `level` is not inside (0, 1).
    Error: draws spread the means a second time, so ranks of nearly equal configurations are pulled towards the middle.
        Each interval covers its true rank at .95 or above if the configurations' sd is at least that of one seed's
        noise. About .8 are covered if 20 configurations are almost equal: `reliability` near 0 warns of this. The
        intervals hold one by one, not all together.
    Source: Goldstein and Spiegelhalter 1996, League tables and their limitations, section 3.
    """
    check_level(level)
    if direction not in ("minimize", "maximize"):
        raise ValueError(f"`direction` must be 'minimize' or 'maximize', but got {direction!r}")
    table = np.asarray(values, dtype=np.float64) * (1 if direction == "minimize" else -1)
    if table.ndim != 2:
        raise ValueError(f"`values` must be (configurations, seeds), but its shape is {table.shape}")
    fewest = (~np.isnan(table)).sum(axis=1).min()
    if fewest < MIN_SEEDS or len(table) == 1:
        rank = stats.rankdata(np.nanmean(table, axis=1))
        return RankInterval(rank, np.full(rank.shape, np.nan), np.full(rank.shape, np.nan))
    means = SeedMeans.of(table.T)
    rank = stats.rankdata(means.means)
    drawn = np.vstack(list(means.noise_draws(n_draws, rng)))
    ranks = stats.rankdata(drawn, axis=1)
    tail = (1 - level) / 2
    return RankInterval(
        rank,
        np.quantile(ranks, tail, axis=0, method="inverted_cdf"),
        np.quantile(ranks, 1 - tail, axis=0, method="inverted_cdf"),
    )


class Reliability(NamedTuple):
    """Share of the variance of the means that is between configurations, and the two variances, in squared units."""

    reliability: NDArray[np.float64]
    between: NDArray[np.float64]
    residual: NDArray[np.float64]


def reliability(values: ArrayLike) -> Reliability:
    """σ²_cfg / (σ²_cfg + σ²_res/n): the share of the spread of the means over seeds that is not noise.

    σ²_cfg is estimated by the variance of the means minus s²_res/n, or by 0 if that is negative. So reliability is
    1 − 1/F of the two-way analysis of variance, or 0. It is also Cronbach's α, and the expected correlation of these
    means with those of n fresh seeds.

    Args:
        values: (..., C, n), configurations × the same seeds.
    Returns:
        Arrays of shape (...); reliability in [0, 1]. NaN for one seed or one configuration, and if all values are
        equal.
    Raises:
        ValueError: rows have unequal seeds, or a value is missing.
    Source: Hoyt 1941, Test reliability estimated by analysis of variance.
    """
    model = two_way(values)
    noise = model.residual_variance / model.n
    spread = model.means.var(axis=-1, ddof=1) if model.means.shape[-1] > 1 else np.full(noise.shape, np.nan)
    between = np.maximum(spread - noise, 0)
    total = between + noise
    share = np.divide(between, total, out=np.full(total.shape, np.nan), where=total > 0)
    return Reliability(share, between, model.residual_variance)


def _one_table(values: ArrayLike) -> NDArray[np.float64]:
    table = complete_table(values)
    if table.ndim != 2:
        raise ValueError(f"`values` must be (configurations, seeds), but its shape is {table.shape}")
    return table
