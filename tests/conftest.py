"""Tests that span packages run whole studies, with the same helpers as the tests of `study`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "study"))
