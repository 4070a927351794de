"""Kronecker whitening: coordinates that keep the sites separate and make a metric nearly the identity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_core.fitting.metric import Metric

Roots = list[Tensor] | None
"""One symmetric matrix per site; None stands for identities."""


class Whitened:
    """A metric in coordinates in which it is nearly the identity: W becomes (⊗ S_l^{1/2}) W (⊗ K_l^{1/2}).

    The Kronecker products of K_l and of S_l are those nearest to G and to S. Each factor acts on the indices of one
    site, so a chain of cores stays one.

    Args:
        floor: eigenvalues within `floor` of the largest in a Kronecker product, and within 1e-8 in each factor. With
            only a floor per factor, the condition number of the product would grow exponentially with the number of
            sites. Undoing the whitening at the end would then give mostly rounding.
    """

    def __init__(self, metric: Metric, d_out: Sequence[int], d_in: Sequence[int], floor: float = 1e-8) -> None:
        of_out, of_in = _roots(metric.sensitivity, d_out, floor), _roots(metric.gram, d_in, floor)
        self.roots, self.inverse_roots = (of_out[0], of_in[0]), (of_out[1], of_in[1])
        self.metric = Metric.of_checked(
            _conjugated(metric.input_root, of_in[1]), _conjugated(metric.output_root, of_out[1])
        )

    def matrix(self, W: Tensor) -> Tensor:
        """W (prod(d_out), prod(d_in)) in these coordinates."""
        of_out, of_in = self.roots
        W = W if of_in is None else times_sites(W, of_in)
        return W if of_out is None else times_sites(W.T, of_out).T


def _roots(moment: Tensor | None, sizes: Sequence[int], floor: float) -> tuple[Roots, Roots]:
    """Square roots of the Kronecker factors, and their inverses."""
    if moment is None:
        return None, None
    lowest = max(1e-8, floor ** (1 / len(sizes)))
    roots, inverse_roots = [], []
    for K in kronecker_factors(moment, sizes):
        values, vectors = torch.linalg.eigh(K)
        # Any definite K is only a change of coordinates; the floor makes sure that it can be undone.
        values = values.clamp(min=lowest * float(values[-1]))
        roots.append(vectors * values.sqrt() @ vectors.T)
        inverse_roots.append(vectors * values.rsqrt() @ vectors.T)
    return roots, inverse_roots


def _conjugated(root: Tensor | None, inverse_roots: Roots) -> Tensor | None:
    if root is None or inverse_roots is None:
        return None
    # By a square root, because rounding in G itself would cause negative directions if G is singular.
    half = times_sites(root.T.contiguous(), inverse_roots)
    return half.T @ half


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


def on_cores(cores: Sequence[Tensor], of_out: Roots, of_in: Roots) -> list[Tensor]:
    """The cores with a symmetric factor per site applied to their output and to their input indices."""
    changed = list(cores)
    if of_out is not None:
        changed = [torch.einsum("aoib,oj->ajib", core, factor) for core, factor in zip(changed, of_out, strict=True)]
    if of_in is not None:
        changed = [torch.einsum("aoib,ij->aojb", core, factor) for core, factor in zip(changed, of_in, strict=True)]
    return changed
