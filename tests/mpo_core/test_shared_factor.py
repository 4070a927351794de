"""One matrix times each of a batch: the same derivatives however many items are summed at once."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from mpo_core.shared_factor import _SharedFactor, shared_product

# PyTorch scripts its own rules of forward mode when these are first needed.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


def operands(*, dtype=torch.float64, batch=5, m=3, k=2, n=2):
    generator = torch.Generator().manual_seed(1)
    A, state = (torch.rand(*shape, generator=generator, dtype=dtype) for shape in ((m, k), (batch, k, n)))
    return A.requires_grad_(), state.requires_grad_()


@forward_mode
@pytest.mark.parametrize("n_at_once", [1, 2, 4, 5])
def test_derivatives_of_both_orders_are_those_of_finite_differences(n_at_once):
    def product(A, state):
        return shared_product(A, state, n_at_once)

    assert torch.autograd.gradcheck(product, operands(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, operands())


@forward_mode
def test_derivative_along_a_direction_of_one_operand():
    A, state = operands()
    for dA, dstate in ((torch.ones_like(A), None), (None, torch.ones_like(state))):
        with forward_ad.dual_level():
            duals = [
                value if tangent is None else forward_ad.make_dual(value, tangent)
                for value, tangent in ((A, dA), (state, dstate))
            ]
            tangent = forward_ad.unpack_dual(shared_product(*duals, 2)).tangent
        along = A @ torch.ones_like(state) if dA is None else torch.ones_like(A) @ state
        torch.testing.assert_close(tangent, along)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_parts_of_few_bits_lose_nothing(dtype):
    A, state = operands(dtype=dtype, batch=4096, n=4)
    [dA] = torch.autograd.grad(shared_product(A, state, 1), [A], torch.ones(4096, 3, 4, dtype=dtype))
    exact = state.detach().double().sum((0, 2)).expand(3, 2)
    torch.testing.assert_close(dA.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_few_items_and_a_matrix_without_gradient_are_one_product_of_autograd():
    def function(A, state, n_at_once):
        return type(shared_product(A, state, n_at_once).grad_fn).__name__

    A, state = operands()
    assert function(A, state, 4) == f"{_SharedFactor.__name__}Backward"
    assert function(A, state, 5) == "BmmBackward0"
    assert function(A.detach(), state, 4) == "BmmBackward0"
    with torch.autocast("cpu", torch.bfloat16):
        assert function(A, state, 4) == "BmmBackward0"


@pytest.mark.filterwarnings("ignore")
def test_a_trace_can_be_saved(tmp_path):
    both = tuple(value.float().detach().requires_grad_() for value in operands())
    traced = torch.jit.trace(lambda A, state: shared_product(A, state, 2), both)
    traced.save(str(tmp_path / "traced.pt"))
