"""A study's whole ledger as one Parquet file, and a study's folder from such a file.

The file has a row for each row of the ledger's tables, including Optuna's: the table's name, and the row as JSON. So it
is lossless whatever the tables contain, and pandas can read it. It also holds the study file and a corpus other than
the default one, under separate names. It has no checkpoints, weights or addresses, which may hold passwords.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa

from analysis import run_schema
from analysis.runs.urls import hide_password
from study.commands.backup import has_backup
from study.commands.run import known_corpus
from study.errors import StudyError
from study.ledger.database import LEDGER_ERRORS, open_database
from study.ledger.directory import StudyDirectory, is_alive, private_files
from study.ledger.environment import environment
from study.ledger.snapshot import Snapshot, read_ledger
from study.ledger.tables import SCHEMA_VERSION, empty_ledger, optuna_name
from study.ledger.trials import first_defect
from study.spec.config import StudyConfig
from study.spec.definition import definition, settled
from study.spec.study_file import dump_config, parse_yaml, validate
from study.spec.trial import now
from study.spec.values import NAME_PATTERN
from study.training.corpus import corpus_from_bytes
from study.training.storage import Storage
from study.training.unit import store_corpus

FORMAT = 1
"""Version of the file format; a reader refuses newer ones."""

_HEADER = b"mpo-study"
_STUDY_FILE, _CORPUS = "study.yaml", "corpus.txt"
_OPTUNA_VERSION = "alembic_version"
"""Optuna's table with the version of its other tables."""


class _Refused(StudyError):
    """A file is undamaged, but this program cannot import it."""


Rows = list[tuple[str, str]]
"""Name of a table, and a row of it as JSON."""


def export_study(directory: StudyDirectory, file: Path, say: Callable[[str], None]) -> int:
    """Write the study's current ledger to a file, also while a driver works.

    Args:
        say: receives one line that says what the file lacks.
    Returns:
        Number of results in the file.

    Raises:
        StudyError: there is no study, or the file cannot be written.
    """
    config = directory.load_config()
    snapshot = read_ledger(directory.ledger_url, config.name)
    try:
        rows = _rows_of(directory.ledger_url, config.name, snapshot.uuid)
    except LEDGER_ERRORS as error:
        raise StudyError(f"the ledger cannot be read: {error}".splitlines()[0]) from None
    rows.append((_STUDY_FILE, json.dumps(dump_config(config), ensure_ascii=False)))
    if config.corpus.path is not None:  # every machine has the default corpus
        try:
            corpus = known_corpus(config, directory, Storage(directory.storage_url()))
            rows.append((_CORPUS, json.dumps(corpus.text, ensure_ascii=False)))
        except (OSError, StudyError) as error:
            say(f"the file lacks the corpus, without which `sync` and `run` need it where the study file says: {error}")
    header: dict[str, Any] = {
        "format": FORMAT,
        "study": config.name,
        "uuid": snapshot.uuid,
        "written": now(),
        "ledger_schema": SCHEMA_VERSION,
        "versions": environment()["packages"],
    }
    header["sha256"] = _checksum(header, rows)
    columns = {"table": pa.array([name for name, _ in rows]), "row": pa.array([row for _, row in rows])}
    table = pa.table(columns).replace_schema_metadata({_HEADER: json.dumps(header).encode()})
    if file.is_dir():
        raise StudyError(f"{file}: is a folder; give the file to write")
    partial = file.with_name(f"{file.name}.partial")
    try:
        with private_files(), partial.open("wb") as sink:
            pq.write_table(table, sink, compression="zstd")
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):  # a read-only disk has no partial file
            partial.unlink(missing_ok=True)
        raise StudyError(f"{file}: cannot write there: {error.strerror or error}; give another file") from None
    return sum(name == "mpo_result" for name, _ in rows)


def import_study(file: Path, directory: StudyDirectory, storage_url: str | None = None) -> str:
    """Make a study's folder from an exported ledger, completely or not at all; returns the study's name.

    Args:
        storage_url: where the study's checkpoints and weights lie. Default: a new, empty place in its folder.

    Raises:
        StudyError: the file is damaged, newer than this program or not an export; or the folder is not empty.
    """
    with private_files():
        return _import(file, directory, storage_url)


