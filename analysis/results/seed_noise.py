"""Noise of one result over seeds, which says how large a gap the seeds of a study resolve."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.results.comparisons import reference_trial
from analysis.results.selection import seed_table
from analysis.results.summary import Measure
from analysis.runs.study_runs import StudyRuns
from analysis.statistics.seed_blocks import is_complete, two_way, uneven_two_way


class SeedNoise(NamedTuple):
    """Standard deviation of one result over seeds, in the measure's unit, and correlation of two results of one seed.
    Both are pooled over configurations, each of which has at least n seeds."""

    sd: float
    correlation: float
    n: int


def seed_noise(runs: StudyRuns, summary: pd.DataFrame, measure: Measure) -> SeedNoise | None:
    """Noise of the trials of the reference's budget, in the two-way model (see `statistics.seed_blocks`). None if fewer
    than two have enough seeds, or nothing varies."""
    reference = reference_trial(summary)
    if reference is None:
        return None
    budget = summary.loc[summary["trial"] == reference, "budget_hash"].item()
    table = measure.scale * seed_table(summary[summary["budget_hash"] == budget], runs.seeds, measure.key)
    if len(table) < 2:
        return None
    if is_complete(table):
        residual = float(two_way(table).residual_variance)
        variance = float(np.var(table.to_numpy(), axis=1, ddof=1).mean())
    else:
        model = uneven_two_way(table)
        residual, variance = model.residual_variance, model.variance
    if not variance > 0:
        return None
    # The mean variance within rows has the expectation σ_b² + σ²; the part σ_b² is shared.
    correlation = 1 - residual / variance
    n = int(table.notna().sum(axis=1).min())
    return SeedNoise(math.sqrt(variance), min(max(correlation, 0.0), 0.99), n)
