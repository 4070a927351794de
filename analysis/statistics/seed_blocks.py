"""The two-way model behind every quantity that pools configurations: y_cs = μ_c + b_s + ε_cs.

Configuration c ran on seed s; b_s is the shared part of the runs of one seed (data order, initialisation). ε_cs is the
rest, with one variance for all. No value is filled in: a table is complete, or `uneven_two_way` fits the model to the
values that exist.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


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


class UnevenTwoWay(NamedTuple):
    """Means and variances of one table of configurations × seeds, in which configurations may lack seeds.

    means: (C,), each over its own seeds. weights: (C, S), 1/n if a configuration has a seed, else 0.
    residual_variance: as in `TwoWay`, 0 if df is 0. df: its degrees of freedom. seed_variance: Var(b), at least 0.
    seed_df: its degrees of freedom, fewer than seeds if few configurations have some of the seeds.
    """

    means: NDArray[np.float64]
    weights: NDArray[np.float64]
    residual_variance: float
    df: int
    seed_variance: float
    seed_df: float


def uneven_two_way(values: ArrayLike) -> UnevenTwoWay:
    """The two-way model, fitted by least squares; for a complete table it equals `two_way`.

    Within configurations, the seeds' shifts explain R of the sum of squares, with r degrees of freedom. For N values of
    C configurations, R has the expectation (N − C) Var(b) + r Var(ε), from which Var(b) is estimated. R is a sum of r
    independent squares with the variances λ Var(b) + Var(ε). The λ > 0 are the eigenvalues of the seeds' normal
    equations, and add up to N − C. Satterthwaite's degrees of freedom follow from them.

    Args:
        values: (C, S), configurations × all seeds, in any unit; NaN if a configuration lacks the seed.
    Raises:
        ValueError: `values` is not a table, a value is infinite, or a configuration has fewer than 2 seeds.
    Source: Searle, Casella and McCulloch 1992, Variance components, section 5.5 (Henderson's method III).
    """
    table = np.asarray(values, dtype=np.float64)
    has = ~np.isnan(table)
    counts = has.sum(axis=-1)
    if table.ndim != 2 or table.size == 0 or counts.min() < 2 or np.isinf(table).any():
        raise ValueError("`values` must be (configurations, seeds), finite, with 2 seeds or more of each configuration")
    weights = has / counts[:, None]
    means = np.where(has, table, 0).sum(axis=1) / counts
    within = np.where(has, table - means[:, None], 0)
    # The normal equations of the seeds' shifts, after the configurations' effects are eliminated.
    system = np.diag(has.sum(axis=0)) - has.T @ weights
    sizes, axes = np.linalg.eigh(system)
    is_known = sizes > 1e-10 * sizes[-1]  # one shift is free in each set of seeds that configurations connect
    sizes, axes, sums = sizes[is_known], axes[:, is_known], within.sum(axis=0)
    shifts = axes @ (axes.T @ sums / sizes)
    left = np.where(has, within - shifts + (weights @ shifts)[:, None], 0)
    n_free = int(counts.sum()) - len(table)
    df, explained = n_free - sizes.size, max(0.0, float(shifts @ sums))
    residual = float((left**2).sum()) / df if df else 0.0
    of_seeds = explained / n_free
    seed_variance = max(0.0, of_seeds - residual * sizes.size / n_free)
    squares = sizes * seed_variance + residual if of_seeds > 0 else sizes
    seed_df = float(squares.sum() ** 2 / (squares**2).sum())
    return UnevenTwoWay(
        means,
        weights,
        residual,
        df,
        seed_variance,
        seed_df,
    )


def is_complete(values: ArrayLike) -> bool:
    """Return whether no value is missing."""
    return not np.isnan(np.asarray(values, dtype=np.float64)).any()


def complete_table(values: ArrayLike, name: str = "values") -> NDArray[np.float64]:
    """The table (..., C, n) as floats, with every seed of every configuration.

    Raises:
        ValueError: rows have unequal numbers of seeds, there is no row or no seed, or a value is missing (NaN or
            infinite).
    """
    return _complete(values, name, "(..., configurations, seeds)", 2)


def complete_seeds(values: ArrayLike, name: str = "values") -> NDArray[np.float64]:
    """The values (..., n) as floats, with every seed. Raises ValueError as `complete_table`."""
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
