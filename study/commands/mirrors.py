"""The copies of a running study: its runs in MLflow, the ledger's copy beside it, and the backup in remote storage."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from study.commands.backup import BackgroundBackup
from study.commands.progress import StudyProgress
from study.errors import StudyError
from study.ledger.copies import Copies
from study.scheduler.interrupts import interrupts
from study.scheduler.queue import Queue
from study.spec.trial import SeedResult, Trial, now
from study.tracking.background import BackgroundTracker
from study.training.unit import Unit

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LIVE_SECONDS = 5.0
"""Least time between two writes of a trial's seeds in training to MLflow."""


class Mirrors:
    """Follows the queue of a running study, shows its progress and keeps its copies.

    Args:
        tracker: None if tracking is off.
        backup: None if the storage is a path.
    """

    def __init__(
        self,
        queue: Queue,
        progress: StudyProgress,
        tracker: BackgroundTracker | None,
        copies: Copies,
        backup: BackgroundBackup | None,
    ) -> None:
        self._queue, self._ledger, self._progress = queue, queue.ledger, progress
        self._tracker, self._copies, self._backup = tracker, copies, backup
        queue.on_result, queue.on_stop, queue.on_answered = self._on_result, self._on_stop, self._on_answered
        queue.on_record = self._on_record
        self._in_training: dict[tuple[int, int], SeedResult] = {}
        """The seeds in training, by (trial, seed), with their learning curves so far."""
        self._shown: dict[int, float] = {}
        """When the seeds in training of each trial were last sent to MLflow, in seconds."""
        for trial in self._ledger.trials.values():
            self._track(trial)

    def on_evaluation(self, unit: Unit, seed: int, row: dict[str, float]) -> None:
        """Show an evaluation of a run; MLflow hears of each trial at most every few seconds."""
        self._progress.on_evaluation(unit, seed, row)
        is_over = (unit.trial, seed) in self._ledger.results or self._ledger.trials[unit.trial].stop is not None
        if self._tracker is None or is_over:
            return
        key, values = (unit.trial, seed), {name: value for name, value in row.items() if name != "started"}
        # Half a millisecond more, so that rounding never gives the one before.
        started = (_EPOCH + timedelta(milliseconds=row["started"] + 0.5)).isoformat()
        before, paused = self._in_training.get(key), self._ledger.paused(*key)
        if paused is not None:  # it goes on from a rung
            started, before = paused.started, before or paused
        curve = [] if before is None or before.started != started else before.curve
        curve = [*(each for each in curve if each["step"] < row["step"]), values]
        self._in_training[key] = SeedResult(unit.trial, seed, "paused", started, ended=now(), curve=curve)
        if time.monotonic() - self._shown.get(unit.trial, -math.inf) >= LIVE_SECONDS:
            self._shown[unit.trial] = time.monotonic()
            self._track(self._ledger.trials[unit.trial])

    def _on_record(self) -> None:
        if self._backup is not None:
            self._backup.note_change()
        self._keep(self._copies.keep_if_due)

    def _on_result(self, result: SeedResult) -> None:
        self._progress.on_result(result)
        self._in_training.pop((result.trial, result.seed), None)
        for trial in self._ledger.trials.sharing(result.trial):
            self._track(trial)

    def _on_stop(self, trial: Trial) -> None:
        self._progress.on_stop(trial)
        for seed in self._ledger.tally.seeds_of(trial):
            self._in_training.pop((trial.number, seed), None)
        self._track(trial)

    def _on_answered(self, trial: Trial) -> None:
        self._progress.on_answered(trial)
        self._track(trial)

    def _track(self, trial: Trial) -> None:
        if self._tracker is not None:
            seeds, results = self._ledger.tally.seeds_of(trial), self._ledger.on_record(trial)
            over = {result.seed for result in results}
            live = (self._in_training.get((trial.number, seed)) for seed in seeds if seed not in over)
            in_training = [] if trial.stop is not None else [result for result in live if result is not None]
            self._tracker.put(trial, results + in_training, len(seeds))

    def _keep(self, keep: Callable[[], None]) -> None:
        try:
            keep()
        except StudyError as error:
            self._queue.aborted = str(error)

    def complete(self) -> None:
        """Bring the copies up to date when no more units are issued."""
        for trial in self._ledger.trials.values():
            if (
                trial.duplicate_of is not None or trial.skipped is not None
            ):  # it got its results before, from the trial that it repeats
                self._track(trial)
        self._keep(self._copies.keep)

    def leave(self) -> None:
        """After an interrupt: write finished runs to MLflow, until a second interrupt."""
        if self._tracker is None:
            return
        # The second Ctrl-C sets a flag: an exception before the wait begins would be lost.
        with suppress(KeyboardInterrupt), interrupts(self._tracker.leave):
            if self._tracker.n_pending:
                self._progress.say(
                    "stopping; finished runs are written to MLflow first (press Ctrl-C again to skip that)"
                )
            self._tracker.close(self._ledger.tally.n_missing)
        self._tracker.leave()

    def close(self) -> tuple[str | None, str | None]:
        """End the writers; returns why MLflow is incomplete, and why the backup is incomplete. None: it is complete."""
        lost = None
        try:
            trouble = self._tracker.close(self._ledger.tally.n_missing) if self._tracker is not None else None
        finally:
            lost = self._backup.close() if self._backup is not None else None
        return trouble, lost
