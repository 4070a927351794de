"""The last undamaged copy of a ledger's file, kept beside it in case the file is damaged."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from study.ledger.checksums import SUM, Damaged, read_rows
from study.ledger.database import LEDGER_ERRORS, check_file, copy_of, in_one_line, open_database, reason
from study.ledger.tables import metadata
from study.ledger.trials import TRIAL, signed
from study.training.files import replacing

_LEAST_SECONDS = 600.0
"""Shortest time between two copies of a ledger that changes."""

_SHARE = 50
"""Copies take at most one in this many seconds, for a ledger of any size."""

_BUSY_SECONDS = 60
"""How long a copy waits for the writer of a database."""


class Copies:
    """Keeps the copy of one ledger; a ledger in PostgreSQL has none.

    Args:
        say: receives one line if a copy cannot be made.
    """

    def __init__(self, url: str, say: Callable[[str], None]) -> None:
        self._url, self._say = url, say
        database = sa.make_url(url).database
        is_file = sa.make_url(url).get_backend_name() == "sqlite" and database
        self._file = Path(database) if is_file and database else None
        self._due = 0.0

    def keep_if_due(self) -> None:
        """Copy the ledger, which has changed, if the last copy is old enough; see `keep`."""
        if time.monotonic() >= self._due:
            self.keep()

    def keep(self) -> None:
        """Replace the last copy by a new one if the new one is undamaged.

        Raises:
            StudyError: the new copy is damaged, and so is the ledger.
        """
        if self._file is None:
            return
        begun = time.monotonic()
        try:
            with replacing(copy_of(self._file)) as partial, in_one_line(self._url):
                copy_database(self._file, partial)
                check_whole(partial)
        except (OSError, sqlite3.Error) as error:
            self._say(f"cannot copy the ledger to {copy_of(self._file)}, will try again later: {error}")
        now = time.monotonic()
        self._due = now + max(_LEAST_SECONDS, _SHARE * (now - begun))


def copy_database(path: Path, to: Path) -> None:
    """Copy the state of a SQLite database between two transactions, also while others write to it."""
    with (
        closing(sqlite3.connect(path.resolve().as_uri() + "?mode=ro", uri=True, timeout=_BUSY_SECONDS)) as source,
        closing(sqlite3.connect(to)) as target,
    ):
        source.backup(target)


def check_whole(file: Path) -> None:
    """Raise a Damaged if a ledger's file, or any of its rows, differs from what was written."""
    engine = open_database(f"sqlite:///{file.resolve()}")
    try:
        check_file(engine)
        with engine.connect() as connection:
            for table in metadata.sorted_tables:
                read_rows(connection, table, sa.true())
            for number, text in connection.execute(_TRIALS, {"key": TRIAL}):
                content = json.loads(text)
                if content.get(SUM) != signed(content, number)[SUM]:
                    raise Damaged(f"trial {number}: its checksum is wrong")
    except (ValueError, AttributeError) as error:
        raise Damaged(f"a trial in Optuna's tables: {error}") from None
    except LEDGER_ERRORS as error:
        raise Damaged(reason(error)) from None
    finally:
        engine.dispose()


_TRIALS = sa.text("SELECT number, value_json FROM trial_user_attributes JOIN trials USING (trial_id) WHERE key = :key")
