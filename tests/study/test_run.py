from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from study_fixtures import (
    DENSE,
    ENVIRONMENT,
    MPO,
    TUNED,
    USUAL_FINALS,
    ledger_at,
    mlflow_template,  # noqa: F401 (a fixture)
    printed_by_run,
    results_at,
    run_at,
    runs_in,
    substance,
    write_search,
    write_study,
)

from analysis import run_schema as schema
from analysis.runs.load import load_study, resolve_study
from study.commands.opening import study_corpus
from study.commands.sync import sync
from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.ledger.snapshot import read_ledger
from study.scheduler.inline import run_inline
from study.scheduler.queue import Queue
from study.spec.study_file import load_config
from study.training.corpus_storage import store_corpus
from study.training.seed_run import train_seed
from study.training.storage import Storage

pytestmark = pytest.mark.filterwarnings(
    "ignore::optuna.exceptions.ExperimentalWarning", "ignore:::mlflow", "ignore::DeprecationWarning"
)


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
        "n_skipped": 0,
        "n_stopped": 0,
        "search_ended": None,
        "aborted": None,
        "tracking_trouble": None,
        "backup_trouble": None,
    }
    results = results_at(folder)
    assert sorted(results) == [(trial, seed) for trial in range(4) for seed in range(2)]
    for result in results.values():
        assert set(result.final) == USUAL_FINALS
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
    notes, lines = printed.splitlines()[:2], printed.splitlines()[2:]
    assert all(note.startswith("note: ") for note in notes)  # two seeds decide nothing
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


def test_run_study_tells_readers_how_many_runs_are_missing(tmp_path, folder, mlflow_template):  # noqa: F811
    file = write_study(tmp_path)
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    interrupt(file, folder, 9)  # its first results are in the ledger alone
    config = load_config(file)
    done = len(results_at(folder))
    assert 0 < done < 8
    assert sync(config, StudyDirectory(folder), None, None) > 0
    runs = load_study(resolve_study(folder))
    assert (len(runs.seeds), runs.n_missing) == (done, 8 - done)
    run_at(file, folder, tracking=None)
    runs = load_study(resolve_study(folder))
    assert (len(runs.seeds), runs.n_missing) == (8, 0)


@pytest.mark.slow
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


def test_run_study_fails_what_depends_on_a_diverged_start(tmp_path, folder):
    wild = {"name": "wild", "family": "dense", "learning_rate": 1e30}
    outcome = run_at(write_study(tmp_path, arms=[wild, TUNED | {"start": "wild"}, MPO]), folder)
    assert (outcome.n_complete, outcome.n_failed, outcome.n_missing) == (4, 4, 0)
    assert results_at(folder)[1, 0].failure.startswith("its start (arm wild, seed 0) failed: diverged: ")


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
    assert outcome.n_missing == 8  # the starts' weights are gone as well
    assert printed.count("arm dense, seed ") == printed.count("its weights are not in ") == 2
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


@pytest.mark.slow
def test_run_study_without_tracking_imports_neither_ray_nor_mlflow(tmp_path, folder):
    file = write_study(tmp_path, seeds=1, arms=[DENSE])
    script = (
        "import sys\nfrom study.commands.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'ray', 'mlflow'} & set(sys.modules)\n"
    )
    options = ["--dir", folder, "--executor", "inline", "--tracking", "off"]
    done = subprocess.run(
        [sys.executable, "-c", script, "run", file, *options],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tiny: 1 trials, 1 runs complete" in done.stdout
    assert not (folder / "mlflow.db").exists()


# Parts that are gone --------------------------------------------------------------------------------------------------


def test_run_study_refuses_a_folder_whose_ledger_is_gone(tmp_path, folder):
    file = write_study(tmp_path, seeds=1, arms=[DENSE])
    run_at(file, folder)
    shutil.move(folder / "ledger.db", tmp_path / "ledger.db")
    with pytest.raises(StudyError, match="the study's ledger is missing"):
        run_at(file, folder)
    assert not (folder / "ledger.db").exists()
    ledger_at(write_study(tmp_path / "other", seeds=1, arms=[DENSE]), tmp_path / "other" / "study").close()
    shutil.copy(tmp_path / "other" / "study" / "ledger.db", folder / "ledger.db")
    with pytest.raises(StudyError, match=r"the ledger does not contain study tiny .* which was run here before"):
        run_at(file, folder)
    shutil.move(tmp_path / "ledger.db", folder / "ledger.db")
    assert run_at(file, folder).n_complete == 1


@pytest.mark.slow
def test_run_study_trains_a_start_again_whose_weights_are_gone(tmp_path, folder):
    file = write_study(tmp_path)
    interrupt(file, folder, after=10)  # both starts are trained
    [weights] = folder.glob("storage/*/weights")
    shutil.rmtree(weights)
    outcome, printed = printed_by_run(file, folder, tracking="off")
    assert (outcome.n_complete, outcome.n_missing) == (8, 0)
    for seed in (0, 1):
        assert f"arm dense, seed {seed}: its weights are not in " in printed
    run_at(file, tmp_path / "undisturbed")
    assert substance(folder) == substance(tmp_path / "undisturbed")


@pytest.mark.slow
def test_run_study_goes_on_with_another_storage(tmp_path, folder):
    file = write_study(tmp_path)
    interrupt(file, folder, after=10)
    outcome = run_at(file, folder, storage_url=str(tmp_path / "elsewhere"))
    assert (outcome.n_complete, outcome.n_missing) == (8, 0)
    run_at(file, tmp_path / "undisturbed")
    assert substance(folder) == substance(tmp_path / "undisturbed")


def test_run_study_with_a_damaged_start_stops_once_and_then_goes_on(tmp_path, folder):
    file = write_study(tmp_path)
    interrupt(file, folder, after=17)  # all that needs no start is trained
    weights = sorted(folder.glob("storage/*/weights/*"))
    weights[0].write_bytes(weights[0].read_bytes()[:-10])
    assert "it was removed and will be trained again" in str(run_at(file, folder).aborted)
    outcome = run_at(file, folder)
    assert (outcome.n_complete, outcome.aborted) == (8, None)


def test_run_study_mends_a_damaged_corpus_in_storage(tmp_path, folder):
    file = write_study(tmp_path, seeds=1)
    interrupt(file, folder, after=2)
    [text] = folder.glob("storage/corpus/*")
    text.write_text("cut short")
    assert run_at(file, folder).n_complete == 4


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE mpo_result SET content = '{\"trial\": 0'",
        "UPDATE trial_user_attributes SET value_json = '{}'",
        "DELETE FROM trial_user_attributes",
        "DROP TABLE trial_user_attributes",
        None,
    ],
)
def test_run_study_says_in_one_line_what_is_damaged(tmp_path, folder, damage):
    file = write_study(tmp_path, seeds=1, arms=[DENSE])
    run_at(file, folder)
    if damage is None:
        (folder / "study.json").write_text('{"name": "ti')
    else:
        with sqlite3.connect(folder / "ledger.db") as connection:
            connection.execute(damage)
        connection.close()
    with pytest.raises(StudyError, match=r"is damaged: |the ledger cannot be used: ") as error:
        run_at(file, folder)
    assert "\n" not in str(error.value)


