from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from study_fixtures import (
    DENSE,
    ENVIRONMENT,
    MPO,
    TUNED,
    ledger_at,
    printed_by_run,
    results_at,
    run_at,
    substance,
    write_search,
    write_study,
)

from analysis import run_schema as schema
from study.directory import StudyDirectory
from study.errors import StudyError
from study.ledger import read_ledger
from study.run import study_corpus
from study.scheduler.inline import run_inline
from study.scheduler.queue import Queue
from study.scheduler.unit import store_corpus
from study.storage import Storage
from study.study_file import load_config

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "study"


def interrupt(file, folder, after):
    """Run a study in this process, and press Ctrl-C at that evaluation."""
    config = load_config(file)
    corpus = study_corpus(config)
    ledger = ledger_at(file, folder)
    storage = Storage(StudyDirectory(folder).storage_url())
    store_corpus(storage, corpus)
    n_evaluations = 0

    def on_evaluation(unit, seed, row):
        nonlocal n_evaluations
        n_evaluations += 1
        if n_evaluations == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_inline(Queue(config, ledger, storage, corpus.sha256), on_evaluation)
    ledger.close()


# A study to its end ---------------------------------------------------------------------------------------------------


def test_run_study_completes_every_trial_and_seed(tmp_path, folder):
    outcome = run_at(write_study(tmp_path), folder)
    assert outcome.__dict__ == {
        "n_trials": 4,
        "n_complete": 8,
        "n_failed": 0,
        "n_missing": 0,
        "aborted": None,
        "tracking_trouble": None,
    }
    results = results_at(folder)
    assert sorted(results) == [(trial, seed) for trial in range(4) for seed in range(2)]
    for result in results.values():
        assert set(result.final) == {field.key for field in schema.FINALS}
        assert [row["step"] for row in result.curve] == ([0, 2, 4, 6] if result.trial < 3 else [0, 2, 4])
        assert result.final["final/val_loss"] == result.curve[-1]["val_loss"]
    assert {(result.trial, result.weights is not None) for result in results.values()} == {
        (0, True),
        (1, False),
        (2, False),
        (3, False),
    }


def test_run_study_again_does_nothing(tmp_path, folder):
    file = write_study(tmp_path)
    first = run_at(file, folder)
    before = results_at(folder)
    stored = {path: path.stat().st_mtime_ns for path in (folder / "storage").rglob("*") if path.is_file()}
    second, printed = printed_by_run(file, folder, tracking="off")
    assert second == first
    assert results_at(folder) == before
    assert {path: path.stat().st_mtime_ns for path in (folder / "storage").rglob("*") if path.is_file()} == stored
    assert printed == ""


def test_run_study_prints_a_line_for_each_run(tmp_path, folder):
    _, printed = printed_by_run(write_study(tmp_path), folder, tracking="off")
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines] == [f"{n}/8" for n in range(1, 9)]
    assert "trial 3 (tuned χ=2) seed 1" in lines[-1]


def test_run_study_interrupted_ends_as_if_undisturbed(tmp_path, folder):
    file = write_study(tmp_path, execution={"checkpoint_seconds": 0})
    for after in (3, 7, 2, 11):
        interrupt(file, folder, after)
    outcome = run_at(file, folder)
    assert outcome.n_complete == 8
    run_at(file, tmp_path / "undisturbed")
    assert substance(folder) == substance(tmp_path / "undisturbed")


def test_run_study_interrupted_finds_the_same_trials_in_a_search(tmp_path, folder):
    file = write_search(tmp_path, sampler="tpe", trials=12, seeds=1, objectives=["val_loss"])
    for after in (3, 5, 18, 13):
        interrupt(file, folder, after)
    run_at(file, folder)
    run_at(file, tmp_path / "undisturbed")
    name = "search-tpe"
    one, other = (
        read_ledger(StudyDirectory(path).ledger_url, name).trials for path in (folder, tmp_path / "undisturbed")
    )
    assert one == other
    assert len(one) == 13
    assert substance(folder, name) == substance(tmp_path / "undisturbed", name)


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_run_study_records_a_diverging_seed_and_goes_on(tmp_path, folder):
    arms = [DENSE, {"name": "wild", "family": "dense", "learning_rate": 1e30}, MPO]
    outcome, printed = printed_by_run(write_study(tmp_path, arms=arms), folder, tracking="off")
    assert (outcome.n_complete, outcome.n_failed, outcome.n_missing, outcome.aborted) == (6, 2, 0, None)
    for seed in (0, 1):
        failed = results_at(folder)[1, seed]
        assert failed.state == "failed"
        assert failed.failure is not None
        assert failed.failure.startswith("diverged: ")
        assert 1 <= failed.failure_step <= 6
        assert failed.final == {}
        assert failed.curve[0]["step"] == 0
    assert printed.count("failed: trial 1 (wild)") == 2


