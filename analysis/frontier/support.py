"""How often a configuration is on the frontier when the means are redrawn with the noise of the seeds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.frontier.draws import SeedMeans
from analysis.frontier.running_best import SortedSizes
from analysis.run_schema import Direction


class FrontierSupport(NamedTuple):
    """Shares of draws, each (C,), in the order of the input."""

    on_frontier: NDArray[np.float64]
    """The configuration is on the frontier of the draw."""
    near_frontier: NDArray[np.float64]
    """No configuration at most as large is better by more than ε in the draw."""


class SizeNeeded(NamedTuple):
    """How large a configuration has to be in order to lose at most δ against a reference."""

    observed: float
    """Smallest size that has a mean so good."""
    sizes: NDArray[np.float64]
    """(G,): distinct sizes, ascending."""
    support: NDArray[np.float64]
    """(G,): share of draws in which each is the smallest; they add up to 1."""


def frontier_support(
    sizes: ArrayLike,
    values: ArrayLike,
    rng: np.random.Generator,
    *,
    epsilon: float,
    direction: Direction = "minimize",
    n_draws: int = 10_000,
    chunk: int | None = None,
) -> FrontierSupport:
    """Share of draws of the means in which each configuration is on the frontier, or within ε of it.

    CALIBRATION

    Args:
        sizes: (C,), minimised.
        values: (n, C), n >= 2 seeds that all configurations share, one row per seed.
        rng: source of all draws; the result does not depend on `chunk`.
        epsilon: ε >= 0, in the unit of the values.
        direction: what is better in the values.
        chunk: draws held at once, which bounds the memory: 9 bytes per draw and configuration.
    Raises:
        ValueError: shapes differ, a value is not finite, fewer than 2 seeds, or a negative ε or count.
    Error: each share has a standard error of sqrt(share (1 − share) / n_draws).
    Source: Efron and Tibshirani 1998, The problem of regions, section 1: the bootstrap's confidence in a region, and
        its bias.
    """
    sorted_sizes, seed_means = _prepared(sizes, values, epsilon, "epsilon")
    on = np.zeros(seed_means.means.size, dtype=np.intp)
    near = np.zeros_like(on)
    for drawn in seed_means.contrast_draws(n_draws, rng, chunk):
        on += np.count_nonzero(sorted_sizes.on_frontier(drawn, direction), axis=0)
        near += np.count_nonzero(sorted_sizes.behind(drawn, direction) <= epsilon, axis=0)
    return FrontierSupport(on / n_draws, near / n_draws)


def size_needed(
    sizes: ArrayLike,
    values: ArrayLike,
    reference: int,
    rng: np.random.Generator,
    *,
    delta: float,
    direction: Direction = "minimize",
    n_draws: int = 10_000,
    chunk: int | None = None,
) -> SizeNeeded:
    """Smallest size that loses at most δ against a reference configuration, and how often each size is it.

    The reference itself loses nothing, so that some size always is. SIZECALIBRATION

    Args:
        sizes: (C,), minimised, such as trainable parameters.
        values: (n, C), n >= 2 seeds that all configurations share, one row per seed.
        reference: index of the reference, such as the dense model, among the configurations.
        rng: source of all draws; the result does not depend on `chunk`.
        delta: δ >= 0, in the unit of the values.
        direction: what is better in the values.
        chunk: draws held at once, which bounds the memory.
    Raises:
        ValueError: shapes differ, a value is not finite, fewer than 2 seeds, or a negative δ or count.
        IndexError: no such reference.
    """
    sorted_sizes, seed_means = _prepared(sizes, values, delta, "delta")
    if not 0 <= reference < seed_means.means.size:
        raise IndexError(f"`0 <= reference < {seed_means.means.size}` must hold, but got {reference}")

    def smallest(means: NDArray[np.float64]) -> NDArray[np.intp]:
        loss = sorted_sizes.running_best(means, direction) - means[..., reference, None]
        return np.count_nonzero((loss if direction == "minimize" else -loss) > delta, axis=-1)

    n_sizes = sorted_sizes.distinct.size
    counts = np.zeros(n_sizes, dtype=np.intp)
    for drawn in seed_means.contrast_draws(n_draws, rng, chunk):
        counts += np.bincount(smallest(drawn), minlength=n_sizes)
    observed = float(sorted_sizes.distinct[int(smallest(seed_means.means))])
    return SizeNeeded(observed, sorted_sizes.distinct, counts / n_draws)


def _prepared(sizes: ArrayLike, values: ArrayLike, margin: float, name: str) -> tuple[SortedSizes, SeedMeans]:
    if not 0 <= margin < np.inf:
        raise ValueError(f"`0 <= {name}` must hold, but got {margin}")
    return SortedSizes.of(sizes), SeedMeans.of(values)
