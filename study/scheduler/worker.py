"""The code of a Ray worker. Ray sends it by value from the driver; on the worker it decides which program is imported.

Do not import this project's packages at the top of this file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import ray
from ray import tune
from ray.experimental.internal_kv import _internal_kv_get

from study.training.program import PACKAGES, code_in, program

_checked: list[bool] = []
"""Not empty after this process has verified that its program is the driver's."""


class _AsOnTheDriver:
    """Import finder that finds this project's packages in the driver's folders before any other place."""

    def __init__(self, folders: Mapping[str, str]) -> None:
        self._folders = folders

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._folders:
            return None
        folder = self._folders[name]
        return importlib.util.spec_from_file_location(
            name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )


def why_refused(driver: Mapping[str, str]) -> str | None:
    """Why this process may not train for a driver, in one line that names both places; None if it may.

    If the driver's folders hold the driver's program on this machine, too, packages are imported from them. Otherwise
    the packages installed on this machine are imported.
    """
    if _checked:
        return None
    here = f"a worker on {socket.gethostname()}"
    folders = {name: driver[name] for name in PACKAGES}
    try:
        if code_in(folders) == driver["code"]:
            sys.meta_path.insert(0, _AsOnTheDriver(folders))  # type: ignore[arg-type]
    except OSError:  # another machine, with its own program
        pass
    try:
        own = program()
    except (Exception, SystemExit) as error:
        said = (str(error).splitlines() or [""])[0]
        return f"{here} cannot import this program, which the driver imports from {driver['study']}: {said or error!r}"
    if own["fingerprint"] != driver["fingerprint"]:
        places = [
            f"{', '.join(sorted({one[name] for name in PACKAGES}))} (code {one['code'][:12]}, torch {one['torch']}, "
            f"numpy {one['numpy']})"
            for one in (own, driver)
        ]
        return f"{here} has another program than this driver: {places[0]} instead of {places[1]}"
    from study.training.program import this_program  # this process's program, which its results name

    this_program()
    _checked.append(True)
    return None


def work(config: dict[str, str], driver: Mapping[str, str], storage_key: str) -> None:
    """Run one unit, a worker's only task. All results are sent in the last report, which must be complete by itself.

    Args:
        driver: the driver's program.
        storage_key: key of the storage's URL in Ray's key-value store. The URL may hold a password, which Tune would
            write to disk. It is not in Ray's object store, because a driver that has an object there ends without a
            message when its node dies.
    """
    refused = why_refused(driver)
    if refused is not None:
        tune.report({"abort": refused})
        return
    from study.errors import StudyError
    from study.training.unit import OUT_OF_MEMORY, Unit, run_unit

    storage = _internal_kv_get(storage_key)
    if storage is None:
        raise ConnectionError("Ray has lost the storage's URL, which the driver stored in it")
    unit = Unit.model_validate_json(json.dumps(json.loads(config["unit"]) | {"storage": storage.decode()}))
    tune.report({"begin": ray.get_runtime_context().get_node_id()})

    def report_evaluation(seed: int, row: dict[str, float]) -> None:
        tune.report({"evaluation": json.dumps([seed, row])})

    try:
        results = run_unit(unit, report_evaluation, lambda line: tune.report({"said": line}))
    except (OSError, StudyError) as error:  # StudyError: a package for the storage is missing here
        tune.report({"abort": str(error)})
    except OUT_OF_MEMORY as error:
        tune.report({"out_of_memory": f"out of memory: {error}".splitlines()[0]})
    else:
        tune.report({"results": json.dumps([asdict(result) for result in results])})
