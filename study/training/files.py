"""Files that are written atomically, and that only their user can read."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: Path, mode: int = 0o600, *, has_other_writers: bool = False) -> Iterator[Path]:
    """The path of a partial file, which replaces the one at `path` atomically at the end; after an error it is removed.

    Args:
        has_other_writers: whether another process may write the same file now. If not, what a killed process left is
            removed first.

    Raises:
        OSError: the file cannot be written.
    """
    tag = f"{uuid4().hex}." if has_other_writers else ""
    partial = path.with_name(f"{path.name}.{tag}partial")
    _remove(partial)
    partial.touch(mode)
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # the disk that failed may fail again
            _remove(partial)
        raise


def replace_file(path: Path, data: bytes, mode: int = 0o600, *, has_other_writers: bool = False) -> None:
    """Write a file atomically, replacing any previous one; see `replacing`."""
    with replacing(path, mode, has_other_writers=has_other_writers) as partial:
        partial.write_bytes(data)


def _remove(partial: Path) -> None:
    """Remove a partial file, and the files that SQLite keeps beside it."""
    for part in partial.parent.glob(f"{glob.escape(partial.name)}*"):
        part.unlink(missing_ok=True)


@contextmanager
def private_files() -> Iterator[None]:
    """Context in which this process and its children create files that only their user can read.

    Such files may hold texts, or URLs with passwords.
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
