"""Writing to MLflow beside a running study, which never waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from study.errors import StudyError
from study.ledger.trials import Trial
from study.tracking.connection import TrackingAway, first_line
from study.tracking.tracker import Tracker
from study.trial import SeedResult

_LONGEST_PAUSE = 60.0
"""Seconds between two attempts where MLflow stays away."""

_LOOK_SECONDS = 0.1
"""How long `close` waits before it looks whether it was told not to."""

_THREAD = "tracking"

_Job = tuple[Trial, list[SeedResult], int]


def is_left_writing() -> bool:
    """Whether a writer was left behind in the middle of a call: the interpreter may wait for it as it ends."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


class BackgroundTracker:
    """Writes to MLflow from a thread of its own, and goes on trying where MLflow is away.

    Args:
        connect: opens a `Tracker`; called in the thread, again after each failure.
        say: told in one line when MLflow goes away, is back, or does not take a trial.
        opened: a tracker to begin with; None: the first is opened in the thread.
        pause: seconds before the second attempt; each further one waits twice as long.
    """

    def __init__(
        self,
        connect: Callable[[], Tracker],
        say: Callable[[str], None],
        opened: Tracker | None = None,
        pause: float = 1.0,
    ) -> None:
        self._connect, self._say, self._first_pause = connect, say, pause
        self._opened = opened
        # The only way from the study's thread to this one: no lock that Ctrl-C could leave locked.
        self._inbox: SimpleQueue[_Job | None] = SimpleQueue()
        self._pending: dict[int, _Job] = {}
        self._deferred: dict[int, _Job] = {}
        """Trials that MLflow did not take; they are tried again when all others are written."""
        self._refused: dict[int, str] = {}
        self._away: str | None = None
        self._closing = self._is_last_round = self._is_left = False
        self._n_missing = 0
        self._thread = threading.Thread(target=self._run, name=_THREAD, daemon=True)
        self._thread.start()

    @property
    def trouble(self) -> str | None:
        """Why MLflow does not have everything; None while it has."""
        if self._away is not None:
            return self._away
        if self._refused:
            number, why = next(iter(self._refused.items()))
            return f"trial {number}: {why}"
        return "its writer ended before its time" if self._pending and not self._thread.is_alive() else None

    @property
    def n_pending(self) -> int:
        """Trials that are still to be written."""
        waiting = self._inbox.qsize() + len(self._pending) + len(self._deferred)
        return waiting if self._thread.is_alive() else 0

    def put(self, trial: Trial, results: list[SeedResult], n_seeds: int) -> None:
        """Ask for a trial's runs to be brought up to date; `n_seeds`: how many it will have."""
        self._inbox.put((trial, results, n_seeds))

    def leave(self) -> None:
        """Let `close` not wait for what is pending, now or later; may be called while it waits."""
        self._is_left = True

    def close(self, n_missing: int) -> str | None:
        """Write what is pending and end; returns why that was not possible, or None.

        Args:
            n_missing: runs that the study still lacks.
        """
        self._n_missing = n_missing
        self._inbox.put(None)
        while self._thread.is_alive() and not self._is_left:
            self._thread.join(_LOOK_SECONDS)
        return self.trouble

    # In the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        tracker, pause = self._opened, self._first_pause
        while (job := self._next(pause)) is not None:
            trial, results, n_seeds = job
            is_last_attempt = self._closing
            try:
                tracker = tracker or self._connect()
                tracker.write(trial, results, n_seeds)
            except Exception as error:  # whatever it is, the study must go on
                is_refused = tracker is not None and tracker.answers()
                tracker = None  # what it knows of MLflow's runs may not be so
                if is_refused:
                    self._note_refused(trial.number, first_line(error))
                else:
                    is_final = isinstance(error, StudyError) and not isinstance(error, TrackingAway)
                    self._note_away(first_line(error), is_final)
                    if is_last_attempt or is_final:
                        return
                    self._receive(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            if self._away is not None:
                self._away = None
                self._tell("MLflow is back")
            pause = self._first_pause
            self._refused.pop(trial.number, None)
            del self._pending[trial.number]
        if tracker is not None and not self._refused:
            with suppress(Exception):  # without it readers read more than they need
                tracker.settle(self._n_missing)

    def _next(self, pause: float) -> _Job | None:
        """A trial to write, waited for; None where there will be none."""
        self._receive(0)
        while not self._pending:
            if self._is_last_round or (self._closing and not self._deferred):
                return None
            if not self._closing:
                self._receive(pause if self._deferred else None, until_something=True)
            if not self._pending:
                self._is_last_round = self._closing
                self._pending, self._deferred = self._deferred, {}
        return next(iter(self._pending.values()))

    def _receive(self, seconds: float | None, until_something: bool = False) -> None:
        """Take in what was put, for so long (None: without end), at most until the study ends."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not self._closing:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                job = self._inbox.get(timeout=left)
            except Empty:
                return
            if job is None:
                self._closing = True
                return
            self._deferred.pop(job[0].number, None)
            self._pending[job[0].number] = job
            if until_something:
                return

    def _note_refused(self, number: int, why: str) -> None:
        self._deferred[number] = self._pending.pop(number)
        is_first = number not in self._refused
        self._refused[number] = why
        if is_first:
            self._tell(f"MLflow did not take trial {number}, which is tried again later: {why}")

    def _note_away(self, why: str, is_final: bool) -> None:
        was_away, self._away = self._away is not None, why
        if is_final:
            self._tell(f"MLflow takes no more, the study goes on without it: {why}")
        elif not was_away:
            self._tell(f"MLflow is away, the study goes on and catches up later: {why}")

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # a terminal that is gone is no reason to write no more
            self._say(line)
