"""A metric is one line in the schema and the place that computes it; runs without it go on working."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from study_fixtures import DENSE, MPO, ledger_at, made_up, optuna_states, run_at, write_study

from analysis import run_schema as schema
from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.search.telling import what_to_tell, worst_values
from study.spec.study_file import load_config

ROOT = Path(__file__).parents[2]
TOY = {
    "analysis/run_schema.py": (
        "METRICS = (\n",
        '    Metric("val_bits", float, "validation loss in bits", ALL, "bits", "minimize"),\n',
    ),
    "study/training/train.py": (
        '            "val_loss": val_loss,\n',
        '            "val_bits": val_loss / math.log(2),\n',
    ),
}
"""Where a line is added: after this one, of this file."""
READ = """
import json, sys
from analysis.report.report import write_report
from analysis.runs.curves import load_curves
from analysis.runs.load import load_study, resolve_study
from pathlib import Path
runs = load_study(resolve_study(Path(sys.argv[1])))
curves = load_curves(runs, keys=("val_loss", "val_bits"))
write_report(runs, Path(sys.argv[1]) / "report", light=True)
print(json.dumps([runs.seeds.to_dict("list"), curves.to_dict("list")]))
"""


def command(program, *arguments):
    """The output of a program of another copy of the project."""
    made = subprocess.run(
        [sys.executable, *arguments],
        cwd=program,
        env=os.environ | {"PYTHONPATH": str(program)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return made.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A copy of the project with one more metric."""
    program = tmp_path_factory.mktemp("program")
    for package in ("mpo_core", "study", "analysis"):
        shutil.copytree(ROOT / package, program / package)
    for name, (line, added) in TOY.items():
        text = (program / name).read_text(encoding="utf-8")
        assert text.count(line) == 1
        (program / name).write_text(text.replace(line, line + added), encoding="utf-8")
    return program


@pytest.mark.slow
def test_metric_that_is_added_in_the_schema_and_where_it_is_computed_is_searched_recorded_and_read(program, tmp_path):
    searched = MPO | {"chi": {"low": 2, "high": 8}}
    settings = {"search": {"sampler": "tpe", "trials": 3}, "objectives": ["val_bits"]}
    file, folder = write_study(tmp_path, arms=[searched], **settings), tmp_path / "results"
    command(program, "-m", "study", "run", str(file), "--dir", str(folder), "--executor", "inline")
    seeds, curves = json.loads(command(program, "-c", READ, str(folder)).splitlines()[-1])
    for bits, nats in (("final/val_bits", "final/val_loss"), ("best/val_bits", "best/val_loss")):
        assert seeds[bits] == pytest.approx([value / math.log(2) for value in seeds[nats]])
    assert curves["val_bits"] == pytest.approx([value / math.log(2) for value in curves["val_loss"]])
    assert len(optuna_states(StudyDirectory(folder).ledger_url)) == 3


@pytest.mark.slow
def test_runs_from_before_a_metric_was_recorded_are_synced_and_read(program, tmp_path):
    folder = tmp_path / "results"
    run_at(write_study(tmp_path, arms=[MPO], seeds=3), folder, tracking=None)
    command(program, "-m", "study", "sync", str(folder))
    seeds, curves = json.loads(command(program, "-c", READ, str(folder)).splitlines()[-1])
    assert np.isnan(seeds["final/val_bits"]).all()
    assert np.isnan(curves["val_bits"]).all()
    assert np.isfinite(seeds["final/val_loss"]).all()
    assert len(curves["val_loss"]) == 2 * 3 * 4


@pytest.mark.parametrize("objective", ["val_bits", "learning_rate", "best/val_loss"])
def test_objective_must_be_a_metric_with_a_direction(tmp_path, objective):
    with pytest.raises(StudyError, match=f'must be one of {", ".join(schema.OBJECTIVES)}, but got "{objective}"'):
        load_config(write_study(tmp_path, objectives=[objective]))


def test_seed_without_a_value_counts_as_the_worst_on_record_of_any_objective(tmp_path):
    objectives = ["train_seconds", "val_acc", "n_params_compressed"]
    ledger = ledger_at(write_study(tmp_path, arms=[DENSE], objectives=objectives), tmp_path / "results")
    trial = ledger.ask()
    extremes = {"train_seconds": (2.0, 7.0), "final/val_acc": (2.0, 7.0)}
    assert worst_values(ledger.config, trial.shape, extremes) == {"train_seconds": 7.0, "val_acc": 0.0}
    assert worst_values(ledger.config, trial.shape, {}) == {"val_acc": 0.0}
    told = what_to_tell(ledger.config, trial, trial, [made_up(trial.number, seed) for seed in (0, 1)], {})
    assert told.values == [1.0, 0.5, trial.shape.n_params_compressed]
