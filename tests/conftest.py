"""Tests that span packages run whole studies, with the same helpers as the tests of `study` and `mpo_core`."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

# Before PyTorch is imported: workers with more threads than cores take several times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path += [str(Path(__file__).parent / package) for package in ("study", "mpo_core")]


@pytest.fixture(autouse=True)
def _no_writer_is_left():
    """A test that leaves a writer of MLflow in the process fails, and not the next one that runs the command."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if thread.name == "tracking":
            thread.join(60)
            assert not thread.is_alive(), "a writer of MLflow is left in the process"
