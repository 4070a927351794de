"""What of a study is still to be done, counted from its trials and results."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from study.config import StudyConfig

if TYPE_CHECKING:
    from study.ledger import Trial


def missing_seeds(config: StudyConfig, trial: Trial, results: Collection[tuple[int, int]]) -> list[int]:
    """Seeds that a trial has no result for (a trial and a seed) and is to have.

    A duplicate lacks none, nor does a trial that was pruned or stopped.
    """
    if trial.duplicate_of is not None or trial.pruned is not None or trial.stop is not None:
        return []
    return [seed for seed in config.seed_list if (trial.number, seed) not in results]


def n_trials(config: StudyConfig, n_listed: int, trials: Collection[Trial]) -> int:
    """Trials that the study will have: the listed ones, and its budget, or where the search has ended, its trials."""
    ended = search_ended(config, trials) is not None
    return n_listed + (len(_searched(config, trials)) if ended else config.budget.trials)


def n_runs_left(
    config: StudyConfig, n_listed: int, trials: Collection[Trial], results: Collection[tuple[int, int]]
) -> int:
    """Runs (trial × seed) still to be trained; a trial that is not asked yet is taken to need all its seeds."""
    known = sum(len(missing_seeds(config, trial, results)) for trial in trials)
    return known + max(0, n_trials(config, n_listed, trials) - len(trials)) * len(config.seed_list)


def search_ended(config: StudyConfig, trials: Collection[Trial]) -> str | None:
    """Why the sampler is asked no more before the budget is met; None while it is, or where the budget is met."""
    if config.budget.max_repeats is None:
        return None
    searched = _searched(config, trials)
    n_repeats = sum(trial.duplicate_of is not None for trial in searched)
    cap = config.budget.max_repeats
    if n_repeats < cap or len(searched) >= config.budget.trials:
        return None
    return (
        f"the search ended after {len(searched)} of {config.budget.trials} trials: {n_repeats} of them repeat another "
        f"(budget.max_repeats={cap}; more of them, or a wider space, and it goes on)"
    )


def _searched(config: StudyConfig, trials: Collection[Trial]) -> list[Trial]:
    arms = {arm.name for arm in config.arms if arm.is_searched}
    return [trial for trial in trials if trial.spec.arm in arms]