def test_run_study_fails_what_depends_on_a_diverged_teacher(tmp_path, folder):
    wild = {"name": "wild", "family": "dense", "learning_rate": 1e30}
    outcome = run_at(write_study(tmp_path, arms=[wild, TUNED | {"teacher": "wild"}, MPO]), folder)
    assert (outcome.n_complete, outcome.n_failed, outcome.n_missing) == (4, 4, 0)
    assert results_at(folder)[1, 0].failure.startswith("its teacher (arm wild, seed 0) failed: diverged: ")


def test_run_study_stops_where_storage_breaks_and_loses_nothing(tmp_path, folder):
    file = write_study(tmp_path)
    interrupt(file, folder, after=9)  # two runs have four evaluations each
    done = results_at(folder)
    assert sorted(done) == [(0, 0), (0, 1)]
    shutil.move(folder / "storage", tmp_path / "away")
    (folder / "storage").mkdir()
    shutil.copytree(tmp_path / "away" / "corpus", folder / "storage" / "corpus")
    [own] = [path.name for path in (tmp_path / "away").iterdir() if path.name != "corpus"]
    (folder / "storage" / own).write_text("a file where checkpoints and weights were")
    outcome, printed = printed_by_run(file, folder, tracking="off")
    assert "Not a directory" in str(outcome.aborted)
    assert (outcome.n_complete, outcome.n_failed, outcome.n_missing) == (2, 0, 6)
    assert printed == ""
    assert results_at(folder) == done

    shutil.rmtree(folder / "storage")
    shutil.move(tmp_path / "away", folder / "storage")
    outcome = run_at(file, folder)
    assert (outcome.n_complete, outcome.n_missing, outcome.aborted) == (8, 0, None)
    run_at(file, tmp_path / "undisturbed")
    assert substance(folder) == substance(tmp_path / "undisturbed")


def test_run_study_refuses_storage_it_cannot_write_to(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match=r"--storage .*/file: cannot write there: Not a directory"):
        run_at(write_study(tmp_path), folder, storage_url=str(tmp_path / "file"))


def test_run_study_refuses_the_folder_of_another_study(tmp_path, folder):
    run_at(write_study(tmp_path, seeds=1, arms=[DENSE]), folder)
    with pytest.raises(StudyError, match="is the folder of study tiny"):
        run_at(write_study(tmp_path, name="other", seeds=1, arms=[DENSE]), folder)
    assert StudyDirectory(folder).load_config().name == "tiny"


def test_run_study_counts_a_duplicate_as_done(tmp_path, folder):
    file = write_study(tmp_path, seeds=1, arms=[DENSE, MPO | {"chi": [500, 1000]}])
    outcome = run_at(file, folder)
    assert (outcome.n_trials, outcome.n_complete, outcome.n_missing) == (3, 2, 0)


def test_run_study_gives_each_seed_what_it_gives_alone(tmp_path, folder):
    """A result depends on the trial's configuration and the seed, not on what ran before it."""
    run_at(write_study(tmp_path, seeds=[5, 3], arms=[MPO, DENSE]), folder)
    run_at(write_study(tmp_path, name="alone", seeds=[3], arms=[DENSE]), tmp_path / "alone")
    [alone] = results_at(tmp_path / "alone", "alone").values()
    same = results_at(folder)[2, 3]
    assert same.curve == alone.curve
    rest = {"trial": 0, "started": "", "ended": "", "final": {}, "rel_errors": {}, "weights": None}
    assert replace(same, **rest) == replace(alone, **rest)


def test_run_study_without_tracking_imports_neither_ray_nor_mlflow(tmp_path, folder):
    file = write_study(tmp_path, seeds=1, arms=[DENSE])
    script = (
        "import sys\nfrom study.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'ray', 'mlflow'} & set(sys.modules)\n"
    )
    options = ["--dir", folder, "--executor", "inline", "--tracking", "off"]
    done = subprocess.run(
        [sys.executable, "-c", script, "run", file, *options],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tiny: 1 trials, 1 runs complete" in done.stdout
    assert not (folder / "mlflow.db").exists()
