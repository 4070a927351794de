"""One study in a real MLflow database, written once; tests read it and never change it."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import simulated_study

from analysis import run_schema as schema
from analysis.results.findings import Findings
from analysis.results.summary import summarise
from analysis.results.uncertainty import FrontierUncertainty
from analysis.runs.load import load_study, resolve_study
from analysis.runs.study_runs import StudyRuns


@pytest.fixture(scope="session")
def study_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study directory: study.json and mlflow.db."""
    folder = tmp_path_factory.mktemp("tiny")
    uri = simulated_study.write_study(folder, simulated_study.configurations())
    manifest = {
        "schema_version": schema.SCHEMA_VERSION, "name": "tiny", "uuid": simulated_study.UUID, "tracking_uri": uri,
        "experiment": "tiny",
    }  # fmt: skip
    (folder / schema.STUDY_MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def runs(study_dir: Path) -> StudyRuns:
    return load_study(resolve_study(study_dir))


@pytest.fixture(scope="session")
def summary(runs: StudyRuns) -> pd.DataFrame:
    return summarise(runs)


@pytest.fixture(scope="session")
def findings(runs: StudyRuns) -> Findings:
    return Findings.of(runs)


@pytest.fixture(scope="session")
def uncertainties(findings: Findings) -> dict[str, FrontierUncertainty]:
    return findings.uncertainties
