"""Connection to MLflow: its client, the database in a study's own folder, and URIs without passwords for display."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

import sqlalchemy
import sqlalchemy.exc

from analysis.runs.urls import hide_password
from study.errors import StudyError
from study.ledger.urls import is_database
from study.training.files import replacing

if TYPE_CHECKING:
    from mlflow import MlflowClient

_REFUSALS = {
    "BAD_REQUEST",
    "ENDPOINT_NOT_FOUND",
    "INVALID_PARAMETER_VALUE",
    "PERMISSION_DENIED",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
}
"""MLflow's error codes for which waiting does not help."""

_LONGEST_LINE = 500
"""Longest error text that is shown, in characters."""


class TrackingAway(StudyError):
    """MLflow cannot be reached now; the same call may work later."""


def connect(uri: str) -> MlflowClient:
    """A client that has reached its server or database.

    Raises:
        TrackingAway: there is no answer, or only a server error.
        StudyError: the URI is not valid for MLflow, or its database driver is not installed.
    """
    _set_up_mlflow()
    from mlflow import MlflowClient  # slow import, not needed with tracking off

    try:
        _probe(uri)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # MLflow raises whatever its backend raises
        raise tracking_error(error, uri) from error
    return client


def _probe(uri: str) -> None:
    """Raise the database driver's error at once if nobody answers; MLflow itself would try for minutes first."""
    if not is_database(uri) or uri.startswith("sqlite"):
        return
    engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": 10})
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _set_up_mlflow() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # By default an unreachable server is reported only after four minutes, and at each of eight attempts.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines for every run that ends
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    # MLflow prints a line for each migration of a new database, and a traceback for a refused write.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def tracking_error(error: Exception, uri: str) -> StudyError:
    """MLflow's error in one line without the URI's password."""
    if isinstance(error, StudyError):
        return error
    return error_kind(error)(f"cannot reach MLflow at {hide_password(uri)}: {shown(error, uri)}")


def error_kind(error: Exception) -> type[StudyError]:
    """`TrackingAway` if the same call may work later, `StudyError` if it is refused."""
    if isinstance(error, StudyError):
        return type(error)
    return StudyError if _is_refusal(error) else TrackingAway


def _is_refusal(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

    if isinstance(error, MlflowException):
        return error.error_code in _REFUSALS or isinstance(error, UnsupportedModelRegistryStoreURIException)
    wrong = (ImportError, sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError)
    return isinstance(error, wrong)


def first_line(error: Exception) -> str:
    """The first informative line of an error's message, or the exception's name if there is none."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith("(raised as a result of")]  # SQLAlchemy's preamble
    return said[0] if said else type(error).__name__


def shown(error: Exception, uri: str) -> str:
    """`first_line` without the password of a URI, and shortened, since a proxy may have sent a whole page."""
    line = hide_password(first_line(error), uri)
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 1]}…"


def runs_page(uri: str, name: str) -> str:
    """Path of an experiment's runs in MLflow's UI, below the server's address.

    MLflow's start page is for language-model agents, and does not show a study.

    Raises:
        StudyError: MLflow cannot be read, or has no such experiment.
    """
    experiment = connect(uri).get_experiment_by_name(name)
    if experiment is None:
        raise StudyError(f"MLflow at {hide_password(uri)} has no experiment {name}; `mpo-study sync` writes it")
    return f"/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"


# The database in a study's own folder ---------------------------------------------------------------------------------


def prepare_own_database(path: Path, artifacts: str) -> str | None:
    """Ensure that there is an undamaged MLflow database at the path, also after damage or an interrupted creation.

    Its content is also in the ledger. So a damaged database is set aside, and a new one is written from the ledger.

    Args:
        artifacts: where artifacts go if the database has to be made.
    Returns:
        What was done to an existing database, in one line; None if nothing had to be done.
    """
    said = None
    why = _what_is_wrong(path) if path.exists() else None
    if why is not None:
        aside = _set_aside(path)
        said = f"{path.name} {why}; renamed it to {aside.name}, and a new one is written from the ledger"
    if not path.exists():
        _make_database(path, artifacts)
    return said


def _what_is_wrong(path: Path) -> str | None:
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=rw", uri=True)) as database:
            if database.execute("PRAGMA quick_check").fetchone() != ("ok",):
                return "is damaged"
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            is_whole = {"alembic_version", "experiments", "runs"} <= tables
            if not is_whole or any(name.startswith("_alembic_tmp") for name in tables):
                return "is incomplete"
            return None
    except sqlite3.OperationalError:  # locked: MLflow will report it
        return None
    except sqlite3.DatabaseError:
        return "is damaged"


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    for suffix in ("", "-journal", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    return aside


def _make_database(path: Path, artifacts: str) -> None:
    """Make a database under another name first, since MLflow cannot continue a half-made one.

    Making it takes seconds and dozens of transactions.
    """
    _set_up_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with replacing(path) as partial:
        SqlAlchemyStore(f"sqlite:///{partial}", artifacts).engine.dispose()


def move_artifacts(uri: str, experiment: str, artifacts: str, *, is_own: bool) -> None:
    """Update the artifact addresses of an experiment and its runs in a database.

    MLflow stores absolute addresses, which become wrong when a study's folder is moved or copied.

    Args:
        artifacts: where the artifacts are now, in the study's folder.
        is_own: whether the database lies in that folder too. If not, addresses that still exist stay, since another
            copy of the study may use them.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the database cannot be read or written.
    """
    from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlRun

    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.begin() as database:
            query = sqlalchemy.select(SqlExperiment.experiment_id, SqlExperiment.artifact_location)
            row = database.execute(query.where(SqlExperiment.name == experiment)).one_or_none()
            before = row.artifact_location if row is not None else None
            if row is None or before is None or before == artifacts or not (is_own or _leads_nowhere(before)):
                return
            below = sqlalchemy.func.substr(SqlRun.artifact_uri, len(before) + 1)
            moved = sqlalchemy.literal(artifacts).concat(below)
            of_runs = sqlalchemy.update(SqlRun).where(
                SqlRun.experiment_id == row.experiment_id, SqlRun.artifact_uri.startswith(before, autoescape=True)
            )
            database.execute(of_runs.values(artifact_uri=moved).execution_options(synchronize_session=False))
            of_experiment = sqlalchemy.update(SqlExperiment).where(SqlExperiment.experiment_id == row.experiment_id)
            database.execute(of_experiment.values(artifact_location=artifacts))
    finally:
        engine.dispose()


def _leads_nowhere(artifacts: str) -> bool:
    parts = urlsplit(artifacts)
    return parts.scheme == "file" and not Path(unquote(parts.path)).exists()
