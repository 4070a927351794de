"""A study's whole ledger as one compressed SQLite file, and a study's folder from such a file.

The file is an xz-compressed SQLite database with the tables of a ledger, including Optuna's, and one more table of
texts: the study file, and a corpus other than the default one. If the tokens of the corpus are not characters, they are
there instead of its text, with the tokenizer. It has no checkpoints, weights or addresses, which may hold passwords.
"""

from __future__ import annotations

import glob
import lzma
import os
import re
import shutil
import socket
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import sqlalchemy as sa

from analysis import run_schema
from study.commands.backup import has_backup
from study.commands.exported_tokens import COLUMNS, TABLE, read_tokens, write_tokens
from study.commands.opening import known_corpus
from study.errors import StudyError
from study.ledger.database import LEDGER_ERRORS, check_file, open_database
from study.ledger.directory import StudyDirectory, is_alive
from study.ledger.snapshot import Snapshot, read_ledger
from study.ledger.tables import copy_study, empty_ledger, result_table, study_table
from study.ledger.trials import first_defect
from study.spec.config import StudyConfig
from study.spec.definition import definition, settled
from study.spec.study_file import dump_config, parse_yaml, validate
from study.training.corpus import CharacterCorpus, corpus_from_bytes
from study.training.corpus_storage import store_corpus
from study.training.files import private_files, replacing
from study.training.storage import Storage
from study.training.token_corpus import TokenCorpus

FORMAT = 2
"""Version of the file format, SQLite's `user_version`; a reader refuses newer ones. Files without tokens have 1."""
_APPLICATION = int.from_bytes(b"mpo1", "big")
"""SQLite's `application_id`, by which a reader recognises an export."""
_TEXTS, _STUDY_FILE, _CORPUS = "mpo_export", "study.yaml", "corpus.txt"
"""Table of the texts, and the names of its rows."""
_LARGEST_RATIO, _ALWAYS = 100, 1 << 26
"""Largest ratio of the unpacked size to the file's size (usually about 5), and bytes that any file may unpack to. A
file above both limits was made to fill a disk."""
_MEMORY = 1 << 27
"""Largest memory of the decompressor in bytes; a file that `export` wrote needs less than a tenth of it."""


class _Refused(StudyError):
    """A file is undamaged, but this program cannot import it."""


def export_study(directory: StudyDirectory, file: Path, say: Callable[[str], None]) -> int:
    """Write the study's current ledger to a file, also while a driver works.

    Args:
        say: receives one line that says what is missing in the file.
    Returns:
        Number of results in the file.

    Raises:
        StudyError: there is no study, or the file cannot be written.
    """
    config = directory.load_config()
    uuid = read_ledger(directory.ledger_url, config.name).uuid
    if file.is_dir():
        raise StudyError(f"{file}: is a folder; give a path for the new file")
    texts = {_STUDY_FILE: dump_config(config)}
    tokens = None
    if config.corpus.path is not None or config.corpus.tokenizer_folder is not None:  # every machine has the default
        try:
            corpus = known_corpus(config, directory, Storage(directory.storage_url()))
            if isinstance(corpus, CharacterCorpus):
                texts[_CORPUS] = corpus.text
            elif isinstance(corpus, TokenCorpus):
                tokens = corpus.path
        except (OSError, StudyError) as error:
            say(f"the export has no corpus, so `sync` and `run` will read it from the path in the study file: {error}")
    try:
        with private_files(), tempfile.TemporaryDirectory() as scratch, replacing(file) as partial:
            database = Path(scratch) / "ledger.db"
            n_results = _write_database(database, directory.ledger_url, config.name, uuid, texts, tokens)
            with database.open("rb") as source, lzma.open(partial, "wb", check=lzma.CHECK_SHA256) as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except LEDGER_ERRORS as error:
        raise StudyError(f"the ledger cannot be read: {error}".splitlines()[0]) from None
    except OSError as error:
        raise StudyError(f"{file}: cannot write there: {error.strerror or error}; give another file") from None
    return n_results


def _write_database(
    path: Path, ledger_url: str, name: str, uuid: str, texts: dict[str, str], tokens: Path | None
) -> int:
    """Write the database of an export; returns the number of results in it.

    Args:
        tokens: the token file of the corpus, if it has one.
    """
    source, target = open_database(ledger_url), empty_ledger(f"sqlite:///{path}")
    try:
        copy_study(source, target, name, uuid)
        with target.begin() as connection:
            connection.exec_driver_sql(f"CREATE TABLE {_TEXTS} (name TEXT PRIMARY KEY, content TEXT NOT NULL)")
            connection.exec_driver_sql(f"INSERT INTO {_TEXTS} VALUES (?, ?)", list(texts.items()))
            connection.exec_driver_sql(f"PRAGMA application_id = {_APPLICATION}")
            if tokens is not None:
                write_tokens(connection, tokens)
            connection.exec_driver_sql(f"PRAGMA user_version = {1 if tokens is None else FORMAT}")
            finished = sa.select(sa.func.count()).select_from(result_table).where(result_table.c.state != "paused")
            return connection.scalar(finished) or 0
    finally:
        source.dispose()
        target.dispose()


