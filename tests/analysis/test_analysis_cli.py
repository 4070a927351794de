from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import simulated_study
from typer.testing import CliRunner

from analysis.commands.cli import app
from analysis.runs.load import resolve_study


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    # The command sets these unless they are set; monkeypatch puts them back.
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_report_command_by_address_writes_and_says_what(invoke, study_dir, tmp_path):
    uri = resolve_study(study_dir).tracking_uri
    result = invoke("report", "--tracking-uri", uri, "--experiment", "tiny", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "index.html").is_file()
    assert f"wrote {tmp_path / 'out' / 'index.html'}" in result.output
    assert "11 trials, 33 complete seeds, 1 failed, 1 unfinished" in result.output
    assert "808,448" in result.output
    assert max(len(line) for line in result.output.splitlines() if "wrote" not in line) <= 80


@pytest.mark.slow
def test_report_command_prints_counts_of_comparisons_that_are_too_many(invoke, tmp_path):
    sizes = simulated_study.N_PARAMS_DENSE, simulated_study.N_PARAMS_MPO[8]
    dense = simulated_study.Configuration("dense", sizes[0], 1.6, "dense", seeds=range(2))
    found = [
        simulated_study.Configuration("mpo", sizes[1], 1.7, chi=8, seeds=range(2), learning_rate=rate)
        for rate in np.linspace(1e-3, 1e-2, 10)
    ]
    uri = simulated_study.write_study(tmp_path, [dense, *found], n_evaluations=2)
    result = invoke("report", "--tracking-uri", uri, "--experiment", "tiny", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "10 × MPO from scratch" in result.output
    assert "too few seeds at 10" in result.output


@pytest.mark.slow
def test_report_command_is_quiet_on_stderr_and_defaults_to_the_study_directory(tmp_path):
    """As a person runs it: another process, no environment of the tests."""
    folder = tmp_path / "study"
    folder.mkdir()
    uri = simulated_study.write_study(folder, simulated_study.awkward_studies()["one configuration"], n_evaluations=2)
    (folder / "study.json").write_text(
        f'{{"schema_version": 2, "name": "tiny", "uuid": "{simulated_study.UUID}", "tracking_uri": "{uri}", '
        '"experiment": "tiny"}'
    )
    result = subprocess.run(
        [sys.executable, "-m", "analysis", "report", folder], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert (folder / "report" / "index.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "give a study directory, or both --tracking-uri and --experiment"),
        (["report", "--experiment", "tiny"], "give a study directory, or both --tracking-uri and --experiment"),
        (["report", "there", "--experiment", "tiny"], "give either DIR, or --tracking-uri and --experiment, not both"),
        (["report", "--tracking-uri", "sqlite:///x.db", "--experiment", "tiny"], "give the folder for the report"),
        (["report", "no/such/study"], "no/such/study is not a directory"),
        (
            ["report", "--tracking-uri", "sqlite:///no.db", "--experiment", "tiny", "--out", "o"],
            "there is no MLflow database at no.db",
        ),
        (
            ["report", "--tracking-uri", "http://127.0.0.1:9", "--experiment", "tiny", "--out", "o"],
            "cannot read MLflow at http://127.0.0.1:9",
        ),
    ],
)
def test_report_command_says_what_is_wrong_in_one_line(invoke, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"mpo-analysis: {message}")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_report_command_lists_the_experiments(invoke, study_dir, tmp_path):
    uri = resolve_study(study_dir).tracking_uri
    result = invoke("report", "--tracking-uri", uri, "--experiment", "huge", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "experiment 'huge' does not exist" in result.stderr
    assert "'tiny'" in result.stderr


def test_help_names_every_option(invoke):
    result = invoke("report", "--help")
    assert result.exit_code == 0
    for option in ("DIR", "--tracking-uri", "--experiment", "--out", "-o"):
        assert option in result.output
    assert "report" in invoke("--help").output


def test_analysis_imports_neither_torch_nor_ray_and_mlflow_only_to_read():
    code = (
        "import sys, analysis.commands.cli, analysis.report.report, analysis.runs.load; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'torch', 'ray', 'optuna', 'mlflow', 'study', 'mpo_core'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.strip() == "[]"


def test_paper_writes_the_comparison_and_says_what_is_lacking(invoke, study_dir, tmp_path):
    result = invoke("paper", study_dir, "--out", tmp_path / "paper")
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "paper").iterdir()}
    figures = {
        f"{name}.{kind}"
        for name in ("published", "published_curves", "published_rel_error")
        for kind in ("csv", "txt", "svg", "pdf", "png")
    }  # fmt: skip
    tables = {f"{name}.{kind}" for name in ("comparison", "models") for kind in ("csv", "md", "tex")}
    assert names == tables | figures | {"paper.json"}
    assert "left open: no run of " in result.output
    assert "Table 2" in result.output
    assert (
        max(len(line) for line in result.output.splitlines() if not line.startswith(("wrote", "and", "left open")))
        <= 80
    )


def test_paper_needs_a_study(invoke):
    result = invoke("paper")
    assert result.exit_code == 2
    assert result.output == "mpo-analysis: give a study directory, or both --tracking-uri and --experiment\n"
