"""Successive halving: a searched trial ends part of the way if others are better there.

A rung is a share of a trial's steps. The first seeds of a trial train up to it and pause. Once all of them are there,
their mean decides at once: the trial goes on if it is among the best share of the trials that have reached the rung so
far. This is the asynchronous form of successive halving that Ray Tune calls ASHA (Li et al., "A system for massively
parallel hyperparameter tuning", MLSys 2020), on several seeds. With several objectives, trials are ordered by the
number of trials that dominate them (Fonseca and Fleming, ICGA 1993), so a trial that none dominates always goes on.

A seed that diverges before a rung stops its trial. If a deciding seed failed for another reason, the trial passes
without a decision, and others are not compared with it.

The study depends on the order in which its trials reach a rung. A decision to stop is recorded with its evidence and
never made again.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from analysis import run_schema as schema
from study.search.early_stopping import training_of
from study.spec.config import StudyConfig
from study.spec.search import rung_steps
from study.spec.trial import RungStop, SeedResult, Trial, now


class _Rung:
    """The trials that have reached one rung: their objectives, and how many others dominate each."""

    def __init__(self, n_objectives: int) -> None:
        self.trials: set[int] = set()
        self._values = np.empty((8, n_objectives))  # grows by doubling
        self._n_dominating = np.empty(8, dtype=int)

    def add(self, trial: int, own: Sequence[float]) -> int:
        """Add a trial with these objectives, each the lower the better; returns its place, counted from 1."""
        n = len(self.trials)
        if n == len(self._values):
            self._values = np.concatenate([self._values, np.empty_like(self._values)])
            self._n_dominating = np.concatenate([self._n_dominating, np.empty_like(self._n_dominating)])
        self.trials.add(trial)
        values, n_dominating = self._values[:n], self._n_dominating[:n]
        not_above, not_below = (values <= own).all(axis=1), (values >= own).all(axis=1)
        n_dominating += not_below & ~not_above
        n_own = int((not_above & ~not_below).sum())
        self._values[n], self._n_dominating[n] = own, n_own
        return 1 + int((n_dominating < n_own).sum())


class Rungs:
    """The rungs of a study, and the trials that have reached them.

    Args:
        first_seeds: seeds of the study as it was begun; the first of them decide.
    """

    def __init__(self, config: StudyConfig, first_seeds: Sequence[int]) -> None:
        self._config = config
        self._halving = config.search.halving
        self._seeds = () if self._halving is None else tuple(first_seeds[: self._halving.seeds])
        self._rungs: dict[tuple[object, ...], _Rung] = defaultdict(lambda: _Rung(len(config.objectives)))
        """By step and training."""
        self._stops: dict[int, RungStop] = {}
        """Decisions since the ledger was opened, by trial."""
        self._n_passed: dict[int, int] = defaultdict(int)
        """Number of rungs that each trial has passed, by its number."""

    def leg(
        self, trial: Trial, missing: Sequence[int], results: Mapping[int, SeedResult]
    ) -> tuple[Sequence[int], int | None]:
        """The seeds that may train now, and the step at which they pause; None: they train to the end.

        Args:
            missing: the seeds that have no final result.
            results: the trial's results by seed, those of paused seeds included.
        """
        for step in self._steps(trial)[self._n_passed[trial.number] :]:
            return [seed for seed in self._seeds if seed in missing and not _is_at(results.get(seed), step)], step
        return missing, None

    def note(self, trial: Trial, results: Mapping[int, SeedResult], after: tuple[int, int]) -> RungStop | None:
        """Note a trial's results; returns the decision to stop it, if there is one.

        Args:
            results: as for `leg`.
            after: trial and seed of the newest result.
        """
        if trial.number not in self._stops:  # else again: the database did not take it the first time
            stop = self._advance(trial, results, after)
            if stop is not None:
                self._stops[trial.number] = stop
        return self._stops.get(trial.number)

    def restore(self, trial: Trial, results: Mapping[int, SeedResult]) -> None:
        """Take in results on record, whose decisions are on record, too."""
        self._advance(trial, results, after=None)

    def _advance(
        self, trial: Trial, results: Mapping[int, SeedResult], after: tuple[int, int] | None
    ) -> RungStop | None:
        """Bring a trial to the rungs that its results have reached; nothing is decided without `after`."""
        for number, step in enumerate(self._steps(trial), 1):
            rung, is_new = self._rungs[step, *training_of(trial.spec)], number > self._n_passed[trial.number]
            rows = {seed: _row_at(results.get(seed), step) for seed in self._seeds}
            diverged = tuple(seed for seed in self._seeds if rows[seed] is None and _has_diverged(results.get(seed)))
            if diverged and is_new and after is not None:
                return RungStop(trial.number, step, self._seeds, diverged, {}, 0, len(rung.trials), after, when=now())
            if not all(_is_at(results.get(seed), step) for seed in self._seeds):
                return None
            self._n_passed[trial.number] = max(number, self._n_passed[trial.number])
            known = [row for row in rows.values() if row is not None]
            if len(known) < len(rows) or trial.number in rung.trials:
                continue
            means = self._means(trial, known)
            place = rung.add(trial.number, [_lower_is_better(name, mean) for name, mean in means.items()])
            if is_new and after is not None and place > self._n_going_on(len(rung.trials)):
                return RungStop(trial.number, step, self._seeds, (), means, place, len(rung.trials), after, when=now())
        return None

    def _n_going_on(self, n: int) -> int:
        assert self._halving is not None
        return math.ceil(self._halving.keep * n)

    def _steps(self, trial: Trial) -> list[int]:
        """The steps of a trial's rungs; none if it is not searched or not trained."""
        is_own = trial.duplicate_of is None and trial.skipped is None
        if self._halving is None or not is_own or not self._config.arm(trial.spec.arm).is_searched:
            return []
        protocol = trial.spec.protocol
        return rung_steps(self._halving.rungs, protocol.steps, protocol.eval_every)

    def _means(self, trial: Trial, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
        means = {}
        for name in self._config.objectives:
            if "count" in schema.OBJECTIVES[name].recorded:
                means[name] = float(getattr(trial.shape, name))
            else:
                means[name] = statistics.fmean(row[name] for row in rows)
        return means


def _lower_is_better(objective: str, value: float) -> float:
    return value if schema.direction_of(objective) == "minimize" else -value


def _row_at(result: SeedResult | None, step: int) -> Mapping[str, float] | None:
    """The evaluation of a seed at a step; None if it has none."""
    return None if result is None else next((row for row in result.curve if row["step"] == step), None)


def _has_diverged(result: SeedResult | None) -> bool:
    return result is not None and result.failure_step is not None


def _is_at(result: SeedResult | None, step: int) -> bool:
    return result is not None and (result.state != "paused" or result.curve[-1]["step"] >= step)
