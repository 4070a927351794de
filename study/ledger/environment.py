"""The environment of a study: versions, code and machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from study.errors import StudyError
from study.training.program import this_program

_PACKAGES = ("mpo-study", "torch", "ray", "optuna", "mlflow", "numpy", "pandas", "transformers")


def environment() -> dict[str, Any]:
    """Versions of the relevant packages, git commit and fingerprint of this code, and the kind of machine.

    Raises:
        StudyError: the files of this code cannot be read.
    """
    try:
        fingerprint = this_program()["fingerprint"]
    except (ImportError, OSError) as error:
        raise StudyError(f"cannot read the code of this program: {error}") from None
    top = _git("rev-parse", "--show-toplevel")
    is_checkout = top is not None and Path(top) == Path(__file__).resolve().parents[2]  # not a .venv in another
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "program": fingerprint,
        "git_commit": _git("rev-parse", "HEAD") if is_checkout else None,
        "git_changed": bool(_git("status", "--porcelain", "--untracked-files=no")) if is_checkout else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
    }


def what_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences between environments that can change a result, as `torch was 2.1, is 2.2`.

    Compares Python, torch, transformers and this program.
    """

    def named(one: Mapping[str, Any]) -> dict[str, str | None]:
        packages = one.get("packages", {})
        commit = one.get("git_commit")
        return {
            "python": one.get("python"),
            "torch": packages.get("torch"),
            "transformers": packages.get("transformers"),  # models, initial values and tokenizers
            "mpo-study": packages.get("mpo-study"),
            "the git commit": commit[:12] if commit else None,
            "the fingerprint of this program": one.get("program"),
        }

    old, new = named(before), named(now)
    known = [key for key in old if old[key] is not None and new[key] is not None]
    return [f"{key} was {old[key]}, is {new[key]}" for key in known if old[key] != new[key]]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