# Import ---------------------------------------------------------------------------------------------------------------


def import_study(file: Path, directory: StudyDirectory, storage_url: str | None = None) -> str:
    """Make a study's folder from an exported ledger, completely or not at all; returns the study's name.

    Args:
        storage_url: where the study's checkpoints and weights lie. Default: a new, empty place in its folder.

    Raises:
        StudyError: the file is damaged, newer than this program or not an export; or the folder is not empty.
    """
    path = directory.path
    storage = directory.storage(storage_url) if storage_url is not None else None
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StudyError(f"{path}: exists already; give a new or an empty folder")
    with private_files(), tempfile.TemporaryDirectory() as scratch:
        source = _open_untrusted(_unpack(file, Path(scratch) / "export.db"))
        with _new_folder(path.resolve()) as folder:
            with _naming(file):
                config = _make_study(folder, path.resolve(), source, storage)
            if storage is not None:
                _check_has_no_backup(storage, config.name)
    return config.name


def _make_study(folder: Path, path: Path, source: sa.Engine, storage: Storage | None) -> StudyConfig:
    """Make the files of a study in a folder that will be moved to `path`."""
    made = StudyDirectory(folder)
    snapshot, config, texts = _make_ledger(made.ledger_url, source)
    own = Storage(made.storage_url())
    if _CORPUS in texts:
        fraction = config.corpus.validation_fraction
        store_corpus(own, corpus_from_bytes(texts[_CORPUS].encode(), _CORPUS, snapshot.corpus_sha256, fraction))
    elif sa.inspect(source).has_table(TABLE):
        with source.connect() as connection, tempfile.TemporaryDirectory() as scratch:
            store_corpus(own, read_tokens(connection, Path(scratch) / "tokens", snapshot.corpus_sha256))
    keys = own.keys("corpus")
    if keys and not _is_here(config):  # the paths are those on another machine
        changes = {"path": f"{StudyDirectory(path).storage_url()}/{keys[0]}", "sha256": snapshot.corpus_sha256}
        config = config.model_copy(update={"corpus": config.corpus.model_copy(update=changes)})
    made.write(config, snapshot.uuid, None, storage.url if storage is not None else own.url)
    return config


def _is_here(config: StudyConfig) -> bool:
    """Whether this machine has the files of a study's corpus."""
    folder = config.corpus.tokenizer_folder
    return all(Path(path).is_file() for path in config.corpus.paths) and (folder is None or Path(folder).is_dir())


def _make_ledger(url: str, source: sa.Engine) -> tuple[Snapshot, StudyConfig, dict[str, str]]:
    """Make a ledger of an export's tables, and read it to check it; returns the export's texts too."""
    target = empty_ledger(url)
    _check_tables(source, target)
    with source.connect() as connection:
        texts = dict(map(tuple, connection.exec_driver_sql(f"SELECT name, content FROM {_TEXTS}")))
        [(name, uuid)] = connection.execute(sa.select(study_table.c.name, study_table.c.uuid))
    if _STUDY_FILE not in texts:
        raise StudyError("it contains no study file")
    copy_study(source, target, name, uuid)
    target.dispose()
    snapshot = read_ledger(url, name)
    history = snapshot.growths.history
    config = validate(parse_yaml(texts[_STUDY_FILE], "its study file"), "its study file")
    if {name, config.name, *(one.name for one in history)} != {config.name}:
        raise StudyError("it contains studies with different names")
    if not re.fullmatch("[0-9a-f]{32}", uuid):
        raise StudyError("the UUID of its study is not valid")
    if definition(settled(config, history)) != definition(history[-1]):
        raise StudyError("its study file belongs to another study")
    return snapshot, config, texts


def _check_has_no_backup(storage: Storage, name: str) -> None:
    try:
        if has_backup(storage, name):
            raise StudyError(
                f"--storage {storage.shown}: has a backup of study {name}, so no import is needed: run the study with "
                "that --storage in an empty --dir to restore it"
            )
    except OSError as error:
        raise StudyError(f"--storage {storage.shown}: cannot read there: {error.strerror or error}") from None


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, which is moved there at the end; an error leaves nothing.

    Raises:
        StudyError: the folder cannot be made or moved.
    """
    prefix = f".{path.name}-import-{socket.gethostname()}-"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{glob.escape(prefix)}*"):  # left by a killed import
            pid = left.name.removeprefix(prefix).partition("-")[0]
            if pid.isdecimal() and not is_alive(int(pid)):
                shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=path.parent))
        try:
            yield folder
            _move(folder, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise StudyError(f"{path}: cannot create the study: {error.strerror or error}") from None


def _move(folder: Path, path: Path) -> None:
    """Move a folder to a path, or its content into an empty folder there, which may be a shell's working folder."""
    if not path.exists():
        os.replace(folder, path)
        return
    for part in sorted(folder.iterdir(), key=lambda part: part.name == run_schema.STUDY_MANIFEST):
        os.replace(part, path / part.name)  # the manifest, which makes it a study's folder, comes last


