"""The only reader of MLflow: from an experiment to the runs of the study in it."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis import run_schema as schema
from analysis.errors import AnalysisError
from analysis.runs.cache import Cache
from analysis.runs.run_records import no_frames
from analysis.runs.study_runs import FRAMES, RunRecord, StudyAddress, StudyRuns, said_by_summary, study_runs
from analysis.runs.urls import hide_password

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PAGE = 1000


def resolve_study(path: Path) -> StudyAddress:
    """Return the address of the runs of the study in directory `path`, from its manifest.

    A study directory may have been moved or copied: if the SQLite database is no longer where the manifest says, the
    database of the same name in the directory is used.

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
        raise AnalysisError(
            f"{manifest_path} has schema version {version}, but this program reads version {schema.SCHEMA_VERSION}"
        )
    if tracking_uri is None:
        raise AnalysisError(
            f"{path} was run with tracking off, so there are no MLflow runs to read; "
            f"write them with `mpo-study sync {path} --tracking URI`"
        )
    database = _sqlite_path(tracking_uri)
    if database is not None and not database.is_absolute():
        # Never relative to the working folder: MLflow's own default database has the same name.
        tracking_uri = f"sqlite:///{(path / database).resolve()}"
    elif database is not None and not database.exists() and (path / database.name).is_file():
        tracking_uri = f"sqlite:///{(path / database.name).resolve()}"
    return StudyAddress(tracking_uri, experiment, uuid)


def load_study(address: StudyAddress, page_size: int = PAGE, cache: Path | None = None) -> StudyRuns:
    """Read the trials and seeds of one study; only active runs count.

    Args:
        address: the experiment, and the study in it if it holds several.
        page_size: number of runs per request to MLflow; all pages are read.
        cache: folder in which the runs of a study that is not running are kept. They are read from there while the
            study is in the same state (see `stamp_of`). None: always read from MLflow.
    Raises:
        AnalysisError: MLflow cannot be read, the experiment is unknown or holds no such study, or a run is not as the
            schema says: a param missing or of the wrong type, a key twice, a seed without its trial.
    """
    with connect(address.tracking_uri) as client:
        where = experiment_id(client, address)
        summary_runs = search(client, where, schema.KIND_SUMMARY, address.uuid, page_size)
        stamp = None if cache is None else stamp_of(client, where, address.uuid, summary_runs)
        if cache is not None and stamp is not None:
            kept = _from_cache(address, Cache(cache, stamp), summary_runs)
            if kept is not None:
                return kept
        trial_runs = search(client, where, schema.KIND_TRIAL, address.uuid, page_size)
        seed_runs = search(client, where, schema.KIND_SEED, address.uuid, page_size)
        runs = study_runs(address, trial_runs, seed_runs, summary_runs)
        is_over = all(run.end_time is not None for run in (*trial_runs, *seed_runs))
        # The runs may come from several states, unless the state is the same after reading as before.
        if cache is not None and stamp is not None and is_over:
            summary_runs = search(client, where, schema.KIND_SUMMARY, address.uuid, page_size)
            if stamp == stamp_of(client, where, address.uuid, summary_runs):
                runs = replace(runs, cache=Cache(cache, stamp))
                _keep(runs)
    return runs


def stamp_of(
    client: MlflowClient, experiment_id: str, uuid: str | None, summaries: Sequence[RunRecord]
) -> dict[str, Any] | None:
    """Identify the state of a study's runs, with two more small requests; None while the state may be changing.

    The study's writer sets the revision, and removes it before any change. The revision does not cover manual changes:
    a deleted or restored run shows in the number of runs and in the list of deleted runs. (Params, metrics and tags
    that somebody else writes to the runs do not show. MLflow's own pages do not change the ones that are read here.)
    """
    if len(summaries) != 1:
        return None
    revision = summaries[0].tags.get(schema.REVISION, "")
    n_runs = revision.partition("/")[2]
    if not n_runs.isdecimal() or not _is_number_of_runs(client, experiment_id, uuid, int(n_runs)):
        return None
    deleted = "".join(sorted(run.run_id for run in _runs(client, experiment_id, _study_filter(uuid), deleted=True)))
    return {
        "schema": schema.SCHEMA_VERSION,
        "study": summaries[0].tags.get(schema.STUDY_UUID),
        "revision": revision,
        "deleted": hashlib.sha256(deleted.encode()).hexdigest(),
    }


