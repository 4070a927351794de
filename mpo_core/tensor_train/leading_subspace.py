"""The leading left singular vectors of a large matrix, without all the others.

A full SVD of M (m, n) costs about 20 m² n operations for m <= n, however few of its singular vectors are kept. If few
are needed, subspace iteration on random vectors finds them with a handful of products with M. If one side of M is
short, the eigenvectors of its Gram matrix give them.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGE = 2**22
"""Number of entries from which a full SVD of a matrix is avoided, because it takes seconds."""
FEW = 8
"""Subspace iteration finds at most a FEW-th of all singular vectors. For more, it is no faster."""
OBLONG = 8
"""A Gram matrix is formed if one side of M is at least OBLONG times as long as the other."""
OVERSAMPLING = 64
SMALL = 0.1
"""If the squared error is a smaller share of ‖M‖², it is summed from the residual of M."""
MIN_ITERATIONS = 3
SHARE = 0.5
"""Share of the operations of a full SVD. If the iteration takes more, a full SVD is used instead."""
TOLERANCE = 1e-5
"""Share of the squared error that may be due to too few iterations."""


def leading_left(M: Tensor, k: int) -> Tensor | None:
    """Return the k leading left singular vectors U (m, k) of a large matrix M (m, n), orthonormal, in descending order.

    The squared error ‖M − U Uᵀ M‖² is minimal. If a Gram matrix gives U, this holds to the rounding of M's dtype.
    Otherwise it holds to a factor of 1 + TOLERANCE, as far as the convergence of the iteration shows. The iteration
    cannot distinguish many singular values around the k-th that differ by a fraction of a per cent. Taking one for the
    other can cost about 1e-4 of the squared error. Deterministic: the random start is the same for every M of a shape.

    Returns:
        U; or None if a full SVD is better: M is not large, k is not a small part of its singular vectors, or the
        iteration has not converged.
    Source: Halko, Martinsson, Tropp 2011, Algorithm 4.4, with a stopping rule on the captured squared norm.
    """
    m, n = M.shape
    if m * n < LARGE:
        return None
    if max(m, n) >= OBLONG * min(m, n) and M.dtype is not torch.float64:
        return _by_gram(M, k)
    return _by_iteration(M, k) if FEW * k <= min(m, n) else None


def _by_gram(M: Tensor, k: int) -> Tensor:
    """Use the Gram matrix in float64, where squaring loses no digit of M's own dtype."""
    D = M.double()
    if M.shape[0] <= M.shape[1]:
        return torch.linalg.eigh(D @ D.mT)[1].flip(1)[:, :k].to(M.dtype)
    V = torch.linalg.eigh(D.mT @ D)[1].flip(1)[:, :k]
    # M V has orthogonal columns; QR makes them orthonormal even where singular values are 0.
    return torch.linalg.qr(D @ V)[0].to(M.dtype)


def _by_iteration(M: Tensor, k: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(M.shape[1], k + OVERSAMPLING, dtype=M.dtype, generator=generator).to(M.device)
    total = float(torch.linalg.vector_norm(M, dtype=torch.float64)) ** 2
    errors: list[float] = []
    eps = torch.finfo(M.dtype).eps
    # Each iteration takes about 4 m n b operations for b vectors.
    while len(errors) < SHARE * 5 * min(M.shape) / X.shape[1]:
        Q, _ = torch.linalg.qr(M @ X)
        B = Q.mT @ M
        values, vectors = torch.linalg.eigh(B.double() @ B.double().mT)
        errors.append(total - float(values[-k:].sum()))
        uncertain = 2 * eps * (total - errors[-1])  # Q is orthonormal up to this rounding
        if errors[-1] < SMALL * total:  # the difference has few digits left in M's dtype
            outside = torch.linalg.vector_norm(torch.addmm(M, Q, B, alpha=-1), dim=1).double().square().sum()
            errors[-1] = float(outside + values[:-k].clamp(min=0).sum())
            uncertain = 2 * eps * errors[-1]
        if errors[-1] <= (8 * eps) ** 2 * total or _have_converged(errors, uncertain):
            return Q @ vectors.flip(1)[:, :k].to(M.dtype)
        X, _ = torch.linalg.qr(B.mT)
    return None


def _have_converged(errors: list[float], uncertain: float) -> bool:
    """Whether the gains still to come, as a geometric series, are within the tolerance of the squared error.

    Args:
        uncertain: rounding of the errors. If the gains differ by at most this, their trend is unknown. Vectors of
            nearly equal singular values are found so slowly that each gain is tiny, but their sum is not.
    """
    if len(errors) < MIN_ITERATIONS:
        return False
    before, gain = errors[-3] - errors[-2], max(0.0, errors[-2] - errors[-1])
    slowing = before - gain - uncertain
    return slowing > 0 and gain * max(1.0, gain / slowing) <= TOLERANCE * errors[-1]
