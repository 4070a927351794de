"""p values adjusted for the number of tests; they are compared with the level of the whole family.

The other adjustment in use, Benjamini and Hochberg's, is `scipy.stats.false_discovery_control`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p values: for planned contrasts.

    If every test with an adjusted value of at most α is rejected, the chance of any false rejection is at most α, for
    any dependence of the tests.

    Args:
        p: (..., m), each family along the last axis, in [0, 1].
    Returns:
        (..., m), in the order of the input.
    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, axis=-1)
    steps = np.take_along_axis(p, order, axis=-1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(steps, axis=-1), 1), axis=-1)
    return adjusted
