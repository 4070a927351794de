from __future__ import annotations

import moocore
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.statistics import draws
from analysis.statistics.band import mean_frontier_band
from analysis.statistics.draws import SeedMeans
from analysis.statistics.running_best import SortedSizes
from analysis.statistics.seed_blocks import uneven_two_way
from analysis.statistics.support import frontier_support, size_needed

DIRECTIONS = st.sampled_from(["minimize", "maximize"])


def study(seed, n=3, n_configurations=12):
    """Sizes with ties, in no order."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, 9, n_configurations) * 10.0, rng.normal(size=(n, n_configurations))


def redrawn(sizes, values, n_draws, seed=0):
    """The draws that support is counted over, in the order of the input."""
    order = np.argsort(sizes, kind="stable")
    ascending = np.vstack(list(SeedMeans.of(values[:, order]).contrast_draws(n_draws, np.random.default_rng(seed))))
    given = np.empty_like(ascending)
    given[:, order] = ascending
    return given


@given(st.integers(0, 2**32), DIRECTIONS, st.integers(2, 4), st.integers(1, 15), st.sampled_from([0.0, 0.3]))
def test_frontier_support_counts_the_masks_of_moocore(seed, direction, n, n_configurations, epsilon):
    sizes, values = study(seed, n, n_configurations)
    maximise = direction == "maximize"
    on, near = np.zeros(sizes.size), np.zeros(sizes.size)
    for row in redrawn(sizes, values, 20):
        points = np.column_stack((sizes, row))
        on += moocore.is_nondominated(points, maximise=[False, maximise], keep_weakly=True)
        better_by = (row - row[:, None]) if maximise else (row[:, None] - row)
        near += np.where(sizes <= sizes[:, None], better_by, -np.inf).max(axis=1) <= epsilon
    support = frontier_support(
        sizes, values, np.random.default_rng(0), epsilon=epsilon, direction=direction, n_draws=20
    )
    assert support.on_frontier == pytest.approx(on / 20)
    assert support.near_frontier == pytest.approx(near / 20)


def test_frontier_support_of_two_is_a_one_sided_p_value():
    """The larger of two is on the frontier if it is better: the t probability of the block contrast."""
    values = np.array([[1.0, 0.8], [1.1, 1.0], [0.9, 0.85]])
    difference = values[:, 0] - values[:, 1]
    p = stats.ttest_1samp(difference, 0, alternative="greater").pvalue
    support = frontier_support([1, 2], values, np.random.default_rng(0), epsilon=0, n_draws=100_000)
    assert support.on_frontier[0] == 1
    assert 0.02 < p < 0.2
    assert support.on_frontier[1] == pytest.approx(1 - p, abs=4 * np.sqrt(p * (1 - p) / 100_000))


def test_frontier_support_ignores_what_seeds_share():
    sizes, values = study(1)
    shifted = values + np.array([[4.0], [-8.0], [2.0]])
    before, after = (
        frontier_support(sizes, each, np.random.default_rng(0), epsilon=0.2, n_draws=500) for each in (values, shifted)
    )
    assert after.on_frontier == pytest.approx(before.on_frontier)
    assert after.near_frontier == pytest.approx(before.near_frontier)


def test_frontier_support_without_noise_is_the_mask():
    support = frontier_support([1, 2, 2, 3], [[4, 3, 3.1, 3.05]] * 2, np.random.default_rng(0), epsilon=0.06, n_draws=9)
    assert support.on_frontier.tolist() == [1, 1, 0, 0]
    assert support.near_frontier.tolist() == [1, 1, 0, 1]


def test_support_does_not_depend_on_the_number_drawn_at_once(monkeypatch):
    sizes, values = study(2)
    found = []
    for n_values in (draws.CHUNK_VALUES, 1, 7 * 12):
        monkeypatch.setattr(draws, "CHUNK_VALUES", n_values)
        support = frontier_support(sizes, values, np.random.default_rng(0), epsilon=0.1, n_draws=101)
        needed = size_needed(sizes, values, 3, np.random.default_rng(0), delta=0.1, n_draws=101)
        found.append(np.concatenate((*support, needed.support)).tolist())
    assert found[0] == found[1] == found[2]


@given(st.integers(0, 2**32), DIRECTIONS, st.sampled_from([0.0, 0.4]), st.integers(0, 11))
def test_size_needed_matches_a_loop(seed, direction, delta, reference):
    sizes, values = study(seed)
    sign = 1 if direction == "minimize" else -1

    def smallest(row):
        return sizes[sign * (row - row[reference]) <= delta].min()

    drawn = np.vstack(list(SeedMeans.of(values).contrast_draws(20, np.random.default_rng(0))))
    needed = size_needed(
        sizes, values, reference, np.random.default_rng(0), delta=delta, direction=direction, n_draws=20
    )
    assert needed.observed == smallest(values.mean(axis=0))
    assert needed.sizes.tolist() == sorted(set(sizes))
    expected = [np.mean([smallest(row) == size for row in drawn]) for size in needed.sizes]
    assert needed.support == pytest.approx(expected)
    assert needed.support.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2]], "n >= 2"),
        ([1, 2], "n >= 2"),
        ([[1, 2, 3], [1, 2, 4]], "must hold, but got"),
        ([[1, np.inf], [1, 2]], "must be finite"),
        ([[1, np.nan], [1, 2]], "2 seeds or more"),
        ([[1, np.nan], [1, 2], [np.inf, 3]], "finite"),
    ],
)
def test_frontier_support_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        frontier_support([1, 2], values, np.random.default_rng(0), epsilon=0)


# The draws and the kernel ---------------------------------------------------------------------------------------------


def test_draws_have_the_means_and_errors_of_the_two_way_layout():
    values = np.random.default_rng(6).normal(size=(4, 5)) + np.array([[2.0], [0.0], [-1.0], [3.0]])
    seed_means = SeedMeans.of(values)
    residuals = values - values.mean(axis=0) - values.mean(axis=1)[:, None] + values.mean()
    assert seed_means.residual_df == 12
    assert seed_means.residual_se == pytest.approx(np.sqrt((residuals**2).sum() / 12 / 4))
    assert seed_means.grand_se == pytest.approx(stats.sem(values.mean(axis=1)))
    assert seed_means.marginal_se**2 == pytest.approx(seed_means.grand_se**2 + 0.8 * seed_means.residual_se**2)
    assert 3 <= seed_means.marginal_df <= 15

    rng, n_draws = np.random.default_rng(0), 200_000
    contrast, normal, shifted = (
        np.vstack(list(draw(n_draws, rng)))
        for draw in (seed_means.contrast_draws, seed_means.noise_draws, seed_means.draws)
    )
    variance, grand = seed_means.residual_se**2, seed_means.grand_se**2
    for drawn in (contrast, normal, shifted):
        assert drawn.mean(axis=0) == pytest.approx(seed_means.means, abs=0.03)
    assert normal.var(axis=0) == pytest.approx(variance, rel=0.03)
    assert contrast.var(axis=0) == pytest.approx(variance * 12 / 10, rel=0.03)  # t with 12 degrees of freedom
    # The mean of all is t with n − 1 = 3 degrees of freedom; differences are as in the contrasts.
    low, high = np.quantile(shifted.mean(axis=1), [0.025, 0.975])
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 3) * np.sqrt(grand), rel=0.03)
    assert (shifted[:, 0] - shifted[:, 1]).var() == pytest.approx(2 * variance * 12 / 10, rel=0.03)


def test_draws_stand_still_on_average_where_seeds_do():
    values = np.random.default_rng(7).normal(size=(4, 5))
    values -= values.mean(axis=1)[:, None]
    drawn = np.vstack(list(SeedMeans.of(values).draws(50, np.random.default_rng(0))))
    assert drawn.mean(axis=1) == pytest.approx(np.zeros(50), abs=1e-12)
    assert drawn.std() > 0.1


def test_marginal_df_without_noise_is_that_of_the_seeds():
    assert SeedMeans.of([[1, 2], [1, 2], [1, 2]]).marginal_df == 2


UNEVEN = np.array([[1.0, 2.5, 0.8, np.nan, np.nan], [2, 3, 2.2, 4.5, 1], [np.nan, 7, np.nan, 8.6, 5.1]]).T


def test_draws_of_unequal_seeds_share_what_their_seeds_share():
    seed_means = SeedMeans.of(UNEVEN)
    model = uneven_two_way(UNEVEN.T)
    assert seed_means.means == pytest.approx(np.nanmean(UNEVEN, axis=0))
    counts = np.array([3, 5, 3])
    assert seed_means.marginal_se == pytest.approx(np.sqrt(model.marginal_variance / counts))
    drawn = np.vstack(list(seed_means.noise_draws(200_000, np.random.default_rng(0))))
    assert drawn.mean(axis=0) == pytest.approx(seed_means.means, abs=0.02)
    # Means over n and m seeds, of which they share k, have the covariance k/nm Var(b).
    shared = np.array([[3, 3, 1], [3, 5, 3], [1, 3, 3]]) / np.outer(counts, counts)
    expected = model.seed_variance * shared + np.diag(model.residual_variance / counts)
    assert model.seed_variance > 0
    assert np.cov(drawn.T) == pytest.approx(expected, rel=0.05)


def test_draws_of_unequal_seeds_move_with_their_configurations_whatever_is_drawn_at_once(monkeypatch):
    seed_means = SeedMeans.of(UNEVEN)
    whole = np.vstack(list(seed_means.draws(50, np.random.default_rng(1))))
    with monkeypatch.context() as patch:
        patch.setattr(draws, "CHUNK_VALUES", 7 * 3)
        assert (whole == np.vstack(list(seed_means.draws(50, np.random.default_rng(1))))).all()
    turned = seed_means.take(np.array([2, 0, 1]))
    assert turned.means.tolist() == seed_means.means[[2, 0, 1]].tolist()
    part = seed_means.take(np.array([1]))  # with the noise of all
    assert np.vstack(list(part.noise_draws(200_000, np.random.default_rng(0)))).std() == pytest.approx(
        np.sqrt((seed_means.uneven.residual_variance + seed_means.uneven.seed_variance) / 5), rel=0.02
    )
    assert turned.uneven.weights.tolist() == uneven_two_way(UNEVEN.T[[2, 0, 1]]).weights.tolist()


def test_band_is_as_wide_as_the_mean_that_attains_the_frontier_leaves_it():
    values = np.array([[3.0, 2.9, 3.1, np.nan], [2.0, 2.2, 1.9, 2.1], [2.5, 2.6, 2.4, np.nan]]).T
    band = mean_frontier_band([1, 2, 3], values, np.random.default_rng(0))
    width = (band.high - band.low) / 2
    assert width[1] == width[2]  # the third is no better than the second
    assert width[0] / width[1] == pytest.approx(np.sqrt(4 / 3))


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
