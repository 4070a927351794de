"""Tests that span packages run whole studies, with the same helpers as the tests of `study` and `mpo_core`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent / package) for package in ("study", "mpo_core")]