def _from_cache(address: StudyAddress, cache: Cache, summary_runs: Sequence[RunRecord]) -> StudyRuns | None:
    frames = cache.read((*FRAMES, "study"))
    if frames is None or any(not frames[key].dtypes.equals(frame.dtypes) for key, frame in no_frames().items()):
        return None  # nothing, or frames that another version of this program made of the same runs
    name, uuid, n_duplicates, latest = frames.pop("study")[["name", "uuid", "n_duplicates", "latest"]].iloc[0]
    return StudyRuns(
        address=address,
        name=name,
        uuid=uuid,
        **frames,
        n_duplicates=int(n_duplicates),
        latest=None if pd.isna(latest) else latest,
        **said_by_summary(summary_runs, name, uuid),
        cache=cache,
    )


def _keep(runs: StudyRuns) -> None:
    study = {"name": runs.name, "uuid": runs.uuid, "n_duplicates": runs.n_duplicates, "latest": runs.latest}
    assert runs.cache is not None
    with suppress(OSError):  # a study in a read-only folder is still read
        runs.cache.write({key: getattr(runs, key) for key in FRAMES} | {"study": pd.DataFrame([study])})


def history(client: MlflowClient, run_id: str, key: str) -> dict[int, float]:
    """The values of a run's metric by step; empty if it has none."""
    return {metric.step: metric.value for metric in client.get_metric_history(run_id, key)}


@contextmanager
def connect(tracking_uri: str) -> Iterator[MlflowClient]:
    """A client that raises our errors and hides logs of migrations and retries, and deprecation warnings."""
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
            reason = hide_password(str(error).strip().splitlines()[0], tracking_uri)
            raise AnalysisError(f"cannot read MLflow at {hide_password(tracking_uri)}: {reason}") from error
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


def _sqlite_path(tracking_uri: str) -> Path | None:
    return Path(tracking_uri.removeprefix("sqlite:///")) if tracking_uri.startswith("sqlite:///") else None


def _check_database(tracking_uri: str) -> None:
    """Refuse a database that MLflow would create or fill with its own tables: a reader leaves nothing behind."""
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
        AnalysisError: the experiment does not exist or is deleted.
    """
    experiment = client.get_experiment_by_name(address.experiment)
    if experiment is not None and experiment.lifecycle_stage == "active":
        return experiment.experiment_id
    names = sorted(e.name for e in client.search_experiments())
    state = "is deleted" if experiment is not None else "does not exist"
    raise AnalysisError(
        f"experiment {address.experiment!r} {state} at {hide_password(address.tracking_uri)}; "
        f"there are: {', '.join(map(repr, names)) or 'none'}"
    )


def search(client: MlflowClient, experiment_id: str, kind: str, uuid: str | None, page_size: int) -> list[RunRecord]:
    """Every active run of that kind, the oldest first. Pages may shift; a run that appears on two counts once."""
    return _runs(client, experiment_id, f"{_study_filter(uuid)} AND tags.`{schema.KIND}` = '{kind}'", page_size)


def _study_filter(uuid: str | None) -> str:
    """Filter for the runs of this study. uuid None: runs of any study."""
    return f"tags.`{schema.STUDY_UUID}` = '{uuid}'" if uuid else f"tags.`{schema.KIND}` LIKE '%'"


def _runs(
    client: MlflowClient, experiment_id: str, wanted: str, page_size: int = PAGE, deleted: bool = False
) -> list[RunRecord]:
    from mlflow.entities import ViewType

    view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    oldest_first = ["attributes.start_time ASC"]
    runs: dict[str, RunRecord] = {}
    token = None
    with _no_garbage_collection():
        while True:
            page = client.search_runs([experiment_id], wanted, view, page_size, oldest_first, token)
            for run in page:
                info, data = run.info, run.data
                runs[info.run_id] = RunRecord(
                    info.run_id, info.status, info.end_time, data.params, data.metrics, data.tags
                )
            token = page.token
            if not token:
                return list(runs.values())


def _is_number_of_runs(client: MlflowClient, experiment_id: str, uuid: str | None, n: int) -> bool:
    """Return whether the study has exactly n active runs, by the page on which the last one would be alone."""
    from mlflow.entities import ViewType
    from mlflow.utils.search_utils import SearchUtils

    token = SearchUtils.create_page_token(n - 1).decode()
    page = client.search_runs([experiment_id], _study_filter(uuid), ViewType.ACTIVE_ONLY, 1, None, token)
    return len(page) == 1 and not page.token


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch garbage collection off while a page is read.

    MLflow makes hundreds of thousands of objects for a page of runs, and none is garbage until the page is done. The
    collector's passes over them would take most of the time of reading a large study."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
