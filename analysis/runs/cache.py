"""Frames kept as Parquet files in a folder. A frame is read whole, as it was written, or not at all. Uses no MLflow.

The files are for this program only: their contents are in MLflow, and the folder may be removed at any time.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.runs.whole_file import write_whole

VERSION = 4
"""Increased if the contents, or their computation from the runs, change: then older caches are ignored."""
MANIFEST = "cache.json"


@dataclass(frozen=True)
class Cache:
    """Frames of one state of one study.

    `stamp`: identifies the state. Frames with another stamp are ignored, and replaced by those of this state.
    """

    folder: Path
    stamp: dict[str, Any]

    def read(self, names: Iterable[str]) -> dict[str, pd.DataFrame] | None:
        """Return these frames; None if any is missing, damaged or of another stamp."""
        sums = self._sums()
        try:
            return {name: self._frame(name, sums[name]) for name in names}
        except (OSError, ValueError, KeyError):  # pyarrow's own errors are ValueErrors and OSErrors
            return None

    def write(self, frames: dict[str, pd.DataFrame]) -> None:
        """Keep these frames beside others of the same stamp. The manifest, which makes them valid, is written last.

        Raises:
            OSError: the folder cannot be written, or is a symbolic link, which may lead to files of others.
        """
        if self.folder.is_symlink():
            raise OSError(f"{self.folder} is a symbolic link")
        self.folder.mkdir(parents=True, exist_ok=True)
        sums = self._sums()
        for name, frame in frames.items():
            data = io.BytesIO()
            frame.to_parquet(data, index=False, engine="pyarrow")
            sums[name] = hashlib.sha256(data.getvalue()).hexdigest()
            write_whole(self.folder / f"{name}.parquet", data.getvalue())
        write_whole(self.folder / MANIFEST, json.dumps({"stamp": self._full_stamp, "sha256": sums}, indent=1).encode())

    @property
    def _full_stamp(self) -> dict[str, Any]:
        return {"version": VERSION, "pandas": pd.__version__, **self.stamp}

    def _sums(self) -> dict[str, str]:
        """SHA-256 of the file of each frame with this stamp."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_bytes())
            return dict(manifest["sha256"]) if manifest["stamp"] == self._full_stamp else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _frame(self, name: str, sha256: str) -> pd.DataFrame:
        data = (self.folder / f"{name}.parquet").read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"{name} is not what was written")
        return pd.read_parquet(io.BytesIO(data), engine="pyarrow")
