"""The fit of a chain of cores to a weight in a metric."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_core.fitting.descent import MAX_STEPS, TOLERANCE, check_steps, descend
from mpo_core.fitting.metric import Metric
from mpo_core.fitting.whitening import Whitened, on_cores
from mpo_core.tensor_train.algebra import balance_cores, contract, orthogonalize
from mpo_core.tensor_train.bonds import check_sizes
from mpo_core.values import check_cores_finite, check_matrix, error_ratio, in_range, times_power, to_unit, to_units

FLOOR = 1e-3
"""Singular values of a bond count as at least this share of the largest: its square is the gradient's condition."""


@torch.no_grad()
def improve_cores(
    W: Tensor, cores: Sequence[Tensor], metric: Metric, *, max_steps: int = MAX_STEPS, tolerance: float = TOLERANCE
) -> list[Tensor]:
    """Cores nearer to W in the metric, by L-BFGS over all of them at once (`descend`).

    The coordinates make this converge in tens of steps. The metric is whitened site by site (`Whitened`). Bonds have
    the bases of the singular value decomposition there, and each core has the singular values of the bonds at its
    sides as factors. Seen from each core, the others are then orthogonal. The steps are in float32, or in float64 for a
    W in float64.

    Args:
        cores: the start. Their bonds stay, unless one is out of its neighbours' reach. max_steps, tolerance: as
            `descend`.
    Returns:
        Cores in the dtype of the given ones. Where rounding would make them worse than the start, the start.
    Raises:
        ValueError: max_steps < 0 or tolerance < 0, cores that are not finite or do not fit W, a W that `check_matrix`
            refuses, or a metric that does not fit W.
    """
    check_steps(max_steps, tolerance)
    check_matrix(W)
    d_out, d_in = [core.shape[1] for core in cores], [core.shape[2] for core in cores]
    check_sizes(W.shape[0], W.shape[1], d_out, d_in)
    check_cores_finite(cores)
    dtype, metric = cores[0].dtype, metric.on(W)
    precision = torch.promote_types(W.dtype, torch.float32)
    W, scale = in_range(W.double())
    # Parts of a chain may be out of range even if W is not. Powers of two change no digit.
    units, total = to_units([core.to(W) for core in cores])

    def error_of(cores: Sequence[Tensor]) -> float:
        return error_ratio(metric.norm(W - contract(cores) / scale), norm)

    norm = metric.norm(W)
    whitened = Whitened.of(metric, d_out, d_in)
    target, exponent = to_unit(whitened.matrix(W))
    start = [*units[:-1], times_power(units[-1], total)]
    chain = on_cores([*units[:-1], times_power(units[-1] / scale, total - exponent)], *whitened.roots)
    factors, values = centred(chain)
    weights = [value.to(precision) for value in values]

    def matrix(*factors: Tensor) -> Tensor:
        return contract([*[core / value for core, value in zip(factors, weights, strict=False)], factors[-1]])

    fitted = descend(
        matrix,
        [factor.to(precision) for factor in factors],
        target.to(precision),
        whitened.metric.to(dtype=precision),
        max_steps=max_steps,
        tolerance=tolerance,
    )
    unweighted = [*[core.double() / value for core, value in zip(fitted, values, strict=False)], fitted[-1].double()]
    unwhitened = on_cores(unweighted, *whitened.inverse_roots)
    best = balance_cores([*unwhitened[:-1], times_power(unwhitened[-1], exponent) * scale])
    rounded = [core.to(dtype) for core in best]
    return rounded if error_of([core.to(W) for core in rounded]) <= error_of(start) else list(cores)


def centred(cores: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Factors F_l and positive vectors v_l with the chain F_0 v_0⁻¹, F_1 v_1⁻¹, …, F_L; v_l are the bonds' singular
    values.

    Source of these coordinates: Vidal 2003.
    """
    *factors, last = orthogonalize(cores, 0)
    factors, values = [*factors, last], []
    for site in range(len(factors) - 1):
        shape = factors[site].shape
        U, s, Vh = torch.linalg.svd(factors[site].reshape(-1, shape[3]), full_matrices=False)
        values.append(s.clamp(min=FLOOR * float(s[0]) or 1.0))
        factors[site] = (U * values[-1]).reshape(*shape[:3], -1)
        factors[site + 1] = torch.tensordot(s[:, None] * Vh, factors[site + 1], dims=1)
    return factors, values
