"""One driver at a time on a ledger that several machines can reach."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import sqlalchemy as sa
import sqlalchemy.exc

from analysis.runs.urls import hide_password
from study.errors import StudyError
from study.ledger.database import ALIVE

_MARK = "mpo-study"
_LONGEST_NAME = 63
"""Longest name of an application in PostgreSQL, in bytes."""


def check_ledger_url(url: str) -> str:
    """Returns the URL of a PostgreSQL database.

    Raises:
        StudyError: the URL is not that of a PostgreSQL database.
    """
    try:
        is_postgresql = sa.make_url(url).get_backend_name() == "postgresql"
    except sqlalchemy.exc.ArgumentError:
        is_postgresql = False
    if not is_postgresql:
        raise StudyError(
            f"--ledger {hide_password(url)}: must be a PostgreSQL database, postgresql://USER@HOST/DATABASE; without "
            "--ledger, the ledger is a SQLite file in the study's folder"
        )
    return url


class Hold:
    """A driver's hold on a study whose ledger is a file; there the lock of the study's folder is enough."""

    may_be_lost = False
    """Whether its connection, and with it the hold, may be lost and taken again."""

    def is_held(self) -> bool:
        """Whether the driver still has the hold."""
        return True

    def take(self) -> None:
        """Take the hold, again if it was lost.

        Raises:
            StudyError: another driver has it; the message names that driver.
            sqlalchemy.exc.SQLAlchemyError: the database cannot be reached.
        """

    def close(self) -> None:
        """Release the hold."""


class _PostgreSQLHold(Hold):
    """A hold by an advisory lock, which ends with this process or its connection."""

    may_be_lost = True

    def __init__(self, url: str, name: str) -> None:
        self._name = name
        self._key = int.from_bytes(hashlib.sha256(f"{_MARK} {name}".encode()).digest()[:8], "big", signed=True)
        me = f"{_MARK} {os.getpid()}@{socket.gethostname()}"[:_LONGEST_NAME]
        # A separate connection without a transaction: the lock lasts as long as the session.
        self._engine = sa.create_engine(
            url,
            poolclass=sa.NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={"application_name": me, **ALIVE},
        )
        self._connection: sa.Connection | None = None

    def is_held(self) -> bool:
        try:
            return self._connection is not None and bool(self._connection.scalar(sa.text("SELECT true")))
        except sqlalchemy.exc.SQLAlchemyError:
            return False

    def take(self) -> None:
        self._let_go()
        self._connection = self._engine.connect()
        key = self._key
        if not self._connection.scalar(sa.text("SELECT pg_try_advisory_lock(:key)"), {"key": key}):
            halves = {"high": key >> 32 & 0xFFFFFFFF, "low": key & 0xFFFFFFFF}
            holder = self._connection.scalar(_HOLDER, halves)
            process = (holder or "").removeprefix(_MARK).strip() or "its name is not known"
            self._let_go()
            raise StudyError(f"study {self._name}: another driver runs it in this ledger: process {process}")

    def close(self) -> None:
        self._let_go()
        self._engine.dispose()

    def _let_go(self) -> None:
        if self._connection is not None:
            with suppress(sqlalchemy.exc.SQLAlchemyError):
                self._connection.close()
            self._connection = None


@contextmanager
def hold_ledger(url: str, name: str) -> Iterator[Hold]:
    """Hold a study in a PostgreSQL database; for SQLite the lock of the study's folder is enough.

    Raises:
        StudyError: another driver has it, and is named in the message; or the database cannot be reached.
    """
    if sa.make_url(url).get_backend_name() != "postgresql":
        yield Hold()
        return
    try:
        hold = _PostgreSQLHold(url, name)
        hold.take()
    except (sqlalchemy.exc.SQLAlchemyError, ModuleNotFoundError) as error:
        said = hide_password(str(error).splitlines()[0], url)
        raise StudyError(f"cannot open the ledger {hide_password(url)}: {said}") from None
    try:
        yield hold
    finally:
        hold.close()


_HOLDER = sa.text(
    "SELECT application_name FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory' AND granted "
    "AND classid::bigint = :high AND objid::bigint = :low"
)
