from __future__ import annotations

import shutil
import socket
import sqlite3
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from study_fixtures import (
    DENSE,
    MPO,
    contents,
    database,  # noqa: F401 (a fixture)
    ledger_at,
    mlflow_client,
    mlflow_template,  # noqa: F401 (a fixture)
    printed_by_run,
    results_at,
    run_at,
    runs_in,
    write_study,
)

from analysis import run_schema as schema
from analysis.errors import AnalysisError
from analysis.report.publish import publish
from analysis.report.report import FOLDER
from analysis.runs.load import StudyAddress, load_study, resolve_study
from study.commands.opening import study_corpus
from study.commands.sync import sync
from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.spec.config import Execution
from study.spec.study_file import load_config
from study.tracking.background import BackgroundTracker, is_left_writing
from study.tracking.connection import TrackingAway, connect, prepare_own_database, tracking_error
from study.tracking.content import seed_content, trial_content
from study.tracking.opening import open_tracker, study_record
from study.tracking.tracker import Tracker
from study.training.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")

WILD = {"name": "wild", "family": "dense", "learning_rate": 1e30}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study that MLflow does not have: its study file and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    arms = [
        DENSE,
        MPO | {"chi": [2, 500, 1000]},
        WILD,
        {"name": "tuned", "family": "mpo", "chi": 2, "start": "dense", "steps": 4},
    ]
    file = write_study(folder, arms=arms, seeds=[0, 7], description="What it is for.")
    run_at(file, folder / "study")
    return file, folder / "study"


@pytest.fixture
def opened(finished):
    """The finished study's ledger, and what opens a tracker over it."""
    file, folder = finished
    config, directory = load_config(file), StudyDirectory(folder)
    ledger = ledger_at(file, folder)

    def connect(path, **changes):
        corpus = study_corpus(config)
        uri = path if isinstance(path, str) else f"sqlite:///{path}"
        storage = Storage(directory.storage_url())
        record = study_record(config.model_copy(update=changes), ledger, corpus)
        return open_tracker(uri, directory, storage, record)

    yield ledger, connect
    ledger.close()


def wait_until(is_so):
    """Wait for an event of another thread; at most as long as no machine takes."""
    deadline = time.monotonic() + 240
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write_all(ledger, tracker):
    for trial in ledger.trials.values():
        tracker.write(trial, ledger.on_record(trial), 2)


def create(tracker, ledger, number, result=None):
    """Runs of a trial, and of a seed of it, that have only what they are created with."""
    trial, record = ledger.trials[number], tracker._record
    parent = tracker._ensure(trial_content(record, trial, ledger.on_record(trial)[:1], False))
    child = None if result is None else tracker._ensure(seed_content(record, trial, result), parent=parent.run_id)
    return parent, child


def keys_of(ledger):
    """Keys that MLflow must have: a run for each trial, and one for each seed of what is no duplicate."""
    trained = [number for number, trial in ledger.trials.items() if trial.duplicate_of is None]
    seeds = [schema.run_key(ledger.uuid, number, seed) for number in trained for seed in (0, 7)]
    trials = [schema.run_key(ledger.uuid, number) for number in ledger.trials]
    return sorted([*trials, *seeds, f"{ledger.uuid}/summary"])


# What is written ------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(opened, database):  # noqa: F811
    ledger, connect = opened
    write_all(ledger, connect(database))
    return ledger, database, runs_in(database)


def test_tracker_writes_one_run_for_each_trial_and_each_seed(written):
    ledger, _, runs = written
    assert sorted(runs) == keys_of(ledger)
    assert all(len(same) == 1 for same in runs.values())
    for (trial, seed), result in ledger.results.items():
        [parent], [child] = (runs[schema.run_key(ledger.uuid, trial, s)] for s in (None, seed))
        assert child.data.tags[schema.PARENT] == parent.info.run_id
        assert schema.PARENT not in parent.data.tags
        assert child.info.status == ("FINISHED" if result.state == "complete" else "FAILED")
        assert child.info.end_time - child.info.start_time < 60_000
        assert parent.info.status == child.info.status


def test_tracker_writes_params_that_the_schema_reads_back(written):
    ledger, _, runs = written
    for (number, seed), _ in ledger.results.items():
        [run] = runs[schema.run_key(ledger.uuid, number, seed)]
        trial = ledger.trials[number]
        read = {key: schema.FIELDS["param", key].dtype(text) for key, text in run.data.params.items()}
        assert read["trial"] == number
        assert read["seed"] == seed
        assert read["d_ff"] == 32
        assert read["learning_rate"] == trial.spec.protocol.learning_rate
        [parent] = runs[schema.run_key(ledger.uuid, number)]
        assert parent.data.tags[schema.VALIDATION_FRACTION] == "0.1"
        assert read["budget_hash"] == trial.budget_hash
        for key in ("arm", "family", "chi", "n_sites", "factorisation", "init", "start"):
            assert read.get(key) == (getattr(trial.spec, key) or ("scratch" if key == "start" else None))
        [parent] = runs[schema.run_key(ledger.uuid, number)]
        assert parent.data.params == {key: text for key, text in run.data.params.items() if key != "seed"}


