"""Draws of the possible true means of all configurations, with the noise pooled over configurations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.statistics.seed_blocks import UnevenTwoWay, is_complete, two_way, uneven_two_way

CHUNK_VALUES = 1 << 17
"""Number of values drawn at once: 1 MB, which stays in a processor's cache. It changes no draw."""


@dataclass(frozen=True, eq=False, slots=True)
class SeedMeans:
    """Means over n seeds of C configurations that share their seeds, and their uncertainty.

    The model is value = configuration + seed + residual: a seed (its data order and initial weights) shifts all
    configurations alike, and the residuals of all configurations have one standard deviation.
    """

    means: NDArray[np.float64]
    """(C,), in the unit of the values."""
    residual_se: float
    """Standard error of one mean without its seeds' shift: pooled residual sd / √n. For unequal n, it is that of the
    mean variance."""
    residual_df: int
    """Degrees of freedom of the pooled sd: (C − 1)(n − 1)."""
    grand_se: float
    """Standard error of the mean of all means: sd over seeds of the mean over configurations, / √n; NaN for
    unequal seeds."""
    uneven: UnevenTwoWay | None = None
    """The underlying model if configurations do not all have the same seeds."""

    @classmethod
    def of(cls, values: ArrayLike) -> SeedMeans:
        """Estimate from values (n, C), one row per seed; NaN if a configuration lacks the seed.

        Raises:
            ValueError: not two axes, fewer than 2 seeds of a configuration, no configuration, or an infinite value.
        Source: Scheffé 1959, The analysis of variance, section 4.2 (two-way layout, one observation per cell).
        """
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 1:
            raise ValueError(f"`values.shape == (n, C)` with n >= 2 and C >= 1 must hold, but got {values.shape}")
        if not is_complete(values):
            return cls._of_uneven(uneven_two_way(values.T))
        if not np.isfinite(values).all():
            raise ValueError("`values` must be finite, but got an infinity: give only complete seeds")
        model, n = two_way(values.T), values.shape[0]
        residual_se = float(np.sqrt(model.residual_variance / n)) if model.df else 0.0
        grand_se = float(model.seed_means.std(ddof=1) / np.sqrt(n))
        return cls(model.means, residual_se, model.df, grand_se)

    @classmethod
    def _of_uneven(cls, model: UnevenTwoWay) -> SeedMeans:
        shares = (model.weights**2).sum(axis=1)  # 1/n of each configuration
        residual_se = float(np.sqrt(model.residual_variance * shares.mean()))
        return cls(model.means, residual_se, model.df, np.nan, uneven=model)

    def take(self, rows: NDArray[np.intp]) -> SeedMeans:
        """The configurations `rows`, in that order, with the noise of all configurations."""
        uneven = self.uneven and self.uneven._replace(means=self.means[rows], weights=self.uneven.weights[rows])
        return replace(self, means=self.means[rows], uneven=uneven)

    def contrast_draws(self, n_draws: int, rng: np.random.Generator) -> Iterator[NDArray[np.float64]]:
        """Draws for quantities that depend only on differences between configurations: without the seeds' shift.

        The draws are around the configurations' own means, with the pooled standard error: normal with many degrees of
        freedom, t with few (each draw also draws its standard deviation).

        Yields:
            (chunk, C) arrays, `n_draws` rows in all.
        Source: Box and Tiao 1973, Bayesian inference in statistical analysis, section 2.7: means under a flat prior.
        """
        return self._draws(n_draws, rng)

    def noise_draws(self, n_draws: int, rng: np.random.Generator) -> Iterator[NDArray[np.float64]]:
        """As `contrast_draws`, but always normal: for the average effect of noise as large as the estimated one."""
        return self._draws(n_draws, rng, known_scale=True)

    def _draws(
        self, n_draws: int, rng: np.random.Generator, *, known_scale: bool = False
    ) -> Iterator[NDArray[np.float64]]:
        chunk = max(1, CHUNK_VALUES // self.means.size)
        # First, one number per draw is drawn for all draws: the rest is then the same stream for any chunk size.
        scales = np.full(n_draws, self.residual_se)
        if self.residual_df and not known_scale:
            scales *= np.sqrt(self.residual_df / rng.chisquare(self.residual_df, n_draws))
        if self.uneven is not None:
            return (yield from self._uneven_draws(self.uneven, scales, rng, chunk, known_scale))
        for start in range(0, n_draws, chunk):
            part = slice(start, start + chunk)
            drawn = rng.standard_normal((scales[part].size, self.means.size))
            drawn *= scales[part, None]
            drawn += self.means
            yield drawn

    def _uneven_draws(
        self,
        model: UnevenTwoWay,
        scales: NDArray[np.float64],
        rng: np.random.Generator,
        chunk: int,
        known_scale: bool,
    ) -> Iterator[NDArray[np.float64]]:
        errors = np.sqrt(model.residual_variance * (model.weights**2).sum(axis=1))
        apart = errors / self.residual_se if self.residual_se else errors
        shifts = np.sqrt(model.seed_variance) * rng.standard_normal((scales.size, model.weights.shape[1]))
        if not known_scale:
            shifts *= np.sqrt(model.seed_df / rng.chisquare(model.seed_df, scales.size))[:, None]
        for start in range(0, scales.size, chunk):
            part = slice(start, start + chunk)
            drawn = rng.standard_normal((scales[part].size, self.means.size))
            drawn *= scales[part, None]
            drawn *= apart
            # Not `@`: the order in which BLAS adds depends on the chunk.
            drawn += np.einsum("ds,cs->dc", shifts[part], model.weights)
            drawn += self.means
            yield drawn
