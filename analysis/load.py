"""The only reader of MLflow: from an experiment to the runs of the study in it."""

from __future__ import annotations

import json
import logging
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis import run_schema as schema
from analysis.errors import AnalysisError
from analysis.runs import RunRecord, StudyAddress, StudyRuns, study_runs, without_password

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def resolve_study(path: Path) -> StudyAddress:
    """Where the runs of the study in directory `path` are, from its manifest.

    A study directory may have been moved or copied: if the SQLite database is no longer where the manifest says, the
    one of that name in the directory is taken.

    Raises:
        AnalysisError: no such directory, no manifest, a manifest of another version, or the study was not tracked.
    """
    manifest_path = path / schema.STUDY_MANIFEST
    if not path.is_dir():
        raise AnalysisError(f"{path} is not a directory; give the directory that `mpo-study run` wrote")
    if not manifest_path.is_file():
        raise AnalysisError(f"{path} is not a study directory: it has no {schema.STUDY_MANIFEST}")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        version, uuid = manifest["schema_version"], manifest["uuid"]
        tracking_uri, experiment = manifest["tracking_uri"], manifest["experiment"]
    except (ValueError, KeyError, TypeError) as error:
        raise AnalysisError(f"{manifest_path} is not a study manifest: {error!r}") from error
    if version != schema.SCHEMA_VERSION:
        raise AnalysisError(f"{manifest_path} has schema version {version}, but {schema.SCHEMA_VERSION} is read here")
    if tracking_uri is None:
        raise AnalysisError(
            f"{path} was run with tracking off, so there are no MLflow runs to read; "
            f"write them with `mpo-study sync {path} --tracking URI`"
        )
    database = _sqlite_path(tracking_uri)
    if database is not None and not database.is_absolute():
        # Never from the working folder: MLflow's own default database has the same name.
        tracking_uri = f"sqlite:///{(path / database).resolve()}"
    elif database is not None and not database.exists() and (path / database.name).is_file():
        tracking_uri = f"sqlite:///{(path / database.name).resolve()}"
    return StudyAddress(tracking_uri, experiment, uuid)


def load_study(address: StudyAddress, page_size: int = 1000) -> StudyRuns:
    """Read the trials and seeds of one study; only active runs count.

    Args:
        address: the experiment, and the study in it if it holds several.
        page_size: runs asked of MLflow at a time; all pages are read.
    Raises:
        AnalysisError: MLflow cannot be read, the experiment is unknown or holds no such study, or a run is not as the
            schema says: a param missing or of the wrong type, a key twice, a seed without its trial.
    """
    with connect(address.tracking_uri) as client:
        where = experiment_id(client, address)
        trial_runs = search(client, where, schema.KIND_TRIAL, address.uuid, page_size)
        seed_runs = search(client, where, schema.KIND_SEED, address.uuid, page_size)
        summary_runs = search(client, where, schema.KIND_SUMMARY, address.uuid, page_size)
    return study_runs(address, trial_runs, seed_runs, summary_runs)


def load_curves(
    runs: StudyRuns, trials: Sequence[int] | None = None, keys: Sequence[str] = ("val_loss", "tokens")
) -> pd.DataFrame:
    """Learning curves of the complete seeds, one row per evaluation: trial, seed, step and one column per key.

    One request per seed and key, so ask for the trials that will be shown.

    Args:
        trials: trial numbers; None for all.
        keys: curves of the schema.
    Raises:
        AnalysisError: MLflow cannot be read, or a seed has no such curve.
    """
    seeds = runs.seeds if trials is None else runs.seeds[runs.seeds["trial"].isin(trials)]
    frames = []
    with connect(runs.address.tracking_uri) as client:
        for trial, seed, run_id in seeds[["trial", "seed", "run_id"]].itertuples(index=False):
            curves = {}
            for key in keys:
                history = client.get_metric_history(run_id, key)
                if not history:
                    raise AnalysisError(f"run {run_id} (trial {trial}, seed {seed}) has no curve `{key}`")
                curves[key] = pd.Series({metric.step: metric.value for metric in history}, dtype="float64")
            frames.append(pd.DataFrame(curves).rename_axis("step").reset_index().assign(trial=trial, seed=seed))
    columns = ["trial", "seed", "step", *keys]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


@contextmanager
def connect(tracking_uri: str) -> Iterator[MlflowClient]:
    """A client whose errors are ours; the user gets no logs of migrations and retries, and no deprecations."""
    _check_database(tracking_uri)
    quiet = {"alembic": logging.WARNING, "mlflow.store.db.utils": logging.WARNING, "urllib3": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in quiet}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        try:
            for name, level in quiet.items():
                logging.getLogger(name).setLevel(level)
            yield MlflowClient(tracking_uri=tracking_uri)
        except MlflowException as error:
            reason = str(error).strip().splitlines()[0].replace(tracking_uri, without_password(tracking_uri))
            raise AnalysisError(f"cannot read MLflow at {without_password(tracking_uri)}: {reason}") from error
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


def _sqlite_path(tracking_uri: str) -> Path | None:
    return Path(tracking_uri.removeprefix("sqlite:///")) if tracking_uri.startswith("sqlite:///") else None


def _check_database(tracking_uri: str) -> None:
    """Refuse what MLflow would create or fill with tables of its own: a reader leaves nothing behind."""
    path = _sqlite_path(tracking_uri)
    if path is None:
        return
    if not path.is_file():
        raise AnalysisError(f"there is no MLflow database at {path}; give the tracking URI that the study wrote to")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            database.execute("SELECT 1 FROM experiments LIMIT 1")
    except sqlite3.Error as error:
        raise AnalysisError(f"{path} is not a readable MLflow database: {error}") from error


def experiment_id(client: MlflowClient, address: StudyAddress) -> str:
    """MLflow's id of the study's experiment.

    Raises:
        AnalysisError: there is none, or it is deleted.
    """
    experiment = client.get_experiment_by_name(address.experiment)
    if experiment is not None and experiment.lifecycle_stage == "active":
        return experiment.experiment_id
    names = sorted(e.name for e in client.search_experiments())
    state = "is deleted" if experiment is not None else "does not exist"
    raise AnalysisError(
        f"experiment {address.experiment!r} {state} at {without_password(address.tracking_uri)}; "
        f"there are: {', '.join(map(repr, names)) or 'none'}"
    )


def search(client: MlflowClient, experiment_id: str, kind: str, uuid: str | None, page_size: int) -> list[RunRecord]:
    """Every active run of that kind, the oldest first; a run that a shifting page shows twice counts once."""
    wanted = f"tags.`{schema.KIND}` = '{kind}'" + (f" AND tags.`{schema.STUDY_UUID}` = '{uuid}'" if uuid else "")
    runs: dict[str, RunRecord] = {}
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], wanted, max_results=page_size, order_by=["attributes.start_time ASC"], page_token=token
        )
        for run in page:
            runs[run.info.run_id] = RunRecord(
                run.info.run_id, run.info.status, run.info.end_time, run.data.params, run.data.metrics, run.data.tags
            )
        token = page.token
        if not token:
            return list(runs.values())