def _import(file: Path, directory: StudyDirectory, storage_url: str | None) -> str:
    header, rows = _read(file)
    path = directory.path
    storage = directory.storage(storage_url) if storage_url is not None else None
    try:
        if storage is not None and has_backup(storage, header["study"]):
            raise StudyError(
                f"--storage {storage.shown}: has a backup of study {header['study']}, which needs no import: run the "
                "study with that --storage in an empty --dir, and it is brought back"
            )
    except OSError as error:
        raise StudyError(
            f"--storage {hide_password(str(storage_url))}: cannot read there: {error.strerror or error}"
        ) from None
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StudyError(f"{path}: is there already; give a folder that is not, for the study to be made in")
    try:
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.resolve())
        prefix = f"{_unfinished(path.resolve())}{os.getpid()}-"
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=path.resolve().parent))
    except OSError as error:
        raise StudyError(f"{path}: cannot make the folder: {error.strerror or error}") from None
    try:
        made = StudyDirectory(folder)
        snapshot, config = _make_ledger(made.ledger_url, file, header, rows)
        own = Storage(made.storage_url())
        corpus = _only(rows, _CORPUS)
        if corpus is not None:
            fraction = config.corpus.validation_fraction
            store_corpus(own, corpus_from_bytes(corpus.encode(), str(file), snapshot.corpus_sha256, fraction))
            if config.corpus.path is not None and not Path(config.corpus.path).is_file():  # it is on another machine
                [key] = own.keys("corpus")
                there = StudyDirectory(path.resolve()).storage_url()
                here = config.corpus.model_copy(update={"path": f"{there}/{key}"})
                config = config.model_copy(update={"corpus": here})
        made.write(config, snapshot.uuid, None, storage.url if storage is not None else own.url)
        _move(folder, path)
    except OSError as error:
        raise StudyError(f"{path}: cannot make the study there: {error.strerror or error}") from None
    except _Refused:
        raise
    except (StudyError, *LEDGER_ERRORS, *_DEFECTS) as error:
        said = str(error) if isinstance(error, StudyError) else first_defect(error)
        raise StudyError(f"{file}: is damaged: {said.removeprefix(f'{file}: ')}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return config.name


def _make_ledger(url: str, file: Path, header: dict[str, Any], rows: Rows) -> tuple[Snapshot, StudyConfig]:
    """Make a ledger of the rows, and read it to check it: a file with a correct checksum may contain anything."""
    _fill_ledger(url, file, header, rows)
    snapshot = read_ledger(url, header["study"])
    history = snapshot.growths.history
    text = _only(rows, _STUDY_FILE)
    where = "its study file"
    config = validate(parse_yaml(text, where), where) if text is not None else history[-1]
    if {header["study"], config.name, *(one.name for one in history)} != {config.name}:
        raise StudyError("it holds studies of several names")
    if header["uuid"] != snapshot.uuid or not re.fullmatch("[0-9a-f]{32}", snapshot.uuid):
        raise StudyError("its UUIDs differ, or are none")
    if definition(settled(config, history)) != definition(history[-1]):
        raise StudyError("its study file is another study's")
    return snapshot, config


_DEFECTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Errors that values of a wrong type or size raise in SQLite, Optuna and pydantic."""


def _unfinished(path: Path) -> str:
    """Prefix of the names of folders in which this machine prepares an import to the path."""
    return f".{path.name}-import-{socket.gethostname()}-"


def _remove_leftovers(path: Path) -> None:
    """Remove the folders of killed imports."""
    for folder in path.parent.glob(f"{glob.escape(_unfinished(path))}*"):
        pid = folder.name.removeprefix(_unfinished(path)).partition("-")[0]
        if pid.isdecimal() and not is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, path: Path) -> None:
    """Move a folder to a path, or its content into an empty folder there, which may be somebody's working folder."""
    if not path.exists():
        os.replace(folder, path)
        return
    for part in sorted(folder.iterdir(), key=lambda part: part.name == run_schema.STUDY_MANIFEST):
        os.replace(part, path / part.name)  # the manifest, which makes it a study's folder, comes last


# From a ledger --------------------------------------------------------------------------------------------------------


def _rows_of(url: str, name: str, uuid: str) -> Rows:
    """Every row of one study and of the tables common to all studies, from one consistent snapshot."""
    engine = open_database(url)
    with tempfile.TemporaryDirectory() as scratch:
        own = empty_ledger(f"sqlite:///{scratch}/ledger.db")
        wanted = sa.inspect(own).get_table_names()
        own.dispose()
    there = set(sa.inspect(engine).get_table_names())
    metadata = sa.MetaData()
    metadata.reflect(engine, only=[table for table in wanted if table in there])
    studies, trials = metadata.tables["studies"], metadata.tables["trials"]
    of_study = sa.select(studies.c.study_id).where(studies.c.study_name == optuna_name(name, uuid))
    of_trials = sa.select(trials.c.trial_id).where(trials.c.study_id.in_(of_study))
    is_sqlite = engine.dialect.name == "sqlite"
    one_moment = {} if is_sqlite else {"isolation_level": "REPEATABLE READ"}
    with engine.connect().execution_options(**one_moment) as connection:
        if is_sqlite:
            connection.exec_driver_sql("BEGIN")  # otherwise each table would be read at another moment
        found: Rows = []
        for table in (metadata.tables[name] for name in wanted if name in metadata.tables):
            # Without column types a row has the raw values of the database.
            query = sa.select(sa.text("*")).select_from(table)
            if table.name == "mpo_study":
                query = query.where(table.c.name == name)
            for column, among in (("study_uuid", [uuid]), ("study_id", of_study), ("trial_id", of_trials)):
                if column in table.c:
                    query = query.where(table.c[column].in_(among))
                    break
            for row in connection.execute(query.order_by(*table.primary_key.columns)).mappings():
                found.append((table.name, json.dumps(dict(row), default=_as_text, ensure_ascii=False)))
    engine.dispose()
    return found


def _as_text(value: Any) -> str:
    if isinstance(value, datetime):  # SQLite stores them as this text, PostgreSQL as timestamps
        return str(value)
    raise TypeError(f"a ledger holds no {type(value).__name__}")


def _checksum(header: dict[str, Any], rows: Rows) -> str:
    plain = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, row in rows:
        digest.update(f"{name}\n{row}\n".encode())
    return digest.hexdigest()


# To a ledger ----------------------------------------------------------------------------------------------------------


def _read(file: Path) -> tuple[dict[str, Any], Rows]:
    """Header and rows of an exported file, checked."""
    damaged = f"{file}: is damaged; export the study again, or take another copy"
    if not file.exists():
        raise StudyError(f"{file}: there is no such file; `mpo-study export DIR FILE` writes one")
    if not file.is_file():
        raise StudyError(f"{file}: is no file; give one that `mpo-study export DIR FILE` wrote")
    try:
        with pq.ParquetFile(pa.OSFile(str(file))) as source:
            text = (source.schema_arrow.metadata or {}).get(_HEADER)
            rows = _unpack(source, file) if text is not None else []
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StudyError(f"{file}: is no whole Parquet file; export the study again: {reason}") from None
    if text is None:
        raise StudyError(f"{file}: is no study's export; `mpo-study export DIR FILE` writes one")
    try:
        header = dict(json.loads(text))
        is_newer = header["format"] > FORMAT or header["ledger_schema"] > SCHEMA_VERSION
        version, _ = header["versions"]["mpo-study"], header["versions"]["optuna"]
        if not re.fullmatch(NAME_PATTERN, header["study"]):
            raise StudyError(damaged)
    except (ValueError, KeyError, TypeError):
        raise StudyError(damaged) from None
    if is_newer:
        raise StudyError(f"{file}: was written by a newer mpo-study ({version}); import it with that version or later")
    if header.get("sha256") != _checksum(header, rows):
        raise StudyError(damaged)
    return header, rows


_LARGEST_RATIO, _ALWAYS = 50, 1 << 26
"""Largest ratio of a file's unpacked rows to the file (usually about 3), and bytes of rows that every file may have. A
file with more was made to fill a machine's memory."""


def _unpack(source: pq.ParquetFile, file: Path) -> Rows:
    """The rows of a file, unpacked a few at a time while their size stays within the limits above.

    Raises:
        StudyError: the rows are larger.
    """
    limit = max(_ALWAYS, _LARGEST_RATIO * file.stat().st_size)
    groups = [source.metadata.row_group(index).total_byte_size for index in range(source.metadata.num_row_groups)]
    rows: Rows = []
    n_bytes = 0
    if sum(groups) <= limit:
        for batch in source.iter_batches(batch_size=16, columns=["table", "row"]):
            n_bytes += batch.nbytes
            if n_bytes > limit:
                break
            rows += zip(batch["table"].to_pylist(), batch["row"].to_pylist(), strict=True)
        else:
            return rows
    raise StudyError(f"{file}: unpacks to more than {limit >> 20} MiB, which no export of its size does")


def _fill_ledger(url: str, file: Path, header: dict[str, Any], rows: Rows) -> None:
    engine = empty_ledger(url)
    inspector = sa.inspect(engine)
    columns = {name: {column["name"] for column in inspector.get_columns(name)} for name in inspector.get_table_names()}
    with engine.begin() as connection:
        here = connection.exec_driver_sql(f"SELECT version_num FROM {_OPTUNA_VERSION}").scalar()
        there = [json.loads(row)["version_num"] for name, row in rows if name == _OPTUNA_VERSION]
        if there != [here]:
            raise _Refused(
                f"{file}: was written with Optuna {header['versions']['optuna']}, whose tables are not those of "
                f"{optuna.__version__}; install the former and import it again"
            )
        for table in columns:
            connection.exec_driver_sql(f"DELETE FROM {table}")
        for name, row in _of_tables(rows):
            content = json.loads(row)
            if name not in columns or not content.keys() <= columns[name]:
                raise _Refused(
                    f"{file}: holds in {name} what this version does not know; import it with the one that wrote it"
                )
            marks = ", ".join("?" * len(content))
            command = f"INSERT INTO {name} ({', '.join(content)}) VALUES ({marks})"
            connection.exec_driver_sql(command, tuple(content.values()))
    engine.dispose()


def _of_tables(rows: Rows) -> Iterator[tuple[str, str]]:
    return ((name, row) for name, row in rows if name not in (_STUDY_FILE, _CORPUS))


def _only(rows: Rows, name: str) -> str | None:
    return next((json.loads(row) for of, row in rows if of == name), None)
