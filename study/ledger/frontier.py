"""The frontier of a study that still grows: parameters against validation loss, means over seeds.

The analysis defines which points are on it, and how many seeds that takes. This module serves `status`, and `refine`,
which adds seeds to the trials near it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.run_schema import MIN_SEEDS
from analysis.statistics.nondominated import on_frontier
from study.spec.trial import SeedResult, Trial


@dataclass(frozen=True)
class Point:
    """A trial without a failed seed: its trainable parameters, and its losses in nats, one per complete seed."""

    trial: int
    n_params: int
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.losses))


def points(trials: Iterable[Trial], results: Iterable[SeedResult]) -> list[Point]:
    """Every trial that may be on the frontier: a complete seed, no failed seed, not stopped, not a repeat."""
    of_trial: dict[int, list[SeedResult]] = defaultdict(list)
    for result in sorted(results, key=lambda result: result.seed):  # so that a mean does not depend on their order
        of_trial[result.trial].append(result)
    return [
        Point(trial.number, trial.shape.n_params, tuple(r.final["final/val_loss"] for r in of_trial[trial.number]))
        for trial in trials
        if trial.stop is None
        and of_trial[trial.number]
        and all(result.state == "complete" for result in of_trial[trial.number])
    ]


def frontier(among: Sequence[Point], fewest: int = MIN_SEEDS) -> list[Point]:
    """The points on the frontier as `on_frontier` defines it, from the smallest to the one of lowest mean.

    Args:
        fewest: smallest number of seeds that a point needs.
    """
    on = on_frontier(
        [point.n_params for point in among],
        [point.mean for point in among],
        [len(point.losses) for point in among],
        [True] * len(among),  # all points are eligible
        fewest=fewest,
    )
    found = [point for point, is_on in zip(among, on, strict=True) if is_on]
    return sorted(found, key=lambda point: (point.n_params, point.mean, point.trial))


def near_frontier(among: Sequence[Point]) -> list[Point]:
    """The points that are on the frontier or within two standard errors of it, and those with a single seed.

    The frontier at a point is the lowest mean among other points with at most as many parameters. The standard error is
    that of the two means' difference, with one variance over seeds for all points. A point on the frontier counts
    however far it is ahead: it was chosen for its result, which may be luck.
    """
    squares = sum((loss - point.mean) ** 2 for point in among for loss in point.losses)
    df = sum(len(point.losses) - 1 for point in among)
    variance = squares / df if df else math.inf
    by_size = sorted(among, key=lambda point: point.n_params)
    sizes = [point.n_params for point in by_size]
    best: list[list[Point]] = [[]]  # the best two of the first 0, 1, ... points
    for point in by_size:
        best.append(sorted([*best[-1], point], key=lambda one: one.mean)[:2])
    found = []
    for point in among:
        rival = next((other for other in best[bisect_right(sizes, point.n_params)] if other is not point), None)
        reach = math.inf
        if rival is not None and len(point.losses) > 1:
            reach = 2 * math.sqrt(variance * (1 / len(point.losses) + 1 / len(rival.losses)))
        if rival is None or point.mean - rival.mean <= reach:
            found.append(point)
    return found
