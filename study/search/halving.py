"""Successive halving: a searched trial that is behind others part of the way ends there.

A rung is a share of a trial's steps. The first seeds of a trial train up to it and pause. Once all of them are there,
their mean decides at once: the trial goes on if it is among the best share of the trials that have reached the rung so
far. This is the asynchronous form of successive halving that Ray Tune calls ASHA (Li et al., "A system for massively
parallel hyperparameter tuning", MLSys 2020), on several seeds. With several objectives, trials are ordered by the
number of trials that dominate them (Fonseca and Fleming, ICGA 1993), so a trial that none dominates always goes on.

What has been reached first counts, so the study depends on the order in which its trials reach a rung. A decision to
stop is recorded with its evidence and never made again.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from analysis import run_schema as schema
from study.search.early_stopping import training_of
from study.spec.config import StudyConfig
from study.spec.search import rung_steps
from study.spec.trial import RungStop, SeedResult, Trial, now


class _Rung:
    """The trials that have reached one rung: their objectives, and how many others dominate each."""

    def __init__(self, n_objectives: int) -> None:
        self._values = np.empty((0, n_objectives))
        self._n_dominating = np.empty(0, dtype=int)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, own: Sequence[float]) -> int:
        """Add a trial with these objectives, each the lower the better; returns its place, counted from 1."""
        not_above, not_below = (self._values <= own).all(axis=1), (self._values >= own).all(axis=1)
        n_own = int((not_above & ~not_below).sum())
        self._n_dominating = np.append(self._n_dominating + (not_below & ~not_above), n_own)
        self._values = np.vstack([self._values, own])
        return 1 + int((self._n_dominating < n_own).sum())


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
        """Number of rungs that each trial has reached, by its number."""

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
        for step in self._newly_reached(trial, results):
            stop = self._judged(trial, [results[seed] for seed in self._seeds], step, after)
            if stop is not None:
                self._stops[trial.number] = stop
                break
        return self._stops.get(trial.number)  # again if the database did not take it the first time

    def restore(self, trial: Trial, results: Mapping[int, SeedResult]) -> None:
        """Take in results on record, whose decisions are on record, too."""
        for step in self._newly_reached(trial, results):
            self._judged(trial, [results[seed] for seed in self._seeds], step, after=(trial.number, 0))

    def _newly_reached(self, trial: Trial, results: Mapping[int, SeedResult]) -> Iterator[int]:
        """The rungs that a trial has reached with all its deciding seeds since the last call."""
        for step in self._steps(trial)[self._n_passed[trial.number] :]:
            if not all(_is_at(results.get(seed), step) for seed in self._seeds):
                return
            self._n_passed[trial.number] += 1
            yield step

    def _steps(self, trial: Trial) -> list[int]:
        """The steps of a trial's rungs; none if it is not searched or not trained."""
        is_own = trial.duplicate_of is None and trial.skipped is None
        if self._halving is None or not is_own or not self._config.arm(trial.spec.arm).is_searched:
            return []
        return rung_steps(self._halving, trial.spec.protocol)

    def _judged(
        self, trial: Trial, results: Sequence[SeedResult], step: int, after: tuple[int, int]
    ) -> RungStop | None:
        assert self._halving is not None
        rung = self._rungs[step, *training_of(trial.spec)]
        diverged = tuple(result.seed for result in results if result.failure_step is not None)
        rows = [row for result in results for row in result.curve if row["step"] == step]
        if not diverged and not rows:
            return None  # workers or machines failed, which says nothing about the trial
        if diverged:
            return RungStop(trial.number, step, self._seeds, diverged, {}, 0, len(rung), after, when=now())
        means = self._means(trial, rows)
        place = rung.add([mean if schema.direction_of(name) == "minimize" else -mean for name, mean in means.items()])
        if place <= math.ceil(self._halving.keep * len(rung)):
            return None
        return RungStop(trial.number, step, self._seeds, (), means, place, len(rung), after, when=now())

    def _means(self, trial: Trial, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
        means = {}
        for name in self._config.objectives:
            if "count" in schema.OBJECTIVES[name].recorded:
                means[name] = float(getattr(trial.shape, name))
            else:
                means[name] = statistics.fmean(row[name] for row in rows)
        return means


def _is_at(result: SeedResult | None, step: int) -> bool:
    return result is not None and (result.state != "paused" or result.curve[-1]["step"] >= step)
