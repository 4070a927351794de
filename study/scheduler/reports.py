"""When each run that is out reported last: said while a study runs, and kept where `status` finds it.

A worker that hangs sends nothing, so that nothing here waits for a result: a thread of its own looks at the clock.
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

from study.ledger.directory import replace_file

SILENT_SECONDS = 600
"""A run that has not reported for this long is named, and again each time that this long has passed."""

LOOK_SECONDS = 5
"""Time between two looks, and so the least between two writes of the file."""

Key = tuple[int, int]


@dataclass
class Flight:
    """A run (trial, seed) that was issued; `heard`: when a worker had it or reported last, None before any worker."""

    heard: float | None = None
    has_begun: bool = False


@dataclass(frozen=True)
class Silence:
    """Runs of one trial that were heard of last at the same time, in seconds before now."""

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
    """The runs that are out.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock

    def issue(self, keys: Iterable[Key]) -> None:
        self.update((key, Flight()) for key in keys)

    def note(self, keys: Iterable[Key], *, begins: bool = False) -> None:
        """A worker has these, or reports of them; one that is back already is passed over."""
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
        """How long ago each run that has a worker was heard of, all or these."""
        now, found = self._clock(), defaultdict(list)
        for key, flight in list(self.items()) if keys is None else [(key, self[key]) for key in keys if key in self]:
            if flight.heard is not None:
                found[key[0], flight.heard].append(key[1])
        return [Silence(trial, tuple(seeds), now - heard) for (trial, heard), seeds in found.items()]


class SilenceWatch:
    """Looks at the runs that are out, every few seconds, as long as it is entered.

    Args:
        file: where it writes when each was heard of, for `read_reports`.
        show: told at each look of every long silence, and of those among them to be said again.
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
        """Write and say what there is now."""
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
            with suppress(OSError):  # a full disk is said by what matters more
                replace_file(self._file, text.encode(), 0o600)
                self._written = text


def read_reports(file: Path, driver: int | None) -> list[Silence]:
    """What the driver with this process id wrote last; empty where it wrote nothing."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["pid"] != driver:
            return []  # one that was killed left it
        return [Silence(trial, tuple(seeds), max(0.0, time.time() - heard)) for trial, seeds, heard in content["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
