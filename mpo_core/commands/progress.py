"""Progress of a long command: one line that is rewritten on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TextIO

INTERVAL = 15.0
"""Seconds between two lines of a stage, if they are not rewritten."""


class Progress:
    """Shows how far a stage is and the time it still needs, if its steps take equally long.

    Args:
        stream: where the lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self.seconds: dict[str, float] = {}
        """Duration of each stage so far."""
        self._stream, self._rewrites = stream, stream.isatty()
        self._stage, self._begun, self._shown = "", time.monotonic(), 0.0
        self._last = self._begun

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Tell that `done` of `total` steps are done. A stage begins when the last one ended, or at done = 0."""
        now = time.monotonic()
        if stage != self._stage or done == 0:
            self._stage, self._begun, self._shown = stage, now if done == 0 else self._last, now
        self._last = now
        spent = self.seconds[stage] = now - self._begun
        if done >= total:
            self.say(f"{stage}: {total} in {duration(spent)}")
        elif self._rewrites or now - self._shown >= INTERVAL:
            left = f", about {duration(spent / done * (total - done))} left" if done else ""
            self._write(f"{stage}: {done} of {total}{left}")
            self._shown = now

    def say(self, line: str) -> None:
        """Show a line that stays; the next stage begins now."""
        self._last = time.monotonic()
        self._write(line)
        if self._rewrites:
            self._stream.write("\n")
            self._stream.flush()

    def clear(self) -> None:
        """Remove a line that would be rewritten."""
        if self._rewrites:
            self._write("")

    def _write(self, line: str) -> None:
        # Back to the beginning of the line, and erase what is longer.
        self._stream.write(f"\r{line}\x1b[K" if self._rewrites else line + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """Such as "8 s", "3 min 20 s", "12 min" or "2 h 5 min"."""
    minutes, whole = divmod(round(seconds), 60)
    if minutes < 10:
        return " ".join([f"{minutes} min"] * (minutes > 0) + [f"{whole} s"] * (whole > 0 or minutes == 0))
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return " ".join([f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0 or hours == 0))
