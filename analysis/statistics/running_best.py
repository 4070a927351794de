"""The kernel of this package: at each size, the best value among all configurations that are at most as large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.run_schema import Direction

_T = TypeVar("_T", bound=np.generic)


class Standing(NamedTuple):
    """Comparison of each configuration with all that are at most as large; arrays (..., C), in the order given."""

    on_frontier: NDArray[np.bool_]
    """Whether no other dominates it; all copies of a frontier point are on the frontier."""
    behind: NDArray[np.float64]
    """Amount by which it is worse than the best of them, >= 0, in the unit of the values."""


@dataclass(frozen=True, eq=False, slots=True)
class SortedSizes:
    """Sizes of C configurations, sorted once; values of any number of seeds or draws are then compared along them.

    C configurations have G ≤ C distinct sizes. Values are not checked here: a NaN makes all results from its size
    upwards NaN.
    """

    order: NDArray[np.intp]
    """(C,): indices of the configurations from the smallest to the largest."""
    starts: NDArray[np.intp]
    ends: NDArray[np.intp]
    """(G,): positions in that order of the first (`starts`) and last (`ends`) configuration of each distinct size."""
    group: NDArray[np.intp]
    """(C,): index of the distinct size of each configuration, in that order."""
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
        ends = np.flatnonzero(np.append(ascending[1:] != ascending[:-1], True)[: sizes.size])
        starts = np.append(0, ends + 1)[: ends.size]
        group = np.repeat(np.arange(ends.size), ends - starts + 1)
        return cls(order, starts, ends, group, ascending[ends])

    def running_best(self, values: NDArray[np.float64], direction: Direction) -> NDArray[np.float64]:
        """Best value of any configuration at most as large as each distinct size.

        Args:
            values: (..., C), in the order in which the sizes were given.
            direction: whether a small value is good, or a large one.
        Returns:
            (..., G), never getting worse along the last axis.
        Raises:
            ValueError: the last axis is not C.
        """
        # At the last configuration of a size, the running best includes all of that size.
        return best_of(direction).accumulate(self.ascending(values), axis=-1).take(self.ends, axis=-1)

    def standing(self, values: NDArray[np.float64], direction: Direction) -> Standing:
        """The standing of configurations in each row; those that attain an improved running best are on the frontier.

        Args:
            values: (..., C), in the order in which the sizes were given.
        Raises:
            ValueError: the last axis is not C.
        Source: Kung, Luccio and Preparata 1975, On finding the maxima of a set of vectors, section 2.
        """
        values = self.ascending(values)
        running = best_of(direction).accumulate(values, axis=-1)
        first, last = self.starts[self.group], self.ends[self.group]
        shared = np.flatnonzero(first != last)  # usually few: sizes are counts of parameters
        running[..., shared] = running[..., last[shared]]
        on_frontier = np.ones(running.shape, dtype=np.bool_)
        np.not_equal(running[..., 1:], running[..., :-1], out=on_frontier[..., 1:])
        on_frontier[..., shared] = on_frontier[..., first[shared]] & (values[..., shared] == running[..., shared])
        behind = values - running if direction == "minimize" else running - values
        return Standing(self.as_given(on_frontier), self.as_given(behind))

    def ascending(self, values: NDArray[_T]) -> NDArray[_T]:
        """Values (..., C) in the order of the sizes, from the smallest upwards.

        Raises:
            ValueError: the last axis is not C.
        """
        if values.shape[-1:] != self.order.shape:
            raise ValueError(f"`values.shape == (..., {self.order.size})` must hold, but got {values.shape}")
        return values if self._is_ascending() else values.take(self.order, axis=-1)

    def as_given(self, ascending: NDArray[_T]) -> NDArray[_T]:
        """Values (..., C) in ascending order of the sizes, put back into the order in which the sizes were given."""
        if self._is_ascending():
            return ascending
        given = np.empty_like(ascending)
        given[..., self.order] = ascending
        return given

    def _is_ascending(self) -> bool:
        return bool((self.order[1:] > self.order[:-1]).all())


def best_of(direction: Direction) -> np.ufunc:
    """The ufunc that keeps the better of two values."""
    return np.minimum if direction == "minimize" else np.maximum
