"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4


def write_whole(path: Path, data: bytes, *, via: Path | None = None, mode: int = 0o600) -> None:
    """Replace a file, even if two programs do so at once.

    Args:
        via: folder on the same disk where the file is first written. Default: its own.
        mode: permissions, before the umask.
    """
    partial = (via or path.parent) / f".{path.name}-{uuid4().hex}"
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
