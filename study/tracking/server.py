"""MLflow's own server for a study's database, reachable only from this machine."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable

from analysis.runs.urls import hide_password
from study.errors import StudyError

_LOOK_SECONDS = 0.1


def serve(uri: str, artifacts: str, port: int, on_ready: Callable[[], None]) -> None:
    """Serve a database on 127.0.0.1, until Ctrl-C or SIGTERM.

    Args:
        artifacts: place of the artifacts of experiments without their own place.
        on_ready: called once the server answers.

    Raises:
        StudyError: the port is taken, or the server ended by itself.
    """
    _check_port(port)
    settings = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_BACKEND_STORE_URI": uri,  # not an argument, which every user sees: may hold a password
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--default-artifact-root", artifacts]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = subprocess.Popen(
        command,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    log = _Log(server)
    try:
        while server.poll() is None and not _answers(port):
            time.sleep(_LOOK_SECONDS)
        if server.poll() is None:
            on_ready()
            log.show()
            server.wait()
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the server ends with this process
        server.terminate()
        server.wait()
        signal.signal(signal.SIGTERM, before)
    raise StudyError(f"MLflow's server ended with code {server.returncode}: {hide_password(log.error(), uri)}")


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise StudyError(f"--port {port}: cannot listen there: {error.strerror}; give another port") from None


def _answers(port: int) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


class _Log:
    """Output of a server: kept until the server is ready, and then shown; a failed start is reported in one line."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server, self._is_shown = server, False
        self._lines: deque[str] = deque(maxlen=100)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def show(self) -> None:
        self._is_shown = True

    def error(self) -> str:
        """The last line that names an error, otherwise the last line with text, after the server has ended."""
        self._thread.join(timeout=5)  # a child process of the server may keep its output open
        lines = [line.strip() for line in reversed(self._lines) if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return [*errors, *lines, "it printed nothing"][0]

    def _read(self) -> None:
        assert self._server.stdout is not None
        with self._server.stdout as output:
            for line in output:
                self._lines.append(line)
                if self._is_shown:
                    sys.stderr.write(line)
