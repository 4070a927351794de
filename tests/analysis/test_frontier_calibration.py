"""What the docstrings of `analysis.statistics` say of coverage and calibration, on studies whose truth is known.

Every case simulates studies with a new truth each: configurations scattered about a trend (accuracy in points,
saturating with size), seeds with a standard deviation of 0.4 in all, of which they share a part. Shares are asserted
within four standard errors over studies, and those errors to be small.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest

from analysis.statistics.band import mean_frontier_band
from analysis.statistics.frontier_probability import frontier_probability, size_needed
from analysis.statistics.hypervolume import HypervolumeReference, hypervolume_interval
from analysis.statistics.nondominated import frontier_mask
from analysis.statistics.posterior import Posterior

DRAWS = 500
UP = "maximize"
REFERENCE = HypervolumeReference(worst_value=25, largest_size=1e6, base=10, direction=UP)
EPSILON, DELTA = 0.2, 0.5


class Case(NamedTuple):
    n: int
    n_configurations: int
    scatter: float
    trend: float = 5.4
    shared: float = 0.0
    """Share of the seeds' variance that all configurations of a seed have in common."""
    studies: int = 400
    refined: int = 0
    """Configurations, drawn at random, that have twice the seeds of the others."""
    noise_spread: float = 0.0
    """Standard deviation of the logarithm of the configurations' own noise."""


SPREAD = Case(5, 40, 0.6)
CLOSE = Case(5, 40, 0.2)
EQUAL = Case(5, 40, 0.0, trend=0.0)
FEW_SEEDS = Case(3, 40, 0.6, shared=0.5)
FEW = Case(5, 6, 0.6, shared=0.5)
UNEVEN = Case(3, 40, 0.6, shared=0.5, studies=200, refined=10)
MANY = Case(3, 200, 0.2, shared=0.5, studies=200)
UNEVEN_SHIFTED = Case(3, 40, 0.2, shared=0.95, studies=200, refined=10)
THREE, SIX, TWELVE = (Case(n, count, 0.2, trend=0.5) for n, count in ((3, 3), (3, 6), (5, 12)))
UNLIKE = Case(5, 40, 0.6, noise_spread=0.5)
UNLIKE_CLOSE = Case(5, 40, 0.2, noise_spread=0.5)
USUAL = [SPREAD, CLOSE, FEW_SEEDS, FEW, UNEVEN, UNEVEN_SHIFTED, MANY, THREE, SIX, TWELVE]


@cache
def simulated(case):
    """Per study, (studies, ...): what was covered, what was stated and what was true."""
    rng = np.random.default_rng(20)
    sizes = np.geomspace(3e4, 1e6, case.n_configurations)
    found = []
    for _ in range(case.studies):
        truth = 40 - case.trend * np.log10(1e6 / sizes) ** 1.5 + rng.normal(0, case.scatter, sizes.size)
        own = 0.4 * np.sqrt(1 - case.shared) * np.exp(rng.normal(0, case.noise_spread, sizes.size))

        def block(truth=truth, own=own):
            shared = 0.4 * np.sqrt(case.shared) * rng.normal(size=(case.n, 1))
            return truth + shared + own * rng.normal(size=(case.n, sizes.size))

        values = block()
        if case.refined:
            further = block()
            further[:, rng.permutation(sizes.size)[case.refined :]] = np.nan
            values = np.vstack((values, further))
        best = np.maximum.accumulate(truth)

        posterior = Posterior.of(sizes, values)
        band = mean_frontier_band(sizes, posterior, rng, direction=UP, n_draws=DRAWS)
        area = hypervolume_interval(sizes, posterior, REFERENCE, rng, n_draws=DRAWS)
        exact = Posterior.of(sizes, np.stack((truth, truth)))
        true_area = hypervolume_interval(sizes, exact, REFERENCE, np.random.default_rng(0), n_draws=1).observed
        stated = frontier_probability(sizes, posterior, rng, epsilon=EPSILON, direction=UP, n_draws=DRAWS)
        needed = size_needed(sizes, posterior, sizes.size - 1, rng, delta=DELTA, direction=UP, n_draws=DRAWS)
        upper = sizes[np.searchsorted(np.cumsum(needed.probability), 0.95)]
        found.append(
            {
                "band": (band.low <= best) & (best <= band.high),
                "hypervolume": area.low <= true_area <= area.high,
                "stated": stated.on_frontier,
                "true": frontier_mask(sizes, truth, ("minimize", UP)),
                "stated near": stated.near_frontier,
                "true near": best - truth <= EPSILON,
                "upper size": upper >= sizes[np.argmax(best >= truth[-1] - DELTA)],
            }
        )
    return {name: np.array([study[name] for study in found], dtype=float) for name in found[0]}


