"""The values that a sampler gets for a finished trial: its objectives, and by how much it breaks a constraint.

Optuna's samplers learn nothing from a failed trial, and NSGA-II, NSGA-III and the Gaussian process learn nothing from
one that Optuna calls pruned. So a trial that diverged, or was skipped for its size, is told as complete and infeasible.
All samplers rank it below every feasible trial, by how far it is from feasible.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis import run_schema as schema
from study.spec.config import StudyConfig
from study.spec.search import Search
from study.spec.trial import SeedResult, Trial, TrialShape

DIVERGED = "diverged"
"""Constraint: share of a trial's seeds that diverged; −1 if none did, which is well within the constraint."""


@dataclass(frozen=True)
class Told:
    """values: one for each objective; None if nothing can be learnt. constraints: broken if above 0."""

    values: list[float] | None
    constraints: dict[str, float]


def what_to_tell(
    config: StudyConfig, trial: Trial, source: Trial, results: Sequence[SeedResult], worst: Mapping[str, float]
) -> Told:
    """The values that a sampler gets for a trial.

    Args:
        source: the trial itself, or the one that it repeats.
        results: results of the source; some seeds are missing if it was stopped, all if it was not trained.
        worst: replaces the values of a seed that has none, by objective; nothing can be learnt without one.
    """
    failed = [result for result in results if result.state == "failed"]
    if not config.arm(trial.spec.arm).is_searched:  # a listed trial has no parameters to learn about
        return Told(None if failed else _values(config, source, results, worst), {})
    n_diverged = sum(result.failure_step is not None for result in failed)
    constraints = _excess(config.search, trial.shape)
    constraints[DIVERGED] = n_diverged / len(results) if n_diverged else -1.0
    if n_diverged < len(failed):  # a failed worker or machine says nothing about it
        return Told(None, constraints)
    return Told(_values(config, source, results, worst), constraints)


def worst_values(
    config: StudyConfig, shape: TrialShape, on_record: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    """For each objective that seeds have: a value no better than any on record, if a bad one is known.

    A loss is at least that of a uniform guess, and what is maximised at most 0.

    Args:
        on_record: the lowest and the highest value of each final metric.
    """
    worst = {}
    for objective in config.objectives:
        metric = schema.OBJECTIVES[objective]
        if "count" not in metric.recorded:
            lowest, highest = on_record.get(schema.key_of(metric), (math.inf, -math.inf))
            worst[objective] = _worst(metric, shape, lowest, highest)
    return {objective: value for objective, value in worst.items() if value is not None}


def _worst(metric: schema.Metric, shape: TrialShape, lowest: float, highest: float) -> float | None:
    if metric.direction == "maximize":
        return min(lowest, 0.0)
    if metric.unit == "nats":
        return max(math.log(shape.vocab_size), highest, 0.0)
    return highest if math.isfinite(highest) else None


def why_skipped(search: Search, shape: TrialShape) -> str | None:
    """The limit of the search that these parameter counts break, in one line; None if they are within both."""
    for key, value in _excess(search, shape).items():
        if value > 0:
            limit = getattr(search, key)
            of_dense = f" × {shape.n_params_dense:,}" if limit <= 1 else ""
            side = "more" if key == "max_params" else "fewer"
            return f"{shape.n_params:,} parameters, {side} than search.{key}={limit:g}{of_dense}"
    return None


def _excess(search: Search, shape: TrialShape) -> dict[str, float]:
    """Relative excess of the parameters over each limit: above 0 beyond the limit, at most 0 within it."""
    excess = {}
    for key, sign in (("max_params", 1), ("min_params", -1)):
        limit = getattr(search, key)
        if limit is not None:
            excess[key] = sign * (shape.n_params / (limit * shape.n_params_dense if limit <= 1 else limit) - 1)
    return excess


def _values(
    config: StudyConfig, source: Trial, results: Sequence[SeedResult], worst: Mapping[str, float]
) -> list[float] | None:
    values = []
    for objective in config.objectives:
        metric = schema.OBJECTIVES[objective]
        key, otherwise = schema.key_of(metric), worst.get(objective)
        if "count" in metric.recorded:
            values.append(getattr(source.shape, key))
            continue
        own = [result.final.get(key, otherwise) for result in results] or [otherwise]
        known = [value for value in own if value is not None]
        if len(known) < len(own):
            return None
        values.append(statistics.fmean(known))
    return values
