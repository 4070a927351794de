"""The database of a ledger: how it is opened, what it may refuse, and the way back where it is damaged."""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
import sqlalchemy.exc
from optuna.exceptions import StorageInternalError

from analysis.runs.urls import hide_password
from study.errors import StudyError
from study.ledger.checksums import Damaged

LEDGER_ERRORS = (sqlalchemy.exc.SQLAlchemyError, StorageInternalError)
"""What a ledger raises that cannot be read or written any more."""

_NO_DAMAGE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
"""What SQLite says of a file that may be whole; the last byte of its error code."""

_LOCKED_SECONDS = 60
"""How long a writer of a SQLite file waits for those who read it."""

ALIVE = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
"""libpq's: a connection that has nothing to say for days is not dropped on its way, and one whose other end is gone is
given up after a minute."""


def _engine_options(url: str) -> dict[str, Any]:
    if sa.make_url(url).get_backend_name() == "postgresql":
        return {"pool_pre_ping": True, "connect_args": ALIVE}
    return {"connect_args": {"timeout": _LOCKED_SECONDS}}


def reason(error: Exception) -> str:
    """What a database refused, in one line; Optuna's own errors do not say it."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ is not None else error
    return str(cause).splitlines()[0]


def is_away(error: Exception) -> bool:
    """Whether a database may take the same again later: it is the connection that failed, or the server."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    return isinstance(cause, (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)) or bool(
        isinstance(cause, sqlalchemy.exc.DBAPIError) and cause.connection_invalidated
    )


@contextmanager
def in_one_line(url: str) -> Iterator[None]:
    """Say in one line what a database refuses, or how it is damaged, and the way back.

    Raises:
        StudyError: it does, or is.
    """
    try:
        yield
    except Damaged as error:
        raise StudyError(f"the ledger is damaged: {error}{way_back(url, '; ')}") from None
    except LEDGER_ERRORS as error:
        said = hide_password(reason(error), url)
        raise StudyError(f"the ledger cannot be used: {said}{_if_damaged(error, url)}") from None


def copy_of(file: Path) -> Path:
    """Where the last whole copy of a ledger's file lies, see `study.ledger.copies`."""
    return file.with_name(f"{file.name}.copy")


def way_back(url: str, before: str) -> str:
    """How to go back to the last whole copy of a SQLite ledger, with the command; nothing where there is none."""
    database = sa.make_url(url).database
    if sa.make_url(url).get_backend_name() != "sqlite" or not database or not copy_of(Path(database)).is_file():
        return ""
    file = Path(database)
    when = datetime.fromtimestamp(copy_of(file).stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
    beside = shlex.join(f"{file}-{what}" for what in ("journal", "wal", "shm"))  # SQLite would apply them to the copy
    return (
        f"{before}to go back to the copy of {when}, and train again what came later: "
        f"rm -f {beside} && {shlex.join(['cp', str(copy_of(file)), str(file)])}"
    )


def _if_damaged(error: Exception, url: str) -> str:
    """The way back, unless a SQLite file was refused for another reason: then it would only lose results."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    code = getattr(getattr(cause, "orig", None), "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return "" if code & 0xFF in _NO_DAMAGE else way_back(url, "; if it is damaged: ")


def open_database(url: str) -> sa.Engine:
    """An engine for a ledger's URL.

    Raises:
        StudyError: it cannot be opened; the password, if the URL has one, is not shown.
    """
    try:
        engine = sa.create_engine(url, **_engine_options(url))
        sa.inspect(engine).get_table_names()  # to connect alone does not read a SQLite file
        return engine
    except (sqlalchemy.exc.SQLAlchemyError, ModuleNotFoundError) as error:
        said = hide_password(str(error).splitlines()[0], url)
        raise StudyError(f"cannot open the ledger {hide_password(url)}: {said}{_if_damaged(error, url)}") from None


def check_file(engine: sa.Engine) -> None:
    """Raise a Damaged where a SQLite file is damaged in what no row's checksum covers: its pages and indexes."""
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            said = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
        if said != "ok":
            raise Damaged(f"SQLite says: {str(said).splitlines()[-1]}")


def check_tables(engine: sa.Engine, first: sa.Table, other: sa.Table) -> None:
    """Raise a Damaged if the first table has a row, and the other one, which is made before any row, is missing."""
    found = sa.inspect(engine).get_table_names()
    if first.name not in found or other.name in found:
        return
    with engine.connect() as connection:
        if connection.execute(sa.select(first.c.name).limit(1)).first() is not None:
            raise Damaged(f"it has no table {other.name}")


def open_optuna(url: str) -> optuna.storages.RDBStorage:
    """Optuna's side of a ledger."""
    return optuna.storages.RDBStorage(url, engine_kwargs=_engine_options(url))


def close_optuna(storage: optuna.storages.RDBStorage) -> None:
    """Let go of every connection that Optuna has to a ledger."""
    storage.remove_session()
    storage.engine.dispose()
