"""Two-way analysis of variance by a least-squares fit of both factors: the oracle of the two-way model."""

from __future__ import annotations

import numpy as np


def anova_residual(values: np.ndarray) -> float:
    """Residual mean square of a table of configurations × seeds; NaN where a configuration has not the seed."""
    rows, n = values.shape
    row, seed = np.indices(values.shape).reshape(2, -1)
    design = np.hstack((np.eye(rows)[row], np.eye(n)[seed]))[~np.isnan(values.ravel())]
    known = values[~np.isnan(values)]
    fitted = design @ np.linalg.lstsq(design, known, rcond=None)[0]
    return float(((known - fitted) ** 2).sum() / (known.size - np.linalg.matrix_rank(design)))
