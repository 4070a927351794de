"""Early stopping on Ray: what is in flight of a trial that was given up ends, and is no failure."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from study_fixtures import DENSE, write_search

from study.commands.run import run_study
from study.ledger.directory import StudyDirectory
from study.ledger.snapshot import read_ledger
from study.spec.study_file import load_config

pytestmark = [pytest.mark.fault, pytest.mark.filterwarnings("ignore")]


def test_unit_in_flight_of_a_stopped_trial_is_cancelled(tmp_path, monkeypatch):
    listed = {"name": "listed", "family": "mpo", "chi": 1, "learning_rate": 0.01}
    found = {"name": "found", "family": "mpo", "chi": {"choices": [2, 4]}, "learning_rate": 1e-7}
    file = write_search(
        tmp_path,
        arms=[DENSE, listed, found],
        seeds=4,
        protocol={"steps": 600, "warmup_steps": 2, "eval_every": 10},
        search={"trials": 2, "early_stopping": {"margin": 1e-6}},
    )
    printed = io.StringIO()
    outcome = run_study(
        load_config(file), StudyDirectory(tmp_path / "study"), Console(file=printed, width=300), tracking="off"
    )
    assert outcome.aborted is None
    assert (outcome.n_failed, outcome.n_missing) == (0, 0)
    assert outcome.n_stopped >= 1
    snapshot = read_ledger(StudyDirectory(tmp_path / "study").ledger_url, "search-random")
    n_of_stopped = []
    for trial in snapshot.trials:
        n_results = sum(result.trial == trial.number for result in snapshot.results)
        if trial.duplicate_of is not None:
            assert n_results == 0
        elif trial.stop is not None:
            n_of_stopped.append(n_results)
        else:
            assert n_results == 4
    assert min(n_of_stopped) == 2  # with two units at a time, a third was in flight when the second ended
    assert "stopped: trial" in printed.getvalue()
