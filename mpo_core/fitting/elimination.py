"""Choose inputs of a matrix to remove, and fit the columns of the others again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mpo_core.fitting.metric import Metric

BATCH = 1 / 48
"""At most this share of the inputs that are left is removed at a time."""


@torch.no_grad()
def eliminate(W: Tensor, metric: Metric, sizes: Iterable[int]) -> dict[int, tuple[Tensor, float]]:
    """Which inputs of W are left at each size, and the squared error in the metric without the others.

    Greedy: the inputs whose removal raises the error least go first, after the columns of the others are fitted again.

    Args:
        W: (out_features, in_features).
        metric: its gram must be positive definite, as a ridge makes it.
        sizes: numbers of inputs, at least 1 and at most in_features.
    Returns:
        By size: the indices of the inputs, in order; and the error of `refit`.
    Source: Hassibi & Stork 1992 (optimal brain surgeon), with the inputs of a layer as units.
    """
    metric = metric.on(W)
    M, n = metric.outputs_weighted(W.double()), W.shape[1]
    gram = metric.gram if metric.gram is not None else torch.eye(n, dtype=M.dtype, device=M.device)
    H = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    left, error = torch.arange(n, device=M.device), 0.0
    found: dict[int, tuple[Tensor, float]] = {}
    for size in sorted(set(sizes), reverse=True):
        while len(left) > size:
            n_removed = min(len(left) - size, max(1, int(BATCH * len(left))))
            order = torch.argsort(M.square().sum(0) / H.diagonal(), stable=True)
            removed, kept = order[:n_removed], order[n_removed:].sort().values
            taken = M[:, removed] @ torch.linalg.inv(H[removed][:, removed])
            error += float(torch.sum(taken * M[:, removed]))
            M = M[:, kept] - taken @ H[removed][:, kept]
            H = H[kept][:, kept] - H[kept][:, removed] @ torch.linalg.solve(H[removed][:, removed], H[removed][:, kept])
            left = left[kept]
        found[size] = left, max(error, 0.0)
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
