"""One driver at a time on a ledger that several machines can reach."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import sqlalchemy as sa
import sqlalchemy.exc

from analysis.urls import hide_password
from study.errors import StudyError

_MARK = "mpo-study"
_LONGEST_NAME = 63
"""Bytes that PostgreSQL keeps of an application's name."""

_ALIVE = {"keepalives": 1, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
"""libpq's: a connection that has nothing to say for days is neither dropped on its way nor kept after its driver."""


def check_ledger_url(url: str) -> str:
    """The URL, which must be a PostgreSQL database's.

    Raises:
        StudyError: it is not.
    """
    try:
        is_postgresql = sa.make_url(url).get_backend_name() == "postgresql"
    except sqlalchemy.exc.ArgumentError:
        is_postgresql = False
    if not is_postgresql:
        raise StudyError(
            f"--ledger {hide_password(url)}: must be a PostgreSQL database, postgresql://USER@HOST/DATABASE; without "
            "it the ledger is a SQLite file in the study's folder"
        )
    return url


@contextmanager
def hold_ledger(url: str, name: str) -> Iterator[Callable[[], bool]]:
    """Hold a study in a PostgreSQL database by an advisory lock, which ends with this process; SQLite needs none.

    Yields:
        Whether it is held still: it is not where the connection was lost meanwhile.

    Raises:
        StudyError: another driver has it, and is named; or the database cannot be reached.
    """
    if sa.make_url(url).get_backend_name() != "postgresql":
        yield lambda: True
        return
    me = f"{_MARK} {os.getpid()}@{socket.gethostname()}"[:_LONGEST_NAME]
    key = int.from_bytes(hashlib.sha256(f"{_MARK} {name}".encode()).digest()[:8], "big", signed=True)
    try:
        # A connection of its own, in no transaction: the lock lasts as long as the session does.
        engine = sa.create_engine(
            url,
            poolclass=sa.NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={"application_name": me, **_ALIVE},
        )
        connection = engine.connect()
        is_ours = connection.scalar(sa.text("SELECT pg_try_advisory_lock(:key)"), {"key": key})
        holder = (
            None if is_ours else connection.scalar(_HOLDER, {"high": key >> 32 & 0xFFFFFFFF, "low": key & 0xFFFFFFFF})
        )
    except (sqlalchemy.exc.SQLAlchemyError, ModuleNotFoundError) as error:
        said = hide_password(str(error).splitlines()[0], url)
        raise StudyError(f"cannot open the ledger {hide_password(url)}: {said}") from None
    try:
        if not is_ours:
            process = (holder or "").removeprefix(_MARK).strip() or "its name is not to be had"
            raise StudyError(f"study {name}: another driver runs it in this ledger: process {process}")
        yield partial(_answers, connection)
    finally:
        with suppress(sqlalchemy.exc.SQLAlchemyError):
            connection.close()
        engine.dispose()


def _answers(connection: sa.Connection) -> bool:
    try:
        return connection.scalar(sa.text("SELECT true"))
    except sqlalchemy.exc.SQLAlchemyError:
        return False


_HOLDER = sa.text(
    "SELECT application_name FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory' AND granted "
    "AND classid::bigint = :high AND objid::bigint = :low"
)
