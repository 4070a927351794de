"""Where large things are kept: checkpoints, weights and the corpus, at a path or an object store's URL.

An object is written whole and carries its checksum; what was cut short or damaged is recognised. Everything is
safetensors or text: nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from uuid import uuid4

import fsspec
import safetensors
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem

from study.errors import StudyError


class Damaged(Exception):
    """An object is not what was written: cut short, or with a wrong checksum."""


class Storage:
    """A folder of objects, at a path or at a URL that fsspec understands.

    Raises:
        StudyError: fsspec does not know the URL's scheme, or lacks its package.
    """

    def __init__(self, url: str) -> None:
        try:
            if "::" in url:
                raise ValueError("it may not hold ::, by which fsspec chains file systems")
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StudyError(f"--storage {url}: {error}") from None
        # A worker may have another working folder, where a relative path would be another place.
        self.url = self._root if isinstance(self._files, LocalFileSystem) else url

    def _path(self, key: str) -> str:
        if key.startswith("/") or ".." in PurePosixPath(key).parts:
            raise ValueError(f"a key stays inside its storage, but got {key!r}")
        return f"{self._root}/{key}"

    def write(self, key: str, data: bytes) -> None:
        """Write an object whole: a reader sees all of it or nothing."""
        path = self._path(key)
        if not isinstance(self._files, LocalFileSystem):
            self._files.pipe_file(path, data)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.{uuid4().hex}.partial"
        try:
            with open(partial, "wb") as file:
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
        return self._files.cat_file(self._path(key))

    def exists(self, key: str) -> bool:
        return self._files.isfile(self._path(key))

    def keys(self, folder: str) -> list[str]:
        """Keys of the objects directly in a folder, sorted; empty where there is no such folder."""
        try:
            paths = self._files.ls(self._path(folder), detail=False, refresh=True)
        except FileNotFoundError:
            return []
        names = (PurePosixPath(path).name for path in paths)
        return sorted(f"{folder}/{name}" for name in names if not name.endswith(".partial"))

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        try:
            self._files.rm_file(self._path(key))
        except FileNotFoundError:
            return

    def delete_folder(self, folder: str) -> None:
        """Remove all that is in a folder; one that is not there is no error."""
        try:
            self._files.rm(self._path(folder), recursive=True)
        except FileNotFoundError:
            return


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
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage = storage
        self._folder = folder

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]) -> None:
        """Keep the state before optimiser step `step`."""
        self._storage.write(self._key(step), pack_tensors(tensors, content))
        for key in self._storage.keys(self._folder)[:-2]:
            self._storage.delete(key)

    def steps(self) -> list[int]:
        """Steps of those that are kept, in ascending order."""
        return [int(PurePosixPath(key).stem) for key in self._storage.keys(self._folder)]

    def load(self, step: int | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest whole checkpoint, or the one of this step; None if there is none. Damaged ones are removed."""
        keys = self._storage.keys(self._folder) if step is None else [self._key(step)]
        for key in reversed(keys):
            try:
                return unpack_tensors(self._storage.read(key))
            except Damaged as damage:
                print(f"checkpoint {key}: {damage}; using an older one, or starting again", flush=True)
                self._storage.delete(key)
            except FileNotFoundError:
                continue
        return None

    def clear(self) -> None:
        self._storage.delete_folder(self._folder)

    def _key(self, step: int) -> str:
        return f"{self._folder}/{step:09d}.safetensors"
