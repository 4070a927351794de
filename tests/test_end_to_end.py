"""A study through Ray Tune and MLflow to the analysis: what a user does, in the order in which they do it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from study_fixtures import (
    USUAL_FINALS,
    cli,
    contents,
    mlflow_template,  # noqa: F401 (a fixture)
    results_at,
    run_at,
    substance,
    write_study,
)

from analysis import run_schema as schema
from analysis.runs.curves import load_curves
from analysis.runs.load import load_study, resolve_study
from study.ledger.directory import StudyDirectory
from study.ledger.snapshot import read_ledger

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mlflow_template):  # noqa: F811
    """Study file and folder of a study that `mpo-study run` has finished on Ray, and what that printed."""
    work = tmp_path_factory.mktemp("work")
    file = write_study(work)
    (work / "kept").mkdir()
    shutil.copy(mlflow_template, work / "kept" / "mlflow.db")
    code, out, err = cli("run", file, "--dir", "kept", cwd=work)
    assert code == 0, err
    return file, work / "kept", out


def test_study_on_ray_leaves_nothing_but_its_folder(finished):
    file, folder, out = finished
    assert "tiny: 4 trials, 8 runs complete" in out
    assert "MLflow:  kept/mlflow.db  (to view it: mpo-study ui kept)" in out
    assert sorted(path.name for path in file.parent.iterdir()) == ["kept", "text.txt", "tiny.yaml"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "driver.lock",
        "ledger.db",
        "ledger.db.copy",
        "mlartifacts",
        "mlflow.db",
        "storage",
        "study.json",
        "study.yaml",
    ]


def test_study_on_ray_is_bit_identical_to_the_inline_one(finished, tmp_path):
    file, folder, _ = finished
    run_at(file, tmp_path / "inline")
    assert substance(folder) == substance(tmp_path / "inline")


def test_analysis_reads_what_the_ledger_holds(finished):
    _, folder, _ = finished
    results = results_at(folder)
    trials = read_ledger(StudyDirectory(folder).ledger_url, "tiny").trials
    runs = load_study(resolve_study(folder))

    assert runs.uuid == json.loads((folder / "study.json").read_text())["uuid"]
    assert len(runs.failures) == len(runs.unfinished) == runs.n_duplicates == 0
    by_trial = runs.trials.set_index("trial")
    for trial in trials:
        row = by_trial.loc[trial.number]
        assert row["n_seeds"] == 2
        assert row["arm"] == trial.spec.arm
        assert row["n_params"] == trial.shape.n_params
        assert row["learning_rate"] == trial.spec.protocol.learning_rate
        assert row["budget_hash"] == trial.budget_hash
    seeds = runs.seeds.set_index(["trial", "seed"])
    assert sorted(seeds.index) == sorted(results)
    for key, result in results.items():
        assert result.final.keys() == USUAL_FINALS
        for field in schema.FINALS:
            shown = seeds.loc[key, field.key]
            assert shown == result.final[field.key] if field.key in USUAL_FINALS else pd.isna(shown)

    curves = load_curves(runs, keys=["val_loss", "val_acc", "tokens"])
    for (trial, seed), curve in curves.groupby(["trial", "seed"]):
        rows = results[trial, seed].curve
        for key in ("step", "val_loss", "val_acc", "tokens"):
            assert curve[key].tolist() == [row[key] for row in rows]

    errors = {
        (row.trial, row.seed, schema.rel_error_key(row.when, row.chi, row.layer)): row.rel_error
        for row in runs.rel_errors.itertuples()
    }
    assert errors == {
        (trial, seed, key): value
        for (trial, seed), result in results.items()
        for key, value in result.rel_errors.items()
    }
    assert {when for _, _, key in errors for when, *_ in [schema.parse_rel_error_key(key)]} == set(schema.WHEN)


def test_means_in_mlflow_are_those_of_the_analysis(finished):
    _, folder, _ = finished
    runs = load_study(resolve_study(folder))
    means = runs.seeds.groupby("trial")["final/val_loss"].mean()
    for key, [(_, _, _, _, _, params, _, metrics)] in contents(folder / "mlflow.db").items():
        if key.count("/") == 1 and "trial" in params:
            [*_, (step, value, _)] = metrics[schema.mean_key("final/val_loss")]
            assert step == 2
            assert value == pytest.approx(means[int(params["trial"])], rel=1e-15)


@pytest.mark.slow
def test_finished_study_run_again_on_ray_starts_no_ray_and_changes_no_run(finished):
    file, folder, _ = finished
    before, results = contents(folder / "mlflow.db"), results_at(folder)
    code, out, _ = cli("run", file, "--dir", folder, cwd=file.parent)
    assert code == 0
    assert "tiny: 4 trials, 8 runs complete" in out
    assert "1/8" not in out
    assert contents(folder / "mlflow.db") == before
    assert results_at(folder) == results


def test_fine_tuning_starts_from_its_starts_weights(finished):
    """At step 0 a fine-tuned model is a compressed start: nearer to the start's end than to a fresh model."""
    _, folder, _ = finished
    results = results_at(folder)
    for seed in (0, 1):
        errors = [v for k, v in results[3, seed].rel_errors.items() if k.startswith("rel_error/compressed/chi_2/")]
        assert errors
        assert all(0 < error < 1 for error in errors)
        trained = {k: v for k, v in results[0, seed].rel_errors.items() if k.startswith("rel_error/trained/chi_2/")}
        assert np.allclose(sorted(errors), sorted(trained.values()), rtol=1e-4)
