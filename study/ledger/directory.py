"""A study's own folder: its paths, its lock, and the manifest by which the analysis finds its runs."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from analysis import run_schema
from analysis.runs.urls import hide_password
from study.errors import StudyError
from study.ledger.database import way_back
from study.ledger.lock import check_ledger_url
from study.spec.config import StudyConfig
from study.spec.study_file import dump_config, read_config
from study.training.files import private_files, replace_file
from study.training.storage import Storage

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
"""Value in the manifest for the database next to it. The path is relative because the folder may be moved."""


class StudyDirectory:
    """Paths below one folder. The folder is local to the driver; large objects may lie elsewhere.

    Args:
        ledger: URL of a PostgreSQL database that holds the ledger. Default: that of the last run, at first a file here.

    Raises:
        StudyError: a study cannot have this path or URL.
    """

    def __init__(self, path: str | Path, ledger: str | None = None) -> None:
        self.path = Path(path)
        self._given_ledger = check_ledger_url(ledger) if ledger is not None else None
        real = os.path.realpath(self.path)  # `resolve` raises on circular links
        odd = sorted({mark for mark in "?#%" if mark in real})
        if odd:  # these have another meaning in a database's URL
            raise StudyError(f"--dir {self.path}: a study's folder may not have {' '.join(odd)} in its path")

    @property
    def study_file(self) -> Path:
        """The resolved study file of the last run."""
        return self.path / "study.yaml"

    @property
    def ledger_url(self) -> str:
        return self._ledger_elsewhere or f"sqlite:///{self.ledger_file.resolve()}"

    @property
    def _ledger_elsewhere(self) -> str | None:
        return self._given_ledger or self._manifest().get("ledger")

    @property
    def ledger_file(self) -> Path:
        """File of the ledger, unless it is in a database elsewhere."""
        return self.path / "ledger.db"

    @property
    def has_ledger(self) -> bool:
        """Whether there is a ledger, or a database elsewhere that may hold one."""
        return self._ledger_elsewhere is not None or _is_file(self.ledger_file)

    @property
    def has_no_study(self) -> bool:
        """Whether no study was run here, or none of its files is left."""
        return not _is_file(self._manifest_path) and not _is_file(self.ledger_file)

    @property
    def mlflow_database(self) -> Path:
        """MLflow's database, unless the study's runs go elsewhere."""
        return self.path / "mlflow.db"

    @property
    def reports_file(self) -> Path:
        """File in which the driver writes the time of the last report of each run in flight."""
        return self.path / "reports.json"

    @property
    def artifacts(self) -> str:
        """Place of MLflow's artifacts, if MLflow uses the database in this folder."""
        return (self.path / "mlartifacts").resolve().as_uri()

    def load_config(self) -> StudyConfig:
        """The study that was last run here.

        Raises:
            StudyError: there is no study.
        """
        if not _is_file(self.study_file):
            raise StudyError(f"{self.path}: no study here (no {self.study_file.name}); give the folder of a study")
        self.check_ledger()
        version = self._manifest().get("schema_version", run_schema.SCHEMA_VERSION)
        if version != run_schema.SCHEMA_VERSION:
            raise StudyError(
                f"{self.path}: the study has schema version {version}, but this mpo-study reads "
                f"{run_schema.SCHEMA_VERSION}; use the version that wrote it"
            )
        return read_config(self.study_file)

    def check_ledger(self) -> None:
        """Raise a StudyError if the ledger of a study that was run here is missing."""
        if not self.has_ledger:
            raise StudyError(
                f"{self.path}: the study's ledger is missing (no {self.ledger_file.name}); restore it, or begin a new "
                f"study with another --dir{way_back(self.ledger_url, '; ')}"
            )

    def check_is_for(self, config: StudyConfig) -> None:
        """Raise a StudyError if the folder has a study with another name."""
        name = self._manifest().get("name", config.name)
        if name != config.name:
            raise StudyError(f"{self.path} is the folder of study {name}; give {config.name} another --dir")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the study's lock: one driver at a time.

        An error before a study is begun leaves no lock file, and no folder that was created here.

        Raises:
            StudyError: another driver holds it; the message names that driver.
        """
        file, is_new = self.path / "driver.lock", not self.path.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StudyError(f"--dir {self.path}: cannot create the folder: {error.strerror}") from None
        holder = self.path / "driver.json"
        with private_files():
            lock = FileLock(file, mode=0o600)
            try:
                with self._writing():
                    lock.acquire(timeout=0)
            except Timeout:
                raise StudyError(f"{self.path}: another driver runs this study: {_describe_holder(holder)}") from None
            try:
                with self._writing():
                    holder.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}), encoding="utf-8")
                yield
            except StudyError:
                if self.has_no_study:
                    file.unlink(missing_ok=True)  # while it is held, so that no other driver has it
                raise
            finally:
                with suppress(OSError):
                    holder.unlink(missing_ok=True)
                lock.release()
                if is_new:
                    with suppress(OSError):  # it is not empty
                        self.path.rmdir()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Report a full or read-only disk in one line; filelock's `Timeout` is an OSError too, but not one of these."""
        try:
            yield
        except Timeout:
            raise
        except OSError as error:
            raise StudyError(f"--dir {self.path}: cannot write there: {error.strerror or error}") from None

    def driver(self) -> dict[str, Any] | None:
        """Host and process of the driver that holds the study now; None if there is none."""
        try:
            holder = dict(json.loads((self.path / "driver.json").read_text(encoding="utf-8")))
            # A killed driver leaves its name behind.
            return holder if holder["host"] != socket.gethostname() or is_alive(holder["pid"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, config: StudyConfig, uuid: str, tracking_uri: str | None, storage: str) -> None:
        """Write the resolved study file and the manifest, which has the defaults of later commands."""
        self._replace(self.study_file, dump_config(config))
        manifest = {
            "schema_version": run_schema.SCHEMA_VERSION,
            "name": config.name,
            "uuid": uuid,
            "tracking_uri": tracking_uri,
            "experiment": config.name,
            "storage": None if storage == self._own_storage else storage,  # the folder may be moved
            "ledger": self._ledger_elsewhere,
        }
        self._replace(self._manifest_path, json.dumps(manifest, indent=2) + "\n")

    def tracking_uri(self) -> str | None:
        """The tracking URI of the last run, from the manifest; None with tracking off or before any run."""
        return self._manifest().get("tracking_uri")

    def uuid(self) -> str | None:
        """UUID of the study that was run here; None before any run."""
        return self._manifest().get("uuid")

    def storage(self, url: str | None = None) -> Storage:
        """The storage at a path or URL that the user gave, or that of the last run.

        Raises:
            StudyError: the storage is the root, the user's home or this folder, where it would mix with other files.
        """
        storage = Storage(url if url is not None else self.storage_url())
        if not storage.is_remote:
            place = Path(os.path.realpath(storage.url))
            above = [Path("/"), Path(os.path.expanduser("~")).resolve()]
            is_too_high = any(own.is_relative_to(place) for own in above)
            if url != "" and not is_too_high and place != self.path.resolve():
                return storage
        elif storage.has_folder:
            return storage
        raise StudyError(
            f"--storage {storage.shown if url != '' else repr(url)}: must be a separate folder, not the root, your "
            "home, a folder above your home, or the study's folder; give a folder inside one of these"
        )

    def storage_url(self) -> str:
        """The storage of the last run; in this folder before any run."""
        return self._manifest().get("storage") or self._own_storage

    @property
    def _own_storage(self) -> str:
        return str((self.path / "storage").resolve())

    @property
    def _manifest_path(self) -> Path:
        return self.path / run_schema.STUDY_MANIFEST

    def _manifest(self) -> dict[str, Any]:
        if not _is_file(self._manifest_path):
            return {}
        try:
            manifest = dict(json.loads(self._manifest_path.read_text(encoding="utf-8")))
        except OSError as error:
            raise _unreadable(self._manifest_path, error) from None
        except (ValueError, TypeError) as error:
            raise StudyError(f"{self._manifest_path} is damaged: {error}") from None
        for key in ("name", "uuid", "tracking_uri", "storage", "ledger"):
            if not isinstance(manifest.get(key), str | None):
                raise StudyError(f"{self._manifest_path} is damaged: {key} must be a string, but is {manifest[key]!r}")
        return manifest

    def resolve_tracking_uri(self, uri: str) -> str:
        """The URI for MLflow: a relative SQLite path is relative to this folder.

        Raises:
            StudyError: the URI is a plain path, to which MLflow no longer writes.
        """
        prefix = "sqlite:///"
        if uri.startswith(prefix) and not uri.startswith(f"{prefix}/"):
            return f"{prefix}{(self.path / uri.removeprefix(prefix)).resolve()}"
        if "://" not in uri and not uri.startswith("databricks"):
            raise StudyError(
                f"--tracking {hide_password(uri)}: must be a server's URL (http://...) or a database's "
                "(sqlite:///..., postgresql://...)"
            )
        return uri

    def _replace(self, path: Path, text: str) -> None:
        with self._writing():
            replace_file(path, text.encode())


def is_alive(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)  # signal 0 only checks
    except PermissionError:  # it exists and belongs to another user
        return True
    except (OSError, OverflowError):
        return False
    return True


def _is_file(path: Path) -> bool:
    """Whether the path is a file; a StudyError if its folder may not be read."""
    try:
        return path.is_file()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> StudyError:
    return StudyError(f"{path}: cannot read it: {error.strerror}; only the user who ran a study can read it")


def _describe_holder(holder: Path) -> str:
    try:
        content = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {content['pid']} on {content['host']}"
    except (OSError, ValueError, KeyError):
        return "its name is not recorded yet"
