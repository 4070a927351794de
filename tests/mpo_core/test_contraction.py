"""Chains applied to activations against dense oracles, and their FLOPs against what PyTorch counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mpo_core.tensor_train import contraction
from mpo_core.tensor_train.algebra import contract
from mpo_core.tensor_train.bonds import clip_bonds
from mpo_core.tensor_train.contraction import CHAIN_STATE, Product, chain, cheapest_direction, cost, products

DIRECTIONS = ("left", "right")


@st.composite
def chains(draw, max_sites=4):
    """(cores, x, dy) over 1 to 4 sites: sizes and bonds of 1 and primes among them, 0 to 5 rows."""
    n_sites = draw(st.integers(1, max_sites))
    sizes = st.lists(st.sampled_from([1, 2, 3, 4, 5, 7]), min_size=n_sites, max_size=n_sites)
    d_out, d_in = draw(sizes), draw(sizes)
    bonds = (1, *[draw(st.integers(1, 6)) for _ in range(n_sites - 1)], 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = zip(bonds[:-1], d_out, d_in, bonds[1:], strict=True)
    n_rows = draw(st.integers(0, 5))
    cores = [normal(*shape) for shape in shapes]
    return cores, normal(n_rows, math.prod(d_in)), normal(n_rows, math.prod(d_out))


def make_cores(bonds, d_out, d_in, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = zip(bonds[:-1], d_out, d_in, bonds[1:], strict=True)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def dense(cores):
    """W by numpy, one bond at a time."""
    block = np.ones((1, 1, 1))  # (rows, columns, bond)
    for core in cores:
        block = np.einsum("rca,aoib->rocib", block, core.detach().numpy())
        r, o, c, i, b = block.shape
        block = block.reshape(r * o, c * i, b)
    return torch.from_numpy(block[:, :, 0])


@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(max_examples=60, deadline=None)
@given(chains())
def test_chain_values_match_dense(direction, case):
    cores, x, _ = case
    torch.testing.assert_close(chain(cores, x, direction), x @ dense(cores).T)


@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(max_examples=40, deadline=None)
@given(chains())
def test_chain_gradients_match_those_of_the_reconstruction(direction, case):
    cores, x, dy = case
    variables = [x.requires_grad_(), *[core.requires_grad_() for core in cores]]
    ours = torch.autograd.grad(chain(cores, x, direction), variables, dy)
    theirs = torch.autograd.grad(x @ contract(cores).T, variables, dy)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_chain_passes_second_derivatives(direction):
    cores = [core.requires_grad_() for core in make_cores((1, 2, 3, 1), (2, 1, 2), (2, 3, 1))]
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *cores: chain(cores, x, direction), (x, *cores))


@pytest.mark.parametrize("direction", [*DIRECTIONS, "auto"])
@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 0), (2, 3, 4)])
def test_chain_takes_any_leading_shape(direction, leading):
    cores = make_cores((1, 3, 2, 1), (2, 3, 4), (3, 2, 5))
    x = torch.randn(*leading, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(chain(cores, x, direction), x @ contract(cores).T)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_chain_takes_strided_inputs(direction):
    cores = make_cores((1, 3, 1), (4, 3), (2, 5))
    x = torch.randn(10, 6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    strided = x.permute(2, 1, 0)
    torch.testing.assert_close(chain(cores, strided, direction), strided @ contract(cores).T)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("batched", ["cores", "x", "both"])
def test_chain_under_vmap_matches_single_ones(direction, batched):
    stacks = [
        torch.stack(both)
        for both in zip(*[make_cores((1, 3, 2, 1), (2, 3, 4), (3, 2, 5), seed) for seed in (0, 1)], strict=True)
    ]
    x = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    in_dims = (None if batched == "x" else 0, None if batched == "cores" else 0)
    cores = [stack[0] for stack in stacks] if batched == "x" else stacks
    y = vmap(lambda cores, x: chain(cores, x, direction), in_dims)(cores, x[0] if batched == "cores" else x)
    for index in range(2):
        alone = [stack[0 if batched == "x" else index] for stack in stacks]
        torch.testing.assert_close(y[index], chain(alone, x[0 if batched == "cores" else index], direction))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_chain_in_bfloat16_is_near(direction):
    cores = make_cores((1, 4, 4, 1), (4, 4, 4), (4, 4, 4))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = x @ contract(cores).T
    y = chain([core.bfloat16() for core in cores], x.bfloat16(), direction)
    assert y.dtype is torch.bfloat16
    assert torch.linalg.norm(y.double() - exact) < 0.02 * torch.linalg.norm(exact)


SHAPES = [
    ((128,), (96,), 1),
    ((8, 16), (16, 8), 4),
    ((8, 8, 8), (4, 4, 8), 8),
    ((4, 4, 8), (8, 8, 8), 16),
    ((5, 13), (8, 16), 32),
    ((2, 3, 2, 3), (3, 1, 5, 2), 5),
]


@pytest.mark.parametrize(("d_out", "d_in", "chi"), SHAPES)
@pytest.mark.parametrize("n_tokens", [1, 3, 40])
@pytest.mark.parametrize(
    ("mode", "direction"), [("chain", "left"), ("chain", "right"), ("reconstruct", "auto"), ("cached", "auto")]
)
@pytest.mark.parametrize("training", [False, True])
def test_flops_are_those_that_pytorch_counts(d_out, d_in, chi, n_tokens, mode, direction, training):
    bonds = clip_bonds(chi, d_out, d_in)
    cores = [core.requires_grad_(training) for core in make_cores(bonds, d_out, d_in, dtype=torch.float32)]
    x = torch.ones(n_tokens, math.prod(d_in), requires_grad=training)
    W = contract(cores).detach().requires_grad_(training)
    with FlopCounterMode(display=False) as counter:
        if mode == "chain":
            y = chain(cores, x, direction)
        else:
            y = torch.nn.functional.linear(x, W if mode == "cached" else contract(cores))
        if training:
            y.sum().backward()
    steps = products(mode, bonds, d_out, d_in, n_tokens, direction=direction)
    assert cost(steps, 4, training=training).flops == counter.get_total_flops()


def test_flops_are_the_papers_shapes_by_hand():
    # research/structured_layers.md, section B: 512×128 at χ = 4, 8192 tokens, in MFLOP.
    bonds = clip_bonds(4, (8, 8, 8), (4, 4, 8))
    arguments = (bonds, (8, 8, 8), (4, 4, 8), 8192)
    assert cost(products("chain", *arguments, direction="left"), 4).flops == pytest.approx(872e6, rel=1e-3)
    assert cost(products("chain", *arguments, direction="right"), 4).flops == pytest.approx(470e6, rel=1e-3)
    assert cost(products("cached", *arguments), 4).flops == pytest.approx(1073.7e6, rel=1e-3)
    reconstructed = cost(products("reconstruct", *arguments), 4).flops - cost(products("cached", *arguments), 4).flops
    assert reconstructed == pytest.approx(0.56e6, rel=1e-2)


class LargestResult(TorchDispatchMode):
    """The most elements that any operation returned."""

    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.n_elements = max(self.n_elements, result.numel())
        return result


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("d_out", "d_in", "chi"), [((8, 8, 8), (4, 4, 8), 32), ((16, 16), (16, 16), 16), ((4,) * 4, (4,) * 4, 9)]
)
def test_gradients_need_little_more_memory_than_the_states(d_out, d_in, chi, direction):
    """A partial sum per item of a batch would be up to eight times a state here."""
    bonds, n_tokens = clip_bonds(chi, d_out, d_in), 50
    cores = [core.requires_grad_() for core in make_cores(bonds, d_out, d_in)]
    x = torch.ones(n_tokens, math.prod(d_in), dtype=torch.float64, requires_grad=True)
    steps = products("chain", bonds, d_out, d_in, n_tokens, direction=direction)
    state = max(step.batch * max(step.m, step.k) * step.n for step in steps)
    with LargestResult() as largest:
        chain(cores, x, direction).sum().backward()
    assert largest.n_elements <= 2.5 * state


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("leading", [(1000,), (7, 143)])
def test_without_gradients_the_state_stays_small_and_the_values_the_same(direction, leading):
    cores = make_cores((1, 16, 1), (16, 16), (16, 16))
    x = torch.randn(*leading, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with LargestResult() as largest:
        y = chain(cores, x, direction)
    torch.testing.assert_close(y, x @ dense(cores).T)
    assert x.numel() <= largest.n_elements <= CHAIN_STATE
    assert 4 * CHAIN_STATE < 1000 * 16 * 16 * 16  # what all rows at once would take


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_of_many_rows_need_the_memory_of_few(direction, monkeypatch, request):
    request.addfinalizer(contraction._few_rows.cache_clear)
    d_out, d_in, bonds = (16, 16), (16, 16), (1, 16, 1)
    cores = [core.requires_grad_() for core in make_cores(bonds, d_out, d_in)]
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(200, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    variables = [x.requires_grad_(), *cores]

    def gradients_and_largest():
        contraction._few_rows.cache_clear()
        with LargestResult() as largest:
            found = torch.autograd.grad(chain(cores, x, direction), variables, dy)
        return found, largest.n_elements

    whole, most = gradients_and_largest()
    monkeypatch.setattr(contraction, "CHAIN_STATE", 2**14)
    parts, few = gradients_and_largest()
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other)
    assert most == 200 * 16 * 16 * 16
    assert few == x.numel()  # twice the state of four rows is less


@pytest.mark.parametrize(("d_out", "d_in", "chi"), SHAPES)
def test_auto_takes_the_direction_with_fewer_flops(d_out, d_in, chi):
    bonds = clip_bonds(chi, d_out, d_in)
    flops = {
        direction: cost(products("chain", bonds, d_out, d_in, 7, direction=direction), 4).flops
        for direction in ("left", "right", "auto")
    }
    assert flops["auto"] == flops[cheapest_direction(bonds, d_out, d_in)] == min(flops.values())


def test_chain_itself_uses_the_cheaper_direction():
    bonds, d_out, d_in = (1, 4, 4, 1), (8, 8, 8), (4, 4, 8)
    cores, x = make_cores(bonds, d_out, d_in), torch.ones(2, 128, dtype=torch.float64)
    counts = {}
    for direction in ("left", "right", "auto"):
        with FlopCounterMode(display=False) as counter:
            chain(cores, x, direction)
        counts[direction] = counter.get_total_flops()
    assert counts["auto"] == counts["right"] < counts["left"]


def test_bytes_count_operands_once_per_use():
    # 2 items of (3 × 4) @ (4 × 5), the left factor shared.
    assert cost([Product(2, 3, 4, 5)], 8).bytes == 8 * (3 * 4 + 2 * 4 * 5 + 2 * 3 * 5)
    assert cost([Product(2, 3, 4, 5, copied=7)], 2).bytes == 2 * (3 * 4 + 2 * 4 * 5 + 2 * 3 * 5 + 2 * 7)
    # The gradients: (4 × 3) @ (3 × 5) per item, and one (3 × 10) @ (10 × 4) with its partial sums.
    trained = cost([Product(2, 3, 4, 5, partial=24)], 1, training=True).bytes - cost([Product(2, 3, 4, 5)], 1).bytes
    assert trained == (4 * 3 + 2 * 3 * 5 + 2 * 4 * 5) + (3 * 10 + 10 * 4 + 3 * 4 + 2 * 24)
    trained = cost([Product(1, 3, 4, 5)], 4, training=True)
    assert trained.flops == 3 * 2 * 3 * 4 * 5
    assert trained.bytes == 4 * 3 * (3 * 4 + 4 * 5 + 3 * 5)


@pytest.mark.parametrize(
    ("cores", "x", "direction", "message"),
    [
        ([], torch.ones(4), "auto", "`cores` must be at least one"),
        ([torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, 1)], torch.ones(4), "auto", "equal bonds between neighbours"),
        (
            [torch.ones(1, 2, 4, 1)],
            torch.ones(3, 5),
            "auto",
            r"`x.shape\[-1\] == prod\(d_in\)` must hold, but got x of",
        ),
        ([torch.ones(1, 2, 4, 1)], torch.ones(()), "auto", r"must hold, but got x of shape \(\)"),
        ([torch.ones(1, 2, 4, 1)], torch.ones(4), "up", "`direction` must be one of auto, left, right, but got 'up'"),
    ],
)
def test_chain_says_what_is_allowed(cores, x, direction, message):
    with pytest.raises(ValueError, match=message):
        chain(cores, x, direction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "dense"}, "`mode` must be one of reconstruct, chain, cached, but got 'dense'"),
        ({"mode": "chain", "direction": "up"}, "`direction` must be one of"),
    ],
)
def test_products_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        products(**{"bonds": (1, 1), "d_out": (2,), "d_in": (2,), "n_tokens": 1, **options})
