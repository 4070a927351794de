"""Safetensors files that are written whole or not at all, and tensors that are read from them when they are needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

PARTIAL = ".partial"
"""Ending of a file that is being written."""


def write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; a process that is killed meanwhile leaves the file that was there before.

    Raises:
        OSError: the disk is full, or the file cannot be written.
        ValueError: safetensors does not store the dtype of a tensor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_name(path.name + PARTIAL)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, partial, metadata=dict(metadata))
    except KeyError as error:
        raise ValueError(f"{path}: safetensors does not store tensors of {error}") from None
    except SafetensorError as error:  # disk errors too
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: {error}") from None
    make_final(partial, path)


def make_final(partial: Path, path: Path) -> None:
    """Put a written file in the place of another, if there is one, once it is on the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file."""

    path: str
    key: str
    stamp: tuple[int, int]
    """The `stamp_of` the file when it was opened."""

    def read(self) -> Tensor:
        """The tensor, memory-mapped.

        Raises:
            OSError: the file is gone.
            ValueError: it is another file than before.
        """
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            if stamp_of(self.path) != self.stamp:
                raise ValueError(f"{self.path} has been written again since it was loaded: load it again")
            return file.get_tensor(self.key)


def stamp_of(path: str | os.PathLike[str]) -> tuple[int, int]:
    """A number for the file, and when it was last written."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns
