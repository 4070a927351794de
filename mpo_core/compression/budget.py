"""The error of each layer at each number of parameters, and how a budget is spread over layers."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpo_core.fitting.calibration import check_gram
from mpo_core.fitting.whitening import make_whitener, square_root, times_sites
from mpo_core.tensor_train.bonds import clip_bonds, n_params
from mpo_core.values import in_range

Split = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Rung:
    """One size that a layer can have."""

    n_params: int
    error: float
    """Squared relative error of the weights or, under a Gram matrix, of the outputs. The function that made the ladder
    says how exact it is."""


def spread_budget(ladders: Mapping[str, Sequence[Rung]], budget: int) -> dict[str, Rung]:
    """One rung per layer, together at most `budget` parameters, with a small sum of errors.

    Greedy: every layer starts at its cheapest rung. Then the step along the convex hull of a ladder with the largest
    fall of error per parameter is taken, until nothing more fits. If a step does not fit, the layer takes the best rung
    below it that does. Without this last part the result is the optimum for its own number of parameters.

    Raises:
        ValueError: no layers, a layer without rungs, or the cheapest rungs together exceed the budget.
    """
    if not ladders:
        raise ValueError("a budget needs at least one layer to be spread over, but got none")
    hulls: dict[str, list[Rung]] = {}
    rungs = {name: _undominated(name, ladder) for name, ladder in ladders.items()}
    chosen = {name: ladder[0] for name, ladder in rungs.items()}
    left = budget - sum(rung.n_params for rung in chosen.values())
    if left < 0:
        raise ValueError(f"`budget >= {budget - left}` must hold for the layers at their smallest, but got {budget}")

    steps: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        hull = hulls[name]
        if len(hull) > 1:
            heapq.heappush(steps, (-_slope(hull[0], hull[1]), name))

    for name, ladder in rungs.items():
        hulls[name] = _hull(ladder)
        offer(name)
    while steps:
        _, name = heapq.heappop(steps)
        now, then = hulls[name][:2]
        if then.n_params - now.n_params <= left:
            hulls[name].pop(0)
            offer(name)
        else:
            sizes = [rung.n_params for rung in rungs[name]]
            then = rungs[name][bisect_right(sizes, now.n_params + left) - 1]
        left -= then.n_params - now.n_params
        chosen[name] = then
    return chosen


def chain_ladder(W: Tensor, gram: Tensor | None, split: Callable[[int], Split]) -> list[Rung]:
    """Rungs χ = 1, 2, … of a chain of cores, up to the last with fewer parameters than W or the last useful χ.

    The error is the sum over the bonds of the squared singular values that are cut off (Oseledets 2011, Theorem 2.2).
    They are those of W or, under a Gram matrix, of W whitened by its nearest Kronecker product. Without a Gram matrix
    the error is an upper bound on that of `tt_svd`, exact for two sites. Under a Gram matrix that is not such a product
    it is no bound, but falls as the errors do.

    Args:
        split: function from χ to (d_out, d_in).
    """
    G = None if gram is None else check_gram(gram, W.shape[1]).to(W.device)
    tails: dict[Split, list[list[float]]] = {}
    ladder: list[Rung] = []
    chi = 0
    while True:
        chi += 1
        d_out, d_in = split(chi)
        bonds = clip_bonds(chi, d_out, d_in)
        size = n_params(bonds, d_out, d_in)
        if size >= W.numel():
            return ladder
        if (d_out, d_in) not in tails:
            tails[d_out, d_in] = _relative_tails(W, G, d_out, d_in)
        cut = sum(tail[bond] for tail, bond in zip(tails[d_out, d_in], bonds[1:-1], strict=True))
        ladder.append(Rung(size, min(1.0, cut)))
        if max(bonds) < chi:
            return ladder[:-1]


def low_rank_ladder(W: Tensor, gram: Tensor | None) -> list[Rung]:
    """Ranks 1, 2, … of a product of two factors with fewer parameters than W; exact (Eckart & Young 1936)."""
    M = in_range(W.double())[0]
    if gram is not None:
        M = M @ square_root(check_gram(gram, W.shape[1]).to(W.device))
    tail, per_rank = _squared_tail(M), sum(W.shape)
    return [Rung(rank * per_rank, tail[rank]) for rank in range(1, (W.numel() - 1) // per_rank + 1)]


def _relative_tails(W: Tensor, G: Tensor | None, d_out: Sequence[int], d_in: Sequence[int]) -> list[list[float]]:
    n_sites = len(d_out)
    extra_out, extra_in = math.prod(d_out) - W.shape[0], math.prod(d_in) - W.shape[1]
    M = torch.nn.functional.pad(in_range(W.double())[0], (0, extra_in, 0, extra_out))
    if G is not None:
        M = times_sites(M, make_whitener(torch.nn.functional.pad(G, (0, extra_in, 0, extra_in)), d_in).roots)
    T = M.reshape(*d_out, *d_in).permute([axis for site in range(n_sites) for axis in (site, n_sites + site)])
    rows = [math.prod(d_out[:site]) * math.prod(d_in[:site]) for site in range(1, n_sites)]
    return [_squared_tail(T.reshape(n_rows, -1)) for n_rows in rows]


def _squared_tail(M: Tensor) -> list[float]:
    """Entry k: the share of ‖M‖² beyond the k largest singular values."""
    M = M if M.shape[0] <= M.shape[1] else M.T
    # Eigenvalues of M Mᵀ are several times cheaper than singular values, and exact enough for a choice of sizes.
    values = torch.linalg.eigvalsh(M @ M.T).clamp(min=0)  # ascending
    total = float(values.sum())
    if total == 0:
        return [0.0] * (len(values) + 1)
    beyond = torch.cumsum(values, 0).flip(0) / total
    return [*beyond.tolist(), 0.0]


def _undominated(name: str, ladder: Sequence[Rung]) -> list[Rung]:
    """Rungs in the order of their parameters, without those that cost more and are no better."""
    if not ladder:
        raise ValueError(f"{name} has no size to choose from")
    kept: list[Rung] = []
    for rung in sorted(ladder, key=lambda rung: (rung.n_params, rung.error)):
        if not kept or rung.error < kept[-1].error:
            kept.append(rung)
    return kept


def _hull(ladder: Sequence[Rung]) -> list[Rung]:
    hull: list[Rung] = []
    for rung in ladder:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], rung):
            hull.pop()
        hull.append(rung)
    return hull


def _slope(now: Rung, then: Rung) -> float:
    return (now.error - then.error) / (then.n_params - now.n_params)
