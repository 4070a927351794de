"""Time of the last report of each run in flight: shown while a study runs, and written to a file that `status` reads.

A worker that hangs sends nothing. So nothing here waits for a result: a separate thread looks at the clock.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from study.training.files import replace_file

SILENT_SECONDS = 600
"""A run that has not reported for this long is shown, and again after each further period of this length."""

LOOK_SECONDS = 5
"""Time between two checks, and so the shortest time between two writes of the file."""

Key = tuple[int, int]


@dataclass
class Flight:
    """A run (trial, seed) that was issued; `heard`: when a worker got it or last reported, None before any worker."""

    heard: float | None = None
    has_begun: bool = False


@dataclass(frozen=True)
class Silence:
    """Runs of one trial whose last report was at the same time, in seconds before now."""

    trial: int
    seeds: tuple[int, ...]
    seconds: float

    @property
    def is_long(self) -> bool:
        return self.seconds >= SILENT_SECONDS

    def __str__(self) -> str:
        noun, verb = ("seed", "has") if len(self.seeds) == 1 else ("seeds", "have")
        listed = ", ".join(map(str, self.seeds))
        return f"trial {self.trial}, {noun} {listed} {verb} not reported for {self.seconds // 60:.0f} minutes"


class Flights(dict[Key, Flight]):
    """The runs in flight.

    Args:
        clock: monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock

    def issue(self, keys: Iterable[Key]) -> None:
        self.update((key, Flight()) for key in keys)

    def note(self, keys: Iterable[Key], *, begins: bool = False) -> None:
        """Note that a worker has these runs or reports on them; a run that has ended is ignored."""
        for key in keys:
            if key in self:
                self[key].heard = self._clock()
                self[key].has_begun |= begins

    def have_begun(self, keys: Iterable[Key]) -> bool:
        return all(key in self and self[key].has_begun for key in keys)

    def end(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self.pop(key, None)

    def silences(self, keys: Iterable[Key] | None = None) -> list[Silence]:
        """Time since the last report of each run that has a worker. Default: all runs."""
        now, found = self._clock(), defaultdict(list)
        for key, flight in list(self.items()) if keys is None else [(key, self[key]) for key in keys if key in self]:
            if flight.heard is not None:
                found[key[0], flight.heard].append(key[1])
        return [Silence(trial, tuple(seeds), now - heard) for (trial, heard), seeds in found.items()]


class SilenceWatch:
    """Context manager that checks the runs in flight every few seconds.

    Args:
        file: gets the time of each run's last report, for `read_reports`.
        show: called at each check with the lines of all long silences, and with those of them to be printed again.
    """

    def __init__(self, flights: Flights, file: Path, show: Callable[[list[str], list[str]], None]) -> None:
        self._flights, self._file, self._show = flights, file, show
        self._said: dict[tuple[int, tuple[int, ...]], int] = {}
        self._written = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="silence-watch", daemon=True)

    def __enter__(self) -> SilenceWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError):
            self._file.unlink(missing_ok=True)

    def _run(self) -> None:
        self.look()
        while not self._over.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """Write and show the current silences."""
        silences = self._flights.silences()
        self._write(silences)
        long = [silence for silence in silences if silence.is_long]
        passed = {(one.trial, one.seeds): int(one.seconds // SILENT_SECONDS) for one in long}
        anew = [str(one) for one in long if passed[one.trial, one.seeds] > self._said.get((one.trial, one.seeds), 0)]
        self._said = passed
        self._show(list(map(str, long)), anew)

    def _write(self, silences: list[Silence]) -> None:
        now = time.time()
        runs = [[one.trial, one.seeds, round(now - one.seconds)] for one in silences]
        text = json.dumps({"pid": os.getpid(), "runs": sorted(runs)})
        if text != self._written:
            with suppress(OSError):  # a full disk is reported by more important writes
                replace_file(self._file, text.encode())
                self._written = text


def read_reports(file: Path, driver: int | None) -> list[Silence]:
    """The last content written by the driver with this process id; empty if it wrote nothing."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["pid"] != driver:
            return []  # left by a killed driver
        return [Silence(trial, tuple(seeds), max(0.0, time.time() - heard)) for trial, seeds, heard in content["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
