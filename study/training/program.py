"""Identity of the running program: this project's packages as imported, and the versions of torch and numpy.

A Ray worker gets `program` and `code_in` by value from its driver, before it imports any of our packages. So they use
only the standard library.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping
from functools import cache

PACKAGES = ("mpo_core", "analysis", "study")


def code_in(folders: Mapping[str, str]) -> str:
    """SHA-256 of the Python files of packages, the same for a checkout and an installed wheel.

    It does not depend on line endings. Other files (study files, report templates) change no result of a run.

    Args:
        folders: folder of each package, by its name.

    Raises:
        OSError: a folder contains no readable package.
    """
    digest = hashlib.sha256()
    for name, folder in sorted(folders.items()):
        sources = {}
        for parent, subfolders, files in os.walk(folder):
            if "__init__.py" not in files:  # not a package, so not in a wheel
                subfolders.clear()
                continue
            for file in files:
                if file.endswith(".py") and not file.startswith("."):  # for example an editor's lock
                    path = os.path.join(parent, file)
                    with open(path, "rb") as source:
                        inside = os.path.relpath(path, folder).replace(os.sep, "/")
                        sources[inside] = source.read().replace(b"\r\n", b"\n")
        if not sources:
            raise FileNotFoundError(f"{folder} is not the folder of package {name}")
        for inside, source in sorted(sources.items()):
            digest.update(f"{name}/{inside} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def program() -> dict[str, str]:
    """The program that this process imports, or has imported.

    Returns:
        The folder of each of `PACKAGES` under its name; "code", see `code_in`; the versions of "torch" and "numpy"
        without a build's label, since a driver without a GPU may have another build; and "fingerprint", a hash of all
        but the folders.

    Raises:
        ImportError: a package cannot be imported.
        OSError: a package's files cannot be read.
    """
    folders = {}
    for name in PACKAGES:
        module = importlib.import_module(name)
        if module.__file__ is None:  # an empty folder of that name
            raise ImportError(f"{name} in {list(module.__path__)} has no code")
        folders[name] = os.path.dirname(os.path.abspath(module.__file__))
    found = {"code": code_in(folders)}
    for name in ("torch", "numpy"):
        found[name] = importlib.import_module(name).__version__.partition("+")[0]
    fingerprint = hashlib.sha256(" ".join(f"{key} {value}" for key, value in found.items()).encode()).hexdigest()[:12]
    return folders | found | {"fingerprint": fingerprint}


@cache
def this_program() -> dict[str, str]:
    """`program` at the first call in this process: files that change later are not the ones that it runs."""
    return program()
