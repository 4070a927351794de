"""The error of a layer at each of its sizes, from the singular values of its weight, or corrected by a few fits."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpo_core.fitting.metric import Metric
from mpo_core.fitting.shared_space import SharedSpace
from mpo_core.fitting.whitening import Whitened
from mpo_core.tensor_train.gauge import n_fixed_bits
from mpo_core.tensor_train.splitting import Sizes, Split, smaller_shapes
from mpo_core.values import in_range

N_MEASURED = 4
"""Number of sizes at which `corrected` measures the error of a fit."""

QUICK_ABOVE, QUICK_STEPS, QUICK_MEASURED = 2**16, 20, (0.15, 0.6)
"""Where errors of sizes are measured, a matrix with more entries is fitted by QUICK_STEPS steps only, and only near
these shares of the largest size. The steps give most of the gain, and the full fit that follows is no worse."""


@dataclass(frozen=True)
class Rung:
    """One size that a layer can have."""

    n_params: int
    error: float
    """Squared relative error in the metric. The function that made the ladder says how exact it is."""
    n_index_bits: int = 0
    """See `StructuredLinear.n_index_bits`."""
    bits: int = 32
    """Bits of a parameter."""
    candidate: int = 0
    """Which of several kinds of layer has this size."""

    @property
    def cost(self) -> int:
        """Its cost in a budget: its parameters, and one for as many bits of indices as a parameter has."""
        return self.n_params + -(-self.n_index_bits // self.bits)


def chain_ladder(W: Tensor, metric: Metric, split: Split, gauge: str = "free") -> list[Rung]:
    """Rungs χ = 1, 2, … of a chain of cores, up to the last with fewer parameters than W or the last useful χ.

    The error is the sum over the bonds of the squared singular values that are cut off (Oseledets 2011, Theorem 2.2).
    They are those of the `Whitened` W. In the Frobenius norm the error is an upper bound on that of `tt_svd`, exact for
    two sites. In a metric whose moments are not Kronecker products it is no bound, but falls as the errors do.
    """
    metric = metric.on(W)
    tails: dict[tuple[Sizes, Sizes], list[list[float]]] = {}
    ladder: list[Rung] = []
    for shape in smaller_shapes(W.numel(), split, gauge):
        sizes = shape.d_out, shape.d_in
        if sizes not in tails:
            tails[sizes] = _relative_tails(W, metric, *sizes)
        cut = sum(tail[bond] for tail, bond in zip(tails[sizes], shape.bonds[1:-1], strict=True))
        n_index_bits = n_fixed_bits(shape.bonds, *sizes) if gauge == "fixed" else 0
        ladder.append(Rung(shape.n_params, min(1.0, cut), n_index_bits))
    return ladder


def low_rank_errors(W: Tensor, metric: Metric) -> list[float]:
    """Entry r: the squared relative error in the metric of the best matrix of rank r (Eckart & Young 1936)."""
    metric, M = metric.on(W), in_range(W.double())[0]
    # Only the shorter side needs a root.
    if W.shape[0] <= W.shape[1]:
        M = metric.outputs_weighted(M)
        return _tail_of_squares((M if metric.gram is None else M @ metric.gram) @ M.T)
    M = M if metric.input_root is None else M @ metric.input_root
    return _tail_of_squares(M.T @ (M if metric.sensitivity is None else metric.sensitivity @ M))


def corrected(ladder: list[Rung], measure: Callable[[int], float], is_quick: bool = False) -> list[Rung]:
    """The ladder with the errors of fits: measured at some sizes, and scaled by the factors there.

    A whitened TT-SVD's error follows the shape of a fit's error, but not its size. Between the measured rungs the
    factor is interpolated, and outside it is that of the nearest.

    Args:
        measure: function from a number of parameters to the squared relative error of the fit with at most that many.
        is_quick: measure near `QUICK_MEASURED` only, instead of at N_MEASURED sizes from the first to the last.
    """
    if not ladder:
        return ladder
    sizes = [rung.n_params for rung in ladder]
    places: Iterable[int] = range(len(ladder))
    if is_quick:
        places = {min(bisect_left(sizes, share * sizes[-1]), len(sizes) - 1) for share in QUICK_MEASURED}
    elif len(ladder) > N_MEASURED:  # dense where a larger bond changes most
        places = {round(len(ladder) ** (step / (N_MEASURED - 1))) - 1 for step in range(N_MEASURED)}
    places = sorted(places)
    tiny = 1e-16
    logs = [math.log((measure(ladder[place].n_params) + tiny) / (ladder[place].error + tiny)) for place in places]
    at = [math.log(sizes[place]) for place in places]
    return [
        replace(rung, error=(rung.error + tiny) * math.exp(_between(math.log(rung.n_params), at, logs)) - tiny)
        for rung in ladder
    ]


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return y at x by linear interpolation between points in ascending order; outside, that of the nearest."""
    if not xs[0] < x < xs[-1]:
        return ys[0] if x <= xs[0] else ys[-1]
    right = bisect_left(xs, x)
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + share * (ys[right] - ys[right - 1])


def _relative_tails(W: Tensor, metric: Metric, d_out: Sequence[int], d_in: Sequence[int]) -> list[list[float]]:
    n_sites, rows, columns = len(d_out), math.prod(d_out), math.prod(d_in)
    if (rows, columns) == tuple(W.shape) and not metric.is_plain and SharedSpace.is_for(d_out, d_in) and W.any():
        return [SharedSpace.of(W, metric, d_out, d_in).squared_tail()]
    M = torch.nn.functional.pad(in_range(W.double())[0], (0, columns - W.shape[1], 0, rows - W.shape[0]))
    M = Whitened.of(metric.padded(W.shape, rows, columns), d_out, d_in).matrix(M)
    T = M.reshape(*d_out, *d_in).permute([axis for site in range(n_sites) for axis in (site, n_sites + site)])
    heights = [math.prod(d_out[:site]) * math.prod(d_in[:site]) for site in range(1, n_sites)]
    return [squared_tail(T.reshape(height, -1)) for height in heights]


def squared_tail(M: Tensor) -> list[float]:
    """Entry k: the share of ‖M‖² beyond the k largest singular values."""
    M = M if M.shape[0] <= M.shape[1] else M.T
    # Eigenvalues of M Mᵀ are several times cheaper than singular values, and exact enough for a choice of sizes.
    return _tail_of_squares(M @ M.T)


def _tail_of_squares(square: Tensor) -> list[float]:
    """Entry k: the share of the sum of the eigenvalues beyond the k largest."""
    values = torch.linalg.eigvalsh(square).clamp(min=0)  # ascending
    total = float(values.sum())
    if total == 0:
        return [0.0] * (len(values) + 1)
    beyond = torch.cumsum(values, 0).flip(0) / total
    return [*beyond.tolist(), 0.0]
