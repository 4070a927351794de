"""L-BFGS descent of the factors of a layer towards a weight, in a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpo_core.fitting.metric import Metric
from mpo_core.tensor_train.bonds import check_whole

MAX_STEPS, TOLERANCE = 300, 1e-3
"""Most steps of a descent, and the fall of the error over `WINDOW` steps at which it ends."""
WINDOW, MEMORY = 10, 10
"""MEMORY: number of earlier steps that shape the next one."""

_SUFFICIENT, _SHORTEST = 1e-4, 1e-6


@torch.no_grad()
def descend(
    matrix: Callable[..., Tensor],
    factors: Sequence[Tensor],
    W: Tensor,
    metric: Metric,
    *,
    max_steps: int = MAX_STEPS,
    tolerance: float = TOLERANCE,
) -> list[Tensor]:
    """Factors with `matrix(*factors)` nearer to W in the metric; all factors change at once.

    A step costs about one product S E G. No step raises the error (`minimise`). The steps are good if the metric
    is nearly the identity and, seen from each factor, the others are nearly orthogonal.

    Args:
        matrix: differentiable function from the factors to a matrix of W's shape.
        W, metric: in the dtype of the factors.
        max_steps: at most that many steps. tolerance: stop if `WINDOW` steps lower the error by less than this fraction
            of it.
    Raises:
        ValueError: as `check_steps`.
    """
    check_steps(max_steps, tolerance)
    shapes = [factor.shape for factor in factors]
    sizes = [factor.numel() for factor in factors]

    def split(x: Tensor) -> list[Tensor]:
        return [part.reshape(shape) for part, shape in zip(x.split(sizes), shapes, strict=True)]

    def evaluate(x: Tensor) -> tuple[float, Tensor]:
        """Half the squared error, and its gradient."""
        W_hat, pull_back = torch.func.vjp(matrix, *split(x))[:2]
        E = W_hat - W
        weighted = metric.gradient(E)
        return float(torch.sum(E * weighted)) / 2, _joined(pull_back(weighted))

    return split(minimise(evaluate, _joined(factors), max_steps=max_steps, tolerance=tolerance)[0])


def minimise(
    evaluate: Callable[[Tensor], tuple[float, Tensor]],
    x: Tensor,
    *,
    max_steps: int,
    tolerance: float,
    first_scale: float | None = None,
) -> tuple[Tensor, float]:
    """The x that L-BFGS reaches from x (n,), and half its squared error. No step raises it (Armijo's condition).

    Args:
        evaluate: function from x to half the squared error, and its gradient (n,).
        max_steps: at most that many steps. tolerance: stop if `WINDOW` steps lower the error by less than this fraction
            of it.
        first_scale: the first step as a multiple of the gradient. Default: that to the minimum zero of a parabola.
    Source: Liu & Nocedal 1989; Nocedal & Wright 2006, Algorithms 3.1 and 7.4.
    """
    value, gradient = evaluate(x)
    history: list[tuple[Tensor, Tensor]] = []
    values = [value]
    for _ in range(max_steps):
        slope_scale = float(gradient @ gradient)
        if not slope_scale > 0 or not value > 0:
            break
        direction = -_by_inverse_hessian(gradient, history, first_scale or value / slope_scale)
        slope, length = float(gradient @ direction), 1.0
        then, new_gradient = evaluate(x + direction)
        while not then <= value + _SUFFICIENT * length * slope and length > _SHORTEST:
            curvature = then - value - length * slope  # of the parabola through both values, with this slope
            length *= min(0.5, max(0.1, -slope * length / (2 * curvature))) if curvature > 0 else 0.1
            then, new_gradient = evaluate(x + length * direction)
        if not then < value:  # only rounding is left to gain
            break
        step, change = length * direction, new_gradient - gradient
        if float(step @ change) > 1e-10 * float(step.norm() * change.norm()):
            history = [*history[-MEMORY + 1 :], (step, change)]
        x, value, gradient = x + step, then, new_gradient
        values.append(value)
        # The square of the error falls twice as fast.
        if len(values) > WINDOW and values[-1 - WINDOW] - value <= 2 * tolerance * values[-1 - WINDOW]:
            break
    return x, value


def check_steps(max_steps: int, tolerance: float) -> None:
    """Raise ValueError unless max_steps is a whole number, and neither it nor the tolerance is negative."""
    check_whole(max_steps=max_steps)
    if max_steps < 0 or tolerance < 0:
        raise ValueError(
            f"`max_steps` and `tolerance` must not be negative, but got max_steps={max_steps}, tolerance={tolerance}"
        )


def _by_inverse_hessian(gradient: Tensor, history: Sequence[tuple[Tensor, Tensor]], first_scale: float) -> Tensor:
    """The gradient times the inverse Hessian that the steps and changes of the gradient tell."""
    if not history:
        return gradient * first_scale
    vector, shares = gradient, []
    for step, change in reversed(history):
        shares.append(float(step @ vector) / float(step @ change))
        vector = vector - shares[-1] * change
    step, change = history[-1]
    vector = vector * (float(step @ change) / float(change @ change))
    for (step, change), share in zip(history, reversed(shares), strict=True):
        vector = vector + (share - float(change @ vector) / float(step @ change)) * step
    return vector


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
