"""A checksum in each row of a ledger, over the rest of the row, so that damage to the file is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from study.errors import StudyError

SUM = "sha256"
"""Name of the column. A row without a checksum is not checked."""


class Damaged(StudyError):
    """A ledger's content differs from what was written."""


def checksum(what: str, content: Mapping[str, Any]) -> str:
    """Checksum of a row's columns or a mapping of plain values, in any order; an empty column is left out."""
    plain = {key: value for key, value in content.items() if key != SUM and value is not None}
    return hashlib.sha256(json.dumps([what, plain], sort_keys=True).encode()).hexdigest()


def insert(connection: sa.Connection, table: sa.Table, **values: Any) -> int | None:
    """Write a row with its checksum; returns the number that the database gave it, or None."""
    if "id" not in table.c:
        connection.execute(table.insert().values(**values, **{SUM: checksum(table.name, values)}))
        return None
    [number] = connection.execute(table.insert().values(**values)).inserted_primary_key or [None]
    signed = {SUM: checksum(table.name, values | {"id": number})}
    connection.execute(table.update().where(table.c.id == number).values(**signed))
    return number


def read_rows(connection: sa.Connection, table: sa.Table, where: sa.ColumnElement[bool]) -> list[dict[str, Any]]:
    """Rows of a table in the order of its key, with all columns that the table has in the database.

    Raises:
        Damaged: a row's checksum does not match its content.
    """
    query = sa.select(sa.text("*")).select_from(table).where(where).order_by(*table.primary_key.columns)
    rows = [dict(row) for row in connection.execute(query).mappings()]
    for row in rows:
        try:
            is_whole = row.get(SUM) in (None, checksum(table.name, row))
        except TypeError:  # bytes instead of text
            is_whole = False
        if not is_whole:
            key = ", ".join(f"{column.name} {row[column.name]}" for column in table.primary_key.columns)
            raise Damaged(f"the row {key} of {table.name} is not what was written (its checksum is wrong)")
        row.pop(SUM, None)
    return rows
