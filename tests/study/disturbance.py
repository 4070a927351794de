"""A study long enough to be disturbed, and the means to do it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from study_fixtures import (
    USUAL_FINALS,
    contents,
    mlflow_template,  # noqa: F401 (a fixture)
    results_at,
    run_at,
    start_cli,
    substance,
    write_study,
)

from analysis.runs.load import load_study, resolve_study

LONG = {"protocol": {"steps": 400, "eval_every": 40}, "execution": {"checkpoint_seconds": 0.1}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the long study gives when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_at(write_study(folder, **LONG), folder / "kept")
    return substance(folder / "kept")


@pytest.fixture
def work(tmp_path, mlflow_template):  # noqa: F811
    """A folder with the long study's file, and a study folder with an empty MLflow database."""
    write_study(tmp_path, **LONG)
    (tmp_path / "kept").mkdir()
    shutil.copy(mlflow_template, tmp_path / "kept" / "mlflow.db")
    return tmp_path


def start(work, *options):
    return start_cli("run", "tiny.yaml", "--dir", "kept", *options, cwd=work)


def wait_for_results(process, n):
    """Read the driver's lines until that many runs are over, or more: a resumed driver starts from what there is."""
    for line in process.stdout:
        n_done, slash, _ = line.partition("/")
        if slash and n_done.isdecimal() and int(n_done) >= n:
            return
    raise AssertionError(f"the driver ended before its result {n}: {process.stderr.read()}")


def descendants(pid):
    """Process ids of all that this process started, and of what those started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, new = [], [pid]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found += new
    return found


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def trainers(driver):
    """Process ids of this driver's Ray workers that have a unit."""
    found = []
    for pid in descendants(driver.pid):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        except OSError:
            continue
        if title.startswith("ray::ImplicitFunc"):  # Tune's wrapper of a function
            found.append(pid)
    return found


def wait_for_trainer(driver, other_than=()):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        new = [pid for pid in trainers(driver) if pid not in other_than]
        if new:
            return new[0]
        time.sleep(0.02)
    raise AssertionError("no worker has come up")


def check_whole(work, undisturbed):
    """Every trial and seed once in the ledger and once in MLflow, with the numbers of an undisturbed study."""
    assert substance(work / "kept") == undisturbed
    results = results_at(work / "kept")
    assert len(results) == len(undisturbed) == 8  # a trial whose driver died while it was asked has another number
    runs = contents(work / "kept" / "mlflow.db")
    assert {len(same) for same in runs.values()} == {1}
    assert len(runs) == 1 + 4 + 8
    loaded = load_study(resolve_study(work / "kept"))
    assert (len(loaded.seeds), len(loaded.failures), len(loaded.unfinished)) == (8, 0, 0)
    seeds = loaded.seeds.set_index(["trial", "seed"])
    for key, result in results.items():
        assert result.final.keys() == USUAL_FINALS
        for metric, value in result.final.items():
            assert seeds.loc[key, metric] == value
    for [(_, _, status, _, _, params, _, metrics)] in runs.values():
        assert status == "FINISHED"
        if "seed" in params:
            n_rows = len(results[int(params["trial"]), int(params["seed"])].curve)
            assert len(metrics["val_loss"]) == n_rows
