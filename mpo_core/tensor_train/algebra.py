"""Tensor-train matrices (MPO) as plain lists of cores.

Site l of L is a core (bonds[l], d_out[l], d_in[l], bonds[l+1]) with bonds[0] = bonds[L] = 1. Row and column indices of
W are row-major over the sites, site 0 the most significant: i = (i_0, ..., i_{L-1}), j = (j_0, ..., j_{L-1}).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_core.tensor_train.bonds import check_fraction, check_sizes, check_whole, clip_bonds, contraction_order
from mpo_core.tensor_train.leading_subspace import leading_left
from mpo_core.values import (
    check_cores_finite,
    check_matrix,
    error_ratio,
    in_range,
    norm,
    times_power,
    to_unit,
    to_units,
)


@torch.no_grad()
def tt_svd(
    W: Tensor,
    d_out: Sequence[int],
    d_in: Sequence[int],
    chi: int | None = None,
    *,
    bonds: Sequence[int] | None = None,
    rel_error: float | None = None,
) -> list[Tensor]:
    """Decompose W into cores by a left-to-right sweep of truncated SVDs.

    All cores but the last are left-orthogonal; the last carries the norm. The squared error is the sum of what the cuts
    discard. It is at most the sum, over the bonds, of the squared singular values of W's own unfoldings beyond that
    bond (paper, Eq. 5). For L <= 3 it never rises with chi, because the kept subspaces are nested; for L >= 4 it can.
    Without rel_error, a large unfolding is cut by `leading_left` to the tolerance stated there, not by a full SVD.

    Args:
        W: (out_features, in_features), out_features = prod(d_out), in_features = prod(d_in). Computed in W's dtype, but
            at least in float32.
        chi: cap on every bond, >= 1. Or bonds: one cap for each bond. Without rel_error the bonds are then `clip_bonds`
            of the cap for any W, so that the layers of several seeds can be stacked.
        rel_error: target for ‖W − Ŵ‖_F / ‖W‖_F in [0, 1), met to rounding unless a cap binds; the bonds depend on W.
            Each cut may spend an equal share of the squared error that earlier cuts left.
        If none of the three is given: rel_error = 0, exact to rounding. Each bond is then at most the numerical rank of
            its unfolding (and at least 1).
    Returns:
        Cores in W's dtype, on its device. If float16 cannot hold the last one, all have equal norms (`balance_cores`).
    Raises:
        ValueError: chi and bonds together; caps that `clip_bonds` refuses; rel_error outside [0, 1); sizes that do not
            multiply to W's shape; or as `check_matrix`.
    Source: paper, Algorithm 1; Oseledets 2011, Algorithm 1 and Theorem 2.2.
    """
    if W.ndim != 2:
        raise ValueError(f"`W` must have two dimensions, but got shape {tuple(W.shape)}")
    check_sizes(W.shape[0], W.shape[1], d_out, d_in)
    check_matrix(W)
    rel_error = _check_target(chi, bonds, rel_error)
    caps = clip_bonds(chi if bonds is None else bonds, d_out, d_in)

    rest, scale = in_range(by_sites(W, d_out, d_in).to(_at_least_float32(W.dtype)))
    size = float(torch.linalg.vector_norm(rest, dtype=torch.float64))
    # Rounding of that size is carried along the sweep: it scales with W's norm, not with each step's largest value.
    negligible = 16 * math.sqrt(max(W.shape)) * torch.finfo(rest.dtype).eps * size
    budget = None if rel_error is None else (rel_error * size) ** 2
    cores, left = [], 1
    for site in range(len(d_out) - 1):
        M = rest.reshape(left * d_out[site] * d_in[site], -1)
        n_cuts = len(d_out) - 1 - site
        U, rest, budget = _cut(M, caps[site + 1], budget, n_cuts, negligible)
        cores.append(U.reshape(left, d_out[site], d_in[site], -1))
        left = U.shape[1]
    rest = rest if scale == 1 else rest * scale
    cores.append(rest.reshape(left, d_out[-1], d_in[-1], 1))
    return rounded_to(W.dtype, cores)


@torch.no_grad()
def round_cores(
    cores: Sequence[Tensor],
    chi: int | None = None,
    *,
    bonds: Sequence[int] | None = None,
    rel_error: float | None = None,
) -> list[Tensor]:
    """Return cores of the same matrix W, or of one near it, with smaller bonds; W is never formed.

    Args:
        chi, bonds, rel_error: as for `tt_svd`; the error is measured against the W of these cores. Without rel_error
            each bond becomes the minimum of itself and its cap, clipped. With none of the three, only parts that are
            zero to rounding are dropped.
    Returns:
        Cores in the dtype of the given ones. All but the last are left-orthogonal, with `tt_svd`'s exception for
        float16. The error has `tt_svd`'s bounds.
    Raises:
        ValueError: as `tt_svd` and `orthogonalize`.
    Source: Oseledets 2011, Algorithm 2.
    """
    _, d_out, d_in = bonds_and_sizes(cores)
    rel_error = _check_target(chi, bonds, rel_error)
    caps = clip_bonds(chi if bonds is None else bonds, d_out, d_in)

    dtype = _at_least_float32(cores[0].dtype)
    # Right-orthogonal beyond the first core, so that a cut in the small matrix is a cut of the same size in W.
    rounded = orthogonalize([core.to(dtype) for core in cores], 0)
    rounded[0], scale = in_range(rounded[0])
    size = float(torch.linalg.vector_norm(rounded[0], dtype=torch.float64))
    largest = max(core.shape[0] * core.shape[1] * core.shape[2] for core in rounded)
    negligible = 16 * math.sqrt(largest) * torch.finfo(dtype).eps * size
    budget = None if rel_error is None else (rel_error * size) ** 2
    for site in range(len(cores) - 1):
        M = rounded[site].reshape(-1, rounded[site].shape[3])
        n_cuts = len(cores) - 1 - site
        U, rest, budget = _cut(M, caps[site + 1], budget, n_cuts, negligible)
        rounded[site] = U.reshape(-1, d_out[site], d_in[site], U.shape[1])
        rounded[site + 1] = torch.tensordot(rest, rounded[site + 1], 1)
    rounded[-1] = rounded[-1] if scale == 1 else rounded[-1] * scale
    return rounded_to(cores[0].dtype, rounded)


def orthogonalize(cores: Sequence[Tensor], site: int) -> list[Tensor]:
    """Return cores of the same matrix W, left-orthogonal before `site` and right-orthogonal after it; differentiable.

    The core at `site` then carries the norm: its Frobenius norm is W's. A bond out of its neighbours' reach shrinks
    until it is within reach. Left-orthogonal: the (a · o · i, b) matrix of the core (a, o, i, b) has orthonormal
    columns. Right-orthogonal: its (a, o · i · b) matrix has orthonormal rows.

    Raises:
        ValueError: `site` is not one of 0 to L - 1; as `bonds_and_sizes`; a core has an infinite or NaN entry; or the
            dtype cannot hold W's norm.
    Source: Oseledets 2011, section 3; Schollwöck 2011, section 4.4.
    """
    bonds_and_sizes(cores)
    check_whole(site=site)
    if not 0 <= site < len(cores):
        raise ValueError(f"`0 <= site < {len(cores)}` must hold, but got site={site}")
    check_cores_finite(cores)
    # Scaled, because a part of the chain may be out of range even if W is not.
    swept, total = to_units([core.to(_at_least_float32(core.dtype)) for core in cores])
    for place in range(site):
        a, o, i, b = swept[place].shape
        Q, R = torch.linalg.qr(swept[place].reshape(a * o * i, b))
        swept[place] = Q.reshape(a, o, i, -1)
        swept[place + 1], exponent = to_unit(torch.tensordot(R, swept[place + 1], 1))
        total = total + exponent
    for place in range(len(cores) - 1, site, -1):
        a, o, i, b = swept[place].shape
        Q, R = torch.linalg.qr(swept[place].reshape(a, o * i * b).mT)
        swept[place] = Q.mT.reshape(-1, o, i, b)
        swept[place - 1], exponent = to_unit(torch.tensordot(swept[place - 1], R.mT, 1))
        total = total + exponent
    swept[site] = times_power(swept[site], total)
    swept = [core.to(cores[0].dtype).contiguous() for core in swept]
    if not torch.isfinite(swept[site]).all():
        raise ValueError(f"the norm of the matrix of these cores is beyond the range of {cores[0].dtype}")
    return swept


def inner_product(cores_a: Sequence[Tensor], cores_b: Sequence[Tensor]) -> Tensor:
    """⟨A, B⟩ = Σ_ij A_ij B_ij of two matrices given by their cores; neither is formed. Differentiable.

    Returns:
        A float64 scalar. In float32, sums of squares of the cores would overflow, and differences of norms would
        cancel.
    Raises:
        ValueError: the two have different sizes on some site, or as `bonds_and_sizes`.
    """
    return times_power(*_inner_product(cores_a, cores_b))


def frobenius_norm(cores: Sequence[Tensor]) -> Tensor:
    """Return ‖W‖_F from the cores as a float64 scalar; W is never formed. Differentiable, with gradient 0 for W = 0.

    Raises:
        ValueError: as `bonds_and_sizes`.
    """
    square, exponent = _inner_product(cores, cores)
    odd = exponent % 2
    square, positive = times_power(square, odd), square > 0
    root = torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
    return times_power(root, (exponent - odd) / 2)


def _inner_product(cores_a: Sequence[Tensor], cores_b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return ⟨A, B⟩ / 2^k and k, because the square of a norm may be out of range even if the norm is not."""
    _, *sizes_a = bonds_and_sizes(cores_a)
    _, *sizes_b = bonds_and_sizes(cores_b)
    if sizes_a != sizes_b:
        raise ValueError(f"both must have the same [d_out, d_in], but got {sizes_a} and {sizes_b}")
    cores_a, total_a = to_units([core.double() for core in cores_a])
    cores_b, total_b = to_units([core.double() for core in cores_b])
    total = total_a + total_b
    environment = torch.ones(1, 1, dtype=torch.float64, device=cores_a[0].device)  # (bond of A, bond of B)
    for A, B in zip(cores_a, cores_b, strict=True):
        half = environment.mT @ A.reshape(A.shape[0], -1)
        environment, exponent = to_unit(half.reshape(-1, A.shape[3]).mT @ B.reshape(-1, B.shape[3]))
        total = total + exponent
    return environment.reshape(()), total


