"""p values adjusted for the number of tests; they are compared with the level of the whole family."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p values: for planned contrasts.

    If every test with an adjusted value of at most α is rejected, the chance of any false rejection is at most α, for
    any dependence of the tests.

    Args:
        p: (..., m), each family along the last axis. A NaN is no test: it stays NaN and does not count in m.
    Returns:
        (..., m), in the order of the input.
    Raises:
        ValueError: a p value is outside [0, 1], or `p` has no axis.
    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    p, order, count = _sorted(p)
    stepped = np.maximum.accumulate(p * (count - np.arange(p.shape[-1])), axis=-1)  # NaNs come last
    return _unsorted(np.minimum(stepped, 1), order)


def benjamini_hochberg(p: ArrayLike) -> NDArray[np.float64]:
    """Benjamini and Hochberg's adjusted p values: for screening; survivors are run again on fresh seeds.

    If every test with an adjusted value of at most α is rejected, the expected share of false rejections among all
    rejections is at most α. This holds for independent tests and for positively dependent ones (such as one-sided
    contrasts with one reference).

    Args:
        p: (..., m), each family along the last axis. A NaN is no test: it stays NaN and does not count in m.
    Returns:
        (..., m), in the order of the input.
    Raises:
        ValueError: a p value is outside [0, 1], or `p` has no axis.
    Source: Benjamini and Hochberg 1995, Controlling the false discovery rate; for dependence, Benjamini and Yekutieli
        2001.
    """
    p, order, count = _sorted(p)
    stepped = p * count / np.arange(1, p.shape[-1] + 1)
    lowest = np.fmin.accumulate(stepped[..., ::-1], axis=-1)[..., ::-1]  # from the end; fmin skips the NaNs there
    return _unsorted(np.minimum(lowest, 1), order)


def _sorted(p: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.intp], NDArray[np.intp]]:
    """p ascending with NaNs last, the order that sorted it, and the number of tests (..., 1)."""
    p = np.asarray(p, dtype=np.float64)
    if p.ndim == 0:
        raise ValueError("`p` must have an axis of tests, but got a single number")
    if ((p < 0) | (p > 1)).any():
        raise ValueError(f"`0 <= p <= 1` must hold, but got p from {np.nanmin(p)} to {np.nanmax(p)}")
    order = np.argsort(p, axis=-1)
    return np.take_along_axis(p, order, axis=-1), order, (~np.isnan(p)).sum(axis=-1, keepdims=True)


def _unsorted(values: NDArray[np.float64], order: NDArray[np.intp]) -> NDArray[np.float64]:
    result = np.empty_like(values)
    np.put_along_axis(result, order, values, axis=-1)
    return result