def test_tracker_writes_every_evaluation(written):
    ledger, path, runs = written
    client = mlflow_client(path)
    for (trial, seed), result in ledger.results.items():
        [run] = runs[schema.run_key(ledger.uuid, trial, seed)]
        for field in schema.CURVES:
            history = client.get_metric_history(run.info.run_id, field.key)
            points = [(row["step"], row[field.key]) for row in result.curve if field.key in row]
            assert [(point.step, point.value) for point in history] == points
        for key, value in (result.final | result.rel_errors).items():
            assert run.data.metrics[key] == value


def test_tracker_writes_means_and_deviations_over_complete_seeds(written):
    ledger, _, runs = written
    for trial in ledger.trials.values():
        [run] = runs[schema.run_key(ledger.uuid, trial.number)]
        finals = [result.final for result in ledger.on_record(trial) if result.state == "complete"]
        assert run.data.metrics[schema.N_SEEDS] == len(finals)
        assert run.data.metrics[schema.N_FAILED] == 2 - len(finals)
        assert run.data.metrics["n_params"] == trial.shape.n_params
        for field in schema.FINALS:
            values = [final[field.key] for final in finals if field.key in final]
            if not values:  # a metric of other kinds of trial
                assert schema.mean_key(field.key) not in run.data.metrics
                continue
            mean, std = schema.mean_key(field.key), schema.std_key(field.key)
            if values:
                assert run.data.metrics[mean] == pytest.approx(np.mean(values), rel=1e-15)
                assert run.data.metrics[std] == pytest.approx(np.std(values, ddof=1), rel=1e-12, abs=1e-18)
            else:
                assert not {mean, std} & set(run.data.metrics)


def test_tracker_tags_failures_and_duplicates(written):
    ledger, _, runs = written
    [duplicate] = [trial for trial in ledger.trials.values() if trial.duplicate_of is not None]
    [run] = runs[schema.run_key(ledger.uuid, duplicate.number)]
    assert run.data.tags[schema.DUPLICATE_OF] == str(duplicate.duplicate_of)
    [original] = runs[schema.run_key(ledger.uuid, duplicate.duplicate_of)]
    assert run.data.metrics == original.data.metrics
    failed = [result for result in ledger.results.values() if result.state == "failed"]
    assert len(failed) == 2
    for result in failed:
        [run] = runs[schema.run_key(ledger.uuid, result.trial, result.seed)]
        assert run.data.tags[schema.FAILURE] == result.failure
        assert run.data.tags[schema.FAILURE_STEP] == str(result.failure_step)


def test_tracker_keeps_the_study_file_and_the_environment(written, tmp_path, finished):
    ledger, path, runs = written
    [run] = runs[f"{ledger.uuid}/summary"]
    client = mlflow_client(path)
    kept = client.download_artifacts(run.info.run_id, "study.yaml", str(tmp_path))
    assert load_config(kept) == load_config(finished[0])
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"study.yaml", "environment.json"}
    assert client.get_experiment_by_name("tiny").tags["mlflow.note.content"] == "What it is for."


# Again and again ------------------------------------------------------------------------------------------------------


def test_tracker_writing_twice_changes_nothing(opened, database):  # noqa: F811
    ledger, connect = opened
    tracker = connect(database)
    write_all(ledger, tracker)
    before = contents(database)
    write_all(ledger, tracker)
    write_all(ledger, connect(database))
    assert contents(database) == before


def test_tracker_writing_seed_by_seed_ends_like_writing_at_once(opened, database, tmp_path):  # noqa: F811
    ledger, connect = opened
    at_once = shutil.copy(database, tmp_path / "at_once.db")
    write_all(ledger, connect(at_once))
    for n in (1, 2):
        tracker = connect(database)
        for trial in ledger.trials.values():
            in_order = sorted(ledger.on_record(trial), key=lambda result: result.ended)
            tracker.write(trial, in_order[:n], 2)

    def final(path):
        return {
            key: [(r.info.status, r.info.start_time, r.info.end_time, r.data.params, r.data.metrics) for r in same]
            for key, same in runs_in(path).items()
        }

    assert final(database) == final(at_once)


def test_tracker_shows_a_trial_as_running_until_its_last_seed(opened, database):  # noqa: F811
    ledger, connect = opened
    tracker = connect(database)
    tracker.write(ledger.trials[0], ledger.on_record(ledger.trials[0])[:1], 2)
    [run] = runs_in(database)[schema.run_key(ledger.uuid, 0)]
    assert run.info.status == "RUNNING"
    assert run.data.metrics[schema.N_SEEDS] == 1
    assert schema.std_key("final/val_loss") not in run.data.metrics


