"""Real servers for the tests marked `service`: an S3 server and a PostgreSQL, each from a package, on this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

S3_SECRET = "an-s3-secret-that-nobody-may-see"
POSTGRESQL_PASSWORD = "a-database-password-that-nobody-may-see"


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_listening(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server does not come up")


@contextmanager
def s3_server() -> Iterator[tuple[subprocess.Popen, dict[str, str]]]:
    """moto's server, and the environment by which every S3 client of this machine finds it."""
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "an-access-key",
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    forget_clients()
    try:
        wait_until_listening(port, process)
        yield process, environment
    finally:
        forget_clients()
        process.kill()
        process.wait()


def forget_clients() -> None:
    """fsspec keeps its clients, and they the server that they were made for."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def _s3() -> Iterator[dict[str, str]]:
    with s3_server() as (_, environment):
        yield environment


@pytest.fixture
def bucket(_s3, monkeypatch, tmp_path) -> str:
    """URL of an empty bucket, which this process and those it starts can use."""
    forget_clients()
    for name, value in _s3.items():
        monkeypatch.setenv(name, value)
    name = "bucket-" + tmp_path.name.replace("_", "-").lower()[:50].strip("-")
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="module")
def _postgresql():
    # Not in pytest's folder: where root runs the tests, the server has another user, who must get there.
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        import pgserver

        server = pgserver.get_server(Path(folder) / "data")
        server.psql(f"ALTER USER postgres PASSWORD '{POSTGRESQL_PASSWORD}'")
        yield server
        server.cleanup()


@pytest.fixture
def new_database(_postgresql):
    """Makes an empty database with this name, and gives its URL, with a password in it."""

    def make(name: str) -> str:
        _postgresql.psql(f'CREATE DATABASE "{name}"')
        socket_folder = Path(_postgresql.get_uri().partition("host=")[2])
        return f"postgresql://postgres:{POSTGRESQL_PASSWORD}@/{name}?host={socket_folder}"

    return make


def everything_in(folder: Path) -> bytes:
    """All that is in the files below a folder."""
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
