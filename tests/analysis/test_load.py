from __future__ import annotations

import json
import logging
import sqlite3
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import simulated_study

from analysis import run_schema as schema
from analysis.errors import AnalysisError
from analysis.runs.curves import load_curves
from analysis.runs.load import StudyAddress, load_study, resolve_study

CONFIGURATIONS = simulated_study.configurations()


def test_load_study_reads_params_back_as_they_were_written(runs):
    for trial, row in runs.trials.set_index("trial").iterrows():
        for key, written in CONFIGURATIONS[trial].params.items():
            if written is None:
                assert pd.isna(row[key]), key
            else:
                assert row[key] == written
                assert type(row[key]) is not str or schema.FIELDS["param", key].dtype is str
        assert row["n_params"] == CONFIGURATIONS[trial].n_params


def test_load_study_types_every_column_by_the_schema(runs):
    expected = {int: ("int64", "Int64"), float: ("float64",), str: ("str",)}
    for frame, fields in ((runs.trials, (*schema.PARAMS, *schema.COUNTS)), (runs.seeds, schema.FINALS)):
        for field in fields:
            if field.key != "seed":
                assert str(frame[field.key].dtype) in expected[field.dtype], field.key


def test_load_study_sorts_out_what_became_of_each_seed(runs):
    written = CONFIGURATIONS[:-1]
    assert runs.trials["trial"].tolist() == list(range(len(written)))
    assert runs.seeds.groupby("trial")["seed"].apply(tuple).tolist() == [tuple(c.seeds) for c in written]
    assert runs.trials["n_seeds"].tolist() == [len(c.seeds) for c in written]
    assert runs.failures.to_dict("records") == [
        {"trial": 3, "arm": "mpo", "seed": 3, "step": 120, "reason": "validation loss is not finite"}
    ]
    assert runs.unfinished.to_dict("records") == [{"trial": 4, "arm": "mpo", "seed": 3, "status": "RUNNING"}]
    assert list(runs.trials.loc[3, ["n_failed", "n_unfinished"]]) == [1, 0]
    assert list(runs.trials.loc[4, ["n_failed", "n_unfinished"]]) == [0, 1]


def test_load_study_leaves_duplicated_trials_out_and_counts_them(runs):
    assert CONFIGURATIONS[-1].duplicate_of is not None
    assert len(CONFIGURATIONS) - 1 not in runs.trials["trial"].tolist()
    assert runs.n_duplicates == 1


def test_load_study_reads_finals_and_curves_that_agree(runs):
    curves = load_curves(runs, trials=[0, 7], keys=("val_loss", "val_acc", "tokens", "learning_rate"))
    assert sorted(curves["trial"].unique()) == [0, 7]
    assert curves.groupby(["trial", "seed"]).size().unique().tolist() == [21]
    last = curves.groupby(["trial", "seed"]).last()
    finals = runs.seeds.set_index(["trial", "seed"])
    assert last["val_loss"].tolist() == finals.loc[last.index, "final/val_loss"].tolist()
    assert last["tokens"].tolist() == finals.loc[last.index, "train_tokens"].tolist()
    # The curve and the param of that name are two things.
    assert np.ptp(curves["learning_rate"]) > 0
    assert runs.trials["learning_rate"].unique().tolist() == [3e-4]


def test_load_curves_refuses_a_curve_that_is_not_there(runs):
    with pytest.raises(AnalysisError, match=r"trial 0, seed 0\) has no curve `perplexity`"):
        load_curves(runs, trials=[0], keys=("perplexity",))


def test_load_study_reads_rel_errors(runs):
    layers = len(simulated_study.LAYERS)
    assert len(runs.rel_errors) == 3 * 3 * 2 * len(simulated_study.N_PARAMS_MPO) * layers
    assert set(runs.rel_errors["when"]) == {"init", "trained"}
    assert runs.rel_errors.dtypes.astype(str).to_dict() == {
        "trial": "int64", "seed": "int64", "when": "str", "chi": "int64", "layer": "str", "rel_error": "float64",
    }  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 7])
def test_load_study_reads_every_page(study_dir, runs, page_size):
    paged = load_study(resolve_study(study_dir), page_size=page_size)
    pd.testing.assert_frame_equal(paged.trials, runs.trials)
    pd.testing.assert_frame_equal(paged.seeds, runs.seeds)


def test_load_study_leaves_out_deleted_runs_and_runs_of_others(tmp_path):
    from mlflow.tracking import MlflowClient

    uri = simulated_study.write_study(tmp_path, CONFIGURATIONS[:2], n_evaluations=1)
    client = MlflowClient(tracking_uri=uri)
    before = load_study(StudyAddress(uri, "tiny"))
    client.delete_run(before.seeds["run_id"][4])
    experiment_id = client.get_run(before.seeds["run_id"][0]).info.experiment_id
    client.create_run(experiment_id, tags={"made": "by hand"})
    client.create_run(experiment_id, tags={schema.KIND: schema.KIND_SUMMARY})
    after = load_study(StudyAddress(uri, "tiny"))
    assert after.seeds["run_id"].tolist() == [r for i, r in enumerate(before.seeds["run_id"]) if i != 4]


