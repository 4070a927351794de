"""The two-way model behind every quantity that pools configurations: y_cs = μ_c + b_s + ε_cs.

Configuration c ran on seed s; b_s is the shared part of the runs of one seed (data order, initialisation). ε_cs is the
rest, with one variance for all. No value is filled in: a table is complete, or `uneven_two_way` fits the model to the
values that exist.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

MIN_SEEDS = 3
"""With fewer seeds nothing is claimed: intervals, tests and bounds are NaN."""


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
    seed_df: its degrees of freedom, fewer than seeds if few configurations have some of the seeds. variance: average
    variance of one value within configurations.
    marginal_variance, marginal_df: as in `marginal_variance`.
    """

    means: NDArray[np.float64]
    weights: NDArray[np.float64]
    residual_variance: float
    df: int
    seed_variance: float
    seed_df: float
    variance: float
    marginal_variance: float
    marginal_df: float


def uneven_two_way(values: ArrayLike) -> UnevenTwoWay:
    """The two-way model, fitted by least squares; for a complete table it equals `two_way` and `marginal_variance`.

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
    of_seeds, of_rest = explained / n_free, residual * df / n_free
    seed_variance = max(0.0, of_seeds - residual * sizes.size / n_free)
    squares = sizes * seed_variance + residual if of_seeds > 0 else sizes
    seed_df = float(squares.sum() ** 2 / (squares**2).sum())
    share = of_seeds / (of_seeds + of_rest) if of_seeds + of_rest > 0 else 1.0
    return UnevenTwoWay(
        means,
        weights,
        residual,
        df,
        seed_variance,
        seed_df,
        float((within**2).sum()) / n_free,
        of_seeds + of_rest,
        1 / (share**2 / seed_df + ((1 - share) ** 2 / df if df else 0)),
    )


def is_complete(values: ArrayLike) -> bool:
    """Return whether no value is missing."""
    return not np.isnan(np.asarray(values, dtype=np.float64)).any()


def marginal_variance(model: TwoWay) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Variance of one value, including the shared part of its seed, and Satterthwaite's degrees of freedom; both (...).

    In the model a mean over n seeds has the variance (σ_b² + σ²) / n. Two independent mean squares estimate the sum. V,
    the sample variance of the n seed means, has the expectation σ_b² + σ²/C and n − 1 degrees of freedom. s²_res has
    the expectation σ² and (C − 1)(n − 1) degrees of freedom. So s²_marg = V + s²_res (C − 1)/C has the expectation
    σ_b² + σ². Its degrees of freedom match the first two moments of a scaled χ², and are between n − 1 (all variance
    shared; also C = 1) and C(n − 1) (none shared).

    Source: Satterthwaite 1946, An approximate distribution of estimates of variance components.
    """
    rows, n = model.means.shape[-1], model.n
    shared = model.seed_means.var(axis=-1, ddof=1)
    residual = model.residual_variance * (rows - 1) / rows if rows > 1 else np.zeros_like(shared)
    variance = shared + residual
    # Share of the sum. For a sum of 0, which no df would widen, all of it counts as shared.
    share = np.divide(shared, variance, out=np.ones_like(shared), where=variance > 0)
    return variance, (n - 1) / (share**2 + (1 - share) ** 2 / max(rows - 1, 1))


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
