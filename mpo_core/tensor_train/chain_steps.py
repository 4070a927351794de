"""The products of a chain: each core in turn times the state between two sites, for all rows or a few at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor


class Step(NamedTuple):
    """A core, as a matrix (m, k), times the state, which is `items` matrices (k, n) for each row of x."""

    items: int
    m: int
    k: int
    n: int

    def operand(self, state: Tensor, n_rows: int) -> Tensor:
        """The state of n_rows rows before this step: (n_rows · items, k, n)."""
        return state.reshape(n_rows * self.items, self.k, self.n)

    def product(self, A: Tensor, state: Tensor, n_rows: int, out: Tensor | None = None) -> Tensor:
        """The state after this step: (n_rows · items, m, n), in the memory `out` if it is given."""
        return _product(A, self.operand(state, n_rows), out)

    @property
    def n_partial_sums(self) -> int:
        """Number of entries per row of the gradient of A, before they are summed."""
        return 0 if self.n == 1 or copies(self.m, self.k, self.n) else self.items * self.m * self.k

    @property
    def n_written(self) -> int:
        """Number of entries per row of the state after this step."""
        return self.items * self.m * self.n


def steps_of(bonds: Sequence[int], d_out: Sequence[int], d_in: Sequence[int], direction: str) -> list[Step]:
    """The steps from the first site to the last ("left") or from the last to the first ("right")."""
    rest, done, steps = math.prod(d_in), 1, []
    sites = list(zip(bonds[:-1], d_out, d_in, bonds[1:], strict=True))
    for a, o, i, b in sites if direction == "left" else reversed(sites):
        rest = rest // i  # not in place: while being traced these are tensors
        steps.append(Step(done, o * b, a * i, rest) if direction == "left" else Step(rest, a * o, i * b, done))
        done = done * o
    return steps


def matrices_of(cores: Sequence[Tensor], steps: Sequence[Step], direction: str) -> list[Tensor]:
    """The cores as the matrices (m, k) of these steps, in their order."""
    if direction == "left":
        return [core.permute(1, 3, 0, 2).reshape(step.m, step.k) for core, step in zip(cores, steps, strict=True)]
    return [core.reshape(step.m, step.k) for core, step in zip(reversed(cores), steps, strict=True)]


def contracted(steps: Sequence[Step], As: Sequence[Tensor], x: Tensor) -> Tensor:
    """Map (rows, prod(d_in)) to (rows, prod(d_out)), with one matrix A for each step."""
    state = x
    for step, A in zip(steps, As, strict=True):
        state = step.product(A, state, x.shape[0])
    return state.reshape(x.shape[0], steps[-1].n_written)


def contracted_in_parts(steps: Sequence[Step], As: Sequence[Tensor], x: Tensor, n_at_once: int) -> Tensor:
    """`contracted`, with the state of n_at_once rows at a time, also in the backward pass, which computes it again.

    For real numbers, without autocast or forward-mode derivatives. Gradients of gradients are those of `contracted`.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *As)):
        return _InParts.apply(x, steps, n_at_once, *As)
    return _y_in_parts(steps, As, x, n_at_once)


def copies(m: int, k: int, n: int) -> bool:
    """Whether copying the state for one large product is better than a batch of small ones.

    In a batch the gradient of A is one (m, k) partial sum per item. Measured on a CPU, forward and backward: the batch
    is cheaper than a copy if this sum is at most twice the size of the item's own operands. Beyond that it is slower,
    and needs the memory of all partial sums.
    """
    return m * k > 2 * (m + k) * n


