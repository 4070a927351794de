"""Draws of the true means of all configurations, given what their seeds measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis.statistics.draws import CHUNK_VALUES, SeedMeans
from analysis.statistics.seed_blocks import UnevenTwoWay

N_NOISES, N_SCATTERS = 24, 96
"""Size of the grid over the noise and the scatter."""


@dataclass(frozen=True, eq=False, slots=True)
class Posterior:
    """The true means of C configurations in a hierarchical model.

    A measured mean is the true mean with normal noise of its n seeds. The true means are scattered normally about a
    trend, a polynomial in the logarithm of the size: linear below 8 configurations, else quadratic. So a mean that is
    better than others of its size, by no more than its noise, counts as partly lucky. Configurations that differ by
    much more than their noise keep their means.

    The noise has one standard deviation σ for all, estimated from all; the scatter is τ. Trend, τ and σ are not known
    and are drawn, too. Priors: flat for the trend; for σ² the scaled inverse χ² of its estimate; for τ, in units of the
    standard error of a mean, τ / (1 + τ²)^1.5. It is 0 at τ = 0, because true means are never on the trend exactly.

    A seed shifts all configurations that have it. If all have the same seeds, the shifts move all true means together.
    If not, they are estimated from all values, and the means of configurations with different seeds are made
    comparable. What stays unknown of the shifts is drawn, with Student's t.

    Source: Gelman 2006, Prior distributions for variance parameters in hierarchical models; Chung, Rabe-Hesketh, Dorie,
        Gelman and Liu 2013, A nondegenerate penalized likelihood estimator for variance parameters in multilevel
        models; Robinson 1991, That BLUP is a good thing (shifts).
    """

    means: NDArray[np.float64]
    """(C,): measured, each over its own seeds."""
    _comparable: NDArray[np.float64]
    """(C,): the means without the estimated shifts of their seeds."""
    _trend: NDArray[np.float64]
    """(C, p): the trend's basis, orthonormal."""
    _shares: NDArray[np.float64]
    """(C,): variance of each mean's noise, as a multiple of σ²."""
    _noises: NDArray[np.float64]
    """(N_NOISES,): equally probable values of σ²."""
    _shifts: NDArray[np.float64]
    """(C, K): what K independent standard normal numbers add to the means: the unknown part of the seeds' shifts."""
    _shift_df: float

    @classmethod
    def of(cls, sizes: ArrayLike, values: ArrayLike) -> Posterior:
        """The posterior of the means of values.

        Args:
            sizes: (C,), positive.
            values: (n, C), one row per seed, at least 2 for each configuration; NaN if it lacks the seed.
        Raises:
            ValueError: shapes differ, a value is infinite, or a configuration has fewer than 2 seeds.
        """
        found, sizes = SeedMeans.of(values), np.asarray(sizes, dtype=np.float64)
        if sizes.shape != found.means.shape:
            raise ValueError(f"`sizes.shape == {found.means.shape}` must hold, but got {sizes.shape}")
        df: float = found.residual_df
        if found.uneven is None:
            n, n_rows = np.asarray(values).shape
            shares, comparable = np.full(n_rows, 1 / n), found.means
            variance, shift_df = found.residual_se**2 * n, float(n - 1)
            # The mean of all means has the variance (Var(b) + σ²/C) / n; that of the shift is Var(b) / n.
            shift = found.grand_se**2 - variance / n / n_rows
            shifts = np.full((n_rows, 1), np.sqrt(max(shift, 0.0)))
        else:
            model = found.uneven
            shares, shift_df = (model.weights**2).sum(axis=1), model.seed_df
            shifts, comparable = np.zeros((len(found.means), 1)), found.means
            if df == 0:  # no two configurations share a seed: all noise is their own
                variance, df = model.seed_variance, model.seed_df
            else:
                variance = model.residual_variance
                if model.seed_variance > 0:
                    comparable, shifts = _without_shifts(np.asarray(values, dtype=np.float64).T, model)
        levels = (np.arange(N_NOISES) + 0.5) / N_NOISES
        noises = variance * df / stats.chi2.ppf(levels, df) if df else np.full(N_NOISES, variance)
        return cls(found.means, comparable, _basis(sizes), shares, noises, shifts, shift_df)

    def draws(self, n_draws: int, rng: np.random.Generator) -> Iterator[NDArray[np.float64]]:
        """Draws of the true means, (chunk, C) arrays with `n_draws` rows in all.

        The number that is drawn at once changes no draw.
        """
        shifts = rng.standard_normal((n_draws, self._shifts.shape[1]))
        shifts *= np.sqrt(self._shift_df / rng.chisquare(self._shift_df, n_draws))[:, None]
        chunk = max(1, CHUNK_VALUES // self.means.size)
        parts = [slice(start, start + chunk) for start in range(0, n_draws, chunk)]
        if not self._noises.any():
            for part in parts:
                yield self._comparable + self._shifted(shifts[part])
            return
        noises, scatters, trends, factors, weights = self._grid()
        cells = rng.choice(weights.size, size=n_draws, p=weights)
        normal = rng.standard_normal((n_draws, self._trend.shape[1]))
        trends = trends[cells] + np.einsum("dij,dj->di", factors[cells], normal)
        shares = self._shares if np.ptp(self._shares) else self._shares[:1]  # one number for all
        for part in parts:
            noise = noises[cells[part], None] * shares
            kept = scatters[cells[part], None] ** 2
            kept = kept / (kept + noise)  # the part of a mean that is not shrunk to the trend
            drawn = rng.standard_normal((len(noise), self.means.size))
            drawn *= np.sqrt(kept * noise)
            drawn += kept * self._comparable
            # Not `@`: the order in which BLAS adds depends on the chunk.
            for trend, basis in zip(trends[part].T, self._trend.T, strict=True):
                drawn += (1 - kept) * trend[:, None] * basis
            drawn += self._shifted(shifts[part])
            yield drawn

    def _shifted(self, normal: NDArray[np.float64]) -> NDArray[np.float64]:
        """(d, C) or (d, 1): what the seeds' shifts add, for (d, K) normal numbers."""
        is_one = self._shifts.shape[1] == 1
        return np.einsum("dk,ck->dc", normal, self._shifts[:1] if is_one else self._shifts)

    def _grid(self) -> tuple[NDArray[np.float64], ...]:
        """For each cell of the grid: σ², τ, the trend's posterior mean and Cholesky factor, and the probability."""
        x = self._trend
        at = x.T @ self._comparable
        left = self._comparable - x @ at
        se = np.sqrt(np.median(self._noises) * self._shares.mean())
        scatters = np.geomspace(0.05 * se, 4 * np.ptp(self._comparable) + se, N_SCATTERS)
        prior = np.log(np.gradient(scatters) * scatters) - 1.5 * np.log1p((scatters / se) ** 2)
        noises, scatters, prior = (
            each.ravel() for each in np.broadcast_arrays(self._noises[:, None], scatters[None], prior[None])
        )
        # Sums over configurations whose noise is alike: their number does not multiply the cost of the grid.
        kinds, kind_of = np.unique(self._shares, return_inverse=True)
        is_kind = (kind_of == np.arange(kinds.size)[:, None]).astype(np.float64)
        counts, squares = is_kind.sum(axis=1), is_kind @ left**2
        cross, products = (is_kind * left) @ x, np.einsum("kc,ci,cj->kij", is_kind, x, x)
        variance = scatters[:, None] ** 2 + noises[:, None] * kinds
        precision = np.einsum("gk,kij->gij", 1 / variance, products)
        covariance = np.linalg.inv(precision)
        trend = np.einsum("gij,gj->gi", covariance, np.einsum("gk,ki->gi", 1 / variance, cross))
        fitted = np.einsum("gi,gij,gj->g", trend, precision, trend)  # the part of the squares that the trend explains
        likelihood = -0.5 * ((counts * np.log(variance)).sum(axis=1) + (squares / variance).sum(axis=1) - fitted)
        likelihood -= 0.5 * np.linalg.slogdet(precision)[1]
        logs = likelihood + prior
        weights = np.exp(logs - logs.max())
        return noises, scatters, at + trend, np.linalg.cholesky(covariance), weights / weights.sum()


def _without_shifts(table: NDArray[np.float64], model: UnevenTwoWay) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The means of a table (C, S) without their seeds' shifts, (C,), and what is unknown of the shifts, (C, S).

    The shifts are normal with Var(b). Their conditional mean and covariance, under a flat prior of the true means,
    follow from the seeds' normal equations (see `seed_blocks.uneven_two_way`).
    """
    has = ~np.isnan(table)
    system = np.diag(has.sum(axis=0)) - has.T @ model.weights
    sums = np.where(has, table - model.means[:, None], 0).sum(axis=0)
    # Without noise the shifts are known where values tell them apart; a tiny noise stands for none.
    noise = max(model.residual_variance, 1e-9 * model.seed_variance)
    covariance = np.linalg.inv(system / noise + np.eye(len(system)) / model.seed_variance)
    shifts = covariance @ sums / noise
    return model.means - model.weights @ shifts, model.weights @ np.linalg.cholesky(covariance)


def _basis(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(C, p): an orthonormal basis of the trend's polynomials in log size; fewer if there are few distinct sizes."""
    degree = min(1 if sizes.size < 8 else 2, np.unique(sizes).size - 1)
    logs = np.log(sizes)
    logs = (logs - logs.mean()) / (np.ptp(logs) or 1.0)
    return np.linalg.qr(np.stack([logs**power for power in range(degree + 1)], axis=1))[0]
