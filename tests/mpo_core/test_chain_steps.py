"""A chain contracted a few rows at a time: values and derivatives of every order are those of the whole."""

from __future__ import annotations

import math

import pytest
import torch
import torch.utils.checkpoint
from torch.autograd import forward_ad

from mpo_core.tensor_train import contraction
from mpo_core.tensor_train.algebra import bonds_and_sizes, contract
from mpo_core.tensor_train.bonds import clip_bonds
from mpo_core.tensor_train.chain_steps import contracted_in_parts, matrices_of, steps_of
from mpo_core.tensor_train.contraction import chain

CHAINS = {
    "one site": ((3,), (4,), 1),
    "batches": ((2, 4), (4, 2), 2),
    "copies": ((4, 4, 1), (4, 4, 2), 5),
    "copies at the ends": ((16, 2), (16, 2), 4),
    "three sites": ((2, 3, 2), (3, 2, 2), 3),
}
DIRECTIONS = ("left", "right")


@pytest.fixture
def few(monkeypatch):
    """A chain that takes one row at a time, and with gradients, of more than eight, two."""
    monkeypatch.setattr(contraction, "_few_rows", lambda *_: 1)


def operands(name, n_rows=5, dtype=torch.float64):
    """x and the cores."""
    d_out, d_in, chi = CHAINS[name]
    bonds, generator = clip_bonds(chi, d_out, d_in), torch.Generator().manual_seed(1)
    shapes = [(n_rows, math.prod(d_in)), *zip(bonds[:-1], d_out, d_in, bonds[1:], strict=True)]
    return [torch.rand(shape, generator=generator, dtype=dtype).sub_(0.5).requires_grad_() for shape in shapes]


def in_parts(direction, n_at_once):
    def function(x, *cores):
        steps = steps_of(*bonds_and_sizes(cores), direction)
        return contracted_in_parts(steps, matrices_of(cores, steps, direction), x, n_at_once)

    return function


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("n_at_once", [1, 2, 4])
def test_values_and_derivatives_of_both_orders(name, direction, n_at_once):
    function, (x, *cores) = in_parts(direction, n_at_once), operands(name)
    expected = x @ contract(cores).T
    torch.testing.assert_close(function(x, *cores), expected)
    with torch.no_grad():
        torch.testing.assert_close(function(x, *cores), expected)
    assert torch.autograd.gradcheck(function, (x, *cores), check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *cores), fast_mode=True)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("wanted", range(1, 16))
