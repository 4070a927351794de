from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import posterior
from analysis.statistics.posterior import Posterior

NAN = np.nan
UNEVEN = np.array([[1.0, 2.5, 0.8, NAN, NAN], [2, 3, 2.2, 4.5, 1], [NAN, 7, NAN, 8.6, 5.1]]).T


def drawn_of(sizes, values, n_draws=20_000, seed=0):
    return np.vstack(list(Posterior.of(sizes, values).draws(n_draws, np.random.default_rng(seed))))


def by_integration(sizes, values, tau_of, sigma_of):
    """Posterior mean and variance of each true mean, by brute force over a grid of τ and σ, with dense matrices."""
    n, rows = values.shape
    y = values.mean(axis=0)
    residual = values - y - values.mean(axis=1)[:, None] + values.mean()
    df = (n - 1) * (rows - 1)
    s2 = (residual**2).sum() / df
    logs = np.log(sizes)
    degree = 1 if rows < 8 else 2
    x = np.vander(logs - logs.mean(), degree + 1)
    weights, means, seconds = [], [], []
    scale = np.sqrt(s2 / n)
    for sigma2 in sigma_of(s2, df):
        for tau, step in zip(*tau_of(scale, np.ptp(y)), strict=True):
            v = np.eye(rows) * (tau**2 + sigma2 / n)
            inverse = np.linalg.inv(v)
            precision = x.T @ inverse @ x
            beta = np.linalg.solve(precision, x.T @ inverse @ y)
            left = y - x @ beta
            density = step * tau / (1 + (tau / scale) ** 2) ** 1.5
            likelihood = -0.5 * (np.linalg.slogdet(v)[1] + np.linalg.slogdet(precision)[1] + left @ inverse @ left)
            kept = tau**2 / (tau**2 + sigma2 / n)
            mean = kept * y + (1 - kept) * x @ beta
            variance = kept * sigma2 / n + (1 - kept) ** 2 * np.diag(x @ np.linalg.inv(precision) @ x.T)
            weights.append(np.log(density) + likelihood)
            means.append(mean)
            seconds.append(variance + mean**2)
    weights = np.exp(np.array(weights) - max(weights))
    weights /= weights.sum()
    mean = weights @ np.array(means)
    return mean, weights @ np.array(seconds) - mean**2


@pytest.mark.parametrize("rows", [3, 7, 12])
@pytest.mark.parametrize("scatter", [0.0, 0.3, 3.0])
def test_draws_have_the_moments_of_a_fine_integration(rows, scatter):
    rng = np.random.default_rng(rows)
    sizes = np.geomspace(1e3, 1e6, rows)
    values = np.log10(sizes) + scatter * rng.normal(size=rows) + 0.5 * rng.normal(size=(5, rows))
    values -= values.mean(axis=1)[:, None]  # no shift that seeds share

    def taus(scale, reach):
        grid = np.geomspace(0.01 * scale, 4 * reach + scale, 200)
        return grid, np.gradient(grid)

    def sigmas(s2, df):
        return s2 * df / stats.chi2.ppf((np.arange(40) + 0.5) / 40, df)

    mean, variance = by_integration(sizes, values, taus, sigmas)
    drawn = drawn_of(sizes, values, 40_000)
    error = np.sqrt(variance / 40_000)
    assert np.abs(drawn.mean(axis=0) - mean).max() < 4 * error.max() + 0.02 * np.sqrt(variance).max()
    assert drawn.var(axis=0) == pytest.approx(variance, rel=0.08)


def test_means_far_apart_keep_their_noise_and_near_ones_are_shrunk_to_the_trend():
    rng = np.random.default_rng(1)
    sizes, noise = np.geomspace(1e3, 1e6, 20), 0.1 * rng.normal(size=(5, 20))
    far = drawn_of(sizes, 3 * rng.normal(size=20) + noise)
    assert far.std(axis=0) == pytest.approx(0.1 / np.sqrt(5), rel=0.25)
    near = drawn_of(sizes, np.log10(sizes) + noise)
    assert np.abs(near.mean(axis=0) - np.log10(sizes)).max() < np.abs(noise.mean(axis=0)).max()
    assert near.std(axis=0).max() < 0.1 / np.sqrt(5)


