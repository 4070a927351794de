"""Tests that span packages run whole studies, with the same helpers as the tests of `study` and `mpo_core`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before PyTorch is imported: workers with more threads than cores take several times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path += [str(Path(__file__).parent / package) for package in ("study", "mpo_core")]