# An untrusted file ----------------------------------------------------------------------------------------------------


_DEFECTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Errors that values of a wrong type or size raise in SQLite, Optuna and pydantic."""


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Convert every error about a file's content to lines that name the file, one for each defect."""
    try:
        yield
    except _Refused as refusal:
        raise StudyError(f"{file}: {refusal}") from None
    except (StudyError, *LEDGER_ERRORS, *_DEFECTS) as error:
        said = str(error) if isinstance(error, StudyError) else first_defect(error)
        raise StudyError("\n".join(f"{file}: is damaged: {line}" for line in said.splitlines())) from None


def _unpack(file: Path, to: Path) -> Path:
    """Decompress a file, as long as that stays within the limits above.

    Raises:
        StudyError: the file is larger, or not compressed by `export`.
    """
    if not file.exists():
        raise StudyError(f"{file}: no such file; `mpo-study export DIR FILE` writes one")
    if not file.is_file():
        raise StudyError(f"{file}: is not a file; give a file that `mpo-study export DIR FILE` wrote")
    limit = max(_ALWAYS, _LARGEST_RATIO * file.stat().st_size)
    xz, n_bytes = lzma.LZMADecompressor(lzma.FORMAT_XZ, _MEMORY), 0
    try:
        with file.open("rb") as packed, to.open("wb") as unpacked:
            if packed.read(4) == b"PAR1":
                raise StudyError(f"{file}: was written by an older mpo-study; import it with the version that wrote it")
            packed.seek(0)
            while not xz.eof:
                data = packed.read(1 << 16) if xz.needs_input else b""
                if xz.needs_input and not data:
                    raise lzma.LZMAError("it is truncated")
                n_bytes += unpacked.write(xz.decompress(data, 1 << 20))
                if n_bytes > limit:
                    raise StudyError(
                        f"{file}: unpacks to more than {limit >> 20} MiB, too much for an export of its size"
                    )
            if xz.unused_data or packed.read(1):
                raise lzma.LZMAError("it has extra bytes after its end")
    except (lzma.LZMAError, OSError) as error:
        raise StudyError(f"{file}: is not a complete export: {error}; export the study again") from None
    return to


def _open_untrusted(path: Path) -> sa.Engine:
    """A SQLite file, opened so that nothing in it is run or written."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)
        connection.execute("PRAGMA trusted_schema = OFF")
        return connection

    return sa.create_engine("sqlite://", creator=connect, poolclass=sa.NullPool)


_PLAIN = {"table": ("CREATE TABLE ",), "index": ("CREATE INDEX ", "CREATE UNIQUE INDEX ")}
"""How the definitions of a ledger's tables and indexes begin; that of a virtual table, for example, does not."""


def _check_tables(source: sa.Engine, ledger: sa.Engine) -> None:
    """Raise a StudyError if a database is not an export, or its tables or columns differ from a ledger's."""
    with source.connect() as connection:
        if connection.exec_driver_sql("PRAGMA application_id").scalar() != _APPLICATION:
            raise _Refused("is not an export of a study; `mpo-study export DIR FILE` writes one")
        if connection.exec_driver_sql("PRAGMA user_version").scalar_one() > FORMAT:
            raise _Refused("was written by a newer mpo-study; import it with that version or later")
        for kind, sql in connection.exec_driver_sql("SELECT type, sql FROM sqlite_master"):
            if kind not in _PLAIN or not (sql or _PLAIN[kind][0]).startswith(_PLAIN[kind]):
                raise StudyError(f"it contains a {kind}, which an export never does")
    check_file(source)
    tables, own = _columns(source), _columns(ledger) | {_TEXTS: {"name", "content"}}
    if TABLE in tables:
        own[TABLE] = COLUMNS
    for name in sorted(tables.keys() | own.keys()):
        if tables.get(name) != own.get(name):
            raise _Refused(f"table {name} differs from this version's; import it with the version that wrote it")
    alembic = sa.text("SELECT version_num FROM alembic_version")
    with source.connect() as connection, ledger.connect() as other:
        if (there := connection.scalar(alembic)) != (here := other.scalar(alembic)):
            raise _Refused(
                f"has version {there} of Optuna's tables, but Optuna {optuna.__version__} here has version {here}; "
                "install an Optuna with the file's version, and import it again"
            )


def _columns(engine: sa.Engine) -> dict[str, set[str]]:
    """Names of the columns of each table; a StudyError if one of them is computed."""
    found = sa.inspect(engine)
    tables = {name: found.get_columns(name) for name in found.get_table_names()}
    if any("computed" in column for columns in tables.values() for column in columns):
        raise StudyError("it has a computed column")
    return {name: {column["name"] for column in columns} for name, columns in tables.items()}
