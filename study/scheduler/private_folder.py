"""A folder for the files of Ray and Tune: only this user can read it, and it is removed when the study's run ends."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from study.errors import StudyError

_LONGEST = (107 if sys.platform == "linux" else 103) - len(
    "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
)
"""Largest length of the folder's path in bytes, so that Ray's sockets can lie below it."""


def remove_leftovers(study: Path) -> None:
    """Remove the folders that killed runs of a study left in any of the places.

    Args:
        study: the study's folder, whose lock the caller holds.
    """
    for place in _places():
        for left in place.glob(f"{_prefix(study)}*"):
            with suppress(OSError):
                if left.lstat().st_uid == os.getuid():
                    shutil.rmtree(left)  # does not follow a link


@contextmanager
def private_folder(study: Path) -> Iterator[Path]:
    """A new folder, mode 0700, in the first usable place: $RAY_TMPDIR, $TMPDIR, /tmp, /var/tmp, /dev/shm.

    Args:
        study: the study's folder.

    Raises:
        StudyError: no place can be used; the message gives the reason for each.
    """
    reasons, made = [], None
    for place in _places():
        try:
            if len(os.fsencode(place / _prefix(study))) + 8 > _LONGEST:
                raise OSError("its path is too long for Ray's sockets")
            made = tempfile.mkdtemp(prefix=_prefix(study), dir=place)
            break
        except OSError as error:
            reasons.append(f"{place}: {error.strerror or error}")
    if made is None:
        raise StudyError(f"Ray needs a folder for its sockets, but found none: {'; '.join(reasons)}; set TMPDIR")
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _places() -> list[Path]:
    named = [os.environ.get(name) for name in ("RAY_TMPDIR", "TMPDIR")]
    return [Path(place).absolute() for place in (*filter(None, named), "/tmp", "/var/tmp", "/dev/shm")]


def _prefix(study: Path) -> str:
    """Prefix of the names of a study's folders, the same at each run."""
    return f"mpo{hashlib.sha256(str(study.resolve()).encode()).hexdigest()[:6]}-"
