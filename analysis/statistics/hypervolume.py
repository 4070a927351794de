"""One number for a frontier: the area between its step line and a fixed reference, over the logarithm of size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.run_schema import Direction
from analysis.statistics.posterior import Posterior
from analysis.statistics.running_best import SortedSizes


@dataclass(frozen=True, kw_only=True, slots=True)
class HypervolumeReference:
    """The reference of a hypervolume; two hypervolumes are comparable only if their references are equal.

    The unit of a hypervolume is (unit of the values) × (one factor `base` of size).
    """

    worst_value: float
    """A value that is not better than this counts as nothing."""
    largest_size: float
    """Size at which the area ends; configurations at least as large count as nothing."""
    base: float
    """Base of the logarithm of the sizes."""
    direction: Direction = "minimize"
    """Which values are better."""


class HypervolumeInterval(NamedTuple):
    """Hypervolume of the frontier of the means, and limits for that of the frontier of the true means, at least 0."""

    observed: float
    low: float
    high: float


def hypervolume_interval(
    sizes: ArrayLike,
    posterior: Posterior,
    reference: HypervolumeReference,
    rng: np.random.Generator,
    *,
    n_draws: int = 2_000,
) -> HypervolumeInterval:
    """95 % interval for the hypervolume of the frontier of the true means: central quantiles over drawn true means.

    The hypervolume of the measured means is too large, since the best of noisy means is too good. With many
    configurations, the interval may exclude it (see `band.mean_frontier_band`).

    93 to 98 % were covered in the simulated studies that `band.mean_frontier_band` names, and 32 % if all true means
    are exactly equal.

    Args:
        sizes: (C,), positive, minimised.
        posterior: that of the same configurations.
    Raises:
        ValueError: shapes differ.
    """
    sorted_sizes = SortedSizes.of(sizes)
    widths = _widths(sorted_sizes, reference)
    observed = float(_areas(sorted_sizes, widths, posterior.means, reference))
    drawn = [_areas(sorted_sizes, widths, each, reference) for each in posterior.draws(n_draws, rng)]
    low, high = np.quantile(np.concatenate(drawn), (0.025, 0.975))
    return HypervolumeInterval(observed, float(low), float(high))


def _widths(sorted_sizes: SortedSizes, reference: HypervolumeReference) -> NDArray[np.float64]:
    """(G,): width of the step of each distinct size, in powers of the base."""
    ends = np.minimum(np.append(sorted_sizes.distinct, reference.largest_size), reference.largest_size)
    return np.diff(np.log10(ends) / np.log10(reference.base))


def _areas(
    sorted_sizes: SortedSizes,
    widths: NDArray[np.float64],
    values: NDArray[np.float64],
    reference: HypervolumeReference,
) -> NDArray[np.float64]:
    """(...): Σ (amount by which the running best is better than the worst value)₊ · Δ log size, for values (..., C).

    Source: Zitzler and Thiele 1998, Multiobjective optimization using evolutionary algorithms, section 3.
    """
    gain = sorted_sizes.running_best(values, reference.direction) - reference.worst_value
    if reference.direction == "minimize":
        np.negative(gain, out=gain)
    # Not `@`: the order in which BLAS adds depends on the number of rows, and so on the chunk.
    return (np.maximum(gain, 0, out=gain) * widths).sum(axis=-1)