def balance_cores(cores: Sequence[Tensor]) -> list[Tensor]:
    """Return cores of the same matrix W with equal Frobenius norms, the geometric mean of the present ones.

    No other spread of factors over the cores has a smaller sum of squares, so weight decay leads to this one.
    If a core is zero, W = 0 and the cores are returned unchanged. Differentiable if all cores are non-zero.

    Raises:
        ValueError: as `bonds_and_sizes`.
    """
    bonds_and_sizes(cores)
    norms = torch.stack([norm(core) for core in cores])
    usable = (norms > 0).all()
    logs = torch.where(usable, norms, 1.0).log()
    scales = (logs.mean() - logs).exp()
    return [(core.double() * scale).to(core.dtype) for core, scale in zip(cores, scales, strict=True)]


def contract(cores: Sequence[Tensor]) -> Tensor:
    """The matrix W (out_features, in_features) that the cores represent (paper, Eq. 7); differentiable.

    Neighbours are merged in the cheapest order (`contraction_order`).

    Raises:
        ValueError: as `bonds_and_sizes`.
    """
    n_sites, sizes = len(cores), bonds_and_sizes(cores)
    split = contraction_order(*sizes)[0] if n_sites > 2 else {(0, 2): 1}  # two cores have one order

    def merge(first: int, last: int) -> Tensor:
        if last - first == 1:
            return cores[first]
        middle = split[first, last]
        return merge_cores(merge(first, middle), merge(middle, last))

    W = merge(0, n_sites)
    return W.reshape(W.shape[1], W.shape[2])


