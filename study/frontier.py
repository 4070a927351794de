"""The frontier of a study that still grows: parameters against validation loss, means over seeds.

What a claim rests on is the analysis's to say; this serves `status`, and `refine`, which decides where seeds are worth
their time.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analysis.frontier.nondominated import frontier_mask
from study.ledger.trials import Trial
from study.trial import SeedResult


@dataclass(frozen=True)
class Point:
    """A trial none of whose seeds failed: its trainable parameters, and its losses in nats, one per complete seed."""

    trial: int
    n_params: int
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)


def points(trials: Iterable[Trial], results: Iterable[SeedResult]) -> list[Point]:
    """Every trial that may be on the frontier: complete in a seed or more, failed in none, not stopped, no repeat."""
    of_trial: dict[int, list[SeedResult]] = defaultdict(list)
    for result in results:
        of_trial[result.trial].append(result)
    return [
        Point(trial.number, trial.shape.n_params, tuple(r.final["final/val_loss"] for r in of_trial[trial.number]))
        for trial in trials
        if trial.stop is None
        and of_trial[trial.number]
        and all(result.state == "complete" for result in of_trial[trial.number])
    ]


def frontier(among: Sequence[Point]) -> list[Point]:
    """The points that no other one beats, equal ones among them, from the smallest to the one of lowest mean."""
    on = frontier_mask([point.n_params for point in among], [point.mean for point in among])
    found = [point for point, is_on in zip(among, on, strict=True) if is_on]
    return sorted(found, key=lambda point: (point.n_params, point.mean, point.trial))


def undecided(among: Sequence[Point]) -> list[Point]:
    """The points whose 95 % t interval of the mean reaches the frontier of the others' means.

    That frontier is, at a point's number of parameters, the lowest mean that another one has with no more of them.
    Whether the point is on the frontier depends on which side of it its mean is. A single seed has no interval: its
    point is undecided wherever it lies, unless nothing else has as few parameters.
    """
    means = [(point.n_params, point.mean, point) for point in among]
    found = []
    for n_params, mean, point in means:
        rivals = [theirs for size, theirs, other in means if size <= n_params and other is not point]
        if rivals and abs(mean - min(rivals)) <= half_width(point.losses):
            found.append(point)
    return found


def half_width(losses: Sequence[float]) -> float:
    """Half the 95 % t interval of the mean; infinite for one seed."""
    from analysis.statistics.intervals import mean_interval  # and SciPy, without which a plain run does

    return float(mean_interval(losses).half_width) if len(losses) > 1 else math.inf
