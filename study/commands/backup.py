"""Backup of a study's databases in its remote storage, so that the study survives the loss of its driver's machine.

Each copy is a whole SQLite file under a new name, with its number and its checksum. The newest undamaged copy is used;
two are kept. MLflow's files lie next to them. A driver that finds a copy by another driver stops: if two drivers ran at
once, each would restore its own older state.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from study.errors import StudyError
from study.ledger.checksums import Damaged
from study.ledger.copies import check_whole, copy_database
from study.ledger.directory import StudyDirectory
from study.training.files import replace_file
from study.training.storage import Storage


class AnotherDriver(StudyError):
    """Another driver wrote to the backup."""


class Backup:
    """Copies of one study's databases in its storage.

    Args:
        name: name of the study. A storage holds at most one backup per name.
        say: receives one line that says what was damaged.
    """

    def __init__(
        self, storage: Storage, directory: StudyDirectory, name: str, say: Callable[[str], None] = print
    ) -> None:
        self._storage, self._directory, self._say = storage, directory, say
        self._folder = f"backup/{name}"
        self._note = directory.path / "backup.json"
        self._copied: dict[str, str] = {}
        """Checksum of the last copy of each database that this object made or found."""
        self._files: dict[str, int] = {}
        """Size of each of MLflow's files in the storage."""

    # Restoring -----------------------------------------------------------------------------------------------------

    def bring_back(self) -> bool:
        """Restore the databases into a folder that has no study yet; False if there is no backup.

        Raises:
            StudyError: all copies of the ledger are damaged, or the folder cannot be written.
            OSError: the storage cannot be read.
        """
        ledger, mlflow = self._newest_whole("ledger"), self._newest_whole("mlflow")
        if ledger is None and (damaged := self._copies("ledger")):
            raise StudyError(
                f"--storage {self._storage.shown}: every copy of the study's ledger there is damaged "
                f"({', '.join(damaged)}); begin a new study with another name or --storage"
            )
        for key in self._storage.keys_below(f"{self._folder}/files"):
            data = self._storage.read(key)
            path = self._directory.path / key.removeprefix(f"{self._folder}/files/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self._files[str(path)] = len(data)
        if mlflow is not None:
            replace_file(self._directory.mlflow_database, mlflow[1])
        if ledger is not None:
            # The ledger comes last, since it makes the folder a study's: an interrupted restore is done again.
            self._write_note([ledger[0]])
            replace_file(self._directory.ledger_file, ledger[1])
        return ledger is not None or mlflow is not None

    def check_is_ours(self) -> None:
        """Raise a StudyError if the newest copy of the ledger was made from another folder."""
        copies = self._copies("ledger")
        if copies and copies[-1] not in self._read_note():
            raise AnotherDriver(
                f"--storage {self._storage.shown}: another driver wrote a newer backup of study "
                f"{self._folder.removeprefix('backup/')} than the one of {self._directory.path}; continue on that "
                "driver's machine, or restore the backup into an empty --dir, or give a new study another name or "
                "--storage"
            )

    # Backing up ---------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """Copy everything that has changed since the last time.

        Raises:
            AnotherDriver: another driver has made a copy in the meantime.
            Damaged: the ledger is damaged, so that no new copy is made.
            OSError, sqlite3.Error: the storage cannot be written, or a database cannot be read.
        """
        self.check_is_ours()
        # Files first, the ledger last: then everything that a copy refers to exists.
        for path in sorted((self._directory.path / "mlartifacts").rglob("*")):
            if path.is_file() and self._files.get(str(path)) != path.stat().st_size:
                data = path.read_bytes()
                self._storage.write(f"{self._folder}/files/{path.relative_to(self._directory.path)}", data)
                self._files[str(path)] = len(data)
        for kind, path in (("mlflow", self._directory.mlflow_database), ("ledger", self._directory.ledger_file)):
            if path.is_file():
                self._copy(kind, path)

    def _copy(self, kind: str, path: Path) -> None:
        data = _snapshot(path, check_whole if kind == "ledger" else None)
        checksum = hashlib.sha256(data).hexdigest()
        copies = self._copies(kind)
        if self._copied.get(kind) == checksum or (copies and _checksum_of(copies[-1]) == checksum):
            return
        number = 1 + (int(Path(copies[-1]).name.partition("-")[0]) if copies else 0)
        key = f"{self._folder}/{kind}/{number:09d}-{checksum}.db"
        if kind == "ledger":  # noted first, in case this process ends before the write
            self._write_note([*copies[-1:], key])
        self._storage.write(key, data)
        self._copied[kind] = checksum
        for old in copies[:-1]:
            self._storage.delete(old)

    # In storage ---------------------------------------------------------------------------------------------------

    def _copies(self, kind: str) -> list[str]:
        """Keys of the copies of a database, oldest first."""
        return [key for key in self._storage.keys(f"{self._folder}/{kind}") if key.endswith(".db")]

    def _newest_whole(self, kind: str) -> tuple[str, bytes] | None:
        damaged: list[str] = []
        for key in reversed(self._copies(kind)):
            data = self._storage.read(key)
            if hashlib.sha256(data).hexdigest() == _checksum_of(key):
                for worse in damaged:
                    self._storage.delete(worse)
                    self._say(f"damaged backup {worse}: removed; the older one {key} is restored")
                return key, data
            damaged.append(key)
        return None

    # Notes in the study's folder ----------------------------------------------------------------------------------

    def _read_note(self) -> list[str]:
        return self._read_notes().get(self._storage.shown, [])

    def _read_notes(self) -> dict[str, list[str]]:
        try:
            return dict(json.loads(self._note.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def _write_note(self, keys: list[str]) -> None:
        replace_file(self._note, json.dumps(self._read_notes() | {self._storage.shown: keys}).encode())


def has_backup(storage: Storage, name: str) -> bool:
    """Whether a storage has the backup of a study with this name.

    Raises:
        OSError: the storage cannot be read.
    """
    return storage.is_remote and bool(storage.keys(f"backup/{name}/ledger"))


def open_backup(storage: Storage, directory: StudyDirectory, name: str, say: Callable[[str], None]) -> Backup | None:
    """The backup of a study, restored if its folder has no study; None if the storage is a path.

    Args:
        say: receives one line that says what was restored.

    Raises:
        StudyError: the backup is damaged, or belongs to another driver.
        OSError: the storage, or the folder, cannot be used.
    """
    if not storage.is_remote:
        return None
    backup = Backup(storage, directory, name, say)
    if not directory.has_no_study:
        backup.check_is_ours()
    elif backup.bring_back():
        say(f"study {name} was restored from its backup in {storage.shown}")
    return backup


class BackgroundBackup:
    """Backs up a running study from a separate thread; the study continues if a backup fails.

    Args:
        seconds: shortest time between two copies.
        say: receives one line when a backup fails, and when it works again.
        stop: called with the reason if another driver works on the same study, or the ledger is damaged.
    """

    def __init__(self, backup: Backup, seconds: float, say: Callable[[str], None], stop: Callable[[str], None]) -> None:
        self._backup, self._seconds, self._say, self._stop = backup, seconds, say, stop
        self._is_over = threading.Event()
        self._changed = threading.Event()
        self.trouble: str | None = None
        """Why the last attempt failed; None if it succeeded."""
        self._thread = threading.Thread(target=self._run, name="backup", daemon=True)
        self._thread.start()

    def note_change(self) -> None:
        """Note that the ledger has changed."""
        self._changed.set()

    def close(self) -> str | None:
        """Make a last copy; returns the reason if that failed, otherwise None."""
        self._is_over.set()
        self._changed.set()
        self._thread.join()
        self._attempt()
        return self.trouble

    def _run(self) -> None:
        while not self._is_over.is_set():
            begun = time.monotonic()
            self._attempt()
            self._is_over.wait(max(0.0, self._seconds - (time.monotonic() - begun)))
            self._changed.wait(self._seconds if self.trouble is not None else None)
            self._changed.clear()

    def _attempt(self) -> None:
        try:
            self._backup.update()
        except (AnotherDriver, Damaged) as error:
            self.trouble = str(error)
            self._stop(str(error))
        except (OSError, sqlite3.Error) as error:
            if self.trouble is None:
                self._tell(f"cannot back up the study's databases, will try again: {error}")
            self.trouble = str(error)
        else:
            if self.trouble is not None:
                self._tell("the backup of the study's databases works again")
            self.trouble = None

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # continue to back up if the terminal is gone
            self._say(line)


def _checksum_of(key: str) -> str:
    return Path(key).stem.partition("-")[2]


def _snapshot(path: Path, check: Callable[[Path], None] | None) -> bytes:
    """The content of a SQLite database's file at one moment between two transactions, after a check."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy_database(path, copy)
        if check is not None:
            check(copy)
        return copy.read_bytes()