def test_each_gradient_alone_is_what_it_is_with_all(direction, wanted):
    tensors = operands("three sites")
    dy = torch.rand(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    every = torch.autograd.grad(in_parts(direction, 2)(*tensors), tensors, dy)
    some = [tensor.detach().requires_grad_(bool(wanted >> index & 1)) for index, tensor in enumerate(tensors)]
    in_parts(direction, 2)(*some).backward(dy)
    for tensor, expected in zip(some, every, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=0)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_parts_of_few_bits_lose_nothing(dtype):
    x, *cores = operands("batches", n_rows=4096)
    x, cores = (x > 0).to(dtype), [torch.ones_like(core, dtype=dtype).requires_grad_() for core in cores]
    dy = torch.ones(4096, 8, dtype=dtype)
    found = torch.autograd.grad(in_parts("left", 1)(x, *cores), cores, dy)
    exactly = [core.detach().double().requires_grad_() for core in cores]
    expected = torch.autograd.grad(x.double() @ contract(exactly).T, exactly, dy.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2 * torch.finfo(dtype).eps, atol=0)


def is_in_parts(y):
    """Whether `contracted_in_parts` is what y was computed by, last but for views."""
    functions = [y.grad_fn]
    while functions[-1].name().startswith(("View", "Reshape", "UnsafeView", "Alias")):
        functions.append(functions[-1].next_functions[0][0])
    return functions[-1].name() == "_InPartsBackward"


def test_many_rows_are_in_parts_and_few_are_not(few):
    x, *cores = operands("batches", n_rows=9)
    assert is_in_parts(chain(cores, x))
    assert is_in_parts(chain(cores, x.detach()))
    assert not is_in_parts(chain(cores, x[:8]))


@pytest.mark.parametrize("name", CHAINS)
def test_autocast_of_many_rows_is_that_of_few(name, monkeypatch):
    x, *cores = operands(name, n_rows=9, dtype=torch.float32)

    def y_and_gradients():
        with torch.autocast("cpu", torch.bfloat16):
            y = chain(cores, x)
            with torch.no_grad():
                torch.testing.assert_close(chain(cores, x), y)
        return y, *torch.autograd.grad(y.sum(), (x, *cores))

    whole = y_and_gradients()
    monkeypatch.setattr(contraction, "_few_rows", lambda *_: 1)
    parts = y_and_gradients()
    assert is_in_parts(parts[0])
    assert [tensor.dtype for tensor in parts] == [torch.bfloat16] + [torch.float32] * (len(parts) - 1)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_complex_numbers_of_many_rows(few):
    x, *cores = operands("three sites", n_rows=9, dtype=torch.complex128)
    [dx, *dcores] = torch.autograd.grad(chain(cores, x).abs().sum(), (x, *cores))
    [expected, *of_cores] = torch.autograd.grad((x @ contract(cores).T).abs().sum(), (x, *cores))
    for one, other in zip((dx, *dcores), (expected, *of_cores), strict=True):
        torch.testing.assert_close(one, other)


def test_frozen_cores_need_nothing_of_x(few):
    x, *cores = operands("three sites", n_rows=9)
    cores = [core.detach() for core in cores]
    changed = x * 1
    changed += chain(cores, changed)  # as where a residual is added in place
    [dx] = torch.autograd.grad(changed.sum(), x, create_graph=True)
    torch.testing.assert_close(dx, 1 + torch.ones_like(x) @ contract(cores))
    changed = x * 1
    changed += chain(cores, changed)
    [dx] = torch.autograd.grad(changed.sum(), x)
    torch.testing.assert_close(dx, 1 + torch.ones_like(x) @ contract(cores))


@pytest.mark.parametrize("create_graph", [False, True])
def test_cores_that_are_functions_of_x(create_graph):
    x, *cores = operands("batches")
    function = in_parts("left", 2)
    [dx] = torch.autograd.grad(
        function(x, *(x.sum() * core.detach() for core in cores)).sum(), x, create_graph=create_graph
    )
    W = contract([core.detach() for core in cores])
    [expected] = torch.autograd.grad((x.sum() ** 2 * x @ W.T).sum(), x)
    torch.testing.assert_close(dx, expected)


def test_whatever_else_autograd_offers(few):
    x, *cores = operands("copies at the ends", n_rows=9)

    def gradients(y, **options):
        return torch.autograd.grad(y.sum(), (x, *cores), **options)  # dy is expanded

    expected = gradients(x @ contract(cores).T)
    strided = x.T.contiguous().T
    checkpointed = torch.utils.checkpoint.checkpoint(lambda x: chain(cores, x), x, use_reentrant=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.numpy(force=True), torch.from_numpy):
        offloaded = chain(cores, x)
    for y in (chain(cores, x), chain(cores, strided), checkpointed, offloaded):
        for _ in range(2):
            for one, other in zip(gradients(y, retain_graph=True), expected, strict=True):
                torch.testing.assert_close(one, other)
    with torch.inference_mode():
        torch.testing.assert_close(chain(cores, x), x @ contract(cores).T)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_forward_mode_derivatives_of_many_rows(few):
    x, *cores = operands("batches", n_rows=9)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(chain(cores, forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent, torch.ones_like(x) @ contract(cores).T)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_many_rows_can_be_saved(few, tmp_path):
    class Chain(torch.nn.Module):
        def forward(self, x):
            return chain(cores, x)

    x, *cores = [tensor.detach() for tensor in operands("batches", n_rows=9)]
    traced = torch.jit.trace(Chain(), (x,))
    torch.jit.save(traced, str(tmp_path / "traced.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "traced.pt"))(x[:3]), chain(cores, x[:3]))


def test_no_rows_and_many_leading_dimensions(few):
    x, *cores = operands("three sites", n_rows=12)
    assert chain(cores, x[:0]).shape == (0, 12)
    torch.testing.assert_close(chain(cores, x.view(3, 2, 2, 12)).view(12, 12), x @ contract(cores).T)


def test_what_a_gradient_needs_cannot_be_changed_unnoticed(few):
    x, *cores = operands("batches", n_rows=9)
    changed = x.detach() + 0
    y = chain(cores, changed)
    changed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
