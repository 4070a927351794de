"""Writing to MLflow in the background of a running study, which never waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from study.errors import StudyError
from study.spec.trial import SeedResult, Trial
from study.tracking.connection import TrackingAway, first_line
from study.tracking.tracker import Tracker

_LONGEST_PAUSE = 60.0
"""Longest pause in seconds between two attempts while MLflow is unreachable."""

_LONGEST_SILENCE = 600.0
"""Seconds without an answer after which the end of a study stops waiting for MLflow: it may hang, or be very slow."""

_LOOK_SECONDS = 0.1
"""Interval at which `close` checks whether it should stop waiting."""

_AWAY = "is unreachable, the study continues and will write to it later"

_THREAD = "tracking"

_Job = tuple[Trial, list[SeedResult], int]


def is_left_writing() -> bool:
    """Whether a writer was abandoned in the middle of a call: the interpreter may wait for it at exit."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


class BackgroundTracker:
    """Writes to MLflow from a separate thread, and keeps trying while MLflow is unreachable.

    Args:
        connect: opens a `Tracker`; called in the thread, and again after each failure. Its argument must be called
            whenever MLflow has answered.
        say: receives one line when MLflow becomes unreachable, is reachable again, or refuses a trial.
        patience: seconds to wait for the first attempt: a refusal should be known before anything is trained.
        pause: seconds before the second attempt; each further one waits twice as long.
        silence: seconds without an answer after which `close` stops waiting.

    Raises:
        StudyError: MLflow refused this study within `patience`. An unreachable MLflow is no error.
    """

    def __init__(
        self,
        connect: Callable[[Callable[[], None]], Tracker],
        say: Callable[[str], None],
        patience: float = 0.0,
        pause: float = 1.0,
        silence: float = _LONGEST_SILENCE,
    ) -> None:
        self._connect, self._say, self._first_pause, self._silence = connect, say, pause, silence
        # The only connection from the study's thread to this one: it has no lock that Ctrl-C could leave locked.
        self._inbox: SimpleQueue[_Job | None] = SimpleQueue()
        self._pending: dict[int, _Job] = {}
        self._deferred: dict[int, _Job] = {}
        """Trials that MLflow refused, by number; they are written again after all others."""
        self._written: dict[int, _Job] = {}
        """Written trials, by number; checked again after an outage, in which MLflow may have lost them."""
        self._refused: dict[int, str] = {}
        self._suspects: set[int] = set()
        """Trials whose last write failed, perhaps because MLflow was unreachable for a moment."""
        self._away: str | None = None
        self._refusal: SimpleQueue[Exception | None] = SimpleQueue()
        """Result of the first attempt: the refusal, or None."""
        self._is_awaited = patience > 0
        self._closing = self._is_last_round = self._is_left = False
        self._n_missing = 0
        self._last_sign = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=_THREAD, daemon=True)
        self._thread.start()
        if patience > 0:
            self._wait_until_open(patience)

    def _wait_until_open(self, patience: float) -> None:
        try:
            refusal = self._refusal.get(timeout=patience)
        except Empty:
            self._is_awaited = False
            self._note_away(TrackingAway(f"it has not answered within {patience:g} seconds"))
            return
        if refusal is not None:
            raise refusal

    @property
    def trouble(self) -> str | None:
        """Why MLflow is incomplete; None if it is complete."""
        if self._away is not None:
            return self._away
        if self._refused:
            number, why = next(iter(self._refused.items()))
            return f"trial {number}: {why}"
        return "its writer ended unexpectedly" if self._pending and not self._thread.is_alive() else None

    @property
    def n_pending(self) -> int:
        """Number of trials that are still to be written."""
        waiting = self._inbox.qsize() + len(self._pending) + len(self._deferred)
        return waiting if self._thread.is_alive() else 0

    def put(self, trial: Trial, results: list[SeedResult], n_seeds: int) -> None:
        """Request an update of a trial's runs; `n_seeds`: number of seeds that the trial will have."""
        self._inbox.put((trial, results, n_seeds))

    def leave(self) -> None:
        """Make `close` not wait for pending trials, now or later; may be called while it waits."""
        self._is_left = True

    def close(self, n_missing: int) -> str | None:
        """Write pending trials and end; returns the reason if that failed, otherwise None.

        Args:
            n_missing: number of runs that the study still lacks.
        """
        self._n_missing = n_missing
        self._inbox.put(None)
        self._note_sign()
        while self._thread.is_alive() and not self._is_left:
            self._thread.join(_LOOK_SECONDS)
            if self._thread.is_alive() and time.monotonic() - self._last_sign > self._silence:
                self._away = self._away or f"it has not answered for {self._silence:g} seconds"
                self.leave()
        return self.trouble

    # In the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        tracker, pause = None, self._first_pause
        while True:
            job, is_last_attempt = None, self._closing
            try:
                if tracker is None:
                    tracker = self._open()
                job, is_last_attempt = self._next(pause), self._closing
                if job is None:
                    tracker.end_unfinished()
                    if not self._refused:
                        tracker.settle(self._n_missing)
                    self._note_back()
                    return
                tracker.write(*job)
            except Exception as error:  # the study must continue after any error
                if job is not None and tracker is not None and self._is_refused(job, error, tracker):
                    self._note_refused(job[0].number, first_line(error))
                elif self._is_awaited and isinstance(error, StudyError) and not isinstance(error, TrackingAway):
                    self._refusal.put(error)
                    return
                else:
                    self._note_away(error)
                    if is_last_attempt:
                        return
                    self._release()
                    self._receive(pause)
                tracker = None  # its knowledge of MLflow's runs may be outdated
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            self._note_back()
            pause, number = self._first_pause, job[0].number
            self._suspects.discard(number)
            self._refused.pop(number, None)
            self._written[number] = self._pending.pop(number)

    def _open(self) -> Tracker:
        tracker = self._connect(self._note_sign)
        self._pending, self._written = self._written | self._pending, {}
        if not self._pending:
            self._note_back()
        self._release()
        return tracker

    def _release(self) -> None:
        """Let the waiting study begin."""
        if self._is_awaited:
            self._is_awaited = False
            self._refusal.put(None)

    def _is_refused(self, job: _Job, error: Exception, tracker: Tracker) -> bool:
        """Whether the error concerns this trial alone: MLflow answers, and waiting did not help or cannot help."""
        number, is_transient = job[0].number, isinstance(error, TrackingAway)
        is_own = self._closing or not is_transient or number in self._suspects
        self._suspects.add(number)
        return tracker.answers() and is_own

    def _next(self, pause: float) -> _Job | None:
        """Wait for the next trial to write; None if there will be no more."""
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
        """Receive requests for this many seconds (None: without limit), at most until the study ends."""
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
            self._written.pop(job[0].number, None)
            self._pending[job[0].number] = job
            if until_something:
                return

    def _note_refused(self, number: int, why: str) -> None:
        self._deferred[number] = self._pending.pop(number)
        is_first = number not in self._refused
        self._refused[number] = why
        if is_first:
            self._tell(f"MLflow refused trial {number}, will try again later: {why}")

    def _note_away(self, error: Exception) -> None:
        was_away, self._away = self._away is not None, first_line(error)
        if not was_away:
            is_refusal = isinstance(error, StudyError) and not isinstance(error, TrackingAway)
            what = "refuses this study, which continues and will try again" if is_refusal else _AWAY
            self._tell(f"MLflow {what}: {self._away}")

    def _note_back(self) -> None:
        if self._away is not None:
            self._away = None
            self._tell("MLflow is reachable again")

    def _note_sign(self) -> None:
        self._last_sign = time.monotonic()

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # continue to write if the terminal is gone
            self._say(line)
