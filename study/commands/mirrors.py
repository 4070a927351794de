"""The copies of a running study: its runs in MLflow, the ledger's copy beside it, and the backup in remote storage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from study.commands.backup import BackgroundBackup
from study.commands.progress import StudyProgress
from study.errors import StudyError
from study.ledger.copies import Copies
from study.scheduler.interrupts import interrupts
from study.scheduler.queue import Queue
from study.spec.trial import SeedResult, Trial
from study.tracking.background import BackgroundTracker


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
        for trial in self._ledger.trials.values():
            self._track(trial)

    def _on_record(self) -> None:
        if self._backup is not None:
            self._backup.note_change()
        self._keep(self._copies.keep_if_due)

    def _on_result(self, result: SeedResult) -> None:
        self._progress.on_result(result)
        for trial in self._ledger.trials.sharing(result.trial):
            self._track(trial)

    def _on_stop(self, trial: Trial) -> None:
        self._progress.on_stop(trial)
        self._track(trial)

    def _on_answered(self, trial: Trial) -> None:
        self._progress.on_answered(trial)
        self._track(trial)

    def _track(self, trial: Trial) -> None:
        if self._tracker is not None:
            self._tracker.put(trial, self._ledger.on_record(trial), len(self._ledger.tally.seeds_of(trial)))

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
