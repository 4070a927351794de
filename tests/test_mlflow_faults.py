"""An MLflow server that is away, dies or hangs while a study runs: the study goes on, and its runs come after."""

# ruff: noqa: F811 (fixtures are imported, and then the names of parameters)
from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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
    contents,
    ledger_at,
    mlflow_client,
    mlflow_template,  # noqa: F401 (a fixture)
    nothing_left_running,  # noqa: F401 (a fixture)
    printed_by_run,
    results_at,
    run_at,
)

from study.commands.opening import study_corpus
from study.errors import StudyError
from study.ledger.directory import DEFAULT_TRACKING_URI, StudyDirectory
from study.spec.study_file import load_config
from study.tracking.background import BackgroundTracker, is_left_writing
from study.tracking.opening import open_tracker, study_record
from study.tracking.server import serve
from study.training.storage import Storage

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
    assert driver.returncode == (1 if "some runs are not in MLflow" in out else 0), err
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
    assert "some runs are not in MLflow: " in out
    assert "4 trials, 8 runs complete" in out
    assert "fix this, then: mpo-study sync kept" in out
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
    assert line == "stopping; finished runs are written to MLflow first (press Ctrl-C again to skip that)\n"
    driver.send_signal(signal.SIGINT)
    out, err = driver.communicate(timeout=20)
    assert driver.returncode == 130
    assert "stopped; finished runs are kept. To continue, give the same command again (kept)" in out
    assert "Traceback" not in out + err
    assert 3 <= len(results_at(work / "kept")) < 8
    server.signal(signal.SIGCONT)
    code, _, err = cli("run", "tiny.yaml", "--dir", "kept", cwd=work)
    assert code == 0, err
    check_whole(work, undisturbed)


# What comes between a study and its server ----------------------------------------------------------------------------


class Between(ThreadingHTTPServer):
    """A proxy of a real server, which answers by itself where `mode` says how."""

    daemon_threads = True

    def __init__(self, url):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.upstream, self.mode = url, "pass"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        mode = self.server.mode
        if mode == "pass":
            return self._pass_on(body)
        if mode == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            while self.server.mode == "drip":
                self.wfile.write(b" ")
                time.sleep(0.3)
            self.close_connection = True
            return None
        answers = {
            "500": (500, b"no"),
            "html": (200, b"<html>Please sign in</html>"),
            "empty": (200, b""),
            "404": (404, b"no"),
        }
        code, text = answers[mode]
        self._send(code, text)
        return None

    def _pass_on(self, body):
        request = urllib.request.Request(self.server.upstream + self.path, body or None, method=self.command)
        request.add_header("Content-Type", self.headers.get("Content-Type", "application/json"))
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                self._send(answer.status, answer.read())
        except urllib.error.HTTPError as error:
            self._send(error.code, error.read())
        except OSError:
            self._send(502, b"nobody there")

    def _send(self, code, text):
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_):
        """Nobody reads it."""


@pytest.fixture
def between(server):
    server.start()
    proxy = Between(server.url)
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def test_whatever_answers_instead_of_mlflow_it_is_back_without_sync(work, undisturbed, server, between):
    file, directory, said = work / "tiny.yaml", StudyDirectory(work / "kept"), []
    run_at(file, directory.path)
    config, ledger = load_config(file), ledger_at(file, directory.path)
    storage, record = Storage(directory.storage_url()), study_record(config, ledger, study_corpus(config))
    directory.write(config, ledger.uuid, DEFAULT_TRACKING_URI, storage.url)  # which the server serves
    background = BackgroundTracker(lambda sign: open_tracker(between.url, directory, storage, record), said.append)

    def put(trial, mode, n_seeds=2):
        n_said, between.mode = len(said), mode
        background.put(trial, ledger.on_record(trial), n_seeds)
        wait_until(lambda: len(said) > n_said)
        assert said[-1] != "MLflow is reachable again"
        if mode == "pass":
            server.start()
        between.mode = "pass"
        wait_until(lambda: not background.n_pending)
        assert said[-1] == "MLflow is reachable again"

    trials = list(ledger.trials.values())
    background.put(trials[0], ledger.on_record(trials[0]), 2)
    wait_until(lambda: not background.n_pending)
    for trial, mode in zip(trials[1:], ("500", "html", "empty"), strict=True):
        put(trial, mode)
    put(trials[1], "404", n_seeds=3)  # as if there were more to come
    server.kill()
    put(trials[1], "pass")
    assert background.close(0) is None
    ledger.close()
    assert len(said) == 2 * 5
    check_whole(work, undisturbed)


def wait_until(is_so):
    deadline = time.monotonic() + 400
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_server_that_drips_holds_up_neither_the_start_nor_the_end(work, undisturbed, between, monkeypatch):
    between.mode = "drip"
    monkeypatch.setattr("study.commands.run._OPENING_SECONDS", 2.0)
    monkeypatch.setattr("study.tracking.background.BackgroundTracker.__init__.__defaults__", (0.0, 1.0, 2.0))
    outcome, printed = printed_by_run(work / "tiny.yaml", work / "kept", tracking=between.url)
    assert (outcome.n_complete, outcome.n_missing) == (8, 0)
    assert (
        "MLflow is unreachable, the study continues and will write to it later: it has not answered within 2 seconds"
        in printed
    )
    assert outcome.tracking_trouble == "it has not answered within 2 seconds"
    between.mode = "500"
    wait_until(lambda: not is_left_writing())  # it would write the rest before `sync` does
    between.mode = "pass"
    code, _, err = cli("sync", "kept", cwd=work)
    assert (code, err) == (0, "")
    check_whole(work, undisturbed)


# MLflow's own server --------------------------------------------------------------------------------------------------


def test_ui_ends_in_one_line_where_its_server_dies_at_the_start(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    ready = []
    with pytest.raises(StudyError, match=r"^MLflow's server ended with code 1: .*file is not a database$"):
        serve(f"sqlite:///{tmp_path}/mlflow.db", f"file://{tmp_path}/artifacts", port, lambda: ready.append(1))
    assert ready == []


def test_mlflow_does_what_a_deleted_experiment_is_said_to_need(work):
    file, folder = work / "tiny.yaml", work / "kept"
    run_at(file, folder, "seeds=1", tracking=None)
    before = contents(folder / "mlflow.db")

    def delete_and_follow(number):
        client = mlflow_client(folder / "mlflow.db")
        client.delete_experiment(client.get_experiment_by_name("tiny").experiment_id)
        code, _, err = cli("sync", "kept", cwd=work)
        assert (code, err.count("\n")) == (2, 1)
        advice = re.findall(r"it: (.*?)(?:; or|\n|$)", err)[number]
        subprocess.run(f"PATH={Path(sys.executable).parent}:$PATH; {advice}", shell=True, check=True, cwd=work)
        code, _, err = cli("sync", "kept", cwd=work)
        assert (code, err) == (0, "")

    delete_and_follow(0)
    assert contents(folder / "mlflow.db") == before
    delete_and_follow(1)
    assert sorted(contents(folder / "mlflow.db")) == sorted(before)
