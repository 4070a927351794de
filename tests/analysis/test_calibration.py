"""Errors and power of a whole family of declared tests, in simulated studies with known truth."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.calibration import KINDS, SEEDS, mixed_errors, null_errors, power

CASES = [
    pytest.param(kind, n, marks=[] if (kind, n) == ("equal", 3) else pytest.mark.slow) for kind in KINDS for n in SEEDS
]


def assert_at_most(hits, level):
    """The share of hits, less four standard errors of the level."""
    assert hits.mean() <= level + 4 * np.sqrt(level * (1 - level) / len(hits))


@pytest.mark.parametrize(("kind", "n"), CASES)
def test_a_family_errs_in_few_studies(kind, n):
    level = 0.05
    assert_at_most(null_errors(21, kind, n, 500), level)
    wrong, holds = mixed_errors(22, kind, n, 500)
    assert_at_most(wrong, level)
    assert_at_most(~holds, level)


def test_the_gate_finds_what_single_sizes_do_not():
    gate, size = power(23, "equal", 3, 2.0, 200)
    assert gate > 0.7
    assert size < 0.1


@pytest.mark.slow
def test_five_seeds_find_at_each_size_what_three_do_not():
    assert power(24, "equal", 3, 4.0, 200)[1] < 0.2
    assert power(25, "equal", 5, 4.0, 200)[1] > 0.8
