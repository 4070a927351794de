"""The non-dominated set of two objectives, the configurations of a study on it, and its step line."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.run_schema import MIN_SEEDS, Direction
from analysis.statistics.running_best import SortedSizes


def frontier_mask(
    x: ArrayLike, y: ArrayLike, directions: tuple[Direction, Direction] = ("minimize", "minimize")
) -> NDArray[np.bool_]:
    """The points that no other point dominates.

    A point dominates another if it is worse in no objective and better in at least one. Equal points do not dominate
    each other, so all copies of a frontier point are on the frontier.

    Args:
        x, y: (n,), finite, in their own units.
        directions: what is better in x and in y.
    Returns:
        (n,) mask, in the order of the input.
    Raises:
        ValueError: shapes differ, or a value is not finite.
    Cost: O(n log n), by one sort and a running best.
    Source: Kung, Luccio and Preparata 1975, On finding the maxima of a set of vectors, section 2.
    """
    x, y = _checked(x, y)
    sizes = SortedSizes.of(-x if directions[0] == "maximize" else x)
    return sizes.standing(y, directions[1]).on_frontier


def on_frontier(
    sizes: ArrayLike,
    means: ArrayLike,
    n_seeds: ArrayLike,
    is_sound: ArrayLike,
    direction: Direction = "minimize",
    fewest: int = MIN_SEEDS,
) -> NDArray[np.bool_]:
    """The configurations of a study that are on its frontier, wherever it is shown.

    Among the sound configurations with enough seeds, those are on the frontier that no other dominates. A configuration
    with a failed seed, or one that was stopped early, may owe its mean to the seeds that are missing. With fewer than
    `MIN_SEEDS` nothing is claimed.

    Args:
        sizes, means: (C,), over complete seeds; may be NaN for a configuration that is not considered.
        n_seeds: (C,), number of complete seeds of each.
        is_sound: (C,), whether no seed failed and the configuration was not stopped early.
        direction: what is better in the means.
        fewest: number of seeds that is enough.
    Returns:
        (C,) mask.
    Raises:
        ValueError: shapes differ, or a mean that is considered is not finite.
    """
    enough = np.asarray(is_sound, dtype=np.bool_) & (np.asarray(n_seeds) >= fewest)
    on = np.zeros(enough.shape, dtype=np.bool_)
    sizes, means = (np.asarray(values, dtype=np.float64)[enough] for values in (sizes, means))
    on[enough] = frontier_mask(sizes, means, ("minimize", direction))
    return on


def step_line(x: ArrayLike, y: ArrayLike, x_end: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Corners of the line below (or above) which nothing was attained: y holds until the next x reaches a better one.

    Args:
        x, y: (n,), the points of a frontier, in any order; x is the objective that is minimised.
        x_end: where the last step ends.
    Returns:
        Two arrays of 2n coordinates in drawing order: every point of the frontier, and the corner after it.
    Raises:
        ValueError: shapes differ or a value is not finite.
    """
    x, y = _checked(x, y)
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    return np.column_stack((x, np.append(x, x_end)[1:])).ravel(), np.repeat(y, 2)


def _checked(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"`x.shape == y.shape == (n,)` must hold, but got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("`x` and `y` must be finite, but got a NaN or an infinity")
    return x, y
