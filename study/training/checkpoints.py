"""Tensors in storage: weights, and the checkpoints of a run.

A file contains its checksum, so a truncated or damaged one is recognised. Everything is safetensors: nothing is ever
unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

import safetensors
import safetensors.torch
import torch

from study.training.storage import Storage

_CHECKSUM = "sha256"


class Damaged(Exception):
    """An object differs from what was written: it is truncated or has a wrong checksum."""


def pack_tensors(tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any] | None = None) -> bytes:
    """A safetensors file of the tensors, with JSON content and a checksum over both in its metadata."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"content": json.dumps(content or {}, sort_keys=True)}
    return safetensors.torch.save(plain, metadata=metadata | {_CHECKSUM: _checksum(plain, metadata["content"])})


def unpack_tensors(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and content of a file from `pack_tensors`.

    Raises:
        Damaged: the file is truncated or its checksum is wrong.
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
    """The checkpoints of one run. Two are kept; the newest valid one is used.

    Args:
        storage: where they lie.
        folder: the run's own folder, named by study, trial and seed.
        of: what is trained. A checkpoint of something else is not used: a study whose ledger was restored from an older
            backup may give a trial's number again, to another configuration.
        say: receives one line that says what was damaged.
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
        """Steps of the kept checkpoints, in ascending order."""
        return [int(PurePosixPath(key).stem) for key in self._storage.keys(self._folder)]

    def load(self, step: int | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest undamaged checkpoint, or the one of this step; None if there is none. Removes damaged ones."""
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
                    self._tell(damaged, f"continuing from the older one {key}")
                    return tensors, content
                self._storage.delete(key)
        self._tell(damaged, "training from the beginning")
        return None

    def _tell(self, damaged: list[str], instead: str) -> None:
        if damaged:
            self._say(f"damaged checkpoint {', '.join(damaged)}: removed; {instead}")

    def clear(self) -> None:
        self._storage.delete_folder(self._folder)

    def _key(self, step: int) -> str:
        return f"{self._folder}/{step:09d}.safetensors"
