"""Fitting cores to a dense weight so that its outputs change least, given the Gram matrix G of its inputs.

The objective is ‖(W − Ŵ) G^{1/2}‖_F in place of ‖W − Ŵ‖_F. Everything is computed in float64 and on plain matrices;
`mpo_core.fitting.calibration` says where G comes from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_core.fitting.calibration import check_gram, weighted_norm
from mpo_core.fitting.least_squares import als
from mpo_core.fitting.whitening import make_whitener, on_inputs, square_root, times_sites
from mpo_core.tensor_train.algebra import balance_cores, contract, rounded_to, tt_svd
from mpo_core.tensor_train.bonds import check_sizes, check_whole
from mpo_core.values import check_matrix, in_range

FIT_METHODS = ("tt_svd", "whitened", "als")


@torch.no_grad()
def fit_cores(
    W: Tensor,
    d_out: Sequence[int],
    d_in: Sequence[int],
    *,
    chi: int | None = None,
    bonds: Sequence[int] | None = None,
    gram: Tensor | None = None,
    method: str | None = None,
    max_sweeps: int = 20,
    tolerance: float = 1e-2,
) -> list[Tensor]:
    """Return cores with the requested bonds that approximate W as well as `method` can.

    Args:
        W: (out_features, in_features), out_features <= prod(d_out), in_features <= prod(d_in). W is padded with zeros
            to these sizes; padding columns do not count if `gram` is given.
        chi, bonds: exactly one of them, see `tt_svd`; both are clipped to the useful bonds.
        gram: (in_features, in_features), E[x xᵀ] of the layer's inputs.
        method: "tt_svd": nearest in ‖W − Ŵ‖_F, whatever the inputs. "whitened": `whitened_tt_svd`. "als": the better
            of those two under `gram`, then `als`. Default: "als" if there is a gram, else "tt_svd".
        max_sweeps, tolerance: of `als`.
    Returns:
        Cores in W's dtype, on its device. With "tt_svd", all but the last are left-orthogonal, and the last has W's
        norm. With the other two, all have equal norms (`balance_cores`), which suits an optimiser.
    Raises:
        ValueError: neither or both of chi and bonds; an unknown method; "whitened" or "als" without a gram; a gram of
            the wrong shape, not finite, not symmetric or zero; or as `tt_svd`.
    """
    if (chi is None) == (bonds is None):
        raise ValueError(f"exactly one of `chi` and `bonds` must be given, but got chi={chi}, bonds={bonds}")
    method = method or ("tt_svd" if gram is None else "als")
    if method not in FIT_METHODS:
        raise ValueError(f"`method` must be one of {', '.join(FIT_METHODS)}, but got {method!r}")
    W, G = _padded(W, gram, d_out, d_in)
    if method == "tt_svd":
        return tt_svd(W, d_out, d_in, chi, bonds=bonds)
    if G is None:
        raise ValueError(f"`method` {method!r} needs the Gram matrix of the inputs, but got gram=None")
    whitened = whitened_tt_svd(W.double(), d_out, d_in, chi, G, bonds=bonds)
    if method == "whitened":
        return [core.to(W.dtype) for core in balance_cores(whitened)]

    def error_of(cores: Sequence[Tensor]) -> float:
        return weighted_norm(W.double() - contract([core.double() for core in cores]), G)

    starts = [whitened, tt_svd(W.double(), d_out, d_in, chi, bonds=bonds)]
    fitted, _ = als(W.double(), min(starts, key=error_of), G, max_sweeps=max_sweeps, tolerance=tolerance)
    # Rounded before they are compared: the gain of a fit can be smaller than the cost of rounding.
    balanced = [balance_cores(cores) for cores in (fitted, *starts)]
    return min(([core.to(W.dtype) for core in cores] for cores in balanced), key=error_of)


@torch.no_grad()
def whitened_tt_svd(
    W: Tensor,
    d_out: Sequence[int],
    d_in: Sequence[int],
    chi: int | None,
    gram: Tensor,
    *,
    bonds: Sequence[int] | None = None,
) -> list[Tensor]:
    """TT-SVD of W K^{1/2}, undone site by site, with K = K_0 ⊗ … ⊗ K_{L-1} the Kronecker product nearest to `gram`.

    A dense whitener would mix the sites and leave no chain; a Kronecker one acts on each core's own input index. If
    `gram` is such a product, this is a TT-SVD in the norm of the output error; otherwise it may not beat `tt_svd`.

    Args and Raises: as `fit_cores`, with prod(d_out), prod(d_in) the shape of W. Cores in W's dtype.
    Source of the nearest Kronecker product: Van Loan & Pitsianis 1993.
    """
    check_sizes(W.shape[0], W.shape[1], d_out, d_in)
    whitener = make_whitener(check_gram(gram, W.shape[1]).to(W.device), d_in)
    scaled, scale = in_range(W.double())
    cores = tt_svd(times_sites(scaled, whitener.roots), d_out, d_in, chi, bonds=bonds)
    *others, last = on_inputs(cores, whitener.inverse_roots)
    return rounded_to(W.dtype, [*others, last * scale])


@torch.no_grad()
def low_rank_svd(W: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The product A B of that rank nearest to W in ‖(W − A B) G^{1/2}‖_F; without `gram`, in ‖W − A B‖_F.

    Let U be the leading left singular vectors of W G^{1/2}. Then U Uᵀ W is optimal for any G, also a singular one, and
    nothing is inverted. Each component's norm is shared equally between A and B.

    Args:
        W: (out_features, in_features). rank: from 1 to min(W.shape). gram: (in_features, in_features), E[x xᵀ].
    Returns:
        A (out_features, rank) and B (rank, in_features), in W's dtype, on its device; computed in float64.
    Raises:
        ValueError: W is not a finite floating-point matrix, the rank is out of range, or the gram is refused.
    Source: Eckart & Young 1936; the whitened form is that of SVD-LLM (Wang et al. 2024).
    """
    check_matrix(W)
    check_whole(rank=rank)
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"`1 <= rank <= {min(W.shape)}` must hold, but got rank={rank}")
    scaled, scale = in_range(W.double())
    weighted = scaled
    if gram is not None:
        weighted = weighted @ square_root(check_gram(gram, W.shape[1]).to(W.device))
    U = torch.linalg.svd(weighted, full_matrices=False)[0][:, :rank]
    B = U.T @ scaled
    roots = torch.linalg.norm(B, dim=1).sqrt()
    roots, share = torch.where(roots > 0, roots, 1), math.sqrt(scale)
    return (U * roots * share).to(W.dtype), (B / roots[:, None] * share).to(W.dtype)


def _padded(W: Tensor, gram: Tensor | None, d_out: Sequence[int], d_in: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    if W.ndim != 2:
        raise ValueError(f"`W` must have two dimensions, but got shape {tuple(W.shape)}")
    G = None if gram is None else check_gram(gram, W.shape[1]).to(W.device)
    extra_out, extra_in = math.prod(d_out) - W.shape[0], math.prod(d_in) - W.shape[1]
    if extra_out < 0 or extra_in < 0 or extra_out == extra_in == 0:
        return W, G
    return (
        torch.nn.functional.pad(W, (0, extra_in, 0, extra_out)),
        None if G is None else torch.nn.functional.pad(G, (0, extra_in, 0, extra_in)),
    )