def test_one_configuration_has_its_t_interval():
    values = np.random.default_rng(3).normal(2, 0.4, (4, 1))
    drawn = drawn_of([7], values, 200_000)
    low, high = np.quantile(drawn, [0.025, 0.975])
    half_width = stats.t.ppf(0.975, 3) * values.std(ddof=1) / 2
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=0.02)


def test_what_seeds_share_moves_all_draws_together_and_no_difference():
    rng = np.random.default_rng(4)
    sizes, values = np.geomspace(10, 1000, 8), rng.normal(size=(4, 8))
    values -= values.mean(axis=1)[:, None]
    shifted = values + np.array([[4.0], [-8.0], [2.0], [2.0]])
    still, moved = drawn_of(sizes, values), drawn_of(sizes, shifted)
    assert np.diff(moved, axis=1).std(axis=0) == pytest.approx(np.diff(still, axis=1).std(axis=0), rel=0.05)
    assert still.mean(axis=1).std() < 0.5
    expected = stats.t.ppf(0.975, 3) * np.std([4, -8, 2, 2], ddof=1) / 2
    low, high = np.quantile(moved.mean(axis=1), [0.025, 0.975])
    assert (high - low) / 2 == pytest.approx(expected, rel=0.05)


def test_unequal_seeds_give_unequal_noise():
    rng = np.random.default_rng(5)
    values = 10 * np.arange(6) + rng.normal(size=(12, 6))
    values[3:, 1:] = NAN
    drawn = drawn_of(np.arange(1, 7), values)
    assert drawn[:, 1:].std(axis=0) / drawn[:, 0].std() == pytest.approx(np.full(5, 2), rel=0.3)


def test_configurations_without_a_common_seed_have_their_own_noise():
    values = np.full((9, 3), NAN)
    for row in range(3):
        values[3 * row : 3 * row + 3, row] = [0, 30, 10][row] + np.array([-1.0, 0, 1])
    drawn = drawn_of([1, 2, 4], values)
    assert drawn.mean(axis=0) == pytest.approx([0, 30, 10], abs=0.2)
    assert (drawn.std(axis=0) > 0.4).all()


def test_shifts_of_seeds_that_few_have_are_removed():
    rng = np.random.default_rng(6)
    truth = np.array([3.0, 1, 2, 5, 4, 6])
    values = truth + np.array([-5.0, 0, 4, 20, 30])[:, None] + 0.01 * rng.normal(size=(5, 6))
    values[3:, 2:] = NAN  # the first two have two further seeds, with large shifts
    found = Posterior.of(np.arange(1, 7), values)
    drawn = np.vstack(list(found.draws(2000, rng)))
    assert found.means[0] - found.means[2] == pytest.approx(1 + 49 / 5 + 1 / 3, abs=0.1)
    between = drawn - drawn[:, :1]
    assert between.mean(axis=0) == pytest.approx(truth - truth[0], abs=0.05)
    assert between.std(axis=0).max() < 0.05
    assert drawn[:, 0].std() > 1  # the level is as uncertain as the seeds' shifts make it


@pytest.mark.parametrize("values", [[[4, 3, 5.0]] * 3, [[4, 3, 5.0], [4, 3, NAN], [NAN, 3, 5], [4, NAN, 5]]])
def test_without_noise_the_draws_are_the_means(values):
    assert drawn_of([1, 2, 3], values, 4) == pytest.approx(np.tile([4, 3, 5.0], (4, 1)))


def test_draws_do_not_depend_on_the_number_drawn_at_once(monkeypatch):
    whole = drawn_of([1, 2, 3], UNEVEN, 50)
    monkeypatch.setattr(posterior, "CHUNK_VALUES", 7 * 3)
    assert (whole == drawn_of([1, 2, 3], UNEVEN, 50)).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2]], "n >= 2"),
        ([1, 2], "n >= 2"),
        ([[1, 2, 3], [1, 2, 4]], "must hold, but got"),
        ([[1, np.inf], [1, 2]], "must be finite"),
        ([[1, NAN], [1, 2]], "2 seeds or more"),
        ([[1, NAN], [1, 2], [np.inf, 3]], "finite"),
    ],
)
def test_posterior_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Posterior.of([1, 2], values)
