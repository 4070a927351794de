"""Where large things are kept: checkpoints, weights and the corpus, at a path or an object store's URL.

An object is written whole and carries its checksum; what was cut short or damaged is recognised. Everything is
safetensors or text: nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any
from uuid import uuid4

import fsspec
import safetensors
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem

from analysis.urls import hide_password
from study.errors import StudyError


class Damaged(Exception):
    """An object is not what was written: cut short, or with a wrong checksum."""


class Storage:
    """A folder of objects, at a path or at a URL that fsspec understands.

    Raises:
        StudyError: fsspec does not know the URL's scheme, lacks its package or cannot connect.
    """

    def __init__(self, url: str) -> None:
        try:
            if "::" in url:
                raise ValueError("it may not hold ::, by which fsspec chains file systems")
            self._files, self._root = fsspec.core.url_to_fs(url)
        except Exception as error:  # each library has errors of its own; some connect at once
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise StudyError(f"--storage {hide_password(url)}: {hide_password(said, url)}") from None
        self.is_remote = not isinstance(self._files, LocalFileSystem)
        # A worker may have another working folder, where a relative path would be another place.
        self.url = url if self.is_remote else self._root

    @property
    def shown(self) -> str:
        """The path or URL for a reader, without a password."""
        return hide_password(self.url)

    @property
    def has_folder(self) -> bool:
        """Whether it is in a bucket or folder, not what holds all of them."""
        return bool(self._root.strip("/"))

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Raise whatever an object store's own library raises as an OSError, in one line without a password."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # each library has errors of its own
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise OSError(f"{self.shown}: {hide_password(said, self.url)}") from error

    def _path(self, key: str) -> str:
        if key.startswith("/") or ".." in PurePosixPath(key).parts:
            raise ValueError(f"a key stays inside its storage, but got {key!r}")
        return f"{self._root}/{key}"

    def write(self, key: str, data: bytes) -> None:
        """Write an object whole: a reader sees all of it or nothing."""
        path = self._path(key)
        if self.is_remote:
            with self._answering():
                self._files.pipe_file(path, data)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.{uuid4().hex}.partial"
        try:
            with open(partial, "wb", opener=_private) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            if os.path.exists(partial):
                os.remove(partial)
            raise

    def read(self, key: str) -> bytes:
        """The object's content.

        Raises:
            FileNotFoundError: there is none.
        """
        path = self._path(key)
        with self._answering():
            return self._files.cat_file(path)

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with self._answering():
            self._files.invalidate_cache()  # others write, too
            return self._files.isfile(path)

    def keys(self, folder: str) -> list[str]:
        """Keys of the objects directly in a folder, sorted; empty where there is no such folder."""
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
        """Remove an object; one that is not there is no error."""
        path = self._path(key)
        try:
            with self._answering():
                self._files.rm_file(path)
        except FileNotFoundError:
            return

    def delete_folder(self, folder: str) -> None:
        """Remove all that is in a folder; one that is not there is no error."""
        path = self._path(folder)
        try:
            with self._answering():
                self._files.invalidate_cache()
                self._files.rm(path, recursive=True)
        except FileNotFoundError:
            return


def _private(path: str, flags: int) -> int:
    """Opens a file for its user alone."""
    return os.open(path, flags, 0o600)


# Tensors as objects ---------------------------------------------------------------------------------------------------

_CHECKSUM = "sha256"


def pack_tensors(tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any] | None = None) -> bytes:
    """A safetensors file of the tensors, with JSON content and a checksum over both in its metadata."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"content": json.dumps(content or {}, sort_keys=True)}
    return safetensors.torch.save(plain, metadata=metadata | {_CHECKSUM: _checksum(plain, metadata["content"])})


def unpack_tensors(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and content of what `pack_tensors` made.

    Raises:
        Damaged: the file is cut short or its checksum is wrong.
    """
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        content, checksum = metadata["content"], metadata[_CHECKSUM]
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise Damaged(f"not a whole safetensors file: {error}") from None
    if _checksum(tensors, content) != checksum:
        raise Damaged("wrong checksum")
    return tensors, json.loads(content)


def _checksum(tensors: Mapping[str, torch.Tensor], content: str) -> str:
    digest = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one run. The newest valid one wins, two are kept.

    Args:
        storage: where they lie.
        folder: the run's own: made of study, trial and seed.
        of: what is trained. A checkpoint of something else is not used: a study whose ledger was brought back from an
            older backup gives a trial's number anew, perhaps to another configuration.
        say: told in one line what was damaged.
    """

    def __init__(self, storage: Storage, folder: str, of: str = "", say: Callable[[str], None] = print) -> None:
        self._storage, self._folder = storage, folder
        self._of, self._say = of, say

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]) -> None:
        """Keep the state before optimiser step `step`."""
        self._storage.write(self._key(step), pack_tensors(tensors, {**content, "of": self._of}))
        for key in self._storage.keys(self._folder)[:-2]:
            self._storage.delete(key)

    def steps(self) -> list[int]:
        """Steps of those that are kept, in ascending order."""
        return [int(PurePosixPath(key).stem) for key in self._storage.keys(self._folder)]

    def load(self, step: int | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest whole checkpoint, or the one of this step; None if there is none. Damaged ones are removed."""
        keys = self._storage.keys(self._folder) if step is None else [self._key(step)]
        damaged: list[str] = []
        for key in reversed(keys):
            try:
                tensors, content = unpack_tensors(self._storage.read(key))
            except Damaged as damage:
                damaged.append(f"{key} ({damage})")
                self._storage.delete(key)
            except FileNotFoundError:
                continue
            else:
                if content.pop("of", "") == self._of:
                    self._tell(damaged, f"going on from an older one, {key}")
                    return tensors, content
                self._storage.delete(key)
        self._tell(damaged, "starting again")
        return None

    def _tell(self, damaged: list[str], instead: str) -> None:
        if damaged:
            self._say(f"damaged checkpoint {', '.join(damaged)}: removed; {instead}")

    def clear(self) -> None:
        self._storage.delete_folder(self._folder)

    def _key(self, step: int) -> str:
        return f"{self._folder}/{step:09d}.safetensors"
