"""Alternating least squares: cores that are nearest to a weight in a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpo_core.fitting.metric import Metric
from mpo_core.fitting.whitening import Whitened, on_cores
from mpo_core.tensor_train.algebra import balance_cores, contract, merge_cores
from mpo_core.tensor_train.bonds import check_sizes, check_whole
from mpo_core.values import check_cores_finite, check_matrix, error_ratio, in_range

CG_STEPS, MAX_SWEEPS, TOLERANCE = 20, 50, 1e-3
"""Conjugate-gradient steps per visit of a core, most sweeps, and the fall of the error at which a fit ends. On matrices
of a trained model, 8 steps and a tolerance of 1e-2 leave the error up to 16 % higher."""


@torch.no_grad()
def als(
    W: Tensor, cores: Sequence[Tensor], metric: Metric, *, max_sweeps: int = MAX_SWEEPS, tolerance: float = TOLERANCE
) -> tuple[list[Tensor], list[float]]:
    """Alternating least squares: each core in turn comes nearer to the best one given the others, in the metric.

    Sites are visited from left to right and back. The other cores are orthogonal after whitening (`Whitened`). There
    the normal equations of a core are nearly the identity, and a few steps of conjugate gradients nearly solve them.
    The steps are in float32, or in float64 for a W in float64. A sweep that does not lower the error, measured in
    float64, is undone and is the last one. The result is therefore never worse than the start.

    Args:
        cores: the start; their bonds stay.
        max_sweeps: at most that many sweeps there and back. tolerance: stop if a sweep lowers the error by less than
            this fraction of it.
    Returns:
        Cores in the dtype of the given ones, and the relative errors (`Metric.error`) at the start and after every
        sweep kept. The errors are those before the cores are rounded to that dtype. If rounding makes the cores worse
        than the start, the start is returned.
    Raises:
        ValueError: max_sweeps < 0 or tolerance < 0, cores that are not finite or do not fit W, a W that `check_matrix`
            refuses, or a metric that does not fit W.
    Source: Holtz, Rohwedder & Schneider 2012.
    """
    check_whole(max_sweeps=max_sweeps)
    if max_sweeps < 0 or tolerance < 0:
        raise ValueError(
            f"`max_sweeps` and `tolerance` must not be negative, but got max_sweeps={max_sweeps}, tolerance={tolerance}"
        )
    check_matrix(W)
    d_out, d_in = [core.shape[1] for core in cores], [core.shape[2] for core in cores]
    check_sizes(W.shape[0], W.shape[1], d_out, d_in)
    check_cores_finite(cores)
    dtype, metric = cores[0].dtype, metric.on(W)
    precision = torch.promote_types(W.dtype, torch.float32)
    W, scale = in_range(W.double())
    start = [core.to(W) for core in cores]
    if scale != 1 or any(
        in_range(core)[1] != 1 for core in start
    ):  # parts of a chain may then be out of range even if W is not
        start = balance_cores(start)

    norm = metric.norm(W)

    def error_of(cores: Sequence[Tensor]) -> float:
        return error_ratio(metric.norm(W - contract([core.to(W) for core in cores]) / scale), norm)

    whitened = Whitened(metric, d_out, d_in)
    problem, target = whitened.metric.to(dtype=precision), whitened.matrix(W)
    unit = float(target.abs().max()) or 1.0
    target = (target / unit).to(precision)
    chain = on_cores([*start[:-1], start[-1] / scale / unit], *whitened.roots)
    chain = [core.to(precision) for core in balance_cores(chain)]
    best, history = list(cores), [error_of(start)]
    for _ in range(max_sweeps):
        chain = _sweep(target, problem, chain)
        fitted = on_cores([core.double() for core in chain], *whitened.inverse_roots)
        fitted = balance_cores([*fitted[:-1], fitted[-1] * unit * scale])
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


@torch.no_grad()
def improved(
    W: Tensor, factors: Sequence[Tensor], matrix: Callable[..., Tensor], metric: Metric, *, max_sweeps: int = 4
) -> list[Tensor]:
    """Factors of any multilinear `matrix(*factors)`, nearer to W in the metric: `als` without whitening.

    Each factor in turn makes `CG_STEPS` steps of conjugate gradients, so no sweep raises the error. All is computed in
    the dtype of W and the metric.
    """
    factors = list(factors)
    for _ in range(max_sweeps):
        for place, factor in enumerate(factors):

            def of(V: Tensor, place: int = place) -> Tensor:
                return matrix(*factors[:place], V, *factors[place + 1 :])

            pull_back = torch.func.vjp(of, factor)[1]
            gradient = pull_back(metric.gradient(W - of(factor)))[0]
            factors[place] = factor + _solved(lambda V: pull_back(metric.gradient(of(V)))[0], gradient)  # noqa: B023
    return factors


def _sweep(W: Tensor, metric: Metric, cores: Sequence[Tensor]) -> list[Tensor]:
    """Improve every core in turn, from site 0 to the last and back, with the others orthogonal around it."""
    cores, n_sites = list(cores), len(cores)
    end = torch.ones(1, 1, 1, 1, dtype=W.dtype, device=W.device)
    rights = [end] * n_sites
    for site in range(n_sites - 1, 0, -1):
        _orthogonalize_leftwards(cores, site)
        rights[site - 1] = merge_cores(cores[site], rights[site])
    lefts = [end] * n_sites
    for site in range(n_sites):
        cores[site] = _better_core(W, metric, lefts[site], cores[site], rights[site])
        if site < n_sites - 1:
            _orthogonalize_rightwards(cores, site)
            lefts[site + 1] = merge_cores(lefts[site], cores[site])
    right = end
    for site in range(n_sites - 1, 0, -1):
        _orthogonalize_leftwards(cores, site)
        right = merge_cores(cores[site], right)
        cores[site - 1] = _better_core(W, metric, lefts[site - 1], cores[site - 1], right)
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


def _better_core(W: Tensor, metric: Metric, left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """The core (a, o, i, b) between left (1, x, p, a) and right (b, y, q, 1), nearer to the best one."""
    left, right = left[0], right[..., 0]  # (x, p, a), (b, y, q)
    (x, p, a), (_, o, i, _), (b, y, q) = left.shape, core.shape, right.shape
    of_left, of_right = left.reshape(x * p, a), right.reshape(b, y * q)

    def matrix(V: Tensor) -> Tensor:  # (a, o, i, b) -> (out_features, in_features)
        half = (of_left @ V.reshape(a, o * i * b)).reshape(x * p * o * i, b)
        return (half @ of_right).reshape(x, p, o, i, y, q).permute(0, 2, 4, 1, 3, 5).reshape(W.shape)

    def pull_back(M: Tensor) -> Tensor:  # the adjoint of `matrix`
        M = M.reshape(x, o, y, p, i, q).permute(0, 3, 1, 4, 2, 5).reshape(x * p * o * i, y * q)
        half = (M @ of_right.T).reshape(x * p, o * i * b)
        return (of_left.T @ half).reshape(a, o, i, b)

    gradient = pull_back(metric.gradient(W - matrix(core)))
    return core + _solved(lambda V: pull_back(metric.gradient(matrix(V))), gradient)


def _solved(apply: Callable[[Tensor], Tensor], F: Tensor) -> Tensor:
    """C with apply(C) near F, from zero by conjugate gradients; every step gets nearer in the norm of `apply`."""
    C, residual = torch.zeros_like(F), F
    direction, size = residual, float(torch.sum(residual * residual))
    target = torch.finfo(F.dtype).eps ** 2 * size
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
