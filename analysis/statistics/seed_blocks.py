"""The two-way model behind every quantity that pools configurations: y_cs = μ_c + b_s + ε_cs.

Configuration c ran on seed s; b_s is what the runs of one seed share (data order, initialisation), ε_cs is the rest, of
one variance for all. Only complete tables enter: a configuration that lacks a seed is left out by the caller, or the
seed is, and never filled in.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

MIN_SEEDS = 3
"""Below this nothing is claimed: intervals, tests and bounds are NaN."""


class TwoWay(NamedTuple):
    """Means and variances of tables of configurations × seeds.

    means: (..., C), over seeds. seed_means: (..., n), over configurations. residual_variance: (...), the residual mean
    square s²_res, which estimates Var(ε); NaN where df is 0. df: its degrees of freedom, (C − 1)(n − 1). n: seeds.
    """

    means: NDArray[np.float64]
    seed_means: NDArray[np.float64]
    residual_variance: NDArray[np.float64]
    df: int
    n: int


def two_way(values: ArrayLike) -> TwoWay:
    """Two-way analysis of variance without replication.

    Args:
        values: (..., C, n), configurations × the same seeds, in any unit.
    Raises:
        ValueError: as `complete_table`.
    Source: Scheffé 1959, The Analysis of Variance, section 4.2.
    """
    table = complete_table(values)
    (rows, n), df = table.shape[-2:], (table.shape[-2] - 1) * (table.shape[-1] - 1)
    means, seed_means = table.mean(axis=-1), table.mean(axis=-2)
    grand_mean = means.mean(axis=-1)[..., None, None]
    residuals = table - means[..., :, None] - seed_means[..., None, :] + grand_mean
    squares = (residuals**2).sum(axis=(-2, -1))
    variance = squares / df if rows > 1 and n > 1 else np.full(squares.shape, np.nan)
    return TwoWay(means, seed_means, variance, df, n)


def marginal_variance(model: TwoWay) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Variance of one value, what its seed shares included: s²_marg = V + s²_res (C − 1)/C, V that of the seed means,
    and Satterthwaite's degrees of freedom; both (...). For the derivation see `intervals.marginal_interval`."""
    rows, n = model.means.shape[-1], model.n
    shared = model.seed_means.var(axis=-1, ddof=1)
    residual = model.residual_variance * (rows - 1) / rows if rows > 1 else np.zeros_like(shared)
    variance = shared + residual
    # Of the sum; of 0, which no df would widen, as if all of it were shared.
    share = np.divide(shared, variance, out=np.ones_like(shared), where=variance > 0)
    return variance, (n - 1) / (share**2 + (1 - share) ** 2 / max(rows - 1, 1))


def complete_table(values: ArrayLike, name: str = "values") -> NDArray[np.float64]:
    """(..., C, n) as floats, with every seed of every configuration.

    Raises:
        ValueError: rows have unequal numbers of seeds, there is no row or no seed, or a value is missing (NaN or
            infinite).
    """
    return _complete(values, name, "(..., configurations, seeds)", 2)


def complete_seeds(values: ArrayLike, name: str = "values") -> NDArray[np.float64]:
    """(..., n) as floats, with every seed. Raises ValueError as `complete_table`."""
    return _complete(values, name, "(..., seeds)", 1)


def _complete(values: ArrayLike, name: str, shape: str, axes: int) -> NDArray[np.float64]:
    try:
        table = np.asarray(values, dtype=np.float64)
    except ValueError:
        raise ValueError(f"every row of `{name}` must have the same seeds, but their numbers differ") from None
    if table.ndim < axes or 0 in table.shape[-axes:]:
        raise ValueError(f"`{name}` must be {shape}, but its shape is {table.shape}")
    missing = table.size - np.isfinite(table).sum()
    if missing:
        count = "1 value is missing" if missing == 1 else f"{missing} values are missing"
        raise ValueError(f"`{name}` must have every seed of every configuration, but {count}")
    return table
