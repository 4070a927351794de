"""Storage of large objects: checkpoints, weights and the corpus, at a path or an object store's URL."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from analysis.runs.urls import hide_password
from study.errors import StudyError, first_line
from study.training.files import replace_file, replacing


class Storage:
    """A folder of objects, at a path or at a URL that fsspec understands.

    Raises:
        StudyError: fsspec does not know the URL's scheme, lacks its package or cannot connect.
    """

    def __init__(self, url: str) -> None:
        try:
            if "::" in url:
                raise ValueError("it may not contain ::, with which fsspec chains file systems")
            self._files, self._root = fsspec.core.url_to_fs(url)
        except Exception as error:  # each library has its own errors; some connect at once
            raise StudyError(f"--storage {hide_password(url)}: {_first_line(error, url)}") from None
        self.is_remote = not isinstance(self._files, LocalFileSystem)
        # A worker may have another working folder, in which a relative path would mean another place.
        self.url = url if self.is_remote else self._root

    @property
    def shown(self) -> str:
        """The path or URL for display, without a password."""
        return hide_password(self.url)

    @property
    def has_folder(self) -> bool:
        """Whether it is a bucket or folder, not the root that contains all of them."""
        return bool(self._root.strip("/"))

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Convert every error of an object store's library to an OSError, in one line without a password."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # each library has its own errors
            raise OSError(f"{self.shown}: {_first_line(error, self.url)}") from error

    def _path(self, key: str) -> str:
        if key.startswith("/") or ".." in PurePosixPath(key).parts:
            raise ValueError(f"a key must stay inside its storage, but got {key!r}")
        return f"{self._root}/{key}"

    def write(self, key: str, data: bytes) -> None:
        """Write an object atomically: a reader sees all of it or nothing."""
        path = self._path(key)
        if self.is_remote:
            with self._answering():
                self._files.pipe_file(path, data)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        replace_file(Path(path), data, has_other_writers=True)

    def read(self, key: str) -> bytes:
        """The object's content.

        Raises:
            FileNotFoundError: there is no such object.
        """
        path = self._path(key)
        with self._answering():
            return self._files.cat_file(path)

    def local_path(self, key: str) -> Path | None:
        """Path of an object's file; None if the storage is remote."""
        return None if self.is_remote else Path(self._path(key))

    def put(self, key: str, file: Path) -> None:
        """Write a file of any size as an object, atomically as `write`."""
        path = self._path(key)
        if self.is_remote:
            with self._answering():
                self._files.put_file(str(file), path)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replacing(Path(path), has_other_writers=True) as partial:
            shutil.copyfile(file, partial)

    def fetch(self, key: str, file: Path) -> None:
        """Copy an object of any size to a file.

        Raises:
            FileNotFoundError: there is no such object.
        """
        with self._answering():
            self._files.get_file(self._path(key), str(file))

    def size(self, key: str) -> int:
        """Number of bytes of an object.

        Raises:
            FileNotFoundError: there is no such object.
        """
        path = self._path(key)
        with self._answering():
            self._files.invalidate_cache()
            return self._files.size(path)

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with self._answering():
            self._files.invalidate_cache()  # other processes write, too
            return self._files.isfile(path)

    def keys(self, folder: str) -> list[str]:
        """Keys of the objects directly in a folder, sorted; empty if there is no such folder."""
        path = self._path(folder)
        try:
            with self._answering():
                paths = self._files.ls(path, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        names = (PurePosixPath(path).name for path in paths)
        return sorted(f"{folder}/{name}" for name in names if not name.endswith(".partial"))

    def keys_below(self, folder: str) -> list[str]:
        """Keys of all objects in a folder and the folders in it, sorted."""
        path = self._path(folder)
        with self._answering():
            self._files.invalidate_cache()
            found = self._files.find(path)
        root = self._files._strip_protocol(path)
        return sorted(f"{folder}/{PurePosixPath(one).relative_to(root)}" for one in found)

    def delete(self, key: str) -> None:
        """Remove an object; no error if it does not exist."""
        path = self._path(key)
        try:
            with self._answering():
                self._files.rm_file(path)
        except FileNotFoundError:
            return

    def delete_folder(self, folder: str) -> None:
        """Remove everything in a folder; no error if the folder does not exist."""
        path = self._path(folder)
        try:
            with self._answering():
                self._files.invalidate_cache()
                self._files.rm(path, recursive=True)
        except FileNotFoundError:
            return


def _first_line(error: Exception, url: str) -> str:
    """The first line of an error's message without the URL's password, or the error's name if it has no message."""
    return hide_password(first_line(error), url)
