"""What MLflow shows of a search: what it skipped, what it stopped, its corpus and its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study_fixtures import DENSE, contents, mlflow_client, run_at, runs_in, write_search
from typer.testing import CliRunner

from analysis import run_schema as schema
from analysis.commands.cli import app
from study.commands.sync import sync
from study.ledger.directory import StudyDirectory
from study.ledger.growth import NO_GROWTH, Growth
from study.ledger.snapshot import read_ledger

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The runs in MLflow of a search that skipped trials and stopped others, and its ledger's trials."""
    folder = tmp_path_factory.mktemp("searched")
    found = {"name": "found", "family": "mpo", "chi": {"choices": [2, 40]}}
    found["learning_rate"] = {"low": 1e-5, "high": 1e-1, "log": True}
    file = write_search(
        folder,
        arms=[DENSE, found],
        seeds=3,
        search={"trials": 8, "max_params": 0.6, "early_stopping": {"margin": 1e-6}},
        objectives=["val_loss"],
    )
    outcome = run_at(file, folder / "study", tracking=None)
    assert outcome.tracking_trouble is None
    trials = read_ledger(StudyDirectory(folder / "study").ledger_url, "search-random").trials
    return runs_in(folder / "study" / "mlflow.db", "search-random"), trials, folder / "study"


def test_tracker_shows_skipped_and_stopped_trials_with_their_reasons(searched):
    runs, trials, folder = searched
    uuid = StudyDirectory(folder).uuid()
    skipped = [trial for trial in trials if trial.skipped is not None]
    stopped = [trial for trial in trials if trial.stop is not None and trial.duplicate_of is None]
    assert skipped
    assert stopped
    for trial in skipped:
        [run] = runs[schema.run_key(uuid, trial.number)]
        assert (run.data.tags[schema.SKIPPED], run.info.status) == (trial.skipped.reason, "KILLED")
        assert run.data.metrics["n_params"] == trial.shape.n_params
        assert schema.run_key(uuid, trial.number, 0) not in runs
    for trial in stopped:
        [run] = runs[schema.run_key(uuid, trial.number)]
        assert (run.data.tags[schema.STOPPED], run.info.status) == (trial.stop.reason, "FINISHED")
        assert run.data.metrics[schema.N_SEEDS] < 3


def test_sync_changes_nothing_of_skipped_and_stopped_trials(searched):
    _, _, folder = searched
    config, directory = StudyDirectory(folder).load_config(), StudyDirectory(folder)
    before = contents(folder / "mlflow.db", "search-random")
    sync(config, directory, None, None)
    assert contents(folder / "mlflow.db", "search-random") == before


@pytest.mark.slow
def test_published_report_is_on_the_summary_run_and_changes_nothing_else(searched, tmp_path):
    _, _, folder = searched
    before = contents(folder / "mlflow.db", "search-random")
    for _ in range(2):
        result = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "out"), "--publish"])
        assert result.exit_code == 0, result.output
    assert "files on the experiment's summary run in MLflow" in result.output
    assert contents(folder / "mlflow.db", "search-random") == before
    [summary] = runs_in(folder / "mlflow.db", "search-random")[f"{StudyDirectory(folder).uuid()}/summary"]
    client = mlflow_client(folder / "mlflow.db")
    for part in ("figures", "tables"):
        there = {Path(file.path).name for file in client.list_artifacts(summary.info.run_id, part)}
        assert there == {path.name for path in (tmp_path / "out" / part).iterdir()}
    assert {file.path for file in client.list_artifacts(summary.info.run_id)} == {
        "environment.json", "figures", "study.yaml", "tables",
    }  # fmt: skip


@pytest.mark.slow
def test_every_trial_of_a_search_that_grew_has_its_run_as_it_is_now(tmp_path):
    chi = {"name": "found", "family": "mpo", "chi": {"choices": [2, 40]}}
    file = write_search(tmp_path, arms=[DENSE, chi], seeds=1, search={"trials": 4, "max_params": 0.6})
    folder = tmp_path / "study"
    for growth in (NO_GROWTH, Growth(trials=2)):
        run_at(file, folder, tracking=None, growth=growth)
    directory = StudyDirectory(folder)
    trials = read_ledger(directory.ledger_url, "search-random").trials
    runs = runs_in(folder / "mlflow.db", "search-random")
    assert any(trial.skipped is not None and trial.duplicate_of is not None for trial in trials)
    for trial in trials:
        [run] = runs[schema.run_key(directory.uuid(), trial.number)]
        assert (schema.SKIPPED in run.data.tags) == (trial.skipped is not None)
        assert run.data.tags.get(schema.DUPLICATE_OF) == (
            str(trial.duplicate_of) if trial.duplicate_of is not None else None
        )
        assert run.data.params["tuning_trials"] == ("6" if trial.spec.arm == "found" else "1")
    before = contents(folder / "mlflow.db", "search-random")
    sync(directory.load_config(), directory, None, None)
    assert contents(folder / "mlflow.db", "search-random") == before


def test_corpus_is_the_input_of_every_trained_trial_and_of_the_summary(searched):
    runs, _, folder = searched
    for key, [run] in runs.items():
        kind = run.data.tags[schema.KIND]
        inputs = [given.dataset for given in run.inputs.dataset_inputs]
        if kind == schema.KIND_SEED or schema.SKIPPED in run.data.tags:
            assert inputs == []
            continue
        [corpus] = inputs
        known = read_ledger(StudyDirectory(folder).ledger_url, "search-random").corpus_sha256
        assert known.startswith(corpus.digest), key
        assert json.loads(corpus.source) == {"sha256": known}
