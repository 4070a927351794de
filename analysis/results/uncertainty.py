"""Uncertainty of a frontier: who is on it, a band around it, its hypervolume, the size that a margin needs."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.results.selection import seed_table, seeds_stated
from analysis.results.sizes import PARAMETERS, Size
from analysis.results.summary import Measure, sole_reference
from analysis.runs.study_runs import StudyRuns
from analysis.statistics.band import mean_frontier_band
from analysis.statistics.frontier_probability import frontier_probability, size_needed
from analysis.statistics.hypervolume import HypervolumeReference, hypervolume_interval
from analysis.statistics.posterior import Posterior
from analysis.statistics.seed_blocks import is_complete

N_DRAWS = 10_000
"""Number of draws of the true means; the standard error of a probability is at most half a percent."""
HYPERVOLUME_BASE = 10.0
CAUTIOUS = 0.95
"""Probability that a cautious choice of a size is large enough."""


class FrontierUncertainty(NamedTuple):
    """The uncertainty of one frontier by the seeds, in the measure's unit. A frame without results is empty.

    chances: trial, probability (that it is on the frontier), near_probability (that it is within epsilon of it).
    band: the size, observed (best mean up to that size), low, high: 95 % pointwise for the frontier of the true means.
    hypervolume: one row; observed, low, high (95 %), worst_value, largest_size, base.
    size_needed: n_params; probability, cumulative: that each size is the smallest that loses at most epsilon against
        the dense reference; observed: whether it is the smallest by the means; cautious: whether it is the one up to
        which the probabilities add up to CAUTIOUS.
    rests_on: the seeds and trials used, in words; left out are trials with fewer than MIN_SEEDS, or not all seeds.
    """

    chances: pd.DataFrame
    band: pd.DataFrame
    hypervolume: pd.DataFrame
    size_needed: pd.DataFrame
    epsilon: float
    rests_on: str


def frontier_uncertainty(
    runs: StudyRuns,
    summary: pd.DataFrame,
    measure: Measure,
    declared: Collection[int] = (),
    size: Size = PARAMETERS,
) -> FrontierUncertainty:
    """Draw the true means of all trials, each from its own seeds, with the noise of all (`statistics.posterior`).

    The draws come from a fixed seed: the same runs give the same numbers. The area of the hypervolume is bounded by the
    dense model's size and by the result of random guessing: the loss at equal probability of all tokens, or an accuracy
    of 0. So studies of one text and one model are comparable.

    Args:
        measure: measure of the frontier.
        declared: trials of other budgets than the reference's that the study file compares with it. No other trial of
            another budget counts as a possible replacement of dense.
        size: size of the frontier; with another than the parameters, hypervolume and size_needed are empty.
    """
    table = measure.scale * seed_table(summary, runs.seeds, measure.key)
    epsilon = measure.scale * runs.claims.margins.get(measure.name, measure.margin)
    limits = (size.name, *_LIMITS)
    chances, band, hypervolume, needed = (
        pd.DataFrame(columns=list(columns)) for columns in (_CHANCES, limits, _HYPERVOLUME, _SIZE_NEEDED)
    )
    empty = FrontierUncertainty(chances, band, hypervolume, needed, epsilon, _rests_on(table))
    if len(table) < 2:
        return empty
    rows = summary.set_index("trial").loc[table.index]
    sizes, direction = rows[size.name].to_numpy(dtype=np.float64), measure.direction
    rng, posterior = np.random.default_rng(0), Posterior.of(sizes, table.to_numpy().T)
    chances = frontier_probability(sizes, posterior, rng, epsilon=epsilon, direction=direction, n_draws=N_DRAWS)
    band = mean_frontier_band(sizes, posterior, rng, direction=direction)
    of_frontier = empty._replace(
        chances=pd.DataFrame(
            {"trial": table.index, "probability": chances.on_frontier, "near_probability": chances.near_frontier}
        ),
        band=pd.DataFrame(dict(zip(limits, band, strict=True))).astype({size.name: rows[size.name].dtype}),
    )
    if size != PARAMETERS:
        return of_frontier
    corner = HypervolumeReference(
        worst_value=math.log(int(rows["vocab_size"].iloc[0])) if direction == "minimize" else 0.0,
        largest_size=float(rows["n_params_dense"].iloc[0]),
        base=HYPERVOLUME_BASE,
        direction=direction,
    )
    area = hypervolume_interval(sizes, posterior, corner, rng)
    return of_frontier._replace(
        hypervolume=pd.DataFrame(
            [(*area, corner.worst_value, corner.largest_size, corner.base)], columns=list(_HYPERVOLUME)
        ),
        size_needed=_size_needed(summary, table, declared, epsilon, measure, rng),
    )


_CHANCES = ("trial", "probability", "near_probability")
_LIMITS = ("observed", "low", "high")
_HYPERVOLUME = ("observed", "low", "high", "worst_value", "largest_size", "base")
_SIZE_NEEDED = ("n_params", "probability", "cumulative", "observed", "cautious")


def _rests_on(table: pd.DataFrame) -> str:
    if is_complete(table):
        return f"{table.shape[1]} seeds that {len(table)} configurations share"
    return f"{seeds_stated(table)} seeds of each of {len(table)} configurations"


def _size_needed(
    summary: pd.DataFrame,
    table: pd.DataFrame,
    declared: Collection[int],
    epsilon: float,
    measure: Measure,
    rng: np.random.Generator,
) -> pd.DataFrame:
    reference = sole_reference(summary)["trial"].max()
    if reference not in table.index:
        return pd.DataFrame(columns=list(_SIZE_NEEDED))
    budgets = summary.set_index("trial")["budget_hash"]
    table = table[(budgets[table.index] == budgets[reference]) | table.index.isin(list(declared))]
    sizes = summary.set_index("trial")["n_params"][table.index].to_numpy(dtype=np.float64)
    row = int(table.index.get_indexer(pd.Index([reference]))[0])
    posterior = Posterior.of(sizes, table.to_numpy().T)
    needed = size_needed(sizes, posterior, row, rng, delta=epsilon, direction=measure.direction, n_draws=N_DRAWS)
    cumulative = needed.probability.cumsum()
    return pd.DataFrame(
        {
            "n_params": needed.sizes.astype(np.int64),
            "probability": needed.probability,
            "cumulative": cumulative,
            "observed": needed.sizes == needed.observed,
            "cautious": np.arange(len(cumulative)) == np.searchsorted(cumulative, CAUTIOUS),
        }
    )
