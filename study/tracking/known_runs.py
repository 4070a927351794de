"""The data that MLflow has of a study: its experiment, and the runs in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from analysis import run_schema as schema
from analysis.runs.urls import hide_password
from study.errors import StudyError
from study.tracking.connection import TrackingAway
from study.tracking.content import StudyRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

_PAGE = 1000
"""Number of runs per request."""

_OVER = ("FINISHED", "FAILED", "KILLED")


@dataclass
class KnownRun:
    """A run in MLflow, as this writer knows it."""

    run_id: str
    started: int
    status: str
    ended: int | None = None
    """Time in milliseconds; None while the run is not over."""
    digest: str = ""
    """Digest of its content, see `run_schema.digest`; empty if the run does not have one."""
    parent: str | None = None
    lost_weights: bool = False
    revision: str | None = None
    """Only for the summary: the revision by which readers know the experiment, see `analysis.run_schema`."""
    n_missing: str | None = None
    """Only for the summary: number of runs that the study lacks."""
    is_checked: bool = False
    """Whether this writer has written the run, or compared it with its required content."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics found to be correct in the run, kept until the others are written."""
    points: dict[tuple[str, int], float] = field(default_factory=dict)
    """Values that this writer logged while the run was not over, by (key, step)."""
    logged: frozenset[str] = frozenset()
    """Keys of all metrics in the run, if it is checked."""


def open_experiment(client: MlflowClient, record: StudyRecord, artifacts: str | None) -> str:
    name = record.name
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        description = schema.tag_text(record.description)
        tags = {schema.STUDY_UUID: record.uuid, "mlflow.note.content": description}
        return id_of_mlflow(client.create_experiment(name, artifact_location=artifacts, tags=tags))
    experiment_id = id_of_mlflow(experiment.experiment_id)
    if experiment.lifecycle_stage == "deleted":
        raise StudyError(_how_to_restore(client, experiment))
    if experiment.tags.get(schema.STUDY_UUID) != record.uuid:
        raise StudyError(
            f"experiment {name} in MLflow belongs to another study of that name; give this one another name"
        )
    return experiment_id


def _how_to_restore(client: MlflowClient, experiment: Experiment) -> str:
    uri = hide_password(client.tracking_uri)
    store = "the server's database" if uri.startswith("http") else uri
    return (
        f"the experiment {experiment.name} was deleted; restore it: MLFLOW_TRACKING_URI={uri} mlflow experiments "
        f"restore --experiment-id {experiment.experiment_id}; or purge it: mlflow gc --tracking-uri {uri} "
        f"--backend-store-uri {store!r} --experiment-ids {experiment.experiment_id}"
    )


def find_runs(
    client: MlflowClient, experiment_id: str, study_uuid: str, on_sign: Callable[[], None]
) -> tuple[dict[str, KnownRun], list[KnownRun]]:
    """The active runs of a study by key, and the runs that must be deleted because another has their key.

    There may be two runs with one key, if a call was repeated because its answer was lost. Then the run with a digest
    stays, or else the one that is over.

    Args:
        on_sign: called whenever MLflow has answered.
    """
    known: dict[str, KnownRun] = {}
    doomed: list[KnownRun] = []
    token: str | None = None
    while True:
        wanted = f"tags.`{schema.STUDY_UUID}` = '{study_uuid}'"
        page = client.search_runs([experiment_id], filter_string=wanted, max_results=_PAGE, page_token=token)
        on_sign()
        for run in page:
            key, found = run.data.tags.get(schema.KEY, run.info.run_id), _known(run)
            one, other = sorted((known.get(key, found), found), key=lambda one: (one.digest != "", one.ended or 0))
            known[key] = other
            if one is not other:
                doomed.append(one)
        token = page.token
        if not token:
            return known, doomed


def _known(run: Run) -> KnownRun:
    info, tags = run.info, run.data.tags
    digest = schema.digest(run.data.params, run.data.metrics, tags)
    return KnownRun(
        info.run_id,
        info.start_time,
        info.status,
        info.end_time if info.status in _OVER else None,
        digest if tags.get(schema.DIGEST) == digest else "",
        tags.get(schema.PARENT),
        schema.WEIGHTS_LOST in tags,
        tags.get(schema.REVISION),
        tags.get(schema.MISSING),
    )


def is_part(found: dict[str, float], wanted: dict[str, float]) -> bool:
    """Whether all metrics found are wanted, up to a backend's rounding."""
    return all(key in wanted and math.isclose(value, wanted[key], rel_tol=1e-12) for key, value in found.items())


def id_of_mlflow(given: str) -> str:
    """Check an id from MLflow, which is never empty; a proxy in front of MLflow may give an empty answer."""
    if not given:
        raise TrackingAway("the server there is not MLflow: its answer contains no experiment and no run")
    return given
