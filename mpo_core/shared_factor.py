"""One matrix times each of a batch, where autograd would hold the gradient of the matrix once for every item."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor


def shared_product(A: Tensor, state: Tensor, n_at_once: int) -> Tensor:
    """A (m, k) times each of (batch, k, n): (batch, m, n).

    Args:
        n_at_once: items whose parts of A's gradient are in memory at once, on a CPU. For all items these would be
            batch × m × k entries, and mapping so much takes longer than computing it.
    """
    if state.shape[0] > n_at_once and _sums_in_parts(A, state):
        return _SharedFactor.apply(A, state, n_at_once)
    return torch.bmm(A.expand(state.shape[0], *A.shape), state)


def is_traced() -> bool:
    """Whether this code is being compiled, or transformed by `torch.func`: then nothing is to depend on values."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing()


def _sums_in_parts(A: Tensor, state: Tensor) -> bool:
    """Autocast gives the gradients another dtype than A's, and on a GPU each part would be launched by itself."""
    return (
        torch.is_grad_enabled()
        and A.requires_grad
        and A.device.type == "cpu"
        and A.dtype == state.dtype
        and not torch.is_autocast_enabled("cpu")
        and not is_traced()
    )


class _SharedFactor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, state: Tensor, n_at_once: int) -> Tensor:
        ctx.save_for_backward(A, state)
        ctx.save_for_forward(A, state)
        ctx.n_at_once = n_at_once
        return torch.bmm(A.expand(state.shape[0], *A.shape), state)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        [dy], (A, state) = grad_outputs, ctx.saved_tensors
        wants_A, wants_state, _ = ctx.needs_input_grad
        dA = dstate = None
        if wants_A:
            sums_in = torch.promote_types(A.dtype, torch.float32)  # 16 bits would lose what the later items add
            items = zip(dy.split(ctx.n_at_once), state.split(ctx.n_at_once), strict=True)
            parts = (torch.bmm(of_y, own.mT).sum(0, dtype=sums_in) for of_y, own in items)
            dA = reduce(torch.add, parts).to(A.dtype)
        if wants_state:
            dstate = torch.bmm(A.T.expand(dy.shape[0], *A.T.shape), dy)
        return dA, dstate, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        (tangent_A, tangent_state, _), (A, state) = grad_inputs, ctx.saved_tensors
        n = state.shape[0]
        tangents = []
        if tangent_A is not None:
            tangents.append(torch.bmm(tangent_A.expand(n, *A.shape), state))
        if tangent_state is not None:
            tangents.append(torch.bmm(A.expand(n, *A.shape), tangent_state))
        return reduce(torch.add, tangents)
