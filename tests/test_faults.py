"""Processes killed at any moment: nothing lost, nothing twice, and the same numbers in the end."""

# ruff: noqa: F811 (fixtures are imported, and then the names of parameters)
from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from disturbance import (
    LONG,
    check_whole,
    descendants,
    kill,
    start,
    undisturbed,  # noqa: F401 (a fixture)
    wait_for_results,
    wait_for_trainer,
    work,  # noqa: F401 (a fixture)
)
from study_fixtures import (
    DENSE,
    cli,
    mlflow_template,  # noqa: F401 (a fixture)
    nothing_left_running,  # noqa: F401 (a fixture)
    results_at,
    write_study,
)

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

# The driver -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("everything", [False, True], ids=["driver", "driver_and_ray"])
def test_driver_killed_several_times_ends_as_if_undisturbed(work, undisturbed, everything):
    moments = np.random.default_rng(7 + everything)
    n_killed = 0
    for n_results in (0, 1, 1, 2, 1):
        done = len(results_at(work / "kept")) if (work / "kept" / "ledger.db").exists() else 0
        if done + n_results >= 8:  # a fast machine has had more results between two kills
            break
        driver = start(work)
        if n_results == 0:
            time.sleep(moments.uniform(3, 12))  # while it imports, opens its databases, or starts Ray
        else:
            wait_for_results(driver, done + n_results)
            time.sleep(moments.uniform(0, 0.5))
        doomed = [driver.pid, *(descendants(driver.pid) if everything else [])]
        assert driver.poll() is None
        kill(doomed)
        driver.communicate()
        assert driver.returncode == -signal.SIGKILL
        n_killed += 1
    assert n_killed >= 3
    code, out, err = cli("run", "tiny.yaml", "--dir", "kept", cwd=work)
    assert code == 0, err
    assert "4 trials, 8 runs complete" in out
    check_whole(work, undisturbed)


def test_driver_killed_while_mlflow_makes_its_database_ends_as_if_undisturbed(tmp_path, undisturbed):
    write_study(tmp_path, **LONG)
    partial = tmp_path / "kept" / "mlflow.db.partial"
    n_killed_in_it = 0
    for delay in (0, 0.05, 0.2, 0.4, 0.6, 0.9):  # making it takes between one second and three
        driver = start(tmp_path)
        while driver.poll() is None and not partial.exists():
            time.sleep(0.01)
        time.sleep(delay)
        assert driver.poll() is None, driver.stderr.read()
        kill([driver.pid, *descendants(driver.pid)])
        driver.communicate()
        n_killed_in_it += partial.exists()
        partial.unlink(missing_ok=True) if delay == 0.05 else None  # with what was left, and without
    assert n_killed_in_it >= 2
    code, out, err = cli("run", "tiny.yaml", "--dir", "kept", cwd=tmp_path)
    assert code == 0, err
    assert "4 trials, 8 runs complete" in out
    assert not list((tmp_path / "kept").glob("mlflow.db*.*"))
    check_whole(tmp_path, undisturbed)


def ctrl_c(driver):
    """As a terminal does: to the driver and whatever is in its group."""
    os.killpg(driver.pid, signal.SIGINT)


def terminate(driver):
    """As a system that ends a job."""
    driver.terminate()


@pytest.mark.parametrize("send", [ctrl_c, terminate], ids=["ctrl_c", "sigterm"])
def test_driver_that_is_stopped_goes_on_later(work, undisturbed, send):
    driver = start(work)
    wait_for_results(driver, 2)
    send(driver)
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 130
    assert "stopped; finished runs are kept. To continue, give the same command again (kept)" in out
    assert "Traceback" not in out + err
    assert len(results_at(work / "kept")) < 8
    code, _, err = cli("run", "tiny.yaml", "--dir", "kept", cwd=work)
    assert code == 0, err
    check_whole(work, undisturbed)


def test_two_drivers_at_once_are_one(work, undisturbed):
    both = [start(work), start(work)]
    ends = [(*process.communicate(timeout=300), process.returncode) for process in both]
    assert sorted(code for _, _, code in ends) == [0, 2]
    [(out, err, _)] = [end for end in ends if end[2] == 2]
    assert out == ""
    assert "another driver runs this study" in err
    check_whole(work, undisturbed)


def test_study_on_a_ray_of_its_own_listens_on_this_machine_alone(work):
    driver = start(work)
    wait_for_results(driver, 1)
    processes = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    listening = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for socket in process.net_connections(kind="tcp"):
                if socket.status == psutil.CONN_LISTEN:
                    listening.setdefault(socket.laddr.ip.removeprefix("::ffff:"), []).append(process.name())
    driver.communicate(timeout=300)
    assert set(listening) == {"127.0.0.1"}, listening
    assert {"gcs_server", "raylet"} <= set(listening["127.0.0.1"])


# Workers --------------------------------------------------------------------------------------------------------------


def test_worker_killed_in_the_middle_of_a_unit_is_replaced(work, undisturbed):
    driver = start(work)
    wait_for_results(driver, 1)
    time.sleep(0.3)
    kill([wait_for_trainer(driver)])
    wait_for_results(driver, 4)
    kill([wait_for_trainer(driver)])
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    assert "4 trials, 8 runs complete" in out
    assert "Traceback" not in out + err
    check_whole(work, undisturbed)


def test_worker_killed_while_it_starts_is_replaced(work, undisturbed):
    driver = start(work)
    kill([wait_for_trainer(driver)])  # before its first unit has reported anything
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    assert "4 trials, 8 runs complete" in out
    check_whole(work, undisturbed)


