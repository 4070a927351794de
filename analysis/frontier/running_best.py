"""The kernel of everything here: the best value among all configurations that are at most as large, size by size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.run_schema import Direction

_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, eq=False, slots=True)
class SortedSizes:
    """Sizes of C configurations, sorted once; values of any number of seeds or draws are then compared along them.

    C configurations have G ≤ C distinct sizes. Values are not checked here: a NaN in them makes everything from its
    size on NaN.
    """

    order: NDArray[np.intp]
    """(C,): indices of the configurations from the smallest to the largest."""
    starts: NDArray[np.intp]
    """(G,): where in that order each distinct size begins."""
    group: NDArray[np.intp]
    """(C,): number of the distinct size, in that order."""
    distinct: NDArray[np.float64]
    """(G,): distinct sizes, ascending."""

    @classmethod
    def of(cls, sizes: ArrayLike) -> SortedSizes:
        """Sort sizes of shape (C,).

        Raises:
            ValueError: not one axis, or a size is not finite.
        """
        sizes = np.asarray(sizes, dtype=np.float64)
        if sizes.ndim != 1:
            raise ValueError(f"`sizes.shape == (C,)` must hold, but got {sizes.shape}")
        if not np.isfinite(sizes).all():
            raise ValueError("`sizes` must be finite, but got a NaN or an infinity")
        order = np.argsort(sizes, kind="stable")
        ascending = sizes[order]
        starts = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1])[: sizes.size])
        group = np.repeat(np.arange(starts.size), np.diff(starts, append=sizes.size))
        return cls(order, starts, group, ascending[starts])

    def running_best(self, values: NDArray[np.float64], direction: Direction) -> NDArray[np.float64]:
        """Best value of any configuration at most as large as each distinct size.

        Args:
            values: (..., C), in the order in which the sizes were given.
            direction: whether a small value is good, or a large one.
        Returns:
            (..., G), never getting worse along the last axis.
        Raises:
            ValueError: the last axis is not C, or the direction is unknown.
        """
        return self._running_best(self.ascending(values), direction)

    def on_frontier(self, values: NDArray[np.float64], direction: Direction) -> NDArray[np.bool_]:
        """Which configurations no other dominates, in each row: those that attain a running best where it improves.

        Args:
            values: (..., C), in the order in which the sizes were given.
        Returns:
            (..., C) mask in the same order; all copies of a frontier point are on the frontier.
        Raises:
            ValueError: the last axis is not C, or the direction is unknown.
        Source: Kung, Luccio and Preparata 1975, On finding the maxima of a set of vectors, section 2.
        """
        values = self.ascending(values)
        running = self._running_best(values, direction)
        mask = np.ones(running.shape, dtype=np.bool_)
        np.not_equal(running[..., 1:], running[..., :-1], out=mask[..., 1:])
        if self.starts.size < self.order.size:
            mask = mask.take(self.group, axis=-1) & (values == running.take(self.group, axis=-1))
        return self.as_given(mask)

    def behind(self, values: NDArray[np.float64], direction: Direction) -> NDArray[np.float64]:
        """By how much each configuration is worse than the best that is at most as large.

        Args:
            values: (..., C), in the order in which the sizes were given.
        Returns:
            (..., C) in the same order, >= 0, in the unit of the values.
        Raises:
            ValueError: the last axis is not C, or the direction is unknown.
        """
        ascending = self.ascending(values)
        running = self._running_best(ascending, direction)
        if self.starts.size < self.order.size:
            running = running.take(self.group, axis=-1)
        behind = ascending - running if direction == "minimize" else running - ascending
        return self.as_given(behind)

    def ascending(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values (..., C) in the order of the sizes from the smallest up.

        Raises:
            ValueError: the last axis is not C.
        """
        if values.shape[-1:] != self.order.shape:
            raise ValueError(f"`values.shape == (..., {self.order.size})` must hold, but got {values.shape}")
        return values if self._is_ascending() else values.take(self.order, axis=-1)

    def as_given(self, ascending: NDArray[_T]) -> NDArray[_T]:
        """Values (..., C) in the order of the sizes, put into the order in which those were given."""
        if self._is_ascending():
            return ascending
        given = np.empty_like(ascending)
        given[..., self.order] = ascending
        return given

    def _running_best(self, ascending: NDArray[np.float64], direction: Direction) -> NDArray[np.float64]:
        best = best_of(direction)
        if self.starts.size < self.order.size:
            ascending = best.reduceat(ascending, self.starts, axis=-1)  # among the configurations that share one size
        return best.accumulate(ascending, axis=-1)

    def _is_ascending(self) -> bool:
        return bool((self.order[1:] > self.order[:-1]).all())


def best_of(direction: Direction) -> np.ufunc:
    """The ufunc that keeps the better of two values.

    Raises:
        ValueError: the direction is unknown.
    """
    if direction not in ("minimize", "maximize"):
        raise ValueError(f"`direction` must be 'minimize' or 'maximize', but got {direction!r}")
    return np.minimum if direction == "minimize" else np.maximum
