"""Records that are not as the schema says; no MLflow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import simulated_study

from analysis import run_schema as schema
from analysis.errors import AnalysisError
from analysis.runs.study_runs import RunRecord, StudyAddress, study_runs

ADDRESS = StudyAddress("sqlite:///mlflow.db", "tiny")
COUNTS = {"n_params": 79_168.0, "n_params_compressed": 70_000.0, "n_params_dense": 808_448.0}


def record(
    trial: int = 0, seed: int | None = None, status: str = "FINISHED", tags: dict[str, str] | None = None
) -> RunRecord:
    params = {"trial": str(trial)} | ({} if seed is None else {"seed": str(seed)})
    configuration = simulated_study.Configuration("mpo", 79_168, 1.86, chi=8)
    params |= {key: str(value) for key, value in configuration.params.items() if value is not None}
    metrics = COUNTS | ({} if seed is None else {"final/val_loss": 1.86, "final/val_acc": 0.45, "best/step": 1900.0})
    common = {
        schema.KEY: schema.run_key("u", trial, seed), schema.STUDY_NAME: "tiny", schema.STUDY_UUID: "u",
        schema.SCHEMA: str(schema.SCHEMA_VERSION),
    }  # fmt: skip
    common |= {schema.VALIDATION_FRACTION: "0.1"} if seed is None else simulated_study.RAN_ON
    return RunRecord(f"id-{trial}-{seed}", status, 1_790_000_000_000 + trial, params, metrics, common | (tags or {}))


def without(mapping: dict, key: str) -> dict:
    return {k: v for k, v in mapping.items() if k != key}


def test_study_runs_of_sound_records():
    runs = study_runs(ADDRESS, [record()], [record(seed=1), record(seed=0)])
    assert list(runs.trials.loc[0, ["chi", "n_seeds", "n_params"]]) == [8, 2, 79_168]
    assert runs.seeds["seed"].tolist() == [0, 1]
    assert runs.seeds["best/step"].tolist() == [1900, 1900]
    assert runs.seeds["final/train_loss"].isna().all()
    assert runs.budgets == ["b7d1f00d"]
    assert str(runs.latest) == "2026-09-21 14:13:20+00:00"


def broken_param(key, value):
    seed = record(seed=0)
    return [record()], [replace(seed, params=seed.params | {key: value})]


def broken_metric(key, value):
    seed = record(seed=0)
    return [record()], [replace(seed, metrics=seed.metrics | {key: value})]


def missing(kind, key):
    seed = record(seed=0)
    return [record()], [replace(seed, **{kind: without(getattr(seed, kind), key)})]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (broken_param("chi", "eight"), r"run id-0-0 \(trial 0, seed 0\): param `chi` must be int, but is 'eight'"),
        (broken_param("chi", "8.0"), "param `chi` must be int, but is '8.0'"),
        (broken_param("chi", "16"), "`chi` is 16, but its trial has 8"),
        (broken_param("learning_rate", "fast"), "param `learning_rate` must be float, but is 'fast'"),
        (broken_param("trial", "3"), "run id-0-0 .* must have the key u/3/0, but has u/0/0"),
        (missing("params", "arm"), r"run id-0-0 \(trial 0, seed 0\) has no param `arm`"),
        (missing("params", "budget_hash"), "has no param `budget_hash`"),
        (missing("params", "precision"), "has no param `precision`"),
        (missing("tags", schema.PROGRAM), "has no tag `mpo.program`"),
        (missing("params", "chi"), "`chi` is None, but its trial has 8"),
        (missing("params", "seed"), "must have the key u/0, but has u/0/0"),
        (missing("tags", schema.KEY), "has no tag `mpo.key`"),
        (missing("metrics", "final/val_loss"), "is complete but has no metric `final/val_loss`"),
        (broken_metric("final/val_acc", float("nan")), "is complete but its metric `final/val_acc` is nan"),
        (broken_metric("final/val_loss", 1.7976931348623157e308), "is complete but its metric `final/val_loss`"),
        (broken_metric("best/step", 0.5), "metric `best/step` must be a whole number, but is 0.5"),
        (broken_metric("n_params", 79_169.0), "`n_params` is 79169, but its trial has 79168"),
        (([record()], [record(seed=0), replace(record(seed=0), run_id="twin")]), "run twin .* has the same key as run"),
        (([], [record(seed=0)]), "belongs to no trial run"),
        (([], []), "experiment 'tiny' at sqlite:///mlflow.db holds no runs of a study"),
        (([record(tags={schema.SCHEMA: "0"})], []), "schema version 0, but this program reads version 2"),
        (([replace(record(), tags=without(record().tags, schema.VALIDATION_FRACTION))], []), "has no tag `mpo.val"),
        (([record(tags={schema.VALIDATION_FRACTION: "x"})], []), "`mpo.validation_fraction` must be a number"),
        (
            ([record()], [record(seed=0, status="FAILED", tags={schema.FAILURE_STEP: "late"})]),
            "tag `mpo.failure_step` must be a whole number, but is 'late'",
        ),
    ],
)
def test_study_runs_refuses_and_names_run_and_key(broken, message):
    with pytest.raises(AnalysisError, match=message) as raised:
        study_runs(ADDRESS, *broken)
    assert "\n" not in str(raised.value)


def test_study_runs_needs_no_metrics_of_a_seed_that_failed():
    failed = record(seed=0, status="FAILED", tags={schema.FAILURE: "out of memory"})
    runs = study_runs(ADDRESS, [replace(record(), metrics={})], [replace(failed, metrics={})])
    assert list(runs.trials.loc[0, ["n_seeds", "n_failed"]]) == [0, 1]
    assert runs.failures["reason"].tolist() == ["out of memory"]
    assert runs.failures["step"].isna().all()
    assert runs.seeds.empty


def test_study_runs_lists_the_failure_of_a_whole_trial():
    trial = record(status="FAILED", tags={schema.FAILURE: "its start failed"})
    assert study_runs(ADDRESS, [trial], []).failures["reason"].tolist() == ["its start failed"]


@pytest.mark.parametrize("status", ["RUNNING", "SCHEDULED", "KILLED"])
def test_study_runs_counts_what_is_neither_complete_nor_failed(status):
    runs = study_runs(ADDRESS, [record()], [replace(record(seed=0, status=status), metrics={})])
    assert runs.unfinished["status"].tolist() == [status]
    assert runs.trials["n_unfinished"].tolist() == [1]


def test_study_runs_lists_a_trial_that_waits_for_seeds():
    runs = study_runs(ADDRESS, [record(status="RUNNING"), record(trial=1)], [record(seed=0), record(trial=1, seed=0)])
    assert runs.unfinished["trial"].tolist() == [0]
    assert runs.unfinished["seed"].isna().all()
    assert runs.trials["n_seeds"].tolist() == [1, 1]


def test_study_runs_reads_a_study_that_is_being_written():
    """The writer creates a trial's run, writes its seeds, and then the trial's params."""
    empty = {"params": {}, "metrics": {}}
    just_created = replace(record(trial=1, status="RUNNING"), **empty)
    with_a_seed = replace(record(status="RUNNING"), **empty)
    next_seed = replace(record(seed=1, status="RUNNING"), **empty)
    runs = study_runs(ADDRESS, [with_a_seed, just_created], [record(seed=0), next_seed])
    assert runs.trials["trial"].tolist() == [0]
    assert list(runs.trials.loc[0, ["chi", "n_params", "n_seeds", "n_unfinished"]]) == [8, 79_168, 1, 1]
    assert runs.unfinished.to_dict("records") == [{"trial": 0, "arm": "mpo", "seed": 1, "status": "RUNNING"}]


def test_study_runs_refuses_a_finished_run_without_params():
    with pytest.raises(AnalysisError, match="has no param"):
        study_runs(ADDRESS, [replace(record(), params={})], [record(seed=0)])


def test_ran_on_counts_the_machines():
    found = simulated_study.configurations()[:2]
    runs, _ = simulated_study.simulated_runs(found)
    seeds = runs.seeds.copy()
    seeds.loc[0, schema.THREADS] = "2"
    machines = replace(runs, seeds=seeds).ran_on
    assert machines == {"cpu, threads: 1, torch 2.13.0": 5, "cpu, threads: 2, torch 2.13.0": 1}


def test_programs_are_counted_and_means_over_several_of_them():
    found = simulated_study.configurations()[:2]
    runs, _ = simulated_study.simulated_runs(found)
    trials = runs.seeds["trial"]
    programs = trials.map({trial: f"program {trial}" for trial in trials}).astype("str")
    by_trial = replace(runs, seeds=runs.seeds.assign(**{schema.PROGRAM: programs}))
    assert sorted(by_trial.programs.values()) == [3, 3]
    assert by_trial.n_of_several_programs == 0
    programs[0] = "another"
    grown = replace(runs, seeds=runs.seeds.assign(**{schema.PROGRAM: programs}))
    assert grown.programs["another"] == 1
    assert grown.n_of_several_programs == 1
