"""The cache folder: corpora, statistics and pretrained models, all of which can be made again."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

CACHE_VARIABLE = "MPO_STUDY_CACHE"
"""Environment variable: the cache folder. Default: the user's own cache folder."""


CACHE = "cache:"
"""Beginning of a path in the cache folder, in a study file."""


def in_cache(path: str) -> str | None:
    """The path for which `cache:NAME` stands; None for any other path."""
    return str(cache_folder() / path.removeprefix(CACHE)) if path.startswith(CACHE) else None


def cache_folder() -> Path:
    """The folder: `$MPO_STUDY_CACHE`, or this user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).absolute() if given else user_cache_path("mpo-study", appauthor=False)
