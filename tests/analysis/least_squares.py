"""Two-way analysis of variance by a least-squares fit of both factors: the oracle of the block model."""

from __future__ import annotations

import numpy as np


def anova_residual(values: np.ndarray) -> float:
    """Residual mean square of a table of configurations × seeds."""
    rows, n = values.shape
    row, seed = np.indices(values.shape).reshape(2, -1)
    design = np.hstack((np.eye(rows)[row], np.eye(n)[seed]))
    fitted = design @ np.linalg.lstsq(design, values.ravel(), rcond=None)[0]
    return float(((values.ravel() - fitted) ** 2).sum() / (values.size - np.linalg.matrix_rank(design)))
