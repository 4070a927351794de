"""Gauge, rounding, norms and inner products of chains whose matrix is never formed, against the formed one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from chains import dense, few, random_cores, seeds, splits, unfolding_singular_values
from hypothesis import given
from hypothesis import strategies as st

from mpo_core.tensor_train.algebra import (
    balance_cores,
    bonds_and_sizes,
    contract,
    frobenius_norm,
    inner_product,
    orthogonalize,
    rel_error,
    round_cores,
    tt_svd,
)
from mpo_core.tensor_train.bonds import clip_bonds


@st.composite
def chains(draw, max_sites=4, max_size=3, max_bond=6):
    """Cores with any bonds, beyond the reach of their neighbours too."""
    d_out, d_in = draw(splits(max_sites, max_size))
    inner = draw(st.lists(st.integers(1, max_bond), min_size=len(d_out) - 1, max_size=len(d_out) - 1))
    return random_cores((1, *inner, 1), d_out, d_in, draw(seeds))


def matrix(cores):
    return torch.from_numpy(dense([core.numpy() for core in cores]))


def assert_left_orthogonal(core):
    M = core.reshape(-1, core.shape[3])
    torch.testing.assert_close(M.T @ M, torch.eye(M.shape[1], dtype=M.dtype))


def assert_right_orthogonal(core):
    M = core.reshape(core.shape[0], -1)
    torch.testing.assert_close(M @ M.T, torch.eye(M.shape[0], dtype=M.dtype))


@few
@given(chains(), st.data())
def test_orthogonalize_to_any_site_keeps_the_matrix(cores, data):
    site = data.draw(st.integers(0, len(cores) - 1))
    moved = orthogonalize(cores, site)
    torch.testing.assert_close(matrix(moved), matrix(cores))
    for core in moved[:site]:
        assert_left_orthogonal(core)
    for core in moved[site + 1 :]:
        assert_right_orthogonal(core)
    torch.testing.assert_close(torch.linalg.norm(moved[site]), torch.linalg.norm(matrix(cores)))
    assert all(core.is_contiguous() for core in moved)


@pytest.mark.parametrize("site", [0, 1, 2])
def test_orthogonalize_passes_gradients_of_the_matrix_through(site):
    """Whatever the gauge, dL/dcores of a function of W alone is the same."""
    cores = [core.requires_grad_() for core in random_cores((1, 2, 3, 1), [2, 3, 2], [2, 2, 3], 0)]
    dW = torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(contract(cores), cores, dW)
    actual = torch.autograd.grad(contract(orthogonalize(cores, site)), cores, dW)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("site", [-1, 2])
def test_orthogonalize_refuses_a_site_that_is_not_there(site):
    with pytest.raises(ValueError, match=rf"`0 <= site < 2` must hold, but got site={site}"):
        orthogonalize(random_cores((1, 2, 1), [2, 2], [2, 2], 0), site)


@few
@given(chains())
def test_round_cores_without_a_cap_is_exact_with_the_ranks_of_the_unfoldings(cores):
    _, d_out, d_in = bonds_and_sizes(cores)
    W = matrix(cores)
    rounded = round_cores(cores)
    torch.testing.assert_close(matrix(rounded), W)
    ranks = [int(np.sum(s > 1e-9 * s[0])) for s in unfolding_singular_values(W, d_out, d_in)]
    assert bonds_and_sizes(rounded) == ((1, *ranks, 1), d_out, d_in)


@few
@given(chains(), st.integers(1, 6))
def test_round_cores_at_a_cap_is_the_tt_svd_of_the_matrix(cores, chi):
    """Not to the last digit in a cut through equal singular values, which random cores do not have."""
    bonds, d_out, d_in = bonds_and_sizes(cores)
    W = matrix(cores)
    rounded = round_cores(cores, chi)
    expected = tt_svd(W, d_out, d_in, chi)
    torch.testing.assert_close(matrix(rounded), matrix(expected), rtol=1e-6, atol=1e-8 * float(W.abs().max()))
    caps = [min(bond, chi) for bond in bonds]
    assert bonds_and_sizes(rounded)[0] == clip_bonds(caps, d_out, d_in)
    for core in rounded[:-1]:
        assert_left_orthogonal(core)


@few
@given(chains(), st.floats(0, 0.99), st.one_of(st.none(), st.integers(1, 6)))
def test_round_cores_meets_its_error_target_unless_the_cap_binds(cores, target, chi):
    W = matrix(cores)
    rounded = round_cores(cores, chi, rel_error=target)
    bonds = bonds_and_sizes(rounded)[0]
    assert max(bonds) <= (chi or math.inf)
    if chi is None or max(bonds) < chi:
        assert rel_error(W, matrix(rounded)) <= target + 1e-12


def test_round_cores_never_forms_the_matrix():
    """Of 2^40 × 2^40 entries, with bonds doubled as the sum of a chain with itself doubles them."""
    cores = [core / 4 for core in random_cores((1, 3, 3, 3, 1), [2**10] * 4, [2**2] * 4, 0)]
    ends = [torch.cat([cores[0], cores[0]], dim=3), torch.cat([cores[-1], cores[-1]], dim=0)]
    inner = []
    for core in cores[1:-1]:
        block = torch.zeros(6, *core.shape[1:3], 6, dtype=core.dtype)
        block[:3, ..., :3] = block[3:, ..., 3:] = core
        inner.append(block)
    doubled = [ends[0], *inner, ends[1]]
    rounded = round_cores(doubled)
    assert bonds_and_sizes(rounded)[0] == (1, 3, 3, 3, 1)
    norm = float(frobenius_norm(cores))
    assert float(frobenius_norm(doubled)) == pytest.approx(2 * norm)
    assert float(inner_product(rounded, cores)) == pytest.approx(2 * norm**2)
    assert float(frobenius_norm(rounded)) == pytest.approx(2 * norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gauge_functions_keep_the_dtype(dtype):
    cores = [core.to(dtype) for core in random_cores((1, 3, 3, 1), [3, 2, 3], [2, 4, 2], 0)]
    tolerance = 16 * torch.finfo(dtype).eps
    for changed in (orthogonalize(cores, 1), round_cores(cores), balance_cores(cores)):
        assert {core.dtype for core in changed} == {dtype}
        assert rel_error(contract([core.double() for core in cores]), contract(changed)) < tolerance


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gauge_functions_refuse_entries_that_are_not_finite(value):
    cores = random_cores((1, 2, 1), [2, 2], [2, 2], 0)
    cores[1][0, 1, 0, 0] = value
    for function in (round_cores, lambda cores: orthogonalize(cores, 0)):
        with pytest.raises(ValueError, match="`cores` must be finite, but core 1 is not"):
            function(cores)


@few
@given(chains(), seeds, st.integers(1, 4))
def test_inner_product_and_norm_match_the_matrices(cores, seed, bond):
    _, d_out, d_in = bonds_and_sizes(cores)
    other = random_cores((1, *[bond] * (len(d_out) - 1), 1), d_out, d_in, seed)
    A, B = matrix(cores), matrix(other)
    scale = torch.linalg.norm(A) * torch.linalg.norm(B)
    torch.testing.assert_close(inner_product(cores, other) / scale, (A * B).sum() / scale)
    torch.testing.assert_close(frobenius_norm(cores), torch.linalg.norm(A))


def test_inner_product_and_norm_have_the_gradients_of_the_matrices():
    cores, other = (
        [core.requires_grad_() for core in random_cores((1, 3, 2, 1), [2, 3, 2], [3, 1, 2], seed)] for seed in (0, 1)
    )
    A, B = contract(cores), contract(other)
    for ours, oracle in ((inner_product(cores, other), (A * B).sum()), (frobenius_norm(cores), torch.linalg.norm(A))):
        expected = torch.autograd.grad(oracle, cores, retain_graph=True)
        for one, two in zip(torch.autograd.grad(ours, cores), expected, strict=True):
            torch.testing.assert_close(one, two)


def test_frobenius_norm_of_zero_has_gradient_zero():
    cores = [torch.zeros(1, 2, 2, 2, requires_grad=True), torch.ones(2, 2, 2, 1, requires_grad=True)]
    norm = frobenius_norm(cores)
    torch.testing.assert_close(norm, torch.zeros((), dtype=torch.float64), rtol=0, atol=0)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in torch.autograd.grad(norm, cores))


def test_frobenius_norm_of_float32_cores_does_not_overflow():
    cores = [torch.full((1, 2, 2, 1), 1e30), torch.full((1, 2, 2, 1), 1e30)]
    assert float(frobenius_norm(cores)) == pytest.approx(4e60)


def test_inner_product_refuses_sizes_that_differ():
    with pytest.raises(ValueError, match=r"both must have the same \[d_out, d_in\], but got"):
        inner_product([torch.ones(1, 2, 3, 1)], [torch.ones(1, 3, 2, 1)])


@few
@given(chains(), st.lists(st.floats(-6, 6), min_size=4, max_size=4))
def test_balance_cores_evens_the_norms_and_keeps_the_matrix(cores, exponents):
    cores = [core * 10**exponent for core, exponent in zip(cores, exponents, strict=False)]
    balanced = balance_cores(cores)
    norms = torch.stack([torch.linalg.norm(core) for core in balanced])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    W = matrix(cores)
    assert rel_error(W, matrix(balanced)) < 1e-12


def test_balance_cores_passes_gradients_of_the_matrix_through():
    cores = [core.requires_grad_() for core in random_cores((1, 2, 3, 1), [2, 3, 2], [2, 2, 3], 0)]
    dW = torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(contract(cores), cores, dW)
    for one, other in zip(torch.autograd.grad(contract(balance_cores(cores)), cores, dW), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_zero_core_stays_as_it_is():
    cores = [torch.zeros(1, 2, 2, 2), torch.full((2, 2, 2, 1), 3.0)]
    for changed in (balance_cores(cores), orthogonalize(cores, 0), round_cores(cores), round_cores(cores, 2)):
        assert torch.equal(contract(changed), torch.zeros(4, 4))
    for core, balanced in zip(cores, balance_cores(cores), strict=True):
        assert torch.equal(core, balanced)
    assert bonds_and_sizes(round_cores(cores))[0] == (1, 1, 1)
    assert bonds_and_sizes(round_cores(cores, 2))[0] == (1, 2, 1)


def test_norm_inner_product_and_balance_work_under_vmap():
    chains = [random_cores((1, 3, 2, 1), [2, 3, 2], [3, 1, 2], seed) for seed in range(4)]
    stacked = [torch.stack(cores) for cores in zip(*chains, strict=True)]
    norms, products = torch.vmap(lambda *cores: (frobenius_norm(cores), inner_product(cores, cores)))(*stacked)
    balanced = torch.vmap(lambda *cores: tuple(balance_cores(cores)))(*stacked)
    for index, cores in enumerate(chains):
        torch.testing.assert_close(norms[index], frobenius_norm(cores))
        torch.testing.assert_close(products[index], inner_product(cores, cores))
        for many, one in zip(balanced, balance_cores(cores), strict=True):
            torch.testing.assert_close(many[index], one)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], r"at least one tensor of four dimensions each, but got shapes \[\]"),
        ([(2, 2)], r"at least one tensor of four dimensions each, but got shapes \[\(2, 2\)\]"),
        ([(1, 2, 2, 3), (2, 2, 2, 1)], "must have equal bonds between neighbours and 1 at the ends"),
        ([(2, 2, 2, 1)], "must have equal bonds between neighbours and 1 at the ends"),
        ([(1, 2, 2, 2)], "must have equal bonds between neighbours and 1 at the ends"),
    ],
)
def test_functions_of_cores_refuse_what_is_no_chain(shapes, message):
    cores = [torch.ones(shape) for shape in shapes]
    for function in (contract, round_cores, balance_cores, frobenius_norm, lambda cores: orthogonalize(cores, 0)):
        with pytest.raises(ValueError, match=message):
            function(cores)
