"""Seeds in training, as MLflow shows them: running with their curves, killed with their study, and whole in the end."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from study_fixtures import (
    contents,
    database,  # noqa: F401 (a fixture)
    ledger_at,
    mlflow_template,  # noqa: F401 (a fixture)
    run_at,
    runs_in,
    write_study,
)

from analysis import run_schema as schema
from analysis.runs.load import StudyAddress, load_study
from study.commands import mirrors
from study.commands.opening import study_corpus
from study.commands.sync import sync
from study.ledger.directory import StudyDirectory
from study.scheduler.queue import Queue
from study.spec.study_file import load_config
from study.spec.trial import RungStop, now
from study.tracking.opening import open_tracker, study_record
from study.training.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")
DENSE_ALONE = {"arms": [{"name": "dense", "family": "dense"}]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study without MLflow: its file, and its folder."""
    folder = tmp_path_factory.mktemp("live")
    file = write_study(folder, **DENSE_ALONE)
    run_at(file, folder / "study")
    return file, folder / "study"


def opened(finished, database):  # noqa: F811
    """The ledger, and a new tracker over it."""
    file, folder = finished
    config, directory = load_config(file), StudyDirectory(folder)
    ledger = ledger_at(file, folder)
    record = study_record(config, ledger, study_corpus(config))
    return ledger, open_tracker(f"sqlite:///{database}", directory, Storage(directory.storage_url()), record)


def in_training(result, n_rows):
    """The result as it was after n_rows evaluations."""
    return replace(result, state="paused", curve=result.curve[:n_rows], final={}, rel_errors={}, ran_on={})


def seed_run(ledger, database, seed=0):  # noqa: F811
    [run] = runs_in(database)[schema.run_key(ledger.uuid, 0, seed)]
    return run


def losses(database, ledger):  # noqa: F811
    """The (step, loss) of seed 0, in the order in which they were written."""
    [(*_, metrics)] = contents(database)[schema.run_key(ledger.uuid, 0, 0)]
    return [point[:2] for point in metrics["val_loss"]]


def test_seed_in_training_runs_with_its_curve_and_ends_with_its_result(finished, database):  # noqa: F811
    ledger, tracker = opened(finished, database)
    trial, (result, other) = ledger.trials[0], ledger.on_record(ledger.trials[0])
    for n_rows in (1, 2):
        tracker.write(trial, [in_training(result, n_rows)], 2)
        run = seed_run(ledger, database)
        assert run.info.status == "RUNNING"
        assert losses(database, ledger) == [(row["step"], row["val_loss"]) for row in result.curve[:n_rows]]
        [parent] = runs_in(database)[schema.run_key(ledger.uuid, 0)]
        assert parent.info.status == "RUNNING"
        assert schema.N_SEEDS not in parent.data.metrics
        assert run.data.tags[schema.PARENT] == parent.info.run_id
    address = StudyAddress(f"sqlite:///{database}", "tiny", ledger.uuid)
    assert load_study(address).unfinished["seed"].tolist() == [0]  # a reader may come at any time
    tracker.write(trial, [in_training(other, 1), result], 2)
    done = seed_run(ledger, database)
    assert (done.info.run_id, done.info.status) == (run.info.run_id, "FINISHED")
    assert losses(database, ledger) == [(row["step"], row["val_loss"]) for row in result.curve]
    assert seed_run(ledger, database, 1).info.status == "RUNNING"
    tracker.write(trial, [result, other], 2)
    tracker.settle(0)
    assert len(load_study(address).seeds) == 2


def test_run_whose_values_turn_out_otherwise_is_written_anew(finished, database):  # noqa: F811
    """As on a GPU, where a resumed run may differ from its first attempt."""
    ledger, tracker = opened(finished, database)
    trial, (result, _) = ledger.trials[0], ledger.on_record(ledger.trials[0])
    partial = in_training(result, 2)
    partial = replace(partial, curve=[partial.curve[0], partial.curve[1] | {"val_loss": 9.0}])
    tracker.write(trial, [partial], 2)
    tracker.write(trial, [result], 2)
    assert losses(database, ledger) == [(row["step"], row["val_loss"]) for row in result.curve]


def test_run_begun_by_an_interrupted_process_is_begun_anew(finished, database):  # noqa: F811
    ledger, tracker = opened(finished, database)
    trial, (result, _) = ledger.trials[0], ledger.on_record(ledger.trials[0])
    earlier = replace(in_training(result, 2), started="2026-01-01T00:00:00+00:00")
    tracker.write(trial, [earlier], 2)
    tracker.end_unfinished()
    assert seed_run(ledger, database).info.status == "KILLED"
    _, again = opened(finished, database)
    again.write(trial, [in_training(result, 1)], 2)
    assert seed_run(ledger, database).info.status == "RUNNING"
    assert losses(database, ledger) == [(0, result.curve[0]["val_loss"])]


