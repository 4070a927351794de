"""Errors and power of a whole family of declared tests, in simulated studies with known truth."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.calibration import (
    KINDS,
    NOTHING,
    SEEDS,
    decide,
    decide_at_looks,
    gap,
    mixed_errors,
    null_errors,
    power,
    some,
)

CASES = [
    pytest.param(kind, n, marks=[] if (kind, n) == ("equal", 3) else pytest.mark.slow) for kind in KINDS for n in SEEDS
]


def assert_at_most(hits, level):
    """The share of hits, less four standard errors of the level."""
    assert hits.mean() <= level + 4 * np.sqrt(level * (1 - level) / len(hits))


@pytest.mark.parametrize(("kind", "n"), CASES)
def test_a_family_errs_in_few_studies(kind, n):
    level = 0.05
    assert_at_most(null_errors(decide(21, kind, n, NOTHING, 1.0, 500)), level)
    mixed = decide(22, kind, n, some(), 1.0, 500)
    assert_at_most(mixed_errors(mixed), level)
    assert_at_most(~mixed.covered, level)


def test_the_gate_finds_what_single_sizes_do_not():
    overall, size = power(decide(23, "equal", 3, gap(2.0), 1.0, 200))
    assert overall > 0.7
    assert size < 0.1


@pytest.mark.slow
def test_five_seeds_find_at_each_size_what_three_do_not():
    assert power(decide(24, "equal", 3, gap(4.0), 1.0, 200))[1] < 0.2
    assert power(decide(25, "equal", 5, gap(4.0), 1.0, 200))[1] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_looks_err_in_few_studies_though_seeds_are_added_for_what_is_undecided(kind):
    assert_at_most(null_errors(decide_at_looks(26, kind, NOTHING, 1.0, 300)[0]), 0.05)
    mixed, _ = decide_at_looks(27, kind, some(), 1.0, 300)
    assert_at_most(mixed_errors(mixed), 0.05)
    assert_at_most(~mixed.covered, 0.05)


def test_looks_find_nearly_what_all_seeds_find_with_fewer_runs():
    found, runs = decide_at_looks(28, "equal", gap(4.0), 1.0, 60)
    assert power(found)[1] > 0.95
    assert runs.max() <= 1
    assert runs.mean() < 0.95