def test_tracker_completes_half_written_runs(opened, database, tmp_path):  # noqa: F811
    ledger, connect = opened
    whole = shutil.copy(database, tmp_path / "whole.db")
    write_all(ledger, connect(whole))
    tracker = connect(database)
    result = ledger.on_record(ledger.trials[0])[0]
    parent, child = create(tracker, ledger, 0, result)  # the driver dies before their first metric
    write_all(ledger, connect(database))

    runs = runs_in(database)
    assert sorted(runs) == keys_of(ledger)
    assert runs[schema.run_key(ledger.uuid, 0)][0].info.run_id == parent.run_id
    assert runs[schema.run_key(ledger.uuid, 0, 0)][0].info.run_id == child.run_id
    for key, [run] in runs_in(whole).items():
        assert runs[key][0].data.metrics == run.data.metrics
        assert runs[key][0].data.params == run.data.params
        assert runs[key][0].info.status == run.info.status


@pytest.mark.parametrize("deleted", [(0, 7), (0, None), (1, None), (2, 0)])
def test_tracker_writes_a_deleted_run_again(opened, database, deleted):  # noqa: F811
    ledger, connect = opened
    write_all(ledger, connect(database))
    before = runs_in(database)
    [run] = before[schema.run_key(ledger.uuid, *deleted)]
    mlflow_client(database).delete_run(run.info.run_id)
    write_all(ledger, connect(database))

    after = runs_in(database)
    assert sorted(after) == keys_of(ledger)
    for key, [run] in before.items():
        [again] = after[key]
        assert again.data.metrics == run.data.metrics
        assert again.data.params == run.data.params
    for trial, seed in ledger.results:
        [parent], [child] = (after[schema.run_key(ledger.uuid, trial, s)] for s in (None, seed))
        assert child.data.tags[schema.PARENT] == parent.info.run_id


@pytest.mark.parametrize("tag", [schema.CLAIMS, schema.GROWTHS, schema.ENVIRONMENT])
def test_tracker_writes_again_what_the_summary_lacks(opened, database, tag):  # noqa: F811
    ledger, connect = opened
    connect(database)
    key = f"{ledger.uuid}/{schema.KIND_SUMMARY}"
    [before] = runs_in(database)[key]
    mlflow_client(database).delete_tag(before.info.run_id, tag)
    connect(database)
    [after] = runs_in(database)[key]
    assert after.data.tags[tag] == before.data.tags[tag]
    assert after.info.end_time == before.info.end_time


# What readers know a state by -----------------------------------------------------------------------------------------


def revision_of(path):
    [(summary,)] = [runs for key, runs in runs_in(path).items() if key.endswith("/summary")]
    return summary.data.tags.get(schema.REVISION)


def test_tracker_names_a_state_in_which_all_is_written(opened, database):  # noqa: F811
    ledger, connect = opened
    tracker = connect(database)
    write_all(ledger, tracker)
    assert revision_of(database) is None
    tracker.settle(0)
    first = revision_of(database)
    assert first.partition("/")[2] == str(len(keys_of(ledger)))
    again = connect(database)
    write_all(ledger, again)  # which changes nothing
    again.settle(0)
    assert revision_of(database) == first


def test_tracker_takes_the_name_of_a_state_away_before_it_changes_it(opened, database, monkeypatch):  # noqa: F811
    from mlflow import MlflowClient

    ledger, connect = opened
    tracker = connect(database)
    write_all(ledger, tracker)
    tracker.settle(0)
    first = revision_of(database)
    [run] = runs_in(database)[schema.run_key(ledger.uuid, 0, 7)]
    mlflow_client(database).delete_run(run.info.run_id)
    seen = {}

    def watch(name):
        real = getattr(MlflowClient, name)

        def call(self, *arguments, **settings):
            seen[name] = revision_of(database)
            return real(self, *arguments, **settings)

        monkeypatch.setattr(MlflowClient, name, call)

    for name in ("create_run", "log_batch", "log_artifact", "log_inputs", "set_terminated", "delete_run"):
        watch(name)
    again = connect(database)
    write_all(ledger, again)
    assert seen == {"create_run": None, "log_batch": None, "set_terminated": None}
    assert revision_of(database) is None  # a writer that is killed here leaves it so
    again.settle(0)
    assert revision_of(database) not in (None, first)


def test_tracker_names_no_state_in_which_a_run_is_running(opened, database):  # noqa: F811
    ledger, connect = opened
    tracker = connect(database)
    tracker.write(ledger.trials[0], ledger.on_record(ledger.trials[0])[:1], 2)
    tracker.settle(0)
    assert revision_of(database) is None
    write_all(ledger, tracker)
    tracker.settle(0)
    assert revision_of(database) is not None