def test_curve_is_whole_although_another_writer_saw_only_its_end(finished, database):  # noqa: F811
    """A resumed run, and an outage between its last evaluation and its result."""
    ledger, tracker = opened(finished, database)
    trial, (result, _) = ledger.trials[0], ledger.on_record(ledger.trials[0])
    tracker.write(trial, [replace(in_training(result, 4), curve=result.curve[2:])], 2)
    _, again = opened(finished, database)
    again.write(trial, [result], 2)
    assert losses(database, ledger) == [(row["step"], row["val_loss"]) for row in result.curve]


def test_points_are_written_once_although_mlflow_was_away(finished, database):  # noqa: F811
    ledger, tracker = opened(finished, database)
    trial, (result, _) = ledger.trials[0], ledger.on_record(ledger.trials[0])
    tracker.write(trial, [in_training(result, 2)], 2)
    _, again = opened(finished, database)
    for n_rows in (2, 3):
        again.write(trial, [replace(in_training(result, n_rows), ended="2030-01-01T00:00:00+00:00")], 2)
    again.write(trial, [result], 2)
    assert sorted(losses(database, ledger)) == [(row["step"], row["val_loss"]) for row in result.curve]


def test_sync_after_an_interrupt_leaves_nothing_running(finished, database):  # noqa: F811
    ledger, tracker = opened(finished, database)
    trial, (result, other) = ledger.trials[0], ledger.on_record(ledger.trials[0])
    tracker.write(trial, [result, in_training(other, 1)], 2)
    tracker.end_unfinished()
    _, again = opened(finished, database)
    again.write(trial, [result], 2)
    again.end_unfinished()
    again.settle(1)
    states = {key.count("/"): run.info.status for key, [run] in runs_in(database).items() if run.data.params}
    assert states == {1: "KILLED", 2: "FINISHED"}
    [summary] = runs_in(database)[f"{ledger.uuid}/{schema.KIND_SUMMARY}"]
    assert schema.REVISION in summary.data.tags


def test_stopped_trial_leaves_no_seed_running(finished, database):  # noqa: F811
    ledger, tracker = opened(finished, database)
    trial, (result, other) = ledger.trials[0], ledger.on_record(ledger.trials[0])
    failed = replace(result, state="failed", final={}, failure="diverged: the loss", failure_step=1)
    tracker.write(trial, [in_training(result, 1), in_training(other, 1)], 2)
    stop = RungStop(0, 2, (0, 1), (0,), {}, 0, 3, (0, 0), when=now())
    tracker.write(replace(trial, stop=stop), [failed], 2)
    states = [run.info.status for same in runs_in(database).values() for run in same if "seed" in run.data.params]
    assert states == ["FAILED"]


def test_older_result_stays_until_its_run_is_trained_again(finished, database):  # noqa: F811
    ledger, tracker = opened(finished, database)
    trial, (result, _) = ledger.trials[0], ledger.on_record(ledger.trials[0])
    failed = replace(result, state="failed", final={}, failure="its worker died")
    tracker.write(trial, [failed], 2)
    tracker.write(trial, [replace(in_training(result, 1), started="2030-01-01T00:00:00+00:00")], 2)
    assert seed_run(ledger, database).info.status == "FAILED"


def test_study_is_seen_while_it_trains_and_ends_as_if_nobody_had_looked(tmp_path, database, monkeypatch):  # noqa: F811
    monkeypatch.setattr(mirrors, "LIVE_SECONDS", 0.0)
    seen, complete = [], Queue.complete

    def look_first(queue, results):
        deadline = time.monotonic() + 60
        while not seen and time.monotonic() < deadline:
            runs = [run for same in runs_in(database).values() for run in same]
            curves = [run.data.metrics.get("val_loss") for run in runs if run.info.status == "RUNNING"]
            seen.extend(loss for loss in curves if loss is not None)
            time.sleep(0.1)
        complete(queue, results)

    monkeypatch.setattr(Queue, "complete", look_first)
    file = write_study(tmp_path, **DENSE_ALONE)
    run_at(file, tmp_path / "study", tracking=f"sqlite:///{database}")
    assert seen
    live = shown(database)
    assert all(status == "FINISHED" for status, *_ in live.values())
    sync(load_config(file), StudyDirectory(tmp_path / "study"), None, f"sqlite:///{database}")
    assert shown(database) == live


def shown(database):  # noqa: F811
    found = {}
    for key, [run] in runs_in(database).items():
        found[key] = run.info.status, run.info.run_id, run.data.metrics
    return found
