from __future__ import annotations

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.statistics.nondominated import frontier_mask, step_line

# Few distinct values, so that ties and equal points are common.
POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30)
DIRECTIONS = st.tuples(*[st.sampled_from(["minimize", "maximize"])] * 2)


def dominates(a, b, directions):
    signs = np.array([1 if direction == "minimize" else -1 for direction in directions])
    a, b = signs * a, signs * b
    return (a <= b).all() and (a < b).any()


@given(POINTS, DIRECTIONS)
def test_frontier_mask_matches_the_definition(points, directions):
    array = np.array(points, dtype=float).reshape(-1, 2)
    expected = [not any(dominates(other, point, directions) for other in array) for point in array]
    assert frontier_mask(array[:, 0], array[:, 1], directions).tolist() == expected


@given(POINTS.filter(bool), DIRECTIONS)
def test_frontier_mask_matches_moocore(points, directions):
    array = np.array(points, dtype=float)
    expected = moocore.is_nondominated(
        array, maximise=[direction == "maximize" for direction in directions], keep_weakly=True
    )
    assert frontier_mask(array[:, 0], array[:, 1], directions).tolist() == expected.tolist()


def test_frontier_mask_keeps_equal_points_and_drops_ties_in_one_objective():
    #      kept  kept  same x, worse y  same y, worse x  kept
    x = [1.0, 1.0, 1.0, 2.0, 3.0]
    y = [5.0, 5.0, 6.0, 5.0, 4.0]
    assert frontier_mask(x, y).tolist() == [True, True, False, False, True]


def test_frontier_mask_tells_neighbouring_floats_apart():
    x = [1.0, np.nextafter(1.0, 2.0)]
    assert frontier_mask(x, [2.0, 1.0]).tolist() == [True, True]
    assert frontier_mask(x, [1.0, 1.0]).tolist() == [True, False]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1], "must hold, but got"),
        ([[1]], [[1]], "must hold, but got"),
        ([1, np.nan], [1, 1], "must be finite"),
        ([1, 1], [1, np.inf], "must be finite"),
    ],
)
def test_frontier_mask_refuses(x, y, message):
    with pytest.raises(ValueError, match=message):
        frontier_mask(x, y)


@given(POINTS.filter(bool))
def test_step_line_bounds_what_was_attained(points):
    """Left of and below the line there is no point; on it, each x has the best y attained with as little x."""
    array = np.array(points, dtype=float)
    mask = frontier_mask(array[:, 0], array[:, 1])
    xs, ys = step_line(array[mask, 0], array[mask, 1], 10.0)
    assert xs[-1] == 10
    assert (np.diff(xs) >= 0).all()
    assert (np.diff(ys) <= 0).all()
    for x, y in array:
        assert y >= ys[xs <= x][-1]
    for x, y in array[mask]:
        assert (x, y) in set(zip(xs, ys, strict=True))
    assert ((np.diff(xs) == 0) | (np.diff(ys) == 0)).all()


def test_step_line_of_nothing_is_empty():
    xs, ys = step_line([], [], 10.0)
    assert xs.size == ys.size == 0
