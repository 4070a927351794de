"""Publishes a report beside the runs: the only thing that the analysis writes to MLflow."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from analysis import run_schema as schema
from analysis.errors import AnalysisError
from analysis.report.report import FOLDER
from analysis.runs.load import connect, experiment_id, search
from analysis.runs.study_runs import StudyRuns

PARTS = ("figures", "tables")


def publish(runs: StudyRuns, report: Path) -> int:
    """Log a report's figures and tables as artifacts of the experiment's summary run, and return their number.

    They replace artifacts of the same names. Nothing else in MLflow changes.

    Args:
        report: the folder that `write_report` wrote.

    Raises:
        AnalysisError: MLflow does not accept them or has no summary run of this study, or a file is a symbolic link.
    """
    if runs.parts:
        raise AnalysisError("a report on several studies cannot be published; publish a report on each study")
    names = FOLDER.check(report)
    chosen = [name for name in names if Path(name).parts[0] in PARTS]
    with connect(runs.address.tracking_uri) as client, tempfile.TemporaryDirectory() as scratch:
        where = experiment_id(client, runs.address)
        summaries = search(client, where, schema.KIND_SUMMARY, runs.uuid, page_size=2)
        if len(summaries) != 1:
            raise AnalysisError(f"study {runs.name!r} has no summary run; `mpo-study sync DIR` writes it")
        _check_place(client.get_run(summaries[0].run_id).info.artifact_uri or "")
        for name in chosen:  # other files in the report folder are not published
            target = Path(scratch) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(report / name, target)
        try:
            client.log_artifacts(summaries[0].run_id, scratch)
        except OSError as error:
            raise AnalysisError(f"the report could not be published: {error.strerror or error}") from error
    return len(chosen)


def _check_place(artifacts: str) -> None:
    """Refuse to create a folder at the old place of a moved study: its summary run has had files from the start."""
    parts = urlsplit(artifacts)
    if parts.scheme == "file" and not Path(unquote(parts.path)).is_dir():
        raise AnalysisError(
            f"MLflow expects the artifacts at {unquote(parts.path)}, which does not exist: the study's folder was "
            "moved; `mpo-study sync DIR` tells MLflow where it is now"
        )
