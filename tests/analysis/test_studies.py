"""Several studies read as one."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import simulated_study
from typer.testing import CliRunner

from analysis import run_schema as schema
from analysis.commands.cli import app
from analysis.errors import AnalysisError
from analysis.report.report import write_report
from analysis.report.tables import run_tables
from analysis.results.summary import summarise
from analysis.runs.curves import load_curves
from analysis.runs.load import load_study, resolve_study
from analysis.runs.studies import environments, join_studies
from analysis.runs.study_runs import StudyRuns

USUAL = simulated_study.awkward_studies()["usual"]
DENSE, MPO = USUAL[0], USUAL[3]


def study_of(found, name: str = "one", uuid: str = "uuid-one") -> StudyRuns:
    runs, _ = simulated_study.simulated_runs(found, experiment=name, uuid=uuid, n_evaluations=1)
    return runs


@pytest.fixture
def two():
    why = "trial 1 is better"
    first = study_of([DENSE, MPO, replace(MPO, seeds=(0,), failed=(1,), stopped=why)])
    skipped = replace(MPO, chi=64, seeds=(), skipped="900,000 parameters, more than search.max_params=800,000")
    second = study_of(
        [MPO, replace(MPO, chi=8, unfinished=(3,)), replace(MPO, duplicate_of=0), skipped], "two", "uuid-two"
    )
    return first, second


def test_join_studies_numbers_trials_on_and_says_where_they_are_from(two):
    joined = join_studies(two)
    assert joined.trials["trial"].tolist() == [0, 1, 2, 3, 4]
    assert joined.trials["study"].tolist() == ["one"] * 3 + ["two"] * 2
    assert joined.trials["study_trial"].tolist() == [0, 1, 2, 0, 1]
    assert joined.unfinished[["trial", "study", "study_trial"]].to_numpy().tolist() == [[4, "two", 1]]
    assert joined.failures[["trial", "study", "study_trial"]].to_numpy().tolist() == [[2, "one", 2]]
    assert joined.skipped[["trial", "study", "study_trial", "chi"]].to_numpy().tolist() == [[6, "two", 3, 64]]
    assert (joined.name, joined.uuid) == ("one + two", "uuid-one, uuid-two")
    assert joined.n_duplicates == 1
    for study, numbers in zip(two, ([0, 1, 2], [3, 4]), strict=True):
        own = joined.seeds[joined.seeds["trial"].isin(numbers)].reset_index(drop=True)
        pd.testing.assert_frame_equal(own.assign(trial=own["trial"] - numbers[0]), study.seeds)
    assert len(joined.rel_errors) == len(two[0].rel_errors)
    # Pairs are made within a budget hash, whichever study it is of.
    assert joined.trials["budget_hash"].tolist() == [*two[0].trials["budget_hash"], *two[1].trials["budget_hash"]]


def test_join_studies_keeps_the_types_of_columns(two):
    joined = join_studies(two)
    for name in ("trials", "seeds", "failures", "unfinished", "rel_errors", "skipped"):
        own, frame = getattr(two[0], name), getattr(joined, name)
        assert frame[list(own.columns)].dtypes.astype(str).to_dict() == own.dtypes.astype(str).to_dict(), name


def test_join_studies_leaves_its_studies_as_they_are(two):
    before = [study.trials.copy() for study in two]
    join_studies(two)
    for study, trials in zip(two, before, strict=True):
        pd.testing.assert_frame_equal(study.trials, trials)


def test_join_studies_of_one_is_that_one(two):
    assert join_studies(two[:1]) is two[0]
    with pytest.raises(AnalysisError, match="no study"):
        join_studies([])


def test_summary_of_joined_studies_has_labels_of_its_own(two):
    summary = summarise(join_studies(two)).set_index("trial")
    assert summary.groupby("group")["label"].nunique().sum() == len(summary)
    assert summary.loc[3, "label"] == "χ=4, two"
    assert summary.loc[1, "label"] == "χ=4, one, #1"
    assert summary.loc[4, "label"] == "χ=8"


def test_summary_of_joined_studies_measures_sizes_by_the_first_ones_dense_model():
    smaller = replace(DENSE, n_params=404_224, n_params_dense=404_224, d_model=90)
    joined = join_studies([study_of([DENSE, MPO]), study_of([smaller], "two", "uuid-two")])
    summary = summarise(joined).set_index("trial")
    assert summary.loc[2, ["group", "percent_of_dense", "is_reference"]].tolist() == ["dense, smaller", 50, False]
    assert summary.loc[0, "is_reference"]


def test_join_studies_tells_studies_of_one_name_apart():
    joined = join_studies([study_of([MPO], "same", "aaaaaaaa-1"), study_of([MPO], "same", "bbbbbbbb-2")])
    assert joined.trials["study"].tolist() == ["same (aaaaaaaa)", "same (bbbbbbbb)"]
    assert summarise(joined)["label"].is_unique


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("corpus_sha256", "0" * 64, f"corpus_sha256 is 86c4.* in the first and {'0' * 64} in the other"),
        ("tokenizer", "bytes", "tokenizer is characters in the first and bytes in the other"),
        ("vocab_size", 66, "vocab_size is 65 in the first and 66 in the other"),
        ("context", 128, "context is 256 in the first and 128 in the other"),
    ],
)
def test_join_studies_refuses_what_cannot_be_compared(key, value, message):
    other = study_of([replace(c, extra={key: value}) for c in (DENSE, MPO)], "two", "uuid-two")
    with pytest.raises(AnalysisError, match=f"^studies 'one' and 'two' cannot be compared: {message}$"):
        join_studies([study_of([DENSE, MPO]), other])


def test_join_studies_refuses_another_split_of_the_text():
    other = study_of([replace(MPO, validation_fraction="0.2")], "two", "uuid-two")
    with pytest.raises(AnalysisError, match=r"validation_fraction is 0.1 in the first and 0.2 in the other$"):
        join_studies([study_of([DENSE, MPO]), other])


def test_join_studies_refuses_a_study_twice(two):
    with pytest.raises(AnalysisError, match=r"^study 'one' \(uuid-one\) is given twice$"):
        join_studies([*two, two[0]])


def test_skipped_table_says_what_was_never_trained_and_why(two):
    table = run_tables(two[1])[-1]
    assert table.data.to_dict("records") == [
        {
            "trial": 3, "arm": "mpo", "family": "mpo", "chi": 64, "n_params": MPO.n_params,
            "reason": "900,000 parameters, more than search.max_params=800,000",
        }
    ]  # fmt: skip
    assert table.shown["parameters"].tolist() == ["42,336"]
    assert run_tables(two[0])[-1].shown.empty


def test_stopped_table_of_joined_studies_says_whose_numbers_a_reason_has(two):
    [row] = run_tables(join_studies(two[::-1]))[2].data.to_dict("records")
    assert (row["trial"], row["study"], row["study_trial"], row["stopped"]) == (6, "one", 2, "trial 1 is better")


@pytest.fixture
def directories(tmp_path):
    """Two study directories, each with a database of its own."""
    for name, found in (
        ("one", [DENSE, MPO]),
        ("two", [replace(MPO, chi=8), replace(MPO, chi=16, seeds=(), skipped="p")]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        uri = simulated_study.write_study(folder, found, name, uuid=f"uuid-{name}", n_evaluations=3)
        manifest = {
            "schema_version": schema.SCHEMA_VERSION,
            "uuid": f"uuid-{name}",
            "tracking_uri": uri,
            "experiment": name,
        }
        (folder / schema.STUDY_MANIFEST).write_text(json.dumps(manifest))
    return [tmp_path / "one", tmp_path / "two"]


def test_load_curves_of_joined_studies_reads_each_where_it_is(directories):
    studies = [load_study(resolve_study(folder)) for folder in directories]
    curves = load_curves(join_studies(studies))
    assert curves["trial"].unique().tolist() == [0, 1, 2]
    own = [load_curves(study) for study in studies]
    assert curves["val_loss"].tolist() == [*own[0]["val_loss"], *own[1]["val_loss"]]
    assert load_curves(join_studies(studies), [2])["val_loss"].tolist() == own[1]["val_loss"].tolist()


@pytest.mark.slow
def test_report_command_reports_on_several_studies(directories, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["report", *map(str, directories), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "3 trials, 9 complete seeds" in result.output
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "one + two" in page
    assert "Never trained" in page
    assert all(str(folder / "mlflow.db") in page for folder in directories)
    assert pd.read_csv(out / "tables" / "trials.csv")["study"].tolist() == ["one", "one", "two"]
    assert pd.read_csv(out / "tables" / "skipped.csv")["reason"].tolist() == ["p"]


ENVIRONMENT = {
    "python": "3.12.1", "packages": {"torch": "2.8", "ray": None}, "git_commit": "c0ffee", "git_changed": False,
    "system": "Linux", "cpus": 2,
}  # fmt: skip


def test_environments_are_told_apart_only_where_they_differ(two):
    first, second = (replace(study, environment=ENVIRONMENT) for study in two)
    other = replace(second, environment=ENVIRONMENT | {"git_commit": "decaf"})
    unknown = replace(second, environment={})
    assert environments(first) == environments(join_studies([first, second])) == [("", ENVIRONMENT)]
    assert environments(join_studies([first, other])) == [("one", ENVIRONMENT), ("two", other.environment)]
    assert environments(join_studies([first, unknown])) == [("one", ENVIRONMENT), ("two", {})]
    assert environments(unknown) == environments(join_studies([replace(first, environment={}), unknown])) == []


CHANGED = ENVIRONMENT | {"git_commit": "decaf", "git_changed": True, "packages": {"torch": "2.9"}}


@pytest.mark.parametrize(
    ("other", "begun_with", "commit"),
    [
        (
            CHANGED,
            "torch 2.9, Python 3.12.1; Linux, 2 CPU cores",
            "<code>decaf</code>, with changes that were not committed",
        ),
        ({}, "not known", "not known"),
    ],
)
def test_report_on_studies_begun_on_different_code_says_so_of_each(directories, tmp_path, other, begun_with, commit):
    first, second = (load_study(resolve_study(folder)) for folder in directories)
    joined = join_studies([replace(first, environment=ENVIRONMENT), replace(second, environment=other)])
    write_report(joined, tmp_path / "out", light=True)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert (
        "<dt>Begun with</dt>\n"
        "<dd>one: torch 2.8, Python 3.12.1; Linux, 2 CPU cores</dd>\n"
        f"<dd>two: {begun_with}</dd>\n"
        "<dt>Git commit</dt>\n"
        "<dd>one: <code>c0ffee</code></dd>\n"
        f"<dd>two: {commit}</dd>\n"
    ) in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folder for the report with --out"),
        (["--out", "o", "--publish"], "a report on several studies cannot be published"),
    ],
)
def test_report_command_refuses_of_several_studies_what_it_can_do_of_one(directories, arguments, message):
    result = CliRunner().invoke(app, ["report", *map(str, directories), *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"mpo-analysis: {message}")
    assert result.stderr.count("\n") == 1
