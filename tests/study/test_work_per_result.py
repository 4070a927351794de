"""What the driver does for one result does not grow with the results that there are."""

from __future__ import annotations

import io
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import optuna
from rich.console import Console
from study_fixtures import DENSE, MPO, TUNED, made_up, write_study

import study
from study.commands.run import run_study
from study.ledger.directory import StudyDirectory
from study.spec.study_file import load_config


def lines_per_unit(file, folder, monkeypatch):
    """Lines of `study` and of Optuna that a driver runs between two units, in their order; training is left out."""
    n_lines, counts = 0, []
    counted = str(Path(study.__file__).parent), str(Path(optuna.__file__).parent)

    def trace(frame, event, argument):
        nonlocal n_lines
        n_lines += event == "line"
        return trace if frame.f_code.co_filename.startswith(counted) else None

    def run_unit(unit, on_evaluation, say):
        nonlocal n_lines
        counts.append(n_lines)
        n_lines = 0
        on_evaluation(unit.seeds[0], {"step": 1.0, "val_loss": 1.0})
        return [replace(made_up(unit.trial, seed, loss=1 + unit.trial / 100), weights="none") for seed in unit.seeds]

    monkeypatch.setattr("study.scheduler.inline.run_unit", run_unit)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        console = Console(file=io.StringIO(), width=80, force_terminal=True)
        run_study(load_config(file), StudyDirectory(folder), console, executor="inline", tracking="off")
    finally:
        sys.settrace(before)
    return counts


def test_work_for_one_result_does_not_grow_with_the_study(tmp_path, monkeypatch):
    """With trials that repeat others, and some that wait for a start which the file has after them."""
    tuned = [TUNED | {"name": f"tuned{steps}", "steps": steps} for steps in (3, 4, 5)]
    many = MPO | {"chi": [2, 500, 1000], "learning_rate": [0.001 * (1 + index) for index in range(12)]}
    file = write_study(tmp_path, arms=[*tuned, DENSE, many])
    counts = lines_per_unit(file, tmp_path / "study", monkeypatch)
    assert len(counts) == 2 * (3 + 1 + 24)
    early, late = statistics.fmean(counts[12:24]), statistics.fmean(counts[-12:])
    assert late < 1.1 * early
