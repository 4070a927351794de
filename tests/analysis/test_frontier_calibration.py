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
from analysis.statistics.draws import SeedMeans
from analysis.statistics.hypervolume import HypervolumeReference, hypervolume_interval
from analysis.statistics.nondominated import frontier_mask
from analysis.statistics.support import frontier_support, size_needed

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


SPREAD = Case(5, 40, 0.6)
CLOSE = Case(5, 40, 0.2)
EQUAL = Case(5, 40, 0.0, trend=0.0)
FEW_SEEDS = Case(3, 40, 0.6, shared=0.5)
FEW = Case(5, 6, 0.6, shared=0.5)
UNEVEN = Case(3, 40, 0.6, shared=0.5, studies=200, refined=10)
MANY = Case(3, 200, 0.2, shared=0.5, studies=200)


@cache
def simulated(case):
    """Per study, (studies, ...): what was covered, what was stated and what was true."""
    rng = np.random.default_rng(20)
    sizes = np.geomspace(3e4, 1e6, case.n_configurations)
    found = []
    for _ in range(case.studies):
        truth = 40 - case.trend * np.log10(1e6 / sizes) ** 1.5 + rng.normal(0, case.scatter, sizes.size)
        noise = np.sqrt(case.shared) * rng.normal(size=(case.n, 1))
        noise = noise + np.sqrt(1 - case.shared) * rng.normal(size=(case.n, sizes.size))
        values = truth + 0.4 * noise
        if case.refined:
            further = np.sqrt(case.shared) * rng.normal(size=(case.n, 1))
            further = truth + 0.4 * (further + np.sqrt(1 - case.shared) * rng.normal(size=(case.n, sizes.size)))
            further[:, rng.permutation(sizes.size)[case.refined :]] = np.nan
            values = np.vstack((values, further))
        best = np.maximum.accumulate(truth)

        band = mean_frontier_band(sizes, values, rng, direction=UP, n_draws=DRAWS)
        redrawn = np.vstack(list(SeedMeans.of(values).draws(DRAWS, rng)))
        below, over = np.quantile(np.maximum.accumulate(redrawn, axis=-1), [0.025, 0.975], axis=0)
        area = hypervolume_interval(sizes, values, REFERENCE, rng, n_draws=DRAWS)
        without_noise = np.stack((truth, truth))
        true_area = hypervolume_interval(sizes, without_noise, REFERENCE, np.random.default_rng(0), n_draws=1).observed
        support = frontier_support(sizes, values, rng, epsilon=EPSILON, direction=UP, n_draws=DRAWS)
        needed = size_needed(sizes, values, sizes.size - 1, rng, delta=DELTA, direction=UP, n_draws=DRAWS)
        upper = sizes[np.searchsorted(np.cumsum(needed.support), 0.95)]
        found.append(
            {
                "band": (band.low <= best) & (best <= band.high),
                "reflected quantiles": (2 * band.observed - over <= best) & (best <= 2 * band.observed - below),
                "percentiles": (below <= best) & (best <= over),
                "hypervolume": area.low <= true_area <= area.high,
                "stated": support.on_frontier,
                "true": frontier_mask(sizes, truth, ("minimize", UP)),
                "stated near": support.near_frontier,
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
    """Mean stated support of those between two supports, the share that is true, and its standard error."""
    inside = (stated >= low) & (stated <= high)
    share = true[inside].mean()
    residual = np.where(inside, true - share, 0).sum(axis=1)
    return stated[inside].mean(), share, np.sqrt((residual**2).sum()) / inside.sum()


@pytest.mark.slow
@pytest.mark.parametrize("case", [SPREAD, CLOSE, FEW_SEEDS, FEW, UNEVEN, MANY])
def test_band_covers_94_to_95_percent_pointwise(case):
    share, error = share_and_error(simulated(case)["band"])
    assert error < 0.008
    assert 0.94 - 4 * error <= share <= 0.95 + 4 * error
    # Pointwise means at every size, not on average alone: a size's own error is sqrt(.95 · .05 / studies).
    least = simulated(case)["band"].mean(axis=0).min()
    assert least >= 0.94 - 5 * np.sqrt(0.95 * 0.05 / case.studies)


@pytest.mark.parametrize("case", [SPREAD, CLOSE])
def test_reflected_quantiles_cover_less_than_the_band(case):
    share, error = share_and_error(simulated(case)["reflected quantiles"])
    assert share == pytest.approx(0.91, abs=0.005 + 4 * error)
    assert share + 4 * error < 0.94


def test_band_where_all_true_means_are_equal_covers_less_and_percentiles_hardly_ever():
    share, error = share_and_error(simulated(EQUAL)["band"])
    assert error < 0.02
    assert share == pytest.approx(0.87, abs=0.005 + 4 * error)
    assert share + 4 * error < 0.95
    assert share_and_error(simulated(EQUAL)["percentiles"])[0] < 0.2


@pytest.mark.parametrize("case", [SPREAD, CLOSE, FEW_SEEDS, FEW, UNEVEN, MANY])
def test_hypervolume_interval_covers_94_to_98_percent(case):
    share, error = share_and_error(simulated(case)["hypervolume"])
    assert error < 0.02
    assert 0.94 - 4 * error <= share <= 0.98 + 4 * error
    assert share > 0.9


def test_hypervolume_interval_where_all_true_means_are_equal_covers_65_percent():
    share, error = share_and_error(simulated(EQUAL)["hypervolume"])
    assert share == pytest.approx(0.65, abs=0.005 + 4 * error)


BINS = [(0.02, 0.1), (0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 0.98), (0.98, 1)]
STATED = [0.05, 0.19, 0.40, 0.60, 0.81, 0.95, 1.00]


@pytest.mark.parametrize(
    ("case", "suffix", "documented"),
    [
        (SPREAD, "", [0.07, 0.26, 0.46, 0.67, 0.84, 0.96, 1.00]),
        (CLOSE, "", [0.27, 0.50, 0.70, 0.82, 0.92, 0.97, 1.00]),
        (SPREAD, " near", [0.08, 0.27, 0.49, 0.69, 0.86, 0.97, 1.00]),
        (CLOSE, " near", [0.45, 0.66, 0.81, 0.91, 0.97, 0.99, 1.00]),
    ],
)
def test_support_is_calibrated_as_documented(case, suffix, documented):
    study = simulated(case)
    for bounds, near, expected in zip(BINS, STATED, documented, strict=True):
        stated, share, error = calibration(study["stated" + suffix], study["true" + suffix], *bounds)
        assert stated == pytest.approx(near, abs=0.015)
        assert error < 0.03
        assert share == pytest.approx(expected, abs=0.005 + 4 * error)


def test_support_is_underconfident_among_near_equals():
    study = simulated(CLOSE)
    for bounds in BINS[:5]:
        stated, share, error = calibration(study["stated"], study["true"], *bounds)
        assert share - 4 * error > stated


@pytest.mark.parametrize(("case", "least", "most"), [(SPREAD, 0.97, 0.99), (FEW_SEEDS, 0.97, 0.99), (MANY, 0.86, 0.86)])
def test_upper_size_needed_holds_as_often_as_documented(case, least, most):
    share, error = share_and_error(simulated(case)["upper size"])
    assert error < 0.03
    assert least - 0.005 - 4 * error <= share <= most + 0.005 + 4 * error


def test_upper_size_needed_is_optimistic_among_many_near_equals():
    share, error = share_and_error(simulated(MANY)["upper size"])
    assert share + 3 * error < 0.95
