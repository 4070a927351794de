"""Tensor-train matrices (MPO) as plain lists of cores.

Site l of L is a core (bonds[l], d_out[l], d_in[l], bonds[l+1]) with bonds[0] = bonds[L] = 1. Row and column indices of
W are row-major over the sites, site 0 the most significant: i = (i_0, ..., i_{L-1}), j = (j_0, ..., j_{L-1}).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def largest_bonds(d_out: Sequence[int], d_in: Sequence[int]) -> tuple[int, ...]:
    """The bonds (1, ..., 1) beyond which nothing is gained: each is the largest possible rank of its unfolding.

    Raises:
        ValueError: d_out and d_in differ in length, are empty, or contain a size below 1.
    """
    sizes = _site_sizes(d_out, d_in)
    return tuple(min(math.prod(sizes[:site]), math.prod(sizes[site:])) for site in range(len(sizes) + 1))


def clip_bonds(chi: int, d_out: Sequence[int], d_in: Sequence[int]) -> tuple[int, ...]:
    """The bonds (1, χ_1, ..., χ_{L-1}, 1) that the cap `chi` leads to: never above the largest useful ones.

    Raises:
        ValueError: chi < 1, or the sizes are refused by `largest_bonds`.
    """
    if chi < 1:
        raise ValueError(f"`chi >= 1` must hold, but got chi={chi}")
    return tuple(min(chi, bond) for bond in largest_bonds(d_out, d_in))


def n_params(bonds: Sequence[int], d_out: Sequence[int], d_in: Sequence[int]) -> int:
    """Number of entries of all cores (paper, Eq. 3)."""
    sizes = _site_sizes(d_out, d_in)
    return sum(bonds[site] * size * bonds[site + 1] for site, size in enumerate(sizes))


@torch.no_grad()
def tt_svd(W: Tensor, d_out: Sequence[int], d_in: Sequence[int], chi: int | None) -> list[Tensor]:
    """Decompose W into cores by a left-to-right sweep of truncated SVDs.

    All cores but the last are left-orthogonal; the last carries the norm. The squared error is at most the sum over the
    bonds of the squared singular values of W's own unfoldings beyond that bond (paper, Eq. 5). For L <= 3 it never
    rises with chi, as the subspaces kept are nested; for L >= 4 it can.

    Args:
        W: (out_features, in_features), out_features = prod(d_out), in_features = prod(d_in). Computed in W's dtype, or
            in float32 where W has less.
        chi: cap on every bond, >= 1. The bonds are then `clip_bonds(chi, d_out, d_in)` whatever W holds, so that the
            layers of several seeds can be stacked. None: exact to rounding, with bonds no larger than the numerical
            rank of each unfolding (and at least 1).
    Returns:
        Cores in W's dtype, on its device.
    Raises:
        ValueError: chi < 1; W is not a floating-point matrix, has an infinite or NaN entry, or the sizes do not
            multiply to its shape.
    Source: paper, Algorithm 1; Oseledets 2011, Algorithm 1 and Theorem 2.2.
    """
    if W.ndim != 2:
        raise ValueError(f"`W` must have two dimensions, but got shape {tuple(W.shape)}")
    check_sizes(W.shape[0], W.shape[1], d_out, d_in)
    if not W.is_floating_point():
        raise ValueError(f"`W` must be floating-point to be decomposed, but got {W.dtype}")
    if not torch.isfinite(W).all():
        raise ValueError(f"`W` must be finite to be decomposed, but {int((~torch.isfinite(W)).sum())} entries are not")
    bonds = None if chi is None else clip_bonds(chi, d_out, d_in)

    rest = _interleave(W, d_out, d_in).to(torch.promote_types(W.dtype, torch.float32))
    # Rounding of that size is carried along the sweep: it scales with W's norm, not with each step's largest value.
    negligible = 16 * math.sqrt(max(W.shape)) * torch.finfo(rest.dtype).eps * torch.linalg.norm(rest)
    cores, left = [], 1
    for site in range(len(d_out) - 1):
        M = rest.reshape(left * d_out[site] * d_in[site], -1)
        U, s, Vh = torch.linalg.svd(M, full_matrices=False)
        right = max(1, int((s > negligible).sum())) if bonds is None else bonds[site + 1]
        cores.append(U[:, :right].reshape(left, d_out[site], d_in[site], right).to(W.dtype))
        rest, left = s[:right, None] * Vh[:right], right
    cores.append(rest.reshape(left, d_out[-1], d_in[-1], 1).to(W.dtype))
    return cores


def contract(cores: Sequence[Tensor]) -> Tensor:
    """The matrix W (out_features, in_features) that the cores stand for (paper, Eq. 7); differentiable.

    Neighbours are merged in the cheapest order (`contraction_order`).
    """
    n_sites = len(cores)
    bonds = (*[core.shape[0] for core in cores], cores[-1].shape[3])
    split, _ = contraction_order(bonds, [core.shape[1] for core in cores], [core.shape[2] for core in cores])

    def merge(first: int, last: int) -> Tensor:
        if last - first == 1:
            return cores[first]
        middle = split[first, last]
        return merge_cores(merge(first, middle), merge(middle, last))

    W = merge(0, n_sites)
    return W.reshape(W.shape[1], W.shape[2])


def merge_cores(left: Tensor, right: Tensor) -> Tensor:
    """Two neighbouring cores as one: (a, o, i, b) and (b, p, j, c) become (a, o·p, i·j, c)."""
    a, o, i, b = left.shape
    _, p, j, c = right.shape
    product = left.reshape(a * o * i, b) @ right.reshape(b, p * j * c)
    # Ordering the indices at every merge, not once at the end, copies long runs: several times faster for long chains.
    return product.view(a, o, i, p, j * c).transpose(2, 3).reshape(a, o * p, i * j, c)


def contraction_order(
    bonds: Sequence[int], d_out: Sequence[int], d_in: Sequence[int]
) -> tuple[dict[tuple[int, int], int], int]:
    """The order of pairwise merges of neighbours with the fewest multiply-adds: the matrix-chain problem.

    Returns:
        split: sites [first, last) are best merged from [first, split) and [split, last).
        cost: multiply-adds of all merges together.
    """
    n_sites, sizes = len(d_out), _site_sizes(d_out, d_in)
    split: dict[tuple[int, int], int] = {}
    cost = {(site, site + 1): 0 for site in range(n_sites)}
    for width in range(2, n_sites + 1):
        for first in range(n_sites - width + 1):
            last = first + width
            volume = bonds[first] * math.prod(sizes[first:last]) * bonds[last]
            for middle in range(first + 1, last):
                total = cost[first, middle] + cost[middle, last] + volume * bonds[middle]
                if (first, last) not in split or total < cost[first, last]:
                    cost[first, last], split[first, last] = total, middle
    return split, cost[0, n_sites]


def rel_error(W: Tensor, W_hat: Tensor) -> float:
    """‖W − Ŵ‖_F / ‖W‖_F, computed in float64; for W = 0 it is 0 when Ŵ = 0 as well, and infinite otherwise."""
    W, W_hat = W.detach().double(), W_hat.detach().double()
    error, norm = float(torch.linalg.norm(W - W_hat)), float(torch.linalg.norm(W))
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return error / norm


def check_sizes(out_features: int, in_features: int, d_out: Sequence[int], d_in: Sequence[int]) -> None:
    """Raise ValueError unless d_out and d_in split out_features and in_features over the same number of sites."""
    _site_sizes(d_out, d_in)
    for name, sizes, features_name, features in (
        ("d_out", d_out, "out_features", out_features),
        ("d_in", d_in, "in_features", in_features),
    ):
        if math.prod(sizes) != features:
            raise ValueError(
                f"`prod({name}) == {features_name}` must hold, but got {name}={list(sizes)}, {features_name}={features}"
            )


def _site_sizes(d_out: Sequence[int], d_in: Sequence[int]) -> list[int]:
    if len(d_out) != len(d_in) or not d_out or min(*d_out, *d_in) < 1:
        raise ValueError(
            "`d_out` and `d_in` must hold one size of at least 1 per site, "
            f"but got d_out={list(d_out)}, d_in={list(d_in)}"
        )
    return [out * in_ for out, in_ in zip(d_out, d_in, strict=True)]


def _interleave(W: Tensor, d_out: Sequence[int], d_in: Sequence[int]) -> Tensor:
    """(out_features, in_features) -> (d_out[0], d_in[0], ..., d_out[L-1], d_in[L-1])."""
    n_sites = len(d_out)
    return W.reshape(*d_out, *d_in).permute([axis for site in range(n_sites) for axis in (site, n_sites + site)])