def share_and_error(covered):
    """Share over all, and its standard error: studies are independent, what is in one is not."""
    per_study = covered.reshape(len(covered), -1).mean(axis=1)
    return per_study.mean(), per_study.std(ddof=1) / np.sqrt(len(per_study))


def calibration(stated, true, low, high):
    """Mean stated probability of those between two, the share that is true, and its standard error."""
    inside = (stated >= low) & (stated <= high)
    share = true[inside].mean()
    residual = np.where(inside, true - share, 0).sum(axis=1)
    return stated[inside].mean(), share, np.sqrt((residual**2).sum()) / inside.sum()


@pytest.mark.slow
@pytest.mark.parametrize("case", USUAL)
def test_band_covers_93_to_97_percent_pointwise(case):
    share, error = share_and_error(simulated(case)["band"])
    assert error < 0.012
    assert 0.93 - 3 * error <= share <= 0.97 + 3 * error
    # Pointwise means at every size, not on average alone: a size's own error is sqrt(.93 · .07 / studies).
    least = simulated(case)["band"].mean(axis=0).min()
    assert least >= 0.93 - 4 * np.sqrt(0.93 * 0.07 / case.studies)


@pytest.mark.slow
@pytest.mark.parametrize("case", USUAL)
def test_hypervolume_interval_covers_93_to_98_percent(case):
    share, error = share_and_error(simulated(case)["hypervolume"])
    assert error < 0.025
    assert 0.93 - 3 * error <= share <= 0.98 + 3 * error


@pytest.mark.slow
@pytest.mark.parametrize(("case", "band"), [(UNLIKE, 0.94), (UNLIKE_CLOSE, 0.935)])
def test_intervals_where_the_noise_differs_cover_almost_as_much(case, band):
    share, error = share_and_error(simulated(case)["band"])
    assert share == pytest.approx(band, abs=0.005 + 4 * error)
    share, error = share_and_error(simulated(case)["hypervolume"])
    assert share == pytest.approx(0.945, abs=0.005 + 4 * error)


@pytest.mark.slow
def test_intervals_where_all_true_means_are_equal_cover_far_too_little():
    for interval, expected in (("band", 0.40), ("hypervolume", 0.32)):
        share, error = share_and_error(simulated(EQUAL)[interval])
        assert error < 0.03
        assert share == pytest.approx(expected, abs=0.005 + 4 * error)


BINS = [(0.02, 0.1), (0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 0.98), (0.98, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", " near"])
@pytest.mark.parametrize("case", [SPREAD, CLOSE, FEW_SEEDS, UNEVEN, UNEVEN_SHIFTED, MANY])
def test_stated_probability_is_the_share_that_is_true(case, suffix):
    study = simulated(case)
    for bounds in BINS:
        stated, share, error = calibration(study["stated" + suffix], study["true" + suffix], *bounds)
        assert bounds[0] <= stated <= bounds[1]
        assert error < 0.06
        assert share == pytest.approx(stated, abs=0.05 + 3 * error)


@pytest.mark.slow
@pytest.mark.parametrize("case", [SIX, TWELVE])
def test_middling_probabilities_of_few_configurations_on_a_shallow_trend_are_true_within_a_tenth(case):
    study = simulated(case)
    for bounds in BINS[2:]:
        stated, share, error = calibration(study["stated"], study["true"], *bounds)
        assert error < 0.05
        assert share == pytest.approx(stated, abs=0.1 + 3 * error)


@pytest.mark.slow
def test_middling_probabilities_of_three_configurations_are_too_small():
    study = simulated(THREE)
    for bounds, documented in ((BINS[3], 0.81), (BINS[4], 0.93)):
        stated, share, error = calibration(study["stated"], study["true"], *bounds)
        assert share == pytest.approx(documented, abs=0.01 + 4 * error)
        assert share - 3 * error > stated


@pytest.mark.slow
def test_among_near_equals_with_unlike_noise_middling_probabilities_are_wrong_as_documented():
    study = simulated(UNLIKE_CLOSE)
    documented = [(0.06, 0.29), (0.21, 0.29), (0.41, 0.39), (0.61, 0.57), (0.82, 0.77), (0.95, 0.93), (0.99, 0.98)]
    for bounds, (near, expected) in zip(BINS, documented, strict=True):
        stated, share, error = calibration(study["stated"], study["true"], *bounds)
        assert stated == pytest.approx(near, abs=0.015)
        assert share == pytest.approx(expected, abs=0.005 + 4 * error)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*USUAL, UNLIKE, UNLIKE_CLOSE, EQUAL])
def test_cautious_size_needed_is_at_least_the_true_one(case):
    share, error = share_and_error(simulated(case)["upper size"])
    assert error < 0.02
    assert share >= 0.97 - 3 * error