# Failures again -------------------------------------------------------------------------------------------------------


def out_of_memory_at(monkeypatch, arm, times):
    """Let the training of an arm run out of memory that often."""
    left = [times]

    def train(spec, *args, **kwargs):
        if spec.arm == arm and left[0] > 0:
            left[0] -= 1
            raise torch.OutOfMemoryError("tried to allocate a lot")
        return train_seed(spec, *args, **kwargs)

    monkeypatch.setattr("study.training.unit.train_seed", train)


@pytest.mark.slow
def test_run_study_out_of_memory_in_one_trial_goes_on_with_the_others(tmp_path, folder, monkeypatch):
    file = write_study(tmp_path, seeds=1)
    out_of_memory_at(monkeypatch, "dense", times=2)
    assert run_at(file, folder).n_complete == 4
    out_of_memory_at(monkeypatch, "mpo", times=4)  # three for its first trial, and one for its second
    outcome = run_at(file, tmp_path / "again")
    assert (outcome.n_complete, outcome.n_failed, outcome.aborted) == (3, 1, None)
    reason = "its worker died 3 times without progress: out of memory: tried to allocate a lot"
    assert results_at(tmp_path / "again")[1, 0].failure == reason


@pytest.mark.slow
def test_run_study_retries_failures_but_not_divergence(tmp_path, folder, monkeypatch, mlflow_template):  # noqa: F811
    wild = {"name": "wild", "family": "dense", "learning_rate": 1e30}
    file = write_study(tmp_path, arms=[DENSE, wild, TUNED])
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    out_of_memory_at(monkeypatch, "dense", times=3)
    first = run_at(file, folder, tracking=None)
    assert (first.n_complete, first.n_failed) == (2, 4)  # a dense seed, what depends on it, and two that diverge
    assert run_at(file, folder, tracking=None) == first
    outcome = run_at(file, folder, tracking=None, retry_failed=True)
    assert (outcome.n_complete, outcome.n_failed, outcome.n_missing) == (4, 2, 0)
    run_at(file, tmp_path / "undisturbed")
    assert substance(folder) == substance(tmp_path / "undisturbed")

    uuid = StudyDirectory(folder).uuid()
    runs = runs_in(folder / "mlflow.db")
    assert {len(same) for same in runs.values()} == {1}
    for (trial, seed), result in results_at(folder).items():
        [run] = runs[schema.run_key(uuid, trial, seed)]
        assert run.info.status == ("FINISHED" if result.state == "complete" else "FAILED")
        assert (schema.FAILURE in run.data.tags) == (result.state == "failed")
    [parent] = runs[schema.run_key(uuid, 0)]
    assert (parent.data.metrics[schema.N_SEEDS], parent.data.metrics[schema.N_FAILED]) == (2, 0)


def test_run_unit_calls_a_number_that_is_none_a_failure(tmp_path, folder, monkeypatch):
    def train(*args, **kwargs):
        result, weights = train_seed(*args, **kwargs)
        return replace(result, final=result.final | {"final/val_acc": float("nan")}), weights

    monkeypatch.setattr("study.training.unit.train_seed", train)
    outcome = run_at(write_study(tmp_path, seeds=1, arms=[DENSE]), folder)
    assert (outcome.n_complete, outcome.n_failed) == (0, 1)
    assert results_at(folder)[0, 0].failure == "diverged: final/val_acc is not finite"
