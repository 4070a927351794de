from __future__ import annotations

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.statistics import posterior
from analysis.statistics.frontier_probability import frontier_probability, size_needed
from analysis.statistics.posterior import Posterior
from analysis.statistics.running_best import SortedSizes

DIRECTIONS = st.sampled_from(["minimize", "maximize"])


def study(seed, n=3, n_configurations=12):
    """Sizes with ties, in no order."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, 9, n_configurations) * 10.0, rng.normal(size=(n, n_configurations))


def drawn_of(sizes, values, n_draws):
    return np.vstack(list(Posterior.of(sizes, values).draws(n_draws, np.random.default_rng(0))))


@given(st.integers(0, 2**32), DIRECTIONS, st.integers(2, 4), st.integers(1, 15), st.sampled_from([0.0, 0.3]))
def test_probabilities_count_the_masks_of_moocore(seed, direction, n, n_configurations, epsilon):
    sizes, values = study(seed, n, n_configurations)
    maximise = direction == "maximize"
    on, near = np.zeros(sizes.size), np.zeros(sizes.size)
    for row in drawn_of(sizes, values, 20):
        points = np.column_stack((sizes, row))
        on += moocore.is_nondominated(points, maximise=[False, maximise], keep_weakly=True)
        better_by = (row - row[:, None]) if maximise else (row[:, None] - row)
        near += np.where(sizes <= sizes[:, None], better_by, -np.inf).max(axis=1) <= epsilon
    found = frontier_probability(
        sizes, Posterior.of(sizes, values), np.random.default_rng(0), epsilon=epsilon, direction=direction, n_draws=20
    )
    assert found.on_frontier == pytest.approx(on / 20)
    assert found.near_frontier == pytest.approx(near / 20)


def test_probability_without_noise_is_the_mask():
    exact = Posterior.of([1, 2, 2, 3], [[4, 3, 3.1, 3.05]] * 2)
    found = frontier_probability([1, 2, 2, 3], exact, np.random.default_rng(0), epsilon=0.06, n_draws=9)
    assert found.on_frontier.tolist() == [1, 1, 0, 0]
    assert found.near_frontier.tolist() == [1, 1, 0, 1]


def test_probabilities_do_not_depend_on_the_number_drawn_at_once(monkeypatch):
    sizes, values = study(2)
    found = []
    for n_values in (posterior.CHUNK_VALUES, 1, 7 * 12):
        monkeypatch.setattr(posterior, "CHUNK_VALUES", n_values)
        given_them = Posterior.of(sizes, values)
        chances = frontier_probability(sizes, given_them, np.random.default_rng(0), epsilon=0.1, n_draws=101)
        needed = size_needed(sizes, given_them, 3, np.random.default_rng(0), delta=0.1, n_draws=101)
        found.append(np.concatenate((*chances, needed.probability)).tolist())
    assert found[0] == found[1] == found[2]


@given(st.integers(0, 2**32), DIRECTIONS, st.sampled_from([0.0, 0.4]), st.integers(0, 11))
def test_size_needed_matches_a_loop(seed, direction, delta, reference):
    sizes, values = study(seed)
    sign = 1 if direction == "minimize" else -1

    def smallest(row):
        return sizes[sign * (row - row[reference]) <= delta].min()

    needed = size_needed(
        sizes, Posterior.of(sizes, values), reference, np.random.default_rng(0), delta=delta, direction=direction,
        n_draws=20,
    )  # fmt: skip
    assert needed.observed == smallest(values.mean(axis=0))
    assert needed.sizes.tolist() == sorted(set(sizes))
    drawn = drawn_of(sizes, values, 20)
    expected = [np.mean([smallest(row) == size for row in drawn]) for size in needed.sizes]
    assert needed.probability == pytest.approx(expected)
    assert needed.probability.sum() == pytest.approx(1)


# The kernel -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), DIRECTIONS, st.integers(1, 15))
def test_running_best_is_the_best_of_all_that_are_no_larger(seed, direction, n_configurations):
    sizes, values = study(seed, n_configurations=n_configurations)
    sorted_sizes = SortedSizes.of(sizes)
    best = min if direction == "minimize" else max
    running = sorted_sizes.running_best(values, direction)
    assert sorted_sizes.distinct.tolist() == sorted(set(sizes))
    for row, ours in zip(values, running, strict=True):
        assert ours.tolist() == [best(row[sizes <= size]) for size in sorted_sizes.distinct]
    on_frontier, behind = sorted_sizes.standing(values, direction)
    assert (behind >= 0).all()
    assert (on_frontier <= (behind == 0)).all()


def test_sorted_sizes_refuses():
    with pytest.raises(ValueError, match="must hold, but got"):
        SortedSizes.of([[1, 2]])
    with pytest.raises(ValueError, match="must be finite"):
        SortedSizes.of([1, np.nan])
    with pytest.raises(ValueError, match="must hold, but got"):
        SortedSizes.of([1, 2]).running_best(np.zeros((2, 3)), "minimize")