def test_cache_of_the_analysis_follows_what_a_tracker_does(opened, database, tmp_path):  # noqa: F811
    ledger, connect = opened
    address, cache = StudyAddress(f"sqlite:///{database}", "tiny"), tmp_path / "cache"

    def check(is_kept):
        kept, read = load_study(address, cache=cache), load_study(address)
        for name in ("trials", "seeds", "failures", "unfinished"):
            pd.testing.assert_frame_equal(getattr(kept, name), getattr(read, name))
        assert (kept.cache is not None) == is_kept
        return len(read.seeds)

    tracker = connect(database)
    half = list(ledger.trials.values())[:1]
    for trial in half:
        tracker.write(trial, ledger.on_record(trial), 2)
    check(False)
    tracker.settle(0)  # the study was stopped here
    n_first = check(True)
    write_all(ledger, tracker)
    assert check(False) > n_first
    tracker.settle(0)
    n_all = check(True)
    [run] = runs_in(database)[schema.run_key(ledger.uuid, 0, 7)]
    mlflow_client(database).delete_run(run.info.run_id)
    for options in ({"cache": cache}, {}):
        with pytest.raises(AnalysisError, match=r"2 complete seeds, but there are 1 runs of them.*mpo-study sync"):
            load_study(address, **options)
    again = connect(database)
    write_all(ledger, again)
    again.settle(0)
    assert check(True) == n_all


# Refusals -------------------------------------------------------------------------------------------------------------


def test_tracker_refuses_the_experiment_of_another_study(opened, database, tmp_path):  # noqa: F811
    _, connect = opened
    connect(database)
    other = tmp_path / "other"
    config, directory = load_config(write_study(other, arms=[DENSE])), StudyDirectory(other / "study")
    ledger = ledger_at(other / "tiny.yaml", other / "study")
    before = contents(database)
    record = study_record(config, ledger, study_corpus(config))
    with pytest.raises(StudyError, match="experiment tiny in MLflow belongs to another study of that name"):
        open_tracker(f"sqlite:///{database}", directory, Storage(str(other)), record)
    ledger.close()
    assert contents(database) == before


def test_tracker_refuses_a_deleted_experiment(opened, database):  # noqa: F811
    _, connect = opened
    connect(database)
    client = mlflow_client(database)
    client.delete_experiment(client.get_experiment_by_name("tiny").experiment_id)
    with pytest.raises(StudyError, match="the experiment tiny was deleted; restore it"):
        connect(database)


@pytest.fixture
def nobody(monkeypatch):
    """The address of a server that is not there; asked once, without patience."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_tracker_says_in_one_line_that_mlflow_is_away(opened, nobody):
    _, connect = opened
    with pytest.raises(StudyError, match=f"cannot reach MLflow at {nobody}: ") as error:
        connect(nobody)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("uri", ["redis://host", "oracle://me:secret@host/db"])
def test_connect_tells_a_wrong_place_from_one_that_is_away(uri):
    with pytest.raises(StudyError, match="cannot reach MLflow at ") as error:
        connect(uri)
    assert not isinstance(error.value, TrackingAway)
    assert "secret" not in str(error.value)


def test_tracking_error_hides_a_password_in_what_the_driver_says():
    error = tracking_error(ConnectionError("cannot connect with me:se-cret@host"), "postgresql://me:se-cret@host/db")
    assert str(error) == "cannot reach MLflow at postgresql://me:***@host/db: cannot connect with me:***@host"


# The database in a study's own folder ---------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """Prepares the database of a study's own folder, for artifacts in a folder beside it."""

    def prepare(artifacts="file:///artifacts"):
        return prepare_own_database(tmp_path / "mlflow.db", artifacts)

    return prepare


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_own_database_is_made_whole_and_then_left_alone(tmp_path, own):
    (tmp_path / "mlflow.db.partial").write_text("what a killed driver left")
    assert own() is None
    mlflow_client(tmp_path / "mlflow.db").create_experiment("tiny", artifact_location="file:///artifacts")
    before = (tmp_path / "mlflow.db").read_bytes()
    assert own() is None
    assert names_in(tmp_path) == ["mlflow.db"]
    assert (tmp_path / "mlflow.db").read_bytes() == before


@pytest.mark.parametrize("size", [0, 1, 5000, 100_000])
def test_own_database_that_is_damaged_is_set_aside(tmp_path, mlflow_template, own, size):  # noqa: F811
    damaged = mlflow_template.read_bytes()[:size].replace(b"experiments", b"exp\0riments")
    (tmp_path / "mlflow.db").write_bytes(damaged)
    said = own()
    assert said is not None
    assert "renamed it to mlflow.db.old-1, and a new one is written from the ledger" in said
    assert (tmp_path / "mlflow.db.old-1").read_bytes() == damaged
    assert mlflow_client(tmp_path / "mlflow.db").search_experiments()


def test_own_database_that_was_half_made_is_set_aside(tmp_path, mlflow_template, own):  # noqa: F811
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as half:
        half.execute("CREATE TABLE _alembic_tmp_metrics (key TEXT)")
    half.close()
    assert str(own()).startswith("mlflow.db is incomplete; renamed it to mlflow.db.old-1")


