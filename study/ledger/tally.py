"""What of a study is still to be done, counted from its trials and results."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from study.config import StudyConfig
from study.ledger.trials import Trial
from study.search_space import listed_specs


class Tally:
    """Counts for one study.

    Args:
        more_seeds: seeds that single trials have besides the study's, by their numbers.
    """

    def __init__(self, config: StudyConfig, more_seeds: Mapping[int, Sequence[int]]) -> None:
        self._config, self._more_seeds = config, more_seeds
        self._n_listed = len(listed_specs(config))
        self._searched_arms = {arm.name for arm in config.arms if arm.is_searched}

    def seeds_of(self, trial: Trial) -> list[int]:
        """Seeds that a trial (or the one it repeats) is to have: the study's, and those that were added to it alone."""
        return list(dict.fromkeys([*self._config.seed_list, *self._more_seeds.get(trial.source, [])]))

    def missing_seeds(self, trial: Trial, results: Collection[tuple[int, int]]) -> list[int]:
        """Seeds that a trial has no result for (a trial and a seed) and is to have.

        A duplicate lacks none, nor does a trial that was pruned or stopped.
        """
        if trial.duplicate_of is not None or trial.pruned is not None or trial.stop is not None:
            return []
        return [seed for seed in self.seeds_of(trial) if (trial.number, seed) not in results]

    def n_trials(self, trials: Collection[Trial]) -> int:
        """Trials that the study will have: the listed ones, and its budget, or those searched when the search ended."""
        has_ended = self.search_ended(trials) is not None
        return self._n_listed + (len(self.searched(trials)) if has_ended else self._config.budget.trials)

    def n_runs_unasked(self, trials: Collection[Trial]) -> int:
        """Runs (trial × seed) of trials that are not asked yet; each is taken to need all its seeds."""
        return max(0, self.n_trials(trials) - len(trials)) * len(self._config.seed_list)

    def flops_left(self, trials: Collection[Trial], results: Collection[tuple[int, int]]) -> float:
        """FLOPs of the runs that the study lacks; trials that are not asked yet are taken to cost what the known ones
        do on average."""
        known = [trial.shape.flops for trial in trials if trial.duplicate_of is None and trial.pruned is None]
        left = sum(trial.shape.flops * len(self.missing_seeds(trial, results)) for trial in trials)
        return left + (sum(known) / len(known) * self.n_runs_unasked(trials) if known else 0.0)

    def searched(self, trials: Collection[Trial]) -> list[Trial]:
        """Those that a sampler chose."""
        return [trial for trial in trials if trial.spec.arm in self._searched_arms]

    def search_ended(self, trials: Collection[Trial]) -> str | None:
        """Why the sampler is asked no more before the budget is met; None while it is, or where the budget is met."""
        cap = self._config.budget.max_repeats
        if cap is None:
            return None
        searched = self.searched(trials)
        n_repeats = sum(trial.duplicate_of is not None for trial in searched)
        if n_repeats < cap or len(searched) >= self._config.budget.trials:
            return None
        return (
            f"the search ended after {len(searched)} of {self._config.budget.trials} trials: {n_repeats} of them "
            f"repeat another (budget.max_repeats={cap}; more of them, or a wider space, and it goes on)"
        )
