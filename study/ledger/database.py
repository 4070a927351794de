"""The database of a ledger: opening it, its errors, and how to restore it after damage."""

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
"""Errors of a ledger that can no longer be read or written."""

_NO_DAMAGE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
"""SQLite errors that do not mean damage: the last byte of the error code."""

_LOCKED_SECONDS = 60
"""How long a writer of a SQLite file waits for its readers."""

ALIVE = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
"""Options of libpq: a connection that is idle for days stays open, and one whose other end is gone is given up after a
minute."""


def _engine_options(url: str) -> dict[str, Any]:
    if sa.make_url(url).get_backend_name() == "postgresql":
        return {"pool_pre_ping": True, "connect_args": ALIVE}
    return {"connect_args": {"timeout": _LOCKED_SECONDS}}


def reason(error: Exception) -> str:
    """The database's reason for an error, in one line; Optuna's own errors do not name it."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ is not None else error
    return str(cause).splitlines()[0]


def is_away(error: Exception) -> bool:
    """Whether the same call may succeed later, since the connection or the server failed."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    return isinstance(cause, (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)) or bool(
        isinstance(cause, sqlalchemy.exc.DBAPIError) and cause.connection_invalidated
    )


@contextmanager
def in_one_line(url: str) -> Iterator[None]:
    """Convert a database's errors to one line, which also says how to restore a damaged database.

    Raises:
        StudyError: the database raised an error, or is damaged.
    """
    try:
        yield
    except Damaged as error:
        raise StudyError(f"the ledger is damaged: {error}{way_back(url, '; ')}") from None
    except LEDGER_ERRORS as error:
        said = hide_password(reason(error), url)
        raise StudyError(f"the ledger cannot be used: {said}{_if_damaged(error, url)}") from None


def copy_of(file: Path) -> Path:
    """Path of the last undamaged copy of a ledger's file, see `study.ledger.copies`."""
    return file.with_name(f"{file.name}.copy")


def way_back(url: str, before: str) -> str:
    """How to restore the last undamaged copy of a SQLite ledger, with the command; empty if there is no copy."""
    database = sa.make_url(url).database
    if sa.make_url(url).get_backend_name() != "sqlite" or not database or not copy_of(Path(database)).is_file():
        return ""
    file = Path(database)
    when = datetime.fromtimestamp(copy_of(file).stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
    beside = shlex.join(f"{file}-{what}" for what in ("journal", "wal", "shm"))  # SQLite would apply them to the copy
    return (
        f"{before}to restore the copy of {when} and train later runs again: "
        f"rm -f {beside} && {shlex.join(['cp', str(copy_of(file)), str(file)])}"
    )


def _if_damaged(error: Exception, url: str) -> str:
    """How to restore the copy if a SQLite file may be damaged; empty for other errors, since later results are lost."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    code = getattr(getattr(cause, "orig", None), "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return "" if code & 0xFF in _NO_DAMAGE else way_back(url, "; if it is damaged: ")


def open_database(url: str) -> sa.Engine:
    """An engine for a ledger's URL.

    Raises:
        StudyError: the database cannot be opened; the message does not show a password in the URL.
    """
    try:
        engine = sa.create_engine(url, **_engine_options(url))
        sa.inspect(engine).get_table_names()  # connecting alone does not read a SQLite file
        return engine
    except (sqlalchemy.exc.SQLAlchemyError, ModuleNotFoundError) as error:
        said = hide_password(str(error).splitlines()[0], url)
        raise StudyError(f"cannot open the ledger {hide_password(url)}: {said}{_if_damaged(error, url)}") from None


def check_file(engine: sa.Engine) -> None:
    """Raise a Damaged if a SQLite file's pages or indexes are damaged, which the rows' checksums do not cover."""
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            said = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
        if said != "ok":
            raise Damaged(f"SQLite says: {str(said).splitlines()[-1]}")


def check_tables(engine: sa.Engine, first: sa.Table, other: sa.Table) -> None:
    """Raise a Damaged if the first table has a row but the other table, which is created earlier, is missing."""
    found = sa.inspect(engine).get_table_names()
    if first.name not in found or other.name in found:
        return
    with engine.connect() as connection:
        if connection.execute(sa.select(first.c.name).limit(1)).first() is not None:
            raise Damaged(f"it has no table {other.name}")


def open_optuna(url: str) -> optuna.storages.RDBStorage:
    """Optuna's storage in a ledger."""
    return optuna.storages.RDBStorage(url, engine_kwargs=_engine_options(url))


def close_optuna(storage: optuna.storages.RDBStorage) -> None:
    """Close every connection that Optuna has to a ledger."""
    storage.remove_session()
    storage.engine.dispose()