def test_load_study_tells_two_studies_of_an_experiment_apart(tmp_path):
    uri = simulated_study.write_study(tmp_path, CONFIGURATIONS[:1], n_evaluations=1)
    simulated_study.write_study(tmp_path, CONFIGURATIONS[:2], n_evaluations=1, uuid="another")
    with pytest.raises(AnalysisError, match=r"holds several studies: tiny \(6f1c.*\), tiny \(another\)"):
        load_study(StudyAddress(uri, "tiny"))
    assert len(load_study(StudyAddress(uri, "tiny", "another")).trials) == 2
    with pytest.raises(AnalysisError, match="holds no runs of study nobody"):
        load_study(StudyAddress(uri, "tiny", "nobody"))


def test_load_study_is_quiet_and_puts_loggers_back(study_dir, runs, capfd):
    logger = logging.getLogger("alembic")
    level = logger.level
    load_study(resolve_study(study_dir))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert logger.level == level


def test_load_study_lists_the_experiments_there_are(study_dir):
    address = replace(resolve_study(study_dir), experiment="tinny")
    with pytest.raises(AnalysisError, match=r"'tinny' does not exist.*'tiny'"):
        load_study(address)


def test_load_study_creates_no_database(tmp_path):
    path = tmp_path / "mlflow.db"
    with pytest.raises(AnalysisError, match=f"no MLflow database at {path}"):
        load_study(StudyAddress(f"sqlite:///{path}", "tiny"))
    assert not path.exists()


@pytest.mark.parametrize("content", ["text", "sqlite"])
def test_load_study_leaves_a_foreign_file_alone(tmp_path, content):
    path = tmp_path / "other.db"
    if content == "text":
        path.write_text("no database at all, but long enough to be read as one by its first page header")
    else:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE runs (id INTEGER)")
        database.close()
    before = path.read_bytes()
    with pytest.raises(AnalysisError, match="is not a readable MLflow database"):
        load_study(StudyAddress(f"sqlite:///{path}", "tiny"))
    assert path.read_bytes() == before


def test_load_study_says_which_server_it_could_not_read():
    with pytest.raises(AnalysisError, match="cannot read MLflow at nosuch://user:\\*\\*\\*@host/db") as error:
        load_study(StudyAddress("nosuch://user:secret@host/db", "tiny"))
    assert "secret" not in str(error.value)


def test_resolve_study_reads_the_manifest(study_dir):
    assert resolve_study(study_dir) == StudyAddress(f"sqlite:///{study_dir}/mlflow.db", "tiny", simulated_study.UUID)


def test_resolve_study_finds_the_database_of_a_directory_that_moved(study_dir, tmp_path):
    manifest = json.loads((study_dir / schema.STUDY_MANIFEST).read_text())
    manifest["tracking_uri"] = "sqlite:////gone/from/here/mlflow.db"
    (tmp_path / schema.STUDY_MANIFEST).write_text(json.dumps(manifest))
    assert resolve_study(tmp_path).tracking_uri == manifest["tracking_uri"]
    (tmp_path / "mlflow.db").write_bytes((study_dir / "mlflow.db").read_bytes())
    assert len(load_study(resolve_study(tmp_path)).trials) == 11


def test_resolve_study_takes_a_relative_database_from_the_study_not_the_working_folder(tmp_path, monkeypatch):
    study, elsewhere = tmp_path / "study", tmp_path / "elsewhere"
    for folder in (study, elsewhere):
        folder.mkdir()
        (folder / "mlflow.db").touch()
    manifest = {"schema_version": 2, "uuid": "u", "tracking_uri": "sqlite:///mlflow.db", "experiment": "tiny"}
    (study / "study.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(elsewhere)
    assert resolve_study(study).tracking_uri == f"sqlite:///{study}/mlflow.db"


def test_resolve_study_refuses_what_is_not_there(tmp_path):
    with pytest.raises(AnalysisError, match="is not a directory; give the directory that `mpo-study run` wrote"):
        resolve_study(tmp_path / "nothing")
    with pytest.raises(AnalysisError, match=r"is not a study directory: it has no study\.json"):
        resolve_study(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "is not a study manifest"),
        ("[]", "is not a study manifest"),
        ('{"schema_version": 2}', "is not a study manifest: KeyError"),
        (
            json.dumps({"schema_version": 99, "name": "", "uuid": "", "tracking_uri": "", "experiment": ""}),
            "has schema version 99, but this program reads version 2",
        ),
        (
            json.dumps({"schema_version": 2, "name": "", "uuid": "", "tracking_uri": None, "experiment": "tiny"}),
            "run with tracking off.*`mpo-study sync .* --tracking URI`",
        ),
    ],
)
def test_resolve_study_refuses_a_manifest_it_cannot_use(tmp_path, manifest, message):
    (tmp_path / schema.STUDY_MANIFEST).write_text(manifest)
    with pytest.raises(AnalysisError, match=message):
        resolve_study(tmp_path)