@pytest.mark.parametrize("means", [pytest.param("run", marks=pytest.mark.fault), "sync"])
def test_artifacts_open_where_a_moved_folder_is_now(tmp_path, mlflow_template, means):  # noqa: F811
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

    file, folder = write_study(tmp_path, seeds=1, arms=[DENSE], execution={"keep_weights": True}), tmp_path / "study"
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    run_at(file, folder, tracking=None)
    before = contents(folder / "mlflow.db")
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    _artifact_repos_cache.clear()  # a process that begins now knows nothing of where they were
    (tmp_path / FOLDER.listed).write_text('{"written": []}')
    with pytest.raises(AnalysisError, match="which does not exist: the study's folder was moved; `mpo-study sync"):
        publish(load_study(resolve_study(moved)), tmp_path)
    if means == "run":
        assert run_at(file, moved, tracking=None).tracking_trouble is None
    else:
        sync(load_config(file), StudyDirectory(moved), None, None)
    assert publish(load_study(resolve_study(moved)), tmp_path) == 0
    assert contents(moved / "mlflow.db") == before  # nothing but addresses has changed
    client = mlflow_client(moved / "mlflow.db")
    for key, [run] in runs_in(moved / "mlflow.db").items():
        assert run.info.artifact_uri == f"file://{moved}/mlartifacts/{run.info.run_id}/artifacts"
        names = {file.path for file in client.list_artifacts(run.info.run_id)}
        wanted = {"summary": {"study.yaml", "environment.json"}, "0": {"trial0-seed0.safetensors"}}
        of_seed = key.count("/") == 2
        assert names == wanted.get(key.rpartition("/")[2] if of_seed or key.endswith("summary") else "", set())
    assert not folder.exists()


@pytest.mark.fault
def test_artifacts_of_a_copied_folder_are_its_own(tmp_path, mlflow_template):  # noqa: F811
    file, folder = write_study(tmp_path, seeds=1, arms=[DENSE]), tmp_path / "study"
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    run_at(file, folder, tracking=None)
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    sync(load_config(file), StudyDirectory(copied), None, None)
    for place in (folder, copied):
        for [run] in runs_in(place / "mlflow.db").values():
            assert run.info.artifact_uri.startswith(f"file://{place}/mlartifacts/")


@pytest.mark.fault
def test_artifacts_in_a_shared_database_stay_with_a_copy_that_is_there(tmp_path, database):  # noqa: F811
    file, folder, uri = write_study(tmp_path, seeds=1, arms=[DENSE]), tmp_path / "study", f"sqlite:///{database}"
    run_at(file, folder, tracking=uri)
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    sync(load_config(file), StudyDirectory(copied), None, None)
    addresses = {run.info.artifact_uri.partition("/mlartifacts/")[0] for [run] in runs_in(database).values()}
    assert addresses == {f"file://{folder}"}
    shutil.rmtree(folder)
    sync(load_config(file), StudyDirectory(copied), None, None)
    addresses = {run.info.artifact_uri.partition("/mlartifacts/")[0] for [run] in runs_in(database).values()}
    assert addresses == {f"file://{copied}"}


# With a running study -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_study_writes_mlflow_as_it_goes_and_again_nothing(tmp_path, mlflow_template):  # noqa: F811
    file, folder = write_study(tmp_path), tmp_path / "study"
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    first = run_at(file, folder, tracking=None)
    assert first.tracking_trouble is None
    ledger = ledger_at(file, folder)
    runs = runs_in(folder / "mlflow.db")
    assert sorted(runs) == sorted(
        [schema.run_key(ledger.uuid, t, s) for t in range(4) for s in (None, 0, 1)] + [f"{ledger.uuid}/summary"]
    )
    ledger.close()
    assert revision_of(folder / "mlflow.db").endswith("/13")
    before = contents(folder / "mlflow.db")
    assert run_at(file, folder, tracking=None) == first
    assert contents(folder / "mlflow.db") == before
    assert StudyDirectory(folder).tracking_uri() == "sqlite:///mlflow.db"
    run_at(file, folder, tracking="off")
    assert StudyDirectory(folder).tracking_uri() == "sqlite:///mlflow.db"


def test_run_study_refuses_a_wrong_place_for_mlflow_before_it_trains(tmp_path, database):  # noqa: F811
    file, folder = write_study(tmp_path, arms=[DENSE]), tmp_path / "study"
    run_at(
        write_study(tmp_path / "other", arms=[DENSE]), tmp_path / "other" / "study", tracking=f"sqlite:///{database}"
    )
    for uri, why in (
        ("redis://host", "unsupported URI"),
        (f"sqlite:///{database}", "belongs to another study of that name"),
    ):
        with pytest.raises(StudyError, match=why):
            run_at(file, folder, tracking=uri)
        assert StudyDirectory(folder).tracking_uri() is None
    assert results_at(folder) == {}


