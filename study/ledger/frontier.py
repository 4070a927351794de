"""The frontier of a study that still grows: parameters against validation loss, means over seeds.

The analysis defines which points are on it, and how many seeds that takes. This module serves `status`, and `refine`,
which decides which trials need more seeds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.statistics.nondominated import on_frontier
from analysis.statistics.seed_blocks import MIN_SEEDS
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


def undecided(among: Sequence[Point]) -> list[Point]:
    """The points whose 95 % t interval of the mean reaches the frontier of the others' means, or that lack seeds.

    The frontier at a point is the lowest mean among other points with at most as many parameters. The point is on the
    frontier if its mean lies below. A single seed has no interval, so its point is always undecided. A point that is
    better than the frontier with fewer than MIN_SEEDS seeds is undecided too, since it does not count as on it yet.
    """
    would_be_on = {point.trial for point in frontier(among, fewest=1)}
    means = [(point.n_params, point.mean, point) for point in among]
    found = []
    for n_params, mean, point in means:
        rivals = [theirs for size, theirs, other in means if size <= n_params and other is not point]
        is_close = bool(rivals) and abs(mean - min(rivals)) <= half_width(point.losses)
        if is_close or (point.trial in would_be_on and len(point.losses) < MIN_SEEDS):
            found.append(point)
    return found


def half_width(losses: Sequence[float]) -> float:
    """Half the 95 % t interval of the mean; infinite for one seed."""
    from analysis.statistics.intervals import mean_interval  # imports SciPy, which a plain run does not need

    return float(mean_interval(losses).half_width) if len(losses) > 1 else math.inf