def merge_cores(left: Tensor, right: Tensor) -> Tensor:
    """Merge two neighbouring cores: (a, o, i, b) and (b, p, j, c) become (a, o·p, i·j, c)."""
    a, o, i, b = left.shape
    _, p, j, c = right.shape
    product = left.reshape(a * o * i, b) @ right.reshape(b, p * j * c)
    # Ordering the indices at every merge, not once at the end, copies long runs: several times faster for long chains.
    return product.view(a, o, i, p, j * c).transpose(2, 3).reshape(a, o * p, i * j, c)


def rel_error(W: Tensor, W_hat: Tensor) -> float:
    """‖W − Ŵ‖_F / ‖W‖_F, computed in float64; for W = 0 it is 0 when Ŵ = 0 as well, and infinite otherwise.

    Raises:
        ValueError: the two differ in shape.
    """
    if W.shape != W_hat.shape:
        raise ValueError(f"`W` and `W_hat` must have the same shape, but got {tuple(W.shape)} and {tuple(W_hat.shape)}")
    W, scale = in_range(W.detach().double())
    W_hat = W_hat.detach().double() / scale
    return error_ratio(float(norm(W - W_hat)), float(norm(W)))


def bonds_and_sizes(cores: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(bonds, d_out, d_in) of a chain of cores.

    Raises:
        ValueError: no cores, a core without four dimensions, neighbours whose bonds differ, ends other than 1.
    """
    shapes = [tuple(core.shape) for core in cores]
    if not shapes or any(len(shape) != 4 for shape in shapes):
        raise ValueError(f"`cores` must be at least one tensor of four dimensions each, but got shapes {shapes}")
    bonds = (*[shape[0] for shape in shapes], shapes[-1][3])
    if bonds[0] != 1 or bonds[-1] != 1 or any(s[3] != bond for s, bond in zip(shapes, bonds[1:], strict=True)):
        raise ValueError(f"`cores` must have equal bonds between neighbours and 1 at the ends, but got shapes {shapes}")
    return bonds, tuple(shape[1] for shape in shapes), tuple(shape[2] for shape in shapes)


def rounded_to(dtype: torch.dtype, cores: Sequence[Tensor]) -> list[Tensor]:
    """Return the cores in that dtype, with equal norms if one core is beyond its range."""
    rounded = [core.to(dtype).contiguous() for core in cores]
    if all(torch.isfinite(core).all() for core in rounded):
        return rounded
    return [core.to(dtype).contiguous() for core in balance_cores(cores)]


def _check_target(chi: int | None, bonds: Sequence[int] | None, rel_error: float | None) -> float | None:
    """Return the error target; 0 if none of the three is given."""
    if chi is not None and bonds is not None:
        raise ValueError(f"one of `chi` and `bonds` caps the bonds, but got chi={chi}, bonds={list(bonds)}")
    if rel_error is None:
        return 0.0 if chi is None and bonds is None else None
    check_fraction(rel_error=rel_error)
    return rel_error


def _cut(
    M: Tensor, cap: int, budget: float | None, n_cuts: int, negligible: float
) -> tuple[Tensor, Tensor, float | None]:
    """Split M (m, n) into U (m, k), with orthonormal columns, times rest (k, n), by the k leading singular values.

    k is `cap`, or less if the budget of squared error allows it. This cut is the first of n_cuts to come and takes at
    most its equal share of the budget. The remaining budget is returned too.
    """
    if budget is None:
        U = leading_left(M, cap)
        if U is not None:
            return U, U.mT @ M, None
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    if budget is not None:
        tails = s.double().square().flip(0).cumsum(0).flip(0)  # tails[k]: squared error of keeping k
        cap = max(1, min(cap, int(((tails > budget / n_cuts) & (s > negligible)).sum())))
        budget = max(0.0, budget - float(tails[cap:][:1].sum()))
    return U[:, :cap], s[:cap, None] * Vh[:cap], budget


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def by_sites(W: Tensor, d_out: Sequence[int], d_in: Sequence[int]) -> Tensor:
    """(out_features, in_features) -> (d_out[0], d_in[0], ..., d_out[L-1], d_in[L-1])."""
    n_sites = len(d_out)
    return W.reshape(*d_out, *d_in).permute([axis for site in range(n_sites) for axis in (site, n_sites + site)])
