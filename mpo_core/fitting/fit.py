"""Fitting factors to a dense weight in a metric, on plain matrices; `Metric` says what it measures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_core.fitting.chain_fit import improve_cores
from mpo_core.fitting.descent import MAX_STEPS, TOLERANCE, check_steps
from mpo_core.fitting.metric import Metric
from mpo_core.fitting.shared_space import SharedSpace
from mpo_core.fitting.whitening import Whitened, on_cores
from mpo_core.tensor_train.algebra import balance_cores, rounded_to, tt_svd
from mpo_core.tensor_train.bonds import check_sizes, check_whole, clip_bonds
from mpo_core.values import check_matrix, in_range

FIT_METHODS = ("tt_svd", "whitened", "lbfgs")


@torch.no_grad()
def fit_cores(
    W: Tensor,
    d_out: Sequence[int],
    d_in: Sequence[int],
    *,
    chi: int | None = None,
    bonds: Sequence[int] | None = None,
    metric: Metric | None = None,
    method: str | None = None,
    max_steps: int = MAX_STEPS,
    tolerance: float = TOLERANCE,
) -> list[Tensor]:
    """Return cores with the requested bonds that approximate W as well as `method` can.

    Args:
        W: (out_features, in_features), out_features <= prod(d_out), in_features <= prod(d_in). W is padded with zeros
            to these sizes; what is added does not count if a metric is given.
        chi, bonds: exactly one of them, see `tt_svd`; both are clipped to the useful bonds.
        metric: in which the cores are fitted. Default: the Frobenius norm.
        method: "tt_svd": nearest in ‖W − Ŵ‖_F, whatever the metric. "whitened": `whitened_tt_svd`. "lbfgs": the
            latter, then `improve_cores`; if it can, `SharedSpace`. Default: "tt_svd" for the Frobenius norm, else
            "lbfgs".
        max_steps, tolerance: of the steps of "lbfgs".
    Returns:
        Cores in W's dtype, on its device. With "tt_svd", all but the last are left-orthogonal, and the last has W's
        norm. With the other two, all have equal norms (`balance_cores`), which suits an optimiser.
    Raises:
        ValueError: neither or both of chi and bonds; an unknown method; "whitened" or "lbfgs" in the Frobenius norm; a
            metric that does not fit W; or as `tt_svd`.
    """
    if (chi is None) == (bonds is None):
        raise ValueError(f"exactly one of `chi` and `bonds` must be given, but got chi={chi}, bonds={bonds}")
    metric = metric or Metric()
    check_method(method)
    method = method or ("tt_svd" if metric.is_plain else "lbfgs")
    if W.ndim != 2:
        raise ValueError(f"`W` must have two dimensions, but got shape {tuple(W.shape)}")
    metric = metric.on(W)
    rows, columns = math.prod(d_out), math.prod(d_in)
    if rows >= W.shape[0] and columns >= W.shape[1] and (rows, columns) != tuple(W.shape):
        metric = metric.padded(W.shape, rows, columns)
        W = torch.nn.functional.pad(W, (0, columns - W.shape[1], 0, rows - W.shape[0]))
    if metric.is_plain and method != "tt_svd":
        raise ValueError(f"`method` {method!r} needs a metric other than the Frobenius norm, but got none")
    check_steps(max_steps, tolerance)
    check_sizes(W.shape[0], W.shape[1], d_out, d_in)
    if method == "tt_svd" or not W.any():
        return tt_svd(W, d_out, d_in, chi, bonds=bonds)
    if method == "lbfgs" and SharedSpace.is_for(d_out, d_in):
        caps = clip_bonds(chi if bonds is None else bonds, d_out, d_in)
        cores = SharedSpace.of(W, metric, d_out, d_in).cores(caps[1], max_steps, tolerance)
        return rounded_to(W.dtype, cores)
    whitened = whitened_tt_svd(W.double(), d_out, d_in, chi, metric, bonds=bonds)
    cores = [core.to(W.dtype) for core in balance_cores(whitened)]
    if method == "whitened":
        return cores
    return improve_cores(W, cores, metric, max_steps=max_steps, tolerance=tolerance)


def check_method(method: str | None) -> None:
    """Raise ValueError if it is none of `FIT_METHODS`; None stands for the default."""
    if method not in (None, *FIT_METHODS):
        raise ValueError(f"`method` must be one of {', '.join(FIT_METHODS)}, but got {method!r}")


@torch.no_grad()
def whitened_tt_svd(
    W: Tensor,
    d_out: Sequence[int],
    d_in: Sequence[int],
    chi: int | None,
    metric: Metric,
    *,
    bonds: Sequence[int] | None = None,
) -> list[Tensor]:
    """TT-SVD of the `Whitened` W, undone site by site.

    A dense whitener would mix the sites and leave no chain; a Kronecker one acts on each core's own indices. If the
    moments of the metric are such products, this is a TT-SVD in the metric; otherwise it may not beat `tt_svd`.

    Args and Raises: as `fit_cores`, with prod(d_out), prod(d_in) the shape of W. Cores in W's dtype.
    """
    check_sizes(W.shape[0], W.shape[1], d_out, d_in)
    whitened = Whitened.of(metric.on(W), d_out, d_in)
    scaled, scale = in_range(W.double())
    cores = tt_svd(whitened.matrix(scaled), d_out, d_in, chi, bonds=bonds)
    *others, last = on_cores(cores, *whitened.inverse_roots)
    return rounded_to(W.dtype, [*others, last * scale])


@torch.no_grad()
def low_rank_svd(W: Tensor, rank: int, metric: Metric | None = None) -> tuple[Tensor, Tensor]:
    """The product A B of that rank that is nearest to W in the metric. Default: the Frobenius norm.

    Let R Rᵀ = S, and U the leading left singular vectors of Rᵀ W G^{1/2}. Then R^{-ᵀ} U Uᵀ Rᵀ W is optimal for any G,
    also a singular one. Each component's norm is shared equally between A and B.

    Args:
        W: (out_features, in_features). rank: from 1 to min(W.shape).
    Returns:
        A (out_features, rank) and B (rank, in_features), in W's dtype, on its device; computed in float64.
    Raises:
        ValueError: W is not a finite floating-point matrix, the rank is out of range, or the metric does not fit W.
    Source: Eckart & Young 1936; with G alone it is SVD-LLM (Wang et al. 2024), with both GFWSVD (2025).
    """
    check_matrix(W)
    check_whole(rank=rank)
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"`1 <= rank <= {min(W.shape)}` must hold, but got rank={rank}")
    metric = (metric or Metric()).on(W)
    scaled, scale = in_range(W.double())
    U = torch.linalg.svd(metric.weighted(scaled), full_matrices=False)[0][:, :rank]
    A, B = metric.outputs_unweighted(U), U.T @ metric.outputs_weighted(scaled)
    A_norms, B_norms = torch.linalg.norm(A, dim=0), torch.linalg.norm(B, dim=1)
    roots, share = (B_norms / A_norms).sqrt(), math.sqrt(scale)
    roots = torch.where(torch.isfinite(roots) & (roots > 0), roots, 1)
    return (A * roots * share).to(W.dtype), (B / roots[:, None] * share).to(W.dtype)