def is_traced() -> bool:
    """Whether this code is being compiled, or transformed by `torch.func`; then nothing may depend on values."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing()


def _product(A: Tensor, state: Tensor, out: Tensor | None = None) -> Tensor:
    """(m, k) times each of (batch, k, n): (batch, m, n), in the memory `out` (1-d, large enough) if it is given."""
    batch, k, n = state.shape
    m = A.shape[0]
    if out is not None:
        out = out[: batch * m * n]
    if n == 1 or copies(m, k, n):
        y = torch.mm(_rows(state), A.T, out=None if out is None else out.view(batch * n, m))
        return y.view(batch, n, m).transpose(1, 2)
    return torch.bmm(A.expand(batch, m, k), state, out=None if out is None else out.view(batch, m, n))


def _add_summed_product(dA: Tensor, dy: Tensor, state: Tensor, out: Tensor) -> None:
    """Add the gradient of A in `_product`: the sum over the batch of (m, n) times (k, n) transposed; `out`: memory."""
    batch, m, n = dy.shape
    k = state.shape[1]
    if n == 1 or copies(m, k, n):
        dA += torch.mm(_rows(dy).T, _rows(state))
    else:
        dA += torch.bmm(dy, state.mT, out=out[: batch * m * k].view(batch, m, k)).sum(0, dtype=dA.dtype)


def _rows(state: Tensor) -> Tensor:
    """(batch, k, n) as (batch · n, k)."""
    batch, k, n = state.shape
    return state.transpose(1, 2).reshape(batch * n, k)


def _y_in_parts(steps: Sequence[Step], As: Sequence[Tensor], x: Tensor, n_at_once: int) -> Tensor:
    y = x.new_empty(x.shape[0], steps[-1].n_written)
    memory = _memory(steps, x, n_at_once)
    for part, of_y in zip(x.split(n_at_once), y.split(n_at_once), strict=True):
        state = part
        for step, A, out in zip(steps, As, memory, strict=True):
            state = step.product(A, state, part.shape[0], out)
        of_y.copy_(state.reshape(of_y.shape))
    return y


def _memory(steps: Sequence[Step], x: Tensor, n_at_once: int) -> list[Tensor]:
    """Memory for the state after each step, reused by all parts; the last also has room for the gradient of a part of
    x.

    Mapping new memory takes longer than the computation in it.
    """
    sizes = [step.n_written for step in steps]
    return [x.new_empty(n_at_once * size) for size in (*sizes[:-1], max(sizes[-1], x.shape[1]))]


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: Sequence[Step], n_at_once: int, *As: Tensor) -> Tensor:
        wants = ctx.needs_input_grad[3:]
        ctx.save_for_backward(x if any(wants) else None, *As)  # dx does not depend on x
        ctx.steps, ctx.n_at_once, ctx.shape = steps, n_at_once, x.shape
        return _y_in_parts(steps, As, x, n_at_once)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        [dy], (x, *As), steps = grad_outputs, ctx.saved_tensors, ctx.steps
        wants_x, _, _, *wants = ctx.needs_input_grad
        x = As[0].new_zeros(ctx.shape).requires_grad_() if x is None else x
        if torch.is_grad_enabled() or is_traced() or is_legacy_batchedtensor(dy):
            # For gradients of these gradients, or many dy at once. Views, because an A may itself be a function of x.
            with torch.enable_grad():
                x, *As = (tensor.view_as(tensor) for tensor in (x, *As))
                y = contracted(steps, As, x)
            inputs = [tensor for tensor, is_wanted in zip((x, *As), (wants_x, *wants), strict=True) if is_wanted]
            found = iter(torch.autograd.grad(y, inputs, dy, create_graph=torch.is_grad_enabled()))
            dx, *dAs = [next(found) if is_wanted else None for is_wanted in (wants_x, *wants)]
            return dx, None, None, *dAs
        # The number of steps whose states the gradients of the cores need.
        n_recomputed = max((index for index, is_wanted in enumerate(wants) if is_wanted), default=0)
        dx = torch.empty_like(x)
        # In 16 bits the sums would lose what the later parts add.
        dAs = [torch.zeros_like(A, dtype=torch.promote_types(A.dtype, torch.float32)) for A in As]
        memory = _memory(steps, x, ctx.n_at_once)
        partial_sums = x.new_empty(ctx.n_at_once * max(step.n_partial_sums for step in steps))
        for part, of_x, of_y in zip(*(tensor.split(ctx.n_at_once) for tensor in (x, dx, dy)), strict=True):
            n_rows, states = part.shape[0], [part]
            for index in range(n_recomputed):
                states.append(steps[index].product(As[index], states[-1], n_rows, memory[index]))
            dstate = of_y
            for index, step in reversed(list(enumerate(steps))):
                dstate = dstate.reshape(n_rows * step.items, step.m, step.n)
                if wants[index]:
                    _add_summed_product(dAs[index], dstate, step.operand(states[index], n_rows), partial_sums)
                if not (wants_x or any(wants[:index])):
                    break
                # In the memory of the state, which is not needed again; the gradient of x, at index 0, in the last.
                dstate = _product(As[index].T, dstate, memory[index - 1])
            if wants_x:
                of_x.copy_(dstate.reshape(of_x.shape))
        of_cores = [dA.to(A.dtype) if is_wanted else None for dA, A, is_wanted in zip(dAs, As, wants, strict=True)]
        return dx if wants_x else None, None, None, *of_cores
