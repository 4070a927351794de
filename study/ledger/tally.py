"""The remaining work of a study, counted from its trials and results."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping, Sequence

from study.spec.config import StudyConfig
from study.spec.search_space import listed_specs
from study.spec.trial import Trial


class Tally:
    """Counts of one study, updated with each trial and result, so that no call iterates over all of them.

    Args:
        more_seeds: seeds that single trials have besides the study's, by the trials' numbers.
        results: live container of (trial, seed) of the results on record.
        trials: initial trials.
    """

    def __init__(
        self,
        config: StudyConfig,
        more_seeds: Mapping[int, Sequence[int]],
        results: Container[tuple[int, int]],
        trials: Iterable[Trial] = (),
    ) -> None:
        self._config, self._more_seeds, self._results = config, more_seeds, results
        self._n_listed = len(listed_specs(config))
        self._searched_arms = {arm.name for arm in config.arms if arm.is_searched}
        # OrderedDict: in a plain dictionary the first key is slow to find after many removals from the front.
        self._missing: OrderedDict[int, OrderedDict[int, None]] = OrderedDict()
        """Seeds that each trial lacks, by its number; only trials that lack any."""
        self._n_trials = self._n_searched = self._n_repeats = self._n_missing = 0
        self._n_known = self._flops_known = self._flops_missing = 0
        """FLOPs as integers, so that sums are not rounded."""
        for trial in trials:
            self.add(trial)

    # Keeping up ---------------------------------------------------------------------------------------------------

    def add(self, trial: Trial) -> None:
        """Count a new trial."""
        self._n_trials += 1
        if trial.spec.arm in self._searched_arms:
            self._n_searched += 1
            self._n_repeats += trial.duplicate_of is not None
        if trial.duplicate_of is None and trial.skipped is None:
            self._n_known += 1
            self._flops_known += int(trial.shape.flops)
        self.look_at(trial)

    def look_at(self, trial: Trial) -> None:
        """Determine again which seeds a trial lacks: it is new, was stopped, or its results have changed."""
        n_before = len(self._missing.get(trial.number, ()))
        is_over = trial.duplicate_of is not None or trial.skipped is not None or trial.stop is not None
        seeds = [] if is_over else [s for s in self.seeds_of(trial) if (trial.number, s) not in self._results]
        if seeds:
            self._missing[trial.number] = OrderedDict.fromkeys(seeds)
        else:
            self._missing.pop(trial.number, None)
        self._count_missing(trial, len(seeds) - n_before)

    def note(self, trial: Trial, seed: int) -> None:
        """Count a new result on record."""
        seeds = self._missing.get(trial.number, {})
        if seed in seeds:
            del seeds[seed]
            self._count_missing(trial, -1)
            if not seeds:
                del self._missing[trial.number]

    def _count_missing(self, trial: Trial, n: int) -> None:
        self._n_missing += n
        self._flops_missing += n * int(trial.shape.flops)

    # Counts -------------------------------------------------------------------------------------------------------

    def seeds_of(self, trial: Trial) -> list[int]:
        """All seeds planned for a trial (or the one it repeats): the study's, and those added only to this trial."""
        return seeds_of(self._config, self._more_seeds, trial)

    def missing_seeds(self, trial: Trial) -> list[int]:
        """Planned seeds for which a trial has no result.

        A duplicate lacks none, and neither does a skipped or stopped trial.
        """
        return list(self._missing.get(trial.number, ()))

    def first_missing(self, trial: Trial) -> int | None:
        """The first missing seed; None if none is missing."""
        return next(iter(self._missing.get(trial.number, ())), None)

    @property
    def lacking(self) -> Iterable[int]:
        """Numbers of the trials that lack a seed; invalid after the next change."""
        return self._missing.keys()

    @property
    def n_over(self) -> int:
        """Number of trials that lack no seed."""
        return self._n_trials - len(self._missing)

    @property
    def n_trials(self) -> int:
        """Number of trials that the study will have.

        It is the listed trials plus `search.trials`. If the search ended early, it is the listed trials plus those that
        were searched until then.
        """
        return self._n_listed + (self._n_searched if self.search_ended is not None else self._config.search.trials)

    @property
    def n_runs_unasked(self) -> int:
        """Number of runs (trial × seed) of trials not asked yet; each trial counts with all its seeds."""
        return max(0, self.n_trials - self._n_trials) * len(self._config.seed_list)

    @property
    def n_missing(self) -> int:
        """Number of runs that the study lacks, including those of trials not asked yet."""
        return self._n_missing + self.n_runs_unasked

    @property
    def flops_left(self) -> float:
        """FLOPs of the missing runs; trials not asked yet count with the average FLOPs of the known ones."""
        mean = self._flops_known / self._n_known if self._n_known else 0.0
        return self._flops_missing + mean * self.n_runs_unasked

    @property
    def is_searching(self) -> bool:
        """Whether a sampler still has trials to choose."""
        return self._n_searched < self._config.search.trials and self.search_ended is None

    @property
    def search_ended(self) -> str | None:
        """Why the sampler is no longer asked before the search has all its trials; otherwise None."""
        cap = self._config.search.max_repeats
        if cap is None or self._n_repeats < cap or self._n_searched >= self._config.search.trials:
            return None
        return (
            f"the search ended after {self._n_searched} of {self._config.search.trials} trials: {self._n_repeats} of "
            f"them repeat another (search.max_repeats={cap}); to continue it, raise that limit or widen its space"
        )


def seeds_of(config: StudyConfig, more_seeds: Mapping[int, Sequence[int]], trial: Trial) -> list[int]:
    """See `Tally.seeds_of`."""
    return list(dict.fromkeys([*config.seed_list, *more_seeds.get(trial.source, [])]))