def test_sync_writes_the_other_trials_where_mlflow_does_not_take_one(tmp_path, database, monkeypatch):  # noqa: F811
    file, folder = write_study(tmp_path, seeds=1, arms=[DENSE, MPO]), tmp_path / "study"
    run_at(file, folder)
    write = Tracker.write

    def refuse(self, trial, *args):
        if trial.number == 0:
            raise ValueError("no")
        write(self, trial, *args)

    monkeypatch.setattr(Tracker, "write", refuse)
    with pytest.raises(StudyError, match="MLflow refused 1 trial; the first is trial 0: no"):
        sync(load_config(file), StudyDirectory(folder), None, f"sqlite:///{database}")
    assert len(runs_in(database)) == 1 + 2 * 2
    assert revision_of(database) is None
    monkeypatch.undo()
    (tmp_path / "text.txt").unlink()  # sync needs no more of it than storage has
    assert sync(load_config(file), StudyDirectory(folder), None, f"sqlite:///{database}") == 3
    assert len(runs_in(database)) == 1 + 3 * 2
    assert revision_of(database).endswith("/7")


def test_run_study_goes_on_without_mlflow_and_sync_catches_up(tmp_path, database, nobody):  # noqa: F811
    file, folder = write_study(tmp_path, arms=[DENSE, MPO]), tmp_path / "study"
    outcome, printed = printed_by_run(file, folder, tracking=nobody)
    assert (outcome.n_complete, outcome.n_missing) == (6, 0)
    assert f"cannot reach MLflow at {nobody}" in str(outcome.tracking_trouble)
    assert printed.count("MLflow is unreachable, the study continues") == 1
    with pytest.raises(StudyError, match="cannot reach MLflow"):
        sync(load_config(file), StudyDirectory(folder), None, None)
    assert sync(load_config(file), StudyDirectory(folder), None, f"sqlite:///{database}") == 3
    assert len(runs_in(database)) == 1 + 3 + 6
    assert StudyDirectory(folder).tracking_uri() == f"sqlite:///{database}"


def test_background_tracker_catches_up_once_mlflow_is_back(opened, database):  # noqa: F811
    ledger, connect = opened
    attempts, said = [], []

    def sometimes(sign):
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionError("nobody there\nand more of it")
        return connect(database)

    background = BackgroundTracker(sometimes, said.append, pause=0.01)
    for trial in ledger.trials.values():
        background.put(trial, ledger.on_record(trial), 2)
    deadline = time.monotonic() + 300
    while "MLflow is reachable again" not in said and time.monotonic() < deadline:
        time.sleep(0.05)
    assert background.close(0) is None
    assert said == [
        "MLflow is unreachable, the study continues and will write to it later: nobody there",
        "MLflow is reachable again",
    ]
    assert sorted(runs_in(database)) == keys_of(ledger)


def test_background_tracker_says_what_is_lacking_when_it_ends(opened):
    ledger, _ = opened

    def never(sign):
        raise ConnectionError("nobody there")

    background = BackgroundTracker(never, lambda line: None, pause=0.01)
    background.put(ledger.trials[0], ledger.on_record(ledger.trials[0]), 2)
    assert background.close(0) == "nobody there"


def test_background_tracker_writes_the_other_trials_where_mlflow_does_not_take_one(opened, database, monkeypatch):  # noqa: F811
    ledger, connect = opened
    write, said = Tracker.write, []

    def refuse(self, trial, *args):
        if trial.number == 0:
            raise ValueError("a metric that MLflow does not take")
        write(self, trial, *args)

    monkeypatch.setattr(Tracker, "write", refuse)
    background = BackgroundTracker(lambda sign: connect(database), said.append, pause=0.01)
    for trial in ledger.trials.values():
        background.put(trial, ledger.on_record(trial), 2)
    assert background.close(0) == "trial 0: a metric that MLflow does not take"
    assert said == ["MLflow refused trial 0, will try again later: a metric that MLflow does not take"]
    of_first = [schema.run_key(ledger.uuid, 0, seed) for seed in (None, 0, 7)]
    assert sorted(runs_in(database)) == sorted(set(keys_of(ledger)) - set(of_first))
    assert revision_of(database) is None


def test_background_tracker_tries_again_what_mlflow_did_not_take_once(opened, database, monkeypatch):  # noqa: F811
    ledger, connect = opened
    write, failures = Tracker.write, {0: 1, 2: 1}

    def refuse_once(self, trial, *args):
        if failures.pop(trial.number, 0):
            raise StudyError("database is locked")
        write(self, trial, *args)

    monkeypatch.setattr(Tracker, "write", refuse_once)
    background = BackgroundTracker(lambda sign: connect(database), lambda line: None, pause=0.01)
    for trial in ledger.trials.values():
        background.put(trial, ledger.on_record(trial), 2)
    deadline = time.monotonic() + 300
    while background.n_pending and time.monotonic() < deadline:  # also before it is closed
        time.sleep(0.05)
    assert background.trouble is None
    assert background.close(0) is None
    assert sorted(runs_in(database)) == keys_of(ledger)


def test_background_tracker_ends_where_mlflow_answers_at_times(opened, database, monkeypatch):  # noqa: F811
    ledger, connect = opened
    writes = []

    def fail(self, *args):
        writes.append(1)
        raise StudyError("no route to host")

    monkeypatch.setattr(Tracker, "write", fail)
    monkeypatch.setattr(Tracker, "answers", lambda self: False)
    background = BackgroundTracker(lambda sign: connect(database), lambda line: None, pause=0.5)
    background.put(ledger.trials[0], ledger.on_record(ledger.trials[0]), 2)
    time.sleep(0.7)
    assert background.close(0) == "no route to host"
    assert len(writes) <= 4


