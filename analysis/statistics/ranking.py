"""Reliability of the ranking of configurations: across seeds, under noise, and against their true spread."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis.run_schema import MIN_SEEDS, Direction
from analysis.statistics.draws import SeedMeans
from analysis.statistics.seed_blocks import complete_table, two_way


def rank_agreement(values: ArrayLike) -> float:
    """Kendall's τ_b of two seeds' rankings of the configurations, averaged over the pairs of seeds.

    Args:
        values: (C, n), configurations × the same seeds, in any unit.
    Returns:
        1 is the same order, 0 unrelated, −1 reversed. NaN for one seed, and if one ranks nothing.
    Source: Kendall 1945, The treatment of ties in ranking problems.
    """
    table = pd.DataFrame(complete_table(values))
    taus = table.corr(method="kendall").to_numpy()[np.triu_indices(table.shape[1], 1)]
    return float(taus.mean()) if taus.size else float("nan")


class RankInterval(NamedTuple):
    """Ranks from 1, the best, and their intervals; every array has the shape (C,)."""

    rank: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def rank_intervals(
    values: ArrayLike, direction: Direction, rng: np.random.Generator, n_draws: int = 10_000
) -> RankInterval:
    """Ranks of the means over seeds, and quantiles of their ranks over draws of the means.

    A draw is mean_c + √(s²_res/n) z_c with z standard normal; s²_res is the residual mean square of the two-way model
    (see `seed_blocks`). The shared part of a seed moves all means alike, and changes no rank. If configurations lack
    seeds it does change ranks, and the draws are those of `draws.SeedMeans.noise_draws`. The limits are drawn
    ranks: the outermost that leave at most 2.5 % of the draws beyond.

    Args:
        values: (C, n), configurations × seeds, in any unit; NaN if a configuration lacks the seed.
        direction: what is better.
        rng: draws the means.
        n_draws: number of draws; C × n_draws ranks are held in memory.
    Returns:
        As described in its class; ties share their mean rank. For n < 3, or one configuration, limits are NaN.
    Raises:
        ValueError: not a table.
    Error: draws spread the means a second time, so ranks of nearly equal configurations are pulled towards the middle.
        Each interval covers its true rank at .95 or above if the configurations' sd is at least that of one seed's
        noise. About .8 are covered if 20 configurations are almost equal: `reliability` near 0 warns of this. The
        intervals hold one by one, not all together.
    Source: Goldstein and Spiegelhalter 1996, League tables and their limitations, section 3.
    """
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
    tail = (1 - 0.95) / 2
    return RankInterval(rank, *np.quantile(ranks, (tail, 1 - tail), axis=0, method="inverted_cdf"))


def reliability(values: ArrayLike) -> float:
    """σ²_cfg / (σ²_cfg + σ²_res/n): the share of the spread of the means over seeds that is not noise.

    σ²_cfg is estimated by the variance of the means minus s²_res/n, or by 0 if that is negative. So reliability is
    1 − 1/F of the two-way analysis of variance, or 0. It is also Cronbach's α, and the expected correlation of these
    means with those of n fresh seeds.

    Args:
        values: (C, n), configurations × the same seeds.
    Returns:
        In [0, 1]; NaN for one seed or one configuration, and if all values are equal.
    Source: Hoyt 1941, Test reliability estimated by analysis of variance.
    """
    model = two_way(values)
    noise = float(model.residual_variance) / model.n
    between = max(float(model.means.var(ddof=1)) - noise, 0.0) if model.means.size > 1 else float("nan")
    return between / (between + noise) if between + noise > 0 else float("nan")
