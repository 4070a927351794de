"""Kronecker whitening: coordinates that keep the sites separate and make a metric nearly the identity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_core.fitting.metric import Metric

Roots = list[Tensor] | None
"""One symmetric matrix per site; None stands for identities."""

FLOOR = 1e-12
"""Eigenvalues of a Kronecker product are at least about this share of the largest."""

_LEAST, _MAX_ROUNDS, _SETTLED = 1e-8, 20, 1e-2


class Whitened:
    """A metric in coordinates in which it is nearly the identity: W becomes (⊗ S_l^{1/2}) W (⊗ K_l^{1/2}).

    The Kronecker products of K_l and of S_l resemble G and S (`kronecker_factors`). Each factor acts on the indices of
    one site, so a chain of cores stays one.
    """

    def __init__(self, metric: Metric, d_out: Sequence[int], d_in: Sequence[int]) -> None:
        of_out, of_in = _roots(metric.sensitivity, d_out), _roots(metric.gram, d_in)
        self.roots, self.inverse_roots = (of_out[0], of_in[0]), (of_out[1], of_in[1])
        self.metric = Metric.of_checked(
            _conjugated(metric.input_root, of_in[1]), _conjugated(metric.output_root, of_out[1])
        )

    @classmethod
    def of(cls, metric: Metric, d_out: Sequence[int], d_in: Sequence[int]) -> Whitened:
        """As the constructor; the metric keeps it, because many sizes and splits of one matrix are tried in turn."""
        known: dict[object, Whitened] = metric.__dict__.setdefault("_whitened", {})
        sizes = tuple(d_out), tuple(d_in)
        if sizes not in known:
            known[sizes] = cls(metric, d_out, d_in)
        return known[sizes]

    def matrix(self, W: Tensor) -> Tensor:
        """W (prod(d_out), prod(d_in)) in these coordinates."""
        of_out, of_in = self.roots
        W = W if of_in is None else times_sites(W, of_in)
        return W if of_out is None else times_sites(W.T, of_out).T


def _roots(moment: Tensor | None, sizes: Sequence[int]) -> tuple[Roots, Roots]:
    """Square roots of the Kronecker factors, and their inverses."""
    if moment is None:
        return None, None
    # With a floor per factor alone, the condition number of the product would grow exponentially with the number of
    # sites. Undoing the whitening at the end would then give mostly rounding.
    lowest = max(1e-8, FLOOR ** (1 / len(sizes)))
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
def kronecker_factors(G: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Factors K_l (sizes[l], sizes[l]) whose Kronecker product resembles a symmetric positive semi-definite G.

    They are those of the matrix normal distribution of largest likelihood: each factor makes the mean over the other
    sites of the whitened G the identity. So all directions count by their ratios. The nearest product in the Frobenius
    norm follows the few largest eigenvalues, and is a much worse whitener where a few inputs are large. If G is a
    Kronecker product, it is found.

    Raises:
        ValueError: G is zero.
    Source: Dutilleul 1999 (the flip-flop algorithm).
    """
    n, size = len(sizes), len(G)
    mean = float(G.diagonal().mean())
    if mean == 0:
        raise ValueError("a moment of zeros has no Kronecker factors")
    pairs = [axis for site in range(n) for axis in (site, n + site)]
    T = (G / mean).reshape(*sizes, *sizes).permute(pairs).reshape([size * size for size in sizes])
    K = [torch.eye(size, dtype=G.dtype, device=G.device) for size in sizes]
    inverses = list(K)
    for _ in range(_MAX_ROUNDS):
        change = 0.0
        for site in range(n):
            operands: list[object] = [T, list(range(n))]
            for other in range(n):
                if other != site:
                    operands += [inverses[other].reshape(-1), [other]]
            factor = torch.einsum(*operands, [site]).reshape(K[site].shape) * (sizes[site] / size)
            factor = (factor + factor.T) / 2
            change = max(change, float(torch.linalg.norm(factor - K[site]) / torch.linalg.norm(factor)))
            K[site] = factor
            inverses[site] = _inverse(factor)
        if change <= _SETTLED or n == 1:
            break
    return [K[0] * mean, *K[1:]]


def _inverse(K: Tensor) -> Tensor:
    """The inverse; of a singular K, with eigenvalues of at least `_LEAST` times the largest."""
    lower, failed = torch.linalg.cholesky_ex(K)
    if not failed and float(lower.diagonal().min()) > math.sqrt(_LEAST) * float(lower.diagonal().max()):
        return torch.cholesky_inverse(lower)
    values, vectors = torch.linalg.eigh(K)
    # The inputs may span a subspace. Rounding may have made values there negative.
    return vectors / values.clamp(min=_LEAST * float(values[-1])) @ vectors.T


def times_sites(M: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """M (rows, prod(sizes)) times the Kronecker product of symmetric factors."""
    rows = M.shape[0]
    for factor in factors:
        # Each step moves the leading column index to the end, so that after the last step all are back in order.
        M = M.reshape(rows, len(factor), -1).transpose(1, 2).reshape(-1, len(factor)) @ factor
    return M.reshape(rows, -1)


def on_cores(cores: Sequence[Tensor], of_out: Roots, of_in: Roots) -> list[Tensor]:
    """The cores with a symmetric factor per site applied to their output and to their input indices."""
    changed = list(cores)
    if of_out is not None:
        changed = [torch.einsum("aoib,oj->ajib", core, factor) for core, factor in zip(changed, of_out, strict=True)]
    if of_in is not None:
        changed = [torch.einsum("aoib,ij->aojb", core, factor) for core, factor in zip(changed, of_in, strict=True)]
    return changed