def test_background_tracker_can_be_left_while_it_is_closed(opened):
    ledger, _ = opened
    hangs, is_over = threading.Event(), threading.Event()

    def hanging(sign):
        hangs.set()
        is_over.wait()
        raise ConnectionError("nobody there")

    background = BackgroundTracker(hanging, lambda line: None, pause=0.01)
    background.put(ledger.trials[0], ledger.on_record(ledger.trials[0]), 2)
    assert hangs.wait(60)
    closing = threading.Thread(target=background.close, args=(0,), daemon=True)
    try:
        closing.start()
        closing.join(0.5)
        assert closing.is_alive()
        background.leave()
        closing.join(60)
        assert not closing.is_alive()
        assert is_left_writing()
        background.close(0)  # as often as one likes
    finally:
        is_over.set()
        background._thread.join(60)
    assert not is_left_writing()


def test_tracker_hides_a_password_in_what_it_says_of_a_write(opened, database, monkeypatch):  # noqa: F811
    ledger, connect = opened
    tracker = connect(database)
    monkeypatch.setattr(type(tracker._client), "tracking_uri", "http://me:secret@host")

    def fail(*args, **kwargs):
        raise ConnectionError("(raised as a result of a flush)\nAPI request to http://me:secret@host/api failed\nmore")

    monkeypatch.setattr(type(tracker._client), "create_run", fail)
    with pytest.raises(StudyError, match=r"^API request to http://me:\*\*\*@host/api failed$"):
        tracker.write(ledger.trials[0], ledger.on_record(ledger.trials[0]), 2)


def test_background_tracker_goes_on_where_it_is_refused_for_a_while(opened, database):  # noqa: F811
    ledger, connect = opened
    attempts, said = [], []

    def refused(sign):
        attempts.append(1)
        if len(attempts) < 4:
            raise StudyError("the experiment tiny was deleted")
        return connect(database)

    background = BackgroundTracker(refused, said.append, pause=0.01)
    for trial in ledger.trials.values():
        background.put(trial, ledger.on_record(trial), 2)
    wait_until(lambda: not background.n_pending)
    assert background.close(0) is None
    why = "refuses this study, which continues and will try again: the experiment tiny was deleted"
    assert said == [f"MLflow {why}", "MLflow is reachable again"]
    assert sorted(runs_in(database)) == keys_of(ledger)


def test_background_tracker_raises_at_once_what_mlflow_refuses_at_the_start():
    def refused(sign):
        raise StudyError("the experiment tiny was deleted")

    said = []
    with pytest.raises(StudyError, match="the experiment tiny was deleted"):
        BackgroundTracker(refused, said.append, patience=600)
    assert said == []


def test_background_tracker_waits_no_longer_than_it_has_patience(opened, database):  # noqa: F811
    ledger, connect = opened
    may_answer, said = threading.Event(), []

    def slow(sign):
        may_answer.wait()
        return connect(database)

    background = BackgroundTracker(slow, said.append, patience=0.01)
    assert said == [
        "MLflow is unreachable, the study continues and will write to it later: it has not answered within 0.01 seconds"
    ]
    may_answer.set()
    background.put(ledger.trials[0], ledger.on_record(ledger.trials[0]), 2)
    assert background.close(0) is None
    assert said[1:] == ["MLflow is reachable again"]


def test_background_tracker_does_not_wait_at_the_end_for_a_server_that_hangs(opened):
    ledger, _ = opened
    is_over = threading.Event()

    def hanging(sign):
        is_over.wait()
        raise ConnectionError("nobody there")

    background = BackgroundTracker(hanging, lambda line: None, pause=0.01, silence=0.2)
    background.put(ledger.trials[0], ledger.on_record(ledger.trials[0]), 2)
    assert background.close(0) == "it has not answered for 0.2 seconds"
    is_over.set()
    background._thread.join(60)


class Away(Exception):
    """What a network says."""


@pytest.mark.parametrize("answers", [False, True])
def test_background_tracker_takes_no_outage_for_the_end(opened, database, monkeypatch, answers):  # noqa: F811
    ledger, connect = opened
    write, said, is_up = Tracker._write, [], threading.Event()
    is_up.set()

    def fail(self, *args):
        if not is_up.is_set():
            raise Away("connection refused")
        write(self, *args)

    monkeypatch.setattr(Tracker, "_write", fail)
    monkeypatch.setattr(Tracker, "answers", lambda self: answers)  # it may be back when it is asked
    background = BackgroundTracker(lambda sign: connect(database), said.append, pause=0.01)
    first, *others = ledger.trials.values()
    background.put(first, ledger.on_record(first), 2)
    wait_until(lambda: not background.n_pending)
    is_up.clear()
    for trial in others:
        background.put(trial, ledger.on_record(trial), 2)
    wait_until(lambda: said)
    is_up.set()
    wait_until(lambda: not background.n_pending)
    assert background.close(0) is None
    assert said[0] == "MLflow is unreachable, the study continues and will write to it later: connection refused"
    assert "MLflow is reachable again" in said
    assert sorted(runs_in(database)) == keys_of(ledger)
    assert revision_of(database) is not None


