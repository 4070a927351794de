"""Output of a running study: a live display in a terminal, a line per event elsewhere."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from study.ledger.ledger import Ledger
from study.spec.trial import SeedResult, Trial

if TYPE_CHECKING:
    from study.training.unit import Unit


_MOST_LINES = 16
"""Most lines of runs in training in the live display."""


def say(console: Console, line: str, *, is_trouble: bool = False) -> None:
    """Print a line unchanged and unbroken, whatever brackets and addresses it contains."""
    console.print(line, style="red" if is_trouble else None, markup=False, emoji=False, highlight=False, soft_wrap=True)


class StudyProgress:
    """Counts runs (trial × seed), and weights the remaining ones by their FLOPs."""

    def __init__(self, console: Console, ledger: Ledger) -> None:
        self._console, self._ledger = console, ledger
        self._begun = time.monotonic()
        self._flops_before = ledger.flops_recorded
        self._bar = Progress(
            TextColumn("[bold]runs"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            expand=True,
        )
        self._task = self._bar.add_task("runs", total=None, words="")
        self._running: dict[tuple[int, int], str] = {}
        """The last evaluation of each run in training, by (trial, seed)."""
        self._silent: list[str] = []
        self._live = Live(get_renderable=self._shown, console=console, transient=True, refresh_per_second=1)

    def __enter__(self) -> StudyProgress:
        if self._console.is_terminal:
            self._live.start()
        self.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def _shown(self) -> Group:
        ledger = self._ledger
        lines = [
            line
            for key, line in sorted(self._running.items())
            if key not in ledger.results and ledger.trials[key[0]].stop is None
        ]
        if len(lines) > _MOST_LINES:
            lines = [*lines[: _MOST_LINES - 1], f"and {len(lines) - _MOST_LINES + 1} more"]
        shown = [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in lines]
        return Group(self._bar, *shown, *(Text(line, style="red") for line in self._silent))

    # Events -------------------------------------------------------------------------------------------------------

    def on_evaluation(self, unit: Unit, seed: int, row: dict[str, float]) -> None:
        """Show an evaluation of a run."""
        step = f"step {row['step']:.0f}/{unit.spec.protocol.steps}"
        self._running[unit.trial, seed] = f"{self._name(unit.trial, seed)}: {step}, val loss {row['val_loss']:.3f}"
        if unit.until is not None and row["step"] >= unit.until:  # it pauses there
            self._running.pop((unit.trial, seed))

    def on_result(self, result: SeedResult) -> None:
        """Show the end of a run."""
        self._running.pop((result.trial, result.seed), None)
        name = self._name(result.trial, result.seed)
        if result.state == "failed":
            self.say(f"failed: {name}: {result.failure}")
        elif not self._console.is_terminal:
            loss, seconds = result.final["final/val_loss"], result.final["train_seconds"]
            done = f"{len(self._ledger.results)}/{self._n_runs()}"
            self.say(f"{done}  {name}: val loss {loss:.4f}, {seconds:.1f} s, {self._time_left()}")
        self.refresh()

    def on_silence(self, lines: list[str], anew: list[str]) -> None:
        """Show lines for runs that have not reported for long; a log prints only those in `anew`."""
        self._silent = lines
        if not self._console.is_terminal:
            for line in anew:
                self.say(line)

    def on_answered(self, trial: Trial) -> None:
        """Show a new trial that needs no training."""
        if trial.skipped is not None and trial.duplicate_of is None:
            self.say(f"skipped: trial {trial.number} ({trial.spec.arm}): {trial.skipped.reason}")
        self.refresh()

    def on_stop(self, trial: Trial) -> None:
        """Show a stopped trial."""
        if trial.stop is not None and trial.duplicate_of is None:
            self.say(f"stopped: trial {trial.number} ({trial.spec.arm}): {trial.stop.reason}")
        self.refresh()

    def say(self, line: str) -> None:
        """Print a line above the display."""
        say(self._console, line)

    def refresh(self) -> None:
        """Update the display from the ledger."""
        ledger = self._ledger
        lowest, _ = ledger.results.extremes["final/val_loss"]
        best = f"best loss {lowest:.3f}, " if math.isfinite(lowest) else ""
        words = f"trials {ledger.tally.n_over}/{ledger.tally.n_trials}, {best}{self._time_left()}"
        self._bar.update(self._task, completed=len(self._ledger.results), total=self._n_runs(), words=words)

    def _n_runs(self) -> int:
        """Number of runs that the study will have; a trial that repeats another has no runs of its own."""
        return len(self._ledger.results) + self._ledger.tally.n_missing

    def _name(self, number: int, seed: int) -> str:
        spec = self._ledger.trials[number].spec
        what = f" {spec.size}" if spec.size is not None else ""
        return f"trial {number} ({spec.arm}{what}) seed {seed}"

    # Time left ----------------------------------------------------------------------------------------------------

    def _time_left(self) -> str:
        done = self._ledger.flops_recorded - self._flops_before
        if done <= 0:
            return "time left unknown"
        rate = done / (time.monotonic() - self._begun)
        at_most = "at most " if self._ledger.config.search.halving is not None else ""  # trials may end at a rung
        return f"{at_most}{timedelta(seconds=round(self._ledger.tally.flops_left / rate))} left"
