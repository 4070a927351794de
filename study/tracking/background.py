"""Writing to MLflow beside a running study, which never waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from study.errors import StudyError
from study.ledger import Trial
from study.tracking.connection import TrackingAway, first_line
from study.tracking.tracker import Tracker
from study.trial import SeedResult

_LONGEST_PAUSE = 60.0
"""Seconds between two attempts where MLflow stays away."""


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
        n_seeds: int,
        say: Callable[[str], None],
        opened: Tracker | None = None,
        pause: float = 1.0,
    ) -> None:
        self._connect, self._n_seeds, self._say, self._first_pause = connect, n_seeds, say, pause
        self._opened = opened
        self._pending: dict[int, tuple[Trial, list[SeedResult]]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._away: str | None = None
        self._refused: dict[int, str] = {}
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    @property
    def trouble(self) -> str | None:
        """Why MLflow does not have everything; None while it has."""
        if self._away is not None:
            return self._away
        return next((f"trial {number}: {why}" for number, why in self._refused.items()), None)

    @property
    def n_pending(self) -> int:
        """Trials that MLflow does not have as they are."""
        return len(self._pending)

    def put(self, trial: Trial, results: list[SeedResult]) -> None:
        """Ask for a trial's runs to be brought up to date."""
        with self._changed:
            self._pending[trial.number] = (trial, results)
            self._changed.notify()

    def close(self) -> str | None:
        """Write what is pending and end; returns why that was not possible, or None."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        return self.trouble

    def _run(self) -> None:
        tracker = self._opened
        pause = self._first_pause
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                number, (trial, results) = next(iter(self._pending.items()))
                is_last_attempt = self._closing
            try:
                tracker = tracker or self._connect()
            except Exception as error:  # whatever it is, the study must go on
                is_refusal = isinstance(error, StudyError) and not isinstance(error, TrackingAway)
                self._note_away(first_line(error), is_refusal)
                if is_last_attempt or is_refusal:
                    return
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, timeout=pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            try:
                tracker.write(trial, results, self._n_seeds)
                self._refused.pop(number, None)
            except Exception as error:
                answers = tracker.answers()
                tracker = None  # what it knows of MLflow's runs may not be so
                if not answers:
                    self._note_away(first_line(error))
                    continue
                if number not in self._refused:
                    self._say(f"MLflow does not take trial {number}: {first_line(error)}")
                self._refused[number] = first_line(error)
            if self._away is not None:
                self._say("MLflow is back")
                self._away, pause = None, self._first_pause
            with self._changed:
                if self._pending.get(number, (None, None))[1] is results:
                    del self._pending[number]

    def _note_away(self, why: str, is_refusal: bool = False) -> None:
        if is_refusal:
            self._say(f"MLflow takes no more, the study goes on without it: {why}")
        elif self._away is None:
            self._say(f"MLflow is away, the study goes on and catches up later: {why}")
        self._away = why
