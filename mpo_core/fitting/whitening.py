"""Kronecker whitening: coordinates of a layer's inputs that keep the sites separate and make G nearly the identity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Whitener(NamedTuple):
    """Square roots of the factors K_l, their inverses, and (⊗ K^{-1/2}) G (⊗ K^{-1/2})."""

    roots: list[Tensor]
    inverse_roots: list[Tensor]
    gram: Tensor


def make_whitener(G: Tensor, d_in: Sequence[int], floor: float = 1e-12) -> Whitener:
    """Whitener with eigenvalues within `floor` of the largest in the Kronecker product, and within 1e-8 in each factor.

    With only a floor per factor, the condition number of the product would grow exponentially with the number of sites.
    Undoing the whitening at the end would then give mostly rounding.
    """
    lowest = max(1e-8, floor ** (1 / len(d_in)))
    roots, inverse_roots = [], []
    for K in kronecker_factors(G, d_in):
        values, vectors = torch.linalg.eigh(K)
        # Any definite K is only a change of coordinates; the floor makes sure that it can be undone.
        values = values.clamp(min=lowest * float(values[-1]))
        roots.append(vectors * values.sqrt() @ vectors.T)
        inverse_roots.append(vectors * values.rsqrt() @ vectors.T)
    # By a square root, because rounding in G itself would cause negative directions if G is singular.
    half = times_sites(square_root(G).T.contiguous(), inverse_roots)
    return Whitener(roots, inverse_roots, half.T @ half)


@torch.no_grad()
def kronecker_factors(G: Tensor, sizes: Sequence[int], *, max_sweeps: int = 50) -> list[Tensor]:
    """Factors K_l (sizes[l], sizes[l]) whose Kronecker product is close to a symmetric positive semi-definite G.

    Power iteration for the best rank-one approximation of G rearranged to one index pair per site, started at the
    identity; every iterate stays positive semi-definite. For two factors it ends at the nearest product (Van Loan &
    Pitsianis 1993), for more at a stationary point. Factor 0 carries the scale, the others have norm 1.
    """
    n = len(sizes)
    K = [torch.eye(size, dtype=G.dtype, device=G.device) / math.sqrt(size) for size in sizes]
    T, norm = G.reshape(*sizes, *sizes), 0.0
    for _ in range(max_sweeps):
        previous = norm
        for site in range(n):
            operands: list[object] = [T, list(range(2 * n))]
            for other in range(n):
                if other != site:
                    operands += [K[other], [other, n + other]]
            K[site] = torch.einsum(*operands, [site, n + site])
            norm = float(torch.linalg.norm(K[site]))
            K[site] = K[site] / norm
        if norm - previous <= 1e-10 * norm:
            break
    return [K[0] * norm, *K[1:]]


def times_sites(M: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """M (rows, prod(sizes)) times the Kronecker product of symmetric factors."""
    rows = M.shape[0]
    for factor in factors:
        # Each step moves the leading column index to the end, so that after the last step all are back in order.
        M = M.reshape(rows, factor.shape[0], -1).transpose(1, 2) @ factor
    return M.reshape(rows, -1)


def on_inputs(cores: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.einsum("aoib,ij->aojb", core, factor) for core, factor in zip(cores, factors, strict=True)]


def square_root(G: Tensor) -> Tensor:
    """S with S Sᵀ = G, for G symmetric and positive semi-definite; eigenvalues at rounding level become 0."""
    values, vectors = torch.linalg.eigh(G)
    negligible = 1e-14 * len(values) * float(values[-1])
    return vectors * torch.where(values > negligible, values, 0).sqrt()
