"""The tokens of a corpus in an export: the token file in parts, in a table of their own."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from study.errors import StudyError
from study.training.token_corpus import TokenCorpus, read_token_corpus
from study.training.token_file import Damaged

TABLE, COLUMNS = "mpo_export_tokens", {"part", "content"}
_PART = 1 << 24
"""Bytes of a part."""


def write_tokens(connection: sa.Connection, file: Path) -> None:
    """Make the table, with the content of a token file."""
    connection.exec_driver_sql(f"CREATE TABLE {TABLE} (part INTEGER PRIMARY KEY, content BLOB NOT NULL)")
    with file.open("rb") as source:
        part = 0
        while data := source.read(_PART):
            connection.exec_driver_sql(f"INSERT INTO {TABLE} VALUES (?, ?)", (part, data))
            part += 1


def read_tokens(connection: sa.Connection, file: Path, sha256: str) -> TokenCorpus:
    """Make a token file of the table, which is checked.

    Raises:
        StudyError: the table does not hold the tokens of the corpus with that checksum.
    """
    try:
        with file.open("wb") as target:
            for (data,) in connection.exec_driver_sql(f"SELECT content FROM {TABLE} ORDER BY part"):
                if not isinstance(data, bytes):
                    raise Damaged("a part has another type")
                target.write(data)
        return read_token_corpus(file, sha256)
    except Damaged as damage:
        raise StudyError(f"its corpus: {damage}") from None
