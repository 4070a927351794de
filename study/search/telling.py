"""The values that a sampler gets for a finished trial: its objectives, and by how much it breaks a constraint.

Optuna's samplers learn nothing from a failed trial, and NSGA-II, NSGA-III and the Gaussian process learn nothing from
one that Optuna calls pruned. So a trial that diverged, or was skipped for its size, is told as complete and infeasible.
All samplers rank it below every feasible trial, by how far it is from feasible.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from study.spec.config import Search, StudyConfig
from study.spec.search_space import METRIC_OF_OBJECTIVE
from study.spec.trial import SeedResult, Trial, TrialShape

DIVERGED = "diverged"
"""Constraint: share of a trial's seeds that diverged; −1 if none did, which is well within the constraint."""


@dataclass(frozen=True)
class Told:
    """values: one for each objective; None if nothing can be learnt. constraints: broken if above 0."""

    values: list[float] | None
    constraints: dict[str, float]


def what_to_tell(
    config: StudyConfig, trial: Trial, source: Trial, results: Sequence[SeedResult], worst_loss: float
) -> Told:
    """The values that a sampler gets for a trial.

    Args:
        source: the trial itself, or the one that it repeats.
        results: results of the source; some seeds are missing if it was stopped, all if it was not trained.
        worst_loss: replaces the loss of a seed that has none.
    """
    failed = [result for result in results if result.state == "failed"]
    if not config.arm(trial.spec.arm).is_searched:  # a listed trial has no parameters to learn about
        return Told(None if failed else _values(config, source, results, worst_loss), {})
    n_diverged = sum(result.failure_step is not None for result in failed)
    constraints = _excess(config.search, trial.shape)
    constraints[DIVERGED] = n_diverged / len(results) if n_diverged else -1.0
    if n_diverged < len(failed):  # a failed worker or machine says nothing about it
        return Told(None, constraints)
    return Told(_values(config, source, results, worst_loss), constraints)


def worst_loss(shape: TrialShape, worst_on_record: float) -> float:
    """The larger of the loss of a uniform guess and the worst loss on record."""
    return max(math.log(shape.vocab_size), worst_on_record, 0.0)


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


def _values(config: StudyConfig, source: Trial, results: Sequence[SeedResult], worst_loss: float) -> list[float]:
    worst = {"val_loss": worst_loss, "val_acc": 0.0}
    return [
        source.shape.n_params
        if objective == "n_params"
        else statistics.fmean(
            [
                result.final[METRIC_OF_OBJECTIVE[objective]] if result.state == "complete" else worst[objective]
                for result in results
            ]
            or [worst[objective]]
        )
        for objective in config.objectives
    ]