def test_unit_whose_worker_dies_three_times_is_a_recorded_failure(tmp_path):
    endless = {"protocol": {"steps": 1_000_000, "eval_every": 1_000_000}, "execution": {"checkpoint_seconds": 0.1}}
    write_study(tmp_path, arms=[DENSE], seeds=1, **endless)
    driver = start(tmp_path, "--tracking", "off")
    killed, seen = [], set()
    while len(killed) < 3:
        killed.append(wait_for_trainer(driver, other_than=killed))
        while not (new := set((tmp_path / "kept" / "storage").glob("*/checkpoints/*/*.safetensors")) - seen):
            assert driver.poll() is None  # it has still to import what it trains with
        kill(killed[-1:])
        seen |= new
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 1, err  # every run failed
    assert "1 trials, 0 runs complete, 1 failed" in out
    [result] = results_at(tmp_path / "kept").values()
    assert result.failure.startswith("its worker died 3 times without progress: ")
    assert "Ray does not say why" not in result.failure


def test_unit_too_large_for_its_node_is_tried_alone_and_then_a_recorded_failure(tmp_path, monkeypatch):
    endless = {"protocol": {"steps": 1_000_000, "eval_every": 1_000_000}, "execution": {"checkpoint_seconds": 0.1}}
    write_study(tmp_path, arms=[DENSE], seeds=1, **endless)
    # Ray looks every 12 s and ends the worker, which has begun by then unless the machine is slow.
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "12000")
    driver = start(tmp_path, "--tracking", "off")
    out, err = driver.communicate(timeout=600)
    assert driver.returncode == 1, err
    assert "Traceback" not in out + err
    results = results_at(tmp_path / "kept").values()
    if not results:  # on a slow machine, workers die before they begin
        assert "given up after 3 workers for each died before they began" in out + err
        return
    assert "a node ran out of memory, so Ray ended a worker; from here on at most" in out + err
    assert "1 trials, 0 runs complete, 1 failed" in out
    [result] = results
    assert result.failure.startswith("its worker died 3 times without progress: ")


def test_study_on_a_node_that_cannot_import_it_stops_and_fails_nothing(work, undisturbed, monkeypatch):
    broken = work / "broken"
    broken.mkdir()
    script = (
        "import sys\nif any('default_worker' in word for word in sys.orig_argv):\n    sys.modules['mpo_core'] = None\n"
    )
    (broken / "sitecustomize.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(broken))
    code, out, err = cli("run", "tiny.yaml", "--dir", "kept", cwd=work)
    assert code == 1
    [line] = [line for line in out.splitlines() if "cannot import this program" in line]
    assert "import of mpo_core halted" in line  # Python's own words
    assert "Traceback" not in out + err
    assert results_at(work / "kept") == {}

    monkeypatch.delenv("PYTHONPATH")
    code, _, err = cli("run", "tiny.yaml", "--dir", "kept", cwd=work)
    assert code == 0, err
    check_whole(work, undisturbed)


def test_study_whose_last_node_dies_stops_and_goes_on_later(work, undisturbed):
    driver = start(work)
    wait_for_results(driver, 2)
    [raylet] = [pid for pid in descendants(driver.pid) if Path(f"/proc/{pid}/comm").read_text() == "raylet\n"]
    kill([raylet, *descendants(raylet)])  # a node's own process, and the workers on it
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 1, err
    assert "no node of Ray is left that can hold a unit" in " ".join(out.split())
    assert "Traceback" not in out + err
    code, _, err = cli("run", "tiny.yaml", "--dir", "kept", cwd=work)
    assert code == 0, err
    check_whole(work, undisturbed)


# Storage --------------------------------------------------------------------------------------------------------------


def test_storage_that_breaks_on_ray_stops_the_study_and_loses_nothing(work, undisturbed):
    driver = start(work)
    wait_for_results(driver, 2)
    storage = work / "kept" / "storage"
    storage.rename(work / "kept" / "away")
    storage.write_text("a file where a folder was")
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 1, err
    assert "stopped early with" in out
    assert "Not a directory" in " ".join(out.split())
    assert "Traceback" not in out + err
    assert all(result.state == "complete" for result in results_at(work / "kept").values())

    storage.unlink()
    (work / "kept" / "away").rename(storage)
    code, _, err = cli("run", "tiny.yaml", "--dir", "kept", cwd=work)
    assert code == 0, err
    check_whole(work, undisturbed)


def test_damaged_checkpoints_are_said_on_the_drivers_display_and_passed_over(work, undisturbed):
    driver = start(work)
    wait_for_results(driver, 1)
    checkpoints: list[Path] = []
    deadline = time.monotonic() + 300
    while not checkpoints and time.monotonic() < deadline:
        checkpoints = list((work / "kept" / "storage").glob("*/checkpoints/*/*.safetensors"))
    time.sleep(0.5)
    kill([driver.pid, *descendants(driver.pid)])
    driver.communicate()
    folders = list((work / "kept" / "storage").glob("*/checkpoints/*"))
    newest = [max(folder.glob("*.safetensors")) for folder in folders if list(folder.glob("*.safetensors"))]
    assert newest
    for path in newest:
        path.write_bytes(path.read_bytes()[:-7])
    code, out, err = cli("run", "tiny.yaml", "--dir", "kept", cwd=work)
    assert code == 0, err
    for path in newest:
        key = f"{path.parent.name}/{path.name}"  # both runs may have been at the same step
        [line] = [line for line in out.splitlines() if line.startswith("damaged checkpoint") and key in line]
        assert line.endswith("; training from the beginning") or "; continuing from the older one " in line
    check_whole(work, undisturbed)
