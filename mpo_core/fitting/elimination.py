"""Choose inputs of a matrix to remove, and fit the columns of the others again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mpo_core.fitting.metric import Metric

BATCH = 1 / 48
"""At most this share of the inputs that are left is removed at a time."""


class Left(NamedTuple):
    """A matrix W (out_features, in_features) without some of its inputs."""

    inputs: Tensor
    """The indices of the inputs that are left, in order."""
    error: float
    """The squared error of `refit` in the metric."""
    weighted: Tensor
    """Rᵀ W_left (out_features, len(inputs)), float64, for the columns of `refit`, with R Rᵀ the sensitivity."""


@torch.no_grad()
def eliminate(W: Tensor, metric: Metric, sizes: Iterable[int]) -> dict[int, Left]:
    """W with fewer inputs, for each of these numbers of inputs.

    Greedy: the inputs whose removal raises the error least go first, after the columns of the others are fitted again.

    Args:
        W: (out_features, in_features).
        metric: its gram must be positive definite, as a ridge makes it.
        sizes: numbers of inputs, at least 1 and at most in_features.
    Source: Hassibi & Stork 1992 (optimal brain surgeon), with the inputs of a layer as units.
    """
    metric = metric.on(W)
    M, n = metric.outputs_weighted(W.double()).clone(), W.shape[1]  # changed below
    gram = metric.gram if metric.gram is not None else torch.eye(n, dtype=M.dtype, device=M.device)
    H = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    left, n_left, error = torch.arange(n, device=M.device), n, 0.0
    found: dict[int, Left] = {}
    for size in sorted(set(sizes), reverse=True):
        is_left = torch.ones_like(left, dtype=torch.bool)
        while n_left > size:
            n_removed = min(n_left - size, max(1, int(BATCH * n_left)))
            scores = torch.where(is_left, M.square().sum(0) / H.diagonal(), torch.inf)
            removed = torch.argsort(scores, stable=True)[:n_removed]
            # In place, and inputs that are gone leave only with the size: to copy M and H takes longer than the rest.
            rows, columns = H[removed], M[:, removed]
            inverse = torch.linalg.inv(rows[:, removed])
            taken = columns @ inverse
            error += float(torch.sum(taken * columns))
            M.addmm_(taken, rows, alpha=-1)
            H.addmm_(rows.T @ inverse, rows, alpha=-1)
            is_left[removed] = False
            n_left -= n_removed
            H.diagonal()[~is_left] = 1.0  # not zero, by which scores would be divided
        if not is_left.all():
            M, H, left = M[:, is_left], H[is_left][:, is_left], left[is_left]
        found[size] = Left(left, max(error, 0.0), M.clone())
    return found


def refit(W: Tensor, metric: Metric, left: Tensor) -> Tensor:
    """The columns (out_features, len(left)), for the inputs that are left, that approximate W best in the metric.

    They do not depend on its sensitivity. They are in W's dtype.
    """
    gram = metric.on(W).gram
    if gram is None:
        return W[:, left]
    of_left = gram[left]
    return torch.linalg.solve(of_left[:, left], of_left @ W.double().T).T.to(W.dtype)
