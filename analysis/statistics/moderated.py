"""Variances of many differences that borrow strength from each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from analysis.statistics.differences import TTest, t_test

MIN_PAIRS = 7
"""With fewer differences the prior is too uncertain."""
MOST_DF = 2.0
"""Largest number of degrees of freedom of the prior; more would trust that all pairs have one noise."""


def moderated_tests(test: TTest, units: ArrayLike) -> TTest:
    """The same tests with moderated variances: each is drawn towards what is usual among all.

    The variances of a run are taken as draws from a scaled inverse χ² distribution, whose scale and degrees of freedom
    are estimated from all pairs. A test then has those degrees of freedom besides its own. They are at most 2 here, so
    that a family errs in at most about 5 % of simulated studies (`tests/analysis/test_moderated.py`).

    Args:
        test: (P,); those without a standard error, or with 0, are left as they are.
        units: (P,), the variance of each difference if every run has variance 1, such as 1 / n + 1 / n'.
    Returns:
        The moderated tests; all NaN but difference and n if fewer than `MIN_PAIRS` can be used.
    Source: Smyth 2004, Linear models and empirical Bayes methods for assessing differential expression in microarray
        experiments, section 6; the limit of the degrees of freedom is ours.
    """
    units = np.broadcast_to(np.asarray(units, dtype=np.float64), test.df.shape)
    variances = test.standard_error**2 / units
    usable = variances > 0
    if usable.sum() < MIN_PAIRS:
        nothing = np.full(test.df.shape, np.nan)
        return TTest(test.difference, nothing, nothing, nothing, test.n)
    scale, df = _prior(variances[usable], test.df[usable])
    drawn = (df * scale + test.df * variances) / (df + test.df)
    error = np.where(usable, np.sqrt(drawn * units), test.standard_error)
    return t_test(test.difference, error, np.where(usable, test.df + df, test.df), test.n)


def _prior(variances: NDArray[np.float64], df: NDArray[np.float64]) -> tuple[float, float]:
    """Scale and degrees of freedom of the distribution of true variances, the latter at most `MOST_DF`."""
    logs = np.log(variances) - special.digamma(df / 2) + np.log(df / 2)
    spread = logs.var(ddof=1) - special.polygamma(1, df / 2).mean()
    if spread <= 0:
        return float(np.exp(logs.mean())), MOST_DF

    def excess(log_half: float) -> float:
        return float(special.polygamma(1, np.exp(log_half))) - spread

    half = float(np.exp(optimize.root_scalar(excess, bracket=(-20.0, 20.0)).root))
    scale = np.exp(logs.mean() + special.digamma(half) - np.log(half))
    return float(scale), min(2 * half, MOST_DF)
