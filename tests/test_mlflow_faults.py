"""An MLflow server that is away, dies or hangs while a study runs: the study goes on, and its runs come after."""

# ruff: noqa: F811 (fixtures are imported, and then the names of parameters)
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from disturbance import (
    check_whole,
    start,
    undisturbed,  # noqa: F401 (a fixture)
    wait_for_results,
    work,  # noqa: F401 (a fixture)
)
from study_fixtures import (
    cli,
    mlflow_template,  # noqa: F401 (a fixture)
    nothing_left_running,  # noqa: F401 (a fixture)
    results_at,
)

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


class Server:
    """MLflow's own server over the database in a study's folder; up between `start` and `kill`."""

    def __init__(self, folder):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self.port = unused.getsockname()[1]
        self.url, self._folder, self._process = f"http://127.0.0.1:{self.port}", folder, None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self._folder / "mlartifacts")]
        settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._process = subprocess.Popen(
            command,
            env=os.environ | settings,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError("the server has not come up")

    def signal(self, number):
        os.killpg(self._process.pid, number)

    def kill(self):
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(work):
    server = Server(work / "kept")
    yield server
    server.kill()


def test_mlflow_away_at_the_start_and_killed_in_the_middle_has_every_run_in_the_end(work, undisturbed, server):
    driver = start(work, "--tracking", server.url)
    wait_for_results(driver, 1)
    server.start()
    wait_for_results(driver, 3)
    server.kill()
    wait_for_results(driver, 5)
    server.start()
    out, err = driver.communicate(timeout=300)
    assert "Traceback" not in out + err
    assert "4 trials, 8 runs complete" in out
    # Whether its last attempt came before or after the server was up again is a matter of moments.
    assert driver.returncode == (1 if "MLflow lacks some runs" in out else 0), err
    code, out, err = cli("sync", "kept", cwd=work)
    assert (code, err) == (0, "")
    assert out.startswith("MLflow has all 4 trials of tiny.")
    check_whole(work, undisturbed)


def test_study_ends_without_its_server_and_says_what_to_do(work, undisturbed, server):
    server.start()
    driver = start(work, "--tracking", server.url)
    wait_for_results(driver, 4)
    server.kill()
    out, err = driver.communicate(timeout=600)
    assert driver.returncode == 1, err
    assert "MLflow lacks some runs: " in out
    assert "4 trials, 8 runs complete" in out
    assert "once that is mended: mpo-study sync kept" in out
    server.start()
    code, _, err = cli("sync", "kept", cwd=work)
    assert (code, err) == (0, "")
    check_whole(work, undisturbed)


def test_second_ctrl_c_does_not_wait_for_an_mlflow_that_hangs(work, undisturbed, server):
    server.start()
    driver = start(work, "--tracking", server.url)
    wait_for_results(driver, 1)
    server.signal(signal.SIGSTOP)
    wait_for_results(driver, 3)
    driver.send_signal(signal.SIGINT)
    line = next(line for line in driver.stdout if line.startswith("stopping; "))
    assert line == "stopping; what is done is written to MLflow first (Ctrl-C again: leave that for later)\n"
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=20)
    assert driver.returncode == 130
    assert "stopped; what is done is kept. To go on: the same command again (kept)" in out
    assert "Traceback" not in out + err
    assert 3 <= len(results_at(work / "kept")) < 8
    server.signal(signal.SIGCONT)
    code, _, err = cli("run", "tiny.yaml", "--dir", "kept", cwd=work)
    assert code == 0, err
    check_whole(work, undisturbed)
