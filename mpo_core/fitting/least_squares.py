"""Alternating least squares: cores that change a layer's outputs least."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpo_core.fitting.calibration import check_gram, weighted_norm
from mpo_core.fitting.whitening import make_whitener, on_inputs, times_sites
from mpo_core.tensor_train.algebra import balance_cores, contract, merge_cores
from mpo_core.tensor_train.bonds import check_sizes, check_whole
from mpo_core.values import check_cores_finite, check_matrix, error_ratio, in_range

CG_STEPS = 20
"""Conjugate-gradient steps per core, for the largest cores, whose normal equations are too large to solve."""

MAX_ENTRIES = 2**26
"""Most entries of the largest array that normal equations may need, 512 MiB."""


@torch.no_grad()
def als(
    W: Tensor, cores: Sequence[Tensor], gram: Tensor, *, max_sweeps: int = 20, tolerance: float = 1e-2
) -> tuple[list[Tensor], list[float]]:
    """Alternating least squares: each core in turn becomes the best one given the others, in ‖(W − Ŵ) G^{1/2}‖_F.

    Sites are visited from left to right and back, with the other cores orthogonalised after whitening
    (`whitened_tt_svd`). Each core is found by its normal equations or, if that is cheaper, by conjugate gradients from
    its present value. A sweep that does not lower the error, measured under `gram` itself, is undone and is the last
    one. The result is therefore never worse than the start.

    Args:
        cores: the start; their bonds stay.
        max_sweeps: at most that many sweeps there and back. tolerance: stop if a sweep lowers the error by less than
            this fraction of it.
    Returns:
        Cores in the dtype of the given ones, and the relative output errors (`output_error`) at the start and after
        every sweep kept. The errors are those before the cores are rounded to that dtype. If rounding makes the cores
        worse than the start, the start is returned.
    Raises:
        ValueError: max_sweeps < 0 or tolerance < 0, cores that are not finite or do not fit W, a W that `check_matrix`
            refuses, a gram that does not fit or is not a Gram matrix.
    Source: Holtz, Rohwedder & Schneider 2012.
    """
    check_whole(max_sweeps=max_sweeps)
    if max_sweeps < 0 or tolerance < 0:
        raise ValueError(
            f"`max_sweeps` and `tolerance` must not be negative, but got max_sweeps={max_sweeps}, tolerance={tolerance}"
        )
    check_matrix(W)
    d_in = [core.shape[2] for core in cores]
    check_sizes(W.shape[0], W.shape[1], [core.shape[1] for core in cores], d_in)
    check_cores_finite(cores)
    dtype, G = cores[0].dtype, check_gram(gram, W.shape[1]).to(W.device)
    W, scale = in_range(W.double())
    start = [core.to(W) for core in cores]
    is_extreme = scale != 1 or any(in_range(core)[1] != 1 for core in start)
    if is_extreme:  # parts of a chain may then be out of range even if W is not
        start = balance_cores(start)
    norm = weighted_norm(W, G)

    def error_of(cores: Sequence[Tensor]) -> float:
        return error_ratio(weighted_norm(W - contract([core.to(W) for core in cores]) / scale, G), norm)

    # Undoing the whitening causes rounding errors that grow with its condition number. Here it only has to speed up
    # convergence.
    whitener = make_whitener(G, d_in, floor=1e-8)
    whitened = times_sites(W, whitener.roots)
    chain = on_inputs([*start[:-1], start[-1] / scale], whitener.roots)
    best, history = list(cores), [error_of(start)]
    for _ in range(max_sweeps):
        chain = _sweep(whitened, whitener.gram, chain)
        fitted = on_inputs(chain, whitener.inverse_roots)
        if is_extreme:
            fitted = balance_cores([*fitted[:-1], fitted[-1] * scale])
        error = error_of(fitted)
        if not error <= history[-1]:  # at an exact fit only rounding is left to gain or lose
            break
        best = fitted
        history.append(error)
        if history[-2] - error <= tolerance * history[-2]:
            break
    rounded = [core.to(dtype) for core in best]
    if not error_of(rounded) <= history[0]:
        return list(cores), history[:1]
    return rounded, history


def _sweep(W: Tensor, G: Tensor, cores: Sequence[Tensor]) -> list[Tensor]:
    """Solve for every core in turn, from site 0 to the last and back, with the others orthogonal around it."""
    cores, n_sites = list(cores), len(cores)
    WG = W @ G
    end = torch.ones(1, 1, 1, 1, dtype=W.dtype, device=W.device)
    rights = [end] * n_sites
    for site in range(n_sites - 1, 0, -1):
        _orthogonalize_leftwards(cores, site)
        rights[site - 1] = merge_cores(cores[site], rights[site])
    lefts = [end] * n_sites
    for site in range(n_sites):
        cores[site] = _best_core(WG, G, lefts[site], cores[site], rights[site])
        if site < n_sites - 1:
            _orthogonalize_rightwards(cores, site)
            lefts[site + 1] = merge_cores(lefts[site], cores[site])
    right = end
    for site in range(n_sites - 1, 0, -1):
        _orthogonalize_leftwards(cores, site)
        right = merge_cores(cores[site], right)
        cores[site - 1] = _best_core(WG, G, lefts[site - 1], cores[site - 1], right)
    return cores


def _orthogonalize_rightwards(cores: list[Tensor], site: int) -> None:
    core = cores[site]
    Q, R = torch.linalg.qr(core.reshape(-1, core.shape[3]))
    cores[site] = Q.reshape(*core.shape[:3], -1)
    cores[site + 1] = torch.tensordot(R, cores[site + 1], dims=1)


def _orthogonalize_leftwards(cores: list[Tensor], site: int) -> None:
    core = cores[site]
    Q, R = torch.linalg.qr(core.reshape(core.shape[0], -1).T)
    cores[site] = Q.T.reshape(-1, *core.shape[1:])
    cores[site - 1] = torch.tensordot(cores[site - 1], R.T, dims=1)


def _best_core(WG: Tensor, G: Tensor, left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """The core (a, o, i, b) between left (1, x, p, a) and right (b, y, q, 1) with the least output error.

    It solves H C = F, with F the gradient's part from W and H C the part from Ŵ. H acts only on (a, i, b): each output
    index is a column of its own.
    """
    left, right = left[0], right[..., 0]  # (x, p, a), (b, y, q)
    (x, p, a), (_, o, i, _), (b, y, q) = left.shape, core.shape, right.shape
    in_features, n = p * i * q, a * i * b

    def pull_back(M: Tensor) -> Tensor:  # (out_features, in_features) -> (a, o, i, b)
        half = torch.einsum("xpa,xopi->aoi", left, M.reshape(x, o * y, p, i * q))
        return torch.einsum("aoyiq,byq->aoib", half.reshape(a, o, y, i, q), right)

    F = pull_back(WG)
    direct = n**3 / 3 + (in_features * b) ** 2 + (p * n) ** 2
    iterative = CG_STEPS * WG.shape[0] * in_features**2
    largest = max((q * b) ** 2, (p * a) ** 2, (p * i * b) ** 2, n * n)
    if direct <= iterative and largest <= MAX_ENTRIES:
        H = _normal_matrix(G, left, core, right)
        return _solve_proximal(H, F.permute(0, 2, 3, 1).reshape(n, o), core)

    def apply(V: Tensor) -> Tensor:
        half = torch.tensordot(left, V, dims=1)  # (x, p, o, i, b)
        W_hat = torch.tensordot(half, right, dims=1).permute(0, 2, 4, 1, 3, 5)  # (x, o, y, p, i, q)
        return pull_back(W_hat.reshape(WG.shape) @ G)

    return _conjugate_gradients(apply, F, core)


def _normal_matrix(G: Tensor, left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """H ((a, i, b), (a, i, b)), from left (x, p, a), G ((p, i, q), (p, i, q)) and right (b, y, q)."""
    (_, p, a), i, (b, _, q) = left.shape, core.shape[2], right.shape
    of_right = torch.einsum("byq,cyr->qrbc", right, right).reshape(q * q, b * b)
    of_left = torch.einsum("xpa,xsd->adps", left, left).reshape(a * a, p * p)
    H = G.reshape(p, i, q, p, i, q).permute(0, 3, 1, 4, 2, 5).reshape(-1, q * q) @ of_right
    H = of_left @ H.reshape(p * p, -1)
    return H.reshape(a, a, i, i, b, b).permute(0, 2, 4, 1, 3, 5).reshape(a * i * b, a * i * b)


def _solve_proximal(H: Tensor, F: Tensor, core: Tensor) -> Tensor:
    """C with H C = F; in directions where H is zero it keeps the values of `core`, so that the error cannot rise."""
    a, o, i, b = core.shape
    scale = float(H.diagonal().mean())
    if scale <= 0:
        return core
    present = core.permute(0, 2, 3, 1).reshape(-1, o)
    pull = 1e-13
    while True:
        lower, failed = torch.linalg.cholesky_ex(H + pull * scale * torch.eye(len(H), dtype=H.dtype, device=H.device))
        if not failed:
            break
        pull *= 10
    step = torch.cholesky_solve(F - H @ present, lower)
    return (present + step).reshape(a, i, b, o).permute(0, 3, 1, 2).contiguous()


def _conjugate_gradients(apply: Callable[[Tensor], Tensor], F: Tensor, start: Tensor) -> Tensor:
    """Return C nearer to the solution of apply(C) = F than `start`; every step gets nearer in the norm of `apply`."""
    C, residual = start, F - apply(start)
    direction, size = residual, float(torch.sum(residual * residual))
    target = 1e-16 * float(torch.sum(F * F))
    for _ in range(CG_STEPS):
        if size <= target:
            break
        image = apply(direction)
        curvature = float(torch.sum(direction * image))
        if curvature <= 0:
            break
        C = C + size / curvature * direction
        residual = residual - size / curvature * image
        previous, size = size, float(torch.sum(residual * residual))
        direction = residual + size / previous * direction
    return C