def test_background_tracker_writes_all_again_where_mlflow_is_back_without_it(opened, database, tmp_path):  # noqa: F811
    ledger, connect = opened
    places = [database, Path(shutil.copy(database, tmp_path / "new.db"))]
    first, second, *_ = ledger.trials.values()
    trackers = []

    def connect_to_next(sign):
        trackers.append(connect(places[len(trackers)]))
        return trackers[-1]

    background = BackgroundTracker(connect_to_next, lambda line: None, pause=0.01)
    background.put(first, ledger.on_record(first), 2)
    wait_until(lambda: not background.n_pending)
    client = mlflow_client(database)
    client.delete_experiment(client.get_experiment_by_name("tiny").experiment_id)
    background.put(second, ledger.on_record(second), 2)
    assert background.close(0) is None
    keys = [schema.run_key(ledger.uuid, trial.number, seed) for trial in (first, second) for seed in (None, 0, 7)]
    assert sorted(runs_in(places[1])) == sorted([*keys, f"{ledger.uuid}/summary"])


def test_tracker_keeps_one_of_two_runs_of_one_key(opened, database):  # noqa: F811
    ledger, connect = opened
    tracker = connect(database)
    write_all(ledger, tracker)
    before = contents(database)
    first = ledger.on_record(ledger.trials[0])[0]
    tracker._known.clear()
    create(tracker, ledger, 0, first)  # answers were lost
    assert sorted(map(len, runs_in(database).values()))[-2:] == [2, 2]
    write_all(ledger, connect(database))
    assert contents(database) == before


@pytest.mark.parametrize("page", [3, 6, 1000])
def test_tracker_mends_doubled_runs_of_a_study_half_done(opened, database, monkeypatch, page):  # noqa: F811
    monkeypatch.setattr("study.tracking.known_runs._PAGE", page)
    ledger, connect = opened
    tracker = connect(database)
    for trial in ledger.trials.values():
        first = ledger.on_record(trial)[:1]
        tracker.write(trial, first, 2)
        tracker._known.pop(schema.run_key(ledger.uuid, trial.number))
        create(tracker, ledger, trial.number)  # create_run's answer was lost, and it was made again
    write_all(ledger, connect(database))
    write_all(ledger, connect(database))
    after = runs_in(database)
    assert sorted(after) == keys_of(ledger)
    assert {len(same) for same in after.values()} == {1}
    for trial, seed in ledger.results:
        [parent], [child] = (after[schema.run_key(ledger.uuid, trial, s)] for s in (None, seed))
        assert child.data.tags[schema.PARENT] == parent.info.run_id
        assert parent.data.metrics[schema.N_SEEDS] + parent.data.metrics[schema.N_FAILED] == 2


def test_tracker_finishes_a_run_whose_weights_are_gone(opened, database, finished):  # noqa: F811
    ledger, connect = opened
    key = ledger.results[0, 0].weights
    path = finished[1] / "storage" / str(key)
    aside = path.rename(path.with_suffix(".aside"))
    write_all(ledger, connect(database, execution=Execution(keep_weights=True)))
    aside.rename(path)
    [run] = runs_in(database)[schema.run_key(ledger.uuid, 0, 0)]
    assert run.info.status == "FINISHED"
    assert run.data.tags[schema.WEIGHTS_LOST] == key
    [other] = runs_in(database)[schema.run_key(ledger.uuid, 0, 7)]
    assert schema.WEIGHTS_LOST not in other.data.tags
    write_all(ledger, connect(database, execution=Execution(keep_weights=True)))  # now they are there
    [again] = runs_in(database)[schema.run_key(ledger.uuid, 0, 0)]
    assert schema.WEIGHTS_LOST not in again.data.tags
    assert (again.info.run_id, again.data.metrics) == (run.info.run_id, run.data.metrics)
    assert len(mlflow_client(database).list_artifacts(again.info.run_id)) == 1


@pytest.mark.parametrize("keep", [False, True])
def test_tracker_keeps_weights_where_asked(opened, database, tmp_path, finished, keep):  # noqa: F811
    ledger, connect = opened
    write_all(ledger, connect(database, execution=Execution(keep_weights=keep)))
    [run] = runs_in(database)[schema.run_key(ledger.uuid, 0, 0)]
    client = mlflow_client(database)
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["trial0-seed0.safetensors"] * keep
    if keep:
        kept = client.download_artifacts(run.info.run_id, "trial0-seed0.safetensors", str(tmp_path))
        stored = finished[1] / "storage" / str(ledger.results[0, 0].weights)
        assert Path(kept).read_bytes() == stored.read_bytes()
