"""Tensor-train functions against numpy oracles that share no code with them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from chains import chain, dense, few, random_cores, random_matrix, seeds, splits, unfolding_singular_values
from hypothesis import given
from hypothesis import strategies as st

from mpo_core.layers.low_rank import LowRankLinear
from mpo_core.layers.monarch import MonarchLinear
from mpo_core.layers.pruned import PrunedLinear
from mpo_core.tensor_train.algebra import bonds_and_sizes, contract, rel_error, round_cores, tt_svd
from mpo_core.tensor_train.bonds import clip_bonds, largest_bonds


@few
@given(splits(max_sites=6, max_size=3), st.integers(1, 4), seeds)
def test_contract_matches_a_sum_over_bonds(split, chi, seed):
    cores = random_cores(clip_bonds(chi, *split), *split, seed)
    torch.testing.assert_close(contract(cores), torch.from_numpy(dense([core.numpy() for core in cores])))


def test_contract_takes_site_0_as_the_most_significant():
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    second = torch.tensor([[1.0, 10.0, 100.0]]).reshape(1, 1, 3, 1)
    expected = torch.tensor([[1.0, 10.0, 100.0, 2.0, 20.0, 200.0], [3.0, 30.0, 300.0, 4.0, 40.0, 400.0]])
    torch.testing.assert_close(contract([first, second]), expected)


@few
@given(splits(), st.integers(1, 3), seeds)
def test_contract_gradient_is_made_of_the_two_environments(split, chi, seed):
    """Eqs. 8 to 10 of the paper, with the environments built site by site."""
    d_out, d_in = split
    n_sites = len(d_out)
    cores = [core.requires_grad_() for core in random_cores(clip_bonds(chi, *split), *split, seed)]
    dW = random_matrix(d_out, d_in, seed + 1)
    gradients = torch.autograd.grad(contract(cores), cores, dW)

    arrays = [core.detach().numpy() for core in cores]
    interleave = [axis for site in range(n_sites) for axis in (site, n_sites + site)]
    dW_sites = dW.numpy().reshape(*d_out, *d_in).transpose(interleave)
    for site, gradient in enumerate(gradients):
        before, after = math.prod(d_out[:site]) * math.prod(d_in[:site]), d_out[site] * d_in[site]
        left = chain(arrays[:site])[0].reshape(before, -1)  # (sites before, bond)
        right = chain(arrays[site + 1 :])[..., 0].reshape(arrays[site].shape[3], -1)  # (bond, sites after)
        expected = np.einsum("xa,xsy,by->asb", left, dW_sites.reshape(before, after, -1), right)
        np.testing.assert_allclose(gradient.numpy(), expected.reshape(gradient.shape), rtol=1e-9, atol=1e-9)


@few
@given(splits(), seeds)
def test_tt_svd_is_exact_at_full_chi(split, seed):
    W = random_matrix(*split, seed)
    for chi in (None, max(largest_bonds(*split))):
        assert rel_error(W, contract(tt_svd(W, *split, chi))) < 1e-13


@few
@given(splits(), st.integers(1, 9), seeds)
def test_tt_svd_error_is_within_the_bounds_of_the_unfoldings(split, chi, seed):
    """At most Eq. 5, and at least what no decomposition with these bonds can beat (Eckart and Young)."""
    W = random_matrix(*split, seed)
    error = rel_error(W, contract(tt_svd(W, *split, chi))) ** 2
    norm = float(torch.linalg.norm(W)) ** 2
    discarded = [float(np.sum(s[chi:] ** 2)) / norm for s in unfolding_singular_values(W, *split)]
    assert max(discarded, default=0) - 1e-12 <= error <= sum(discarded) + 1e-12


@few
@given(splits(max_sites=3), seeds)
def test_tt_svd_error_never_rises_with_chi_up_to_three_sites(split, seed):
    W = random_matrix(*split, seed)
    errors = [rel_error(W, contract(tt_svd(W, *split, chi))) for chi in range(1, max(largest_bonds(*split)) + 1)]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(errors))


def test_tt_svd_error_can_rise_with_chi_at_four_sites():
    """Wider first bonds can lead the second truncation to directions that the third then loses.

    At χ = 1 the sweep keeps the first slice of site 0, and of it C, of rank one over the last two sites. At χ = 2 the
    second slice lifts D and E above C in the second unfolding; their spectra are flat, and the third bond keeps 2 of 8.
    """
    C, D, E = torch.zeros(3, 8, 8, dtype=torch.float64)
    C[0, 0] = 1
    for row in range(8):
        D[row, (row + 1) % 8] = E[row, (row + 2) % 8] = 8**-0.5
    zero = torch.zeros_like(C)
    W = torch.stack([C, 0.95 * D, 0.95 * E, zero, zero, zero, zero, zero, 0.9 * D, 0.9 * E]).reshape(-1, 1)
    narrow, wide = (rel_error(W, contract(tt_svd(W, [2, 5, 8, 8], [1, 1, 1, 1], chi))) for chi in (1, 2))
    assert wide > narrow + 0.01


@few
@given(splits(), st.integers(1, 9), seeds)
def test_tt_svd_leaves_all_cores_but_the_last_left_orthogonal(split, chi, seed):
    for core in tt_svd(random_matrix(*split, seed), *split, chi)[:-1]:
        M = core.reshape(-1, core.shape[3])
        torch.testing.assert_close(M.T @ M, torch.eye(M.shape[1], dtype=M.dtype))


@few
@given(splits(), st.integers(1, 3), seeds)
def test_tt_svd_finds_the_bonds_of_an_exact_chain(split, chi, seed):
    bonds = clip_bonds(chi, *split)
    W = contract([core.round() for core in random_cores(bonds, *split, seed)])  # integers: no rounding in W
    found = tt_svd(W, *split, None)
    assert all(core.shape[3] <= bond for core, bond in zip(found, bonds[1:], strict=True))
    assert rel_error(W, contract(found)) < 1e-12


@few
@given(splits(), st.integers(1, 9))
def test_tt_svd_bonds_at_a_cap_depend_on_sizes_alone(split, chi):
    d_out, d_in = split
    W = torch.zeros(math.prod(d_out), math.prod(d_in))
    capped, exact = tt_svd(W, *split, chi), tt_svd(W, *split, None)
    assert tuple(core.shape[0] for core in capped) == clip_bonds(chi, *split)[:-1]
    assert all(core.shape[0] == core.shape[3] == 1 for core in exact)
    assert torch.equal(contract(capped), W)
    assert torch.equal(contract(exact), W)


@few
@given(splits(), st.lists(st.integers(1, 9), min_size=3, max_size=3), seeds)
def test_tt_svd_takes_a_cap_for_each_bond(split, inner, seed):
    caps = (1, *inner[: len(split[0]) - 1], 1)
    cores = tt_svd(random_matrix(*split, seed), *split, bonds=caps)
    assert bonds_and_sizes(cores) == (clip_bonds(caps, *split), tuple(split[0]), tuple(split[1]))


@few
@given(splits(max_size=3), st.floats(0, 0.99), seeds)
def test_tt_svd_meets_its_error_target(split, target, seed):
    W = random_matrix(*split, seed)
    cores = tt_svd(W, *split, rel_error=target)
    assert rel_error(W, contract(cores)) <= target + 1e-13


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("target", [0.0, 0.02, 0.3])
def test_tt_svd_meets_its_error_target_to_rounding(dtype, rounding, target):
    W = random_matrix([4, 4, 3], [3, 4, 4], 0).to(dtype)
    cores = tt_svd(W, [4, 4, 3], [3, 4, 4], rel_error=target)
    assert rel_error(W, contract([core.double() for core in cores])) <= target + rounding


@few
@given(splits(max_size=3), st.floats(0.01, 0.99), seeds)
def test_tt_svd_keeps_no_more_than_its_error_target_needs(split, target, seed):
    """No bond is above that of Oseledets' equal budget: every cut may discard at least ε²‖W‖² / (L − 1)."""
    W = random_matrix(*split, seed)
    cores = tt_svd(W, *split, rel_error=target)
    n_cuts = len(cores) - 1
    for cut, s in enumerate(unfolding_singular_values(W, *split)):
        # An earlier cut never raises a singular value, so W's own unfolding needs at least as many.
        tails = np.cumsum(s[::-1] ** 2)[::-1] / np.sum(s**2)
        kept = cores[cut].shape[3]
        assert kept <= max(1, int(np.sum(tails > target**2 / n_cuts - 1e-12)))
        if cut == 0 and kept < len(s):
            assert tails[kept] <= target**2 / n_cuts + 1e-12


def test_tt_svd_spends_what_earlier_cuts_left():
    """A first site without correlation leaves the whole budget to the second cut, which can then discard more."""
    s = torch.tensor([1.0, 0.3, 0.3, 0.3], dtype=torch.float64)
    later = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    later.view(4, 4).diagonal().copy_(s)  # (o_1, i_1) beside (o_2, i_2)
    W = torch.kron(torch.ones(2, 2, dtype=torch.float64), later.permute(0, 2, 1, 3).reshape(4, 4))
    target = float(s[3] / torch.linalg.norm(s)) * 1.01  # one of the three small values, and not under an equal share
    assert target**2 / 2 < float(s[3] ** 2 / (s**2).sum())
    cores = tt_svd(W, [2, 2, 2], [2, 2, 2], rel_error=target)
    assert bonds_and_sizes(cores)[0] == (1, 1, 3, 1)


@few
@given(splits(), st.integers(1, 4), st.floats(0, 0.99), seeds)
def test_tt_svd_with_cap_and_target_obeys_the_cap_and_stops_early(split, chi, target, seed):
    W = random_matrix(*split, seed)
    cores = tt_svd(W, *split, chi, rel_error=target)
    bonds = bonds_and_sizes(cores)[0]
    assert all(bond <= cap for bond, cap in zip(bonds, clip_bonds(chi, *split), strict=True))
    free = bonds_and_sizes(tt_svd(W, *split, rel_error=target))[0]
    if max(free) <= chi:
        assert bonds == free


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rel_error": -0.1}, "`0 <= rel_error < 1` must hold, but got rel_error=-0.1"),
        ({"rel_error": 1.0}, "`0 <= rel_error < 1` must hold, but got rel_error=1.0"),
        ({"rel_error": math.nan}, "`0 <= rel_error < 1` must hold, but got rel_error=nan"),
        ({"chi": 2, "bonds": (1, 2, 1)}, r"one of `chi` and `bonds` caps the bonds, but got chi=2, bonds=\[1, 2, 1\]"),
    ],
)
def test_tt_svd_and_round_cores_say_what_they_take(arguments, message):
    with pytest.raises(ValueError, match=message):
        tt_svd(torch.ones(4, 4), [2, 2], [2, 2], **arguments)
    with pytest.raises(ValueError, match=message):
        round_cores([torch.ones(1, 2, 2, 3), torch.ones(3, 2, 2, 1)], **arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tt_svd_keeps_the_dtype(dtype):
    W = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    cores = tt_svd(W, [2, 3], [4, 2], None)
    assert {core.dtype for core in cores} == {dtype}
    assert rel_error(W, contract(cores)) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tt_svd_refuses_entries_that_are_not_finite(value):
    W = torch.zeros(4, 4)
    W[1, 2] = value
    with pytest.raises(ValueError, match="`W` must be finite to be decomposed, but 1 entries are not"):
        tt_svd(W, [2, 2], [2, 2], 2)


@pytest.mark.parametrize(
    ("W", "d_out", "d_in", "chi", "message"),
    [
        (
            torch.zeros(65, 64),
            [8, 8],
            [8, 8],
            2,
            r"`prod\(d_out\) == out_features` must hold, but got d_out=\[8, 8\], out_features=65",
        ),
        (
            torch.zeros(64, 65),
            [8, 8],
            [8, 8],
            2,
            r"`prod\(d_in\) == in_features` must hold, but got d_in=\[8, 8\], in_features=65",
        ),
        (torch.zeros(4, 4), [2, 2], [4], 2, r"one size of at least 1 per site, but got d_out=\[2, 2\], d_in=\[4\]"),
        (torch.zeros(0, 4), [0, 2], [2, 2], 2, r"one size of at least 1 per site, but got d_out=\[0, 2\]"),
        (torch.zeros(4, 4), [2, 2], [2, 2], 0, "`chi >= 1` must hold, but got chi=0"),
        (torch.zeros(4, 4, dtype=torch.int64), [2, 2], [2, 2], 2, "`W` must be one of"),
        (torch.zeros(4, 2, 2), [2, 2], [2, 2], 2, r"`W` must have two dimensions, but got shape \(4, 2, 2\)"),
    ],
)
def test_tt_svd_says_what_does_not_fit(W, d_out, d_in, chi, message):
    with pytest.raises(ValueError, match=message):
        tt_svd(W, d_out, d_in, chi)


def test_rel_error_is_defined_for_zero():
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    assert rel_error(zero, zero) == 0
    assert rel_error(zero, one) == math.inf
    assert rel_error(one, zero) == 1
    assert rel_error(one, 3 * one) == 2


def test_rel_error_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match=r"must have the same shape, but got \(2, 2\) and \(2,\)"):
        rel_error(torch.ones(2, 2), torch.ones(2))


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_errors_are_met_where_squares_over_or_underflow(scale):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(12, 12, generator=generator, dtype=torch.float64) ** 3
    cores, scaled = (tt_svd(M, [3, 4], [4, 3], rel_error=0.3) for M in (W, scale * W))
    assert [core.shape for core in scaled] == [core.shape for core in cores]
    assert cores[0].shape[3] < 12
    assert rel_error(scale * W, contract(scaled)) == pytest.approx(rel_error(W, contract(cores)), rel=1e-9)
    rounded, scaled = (round_cores(chain, rel_error=0.6) for chain in (cores, scaled))
    assert [core.shape for core in scaled] == [core.shape for core in rounded]
    for kind in (LowRankLinear, MonarchLinear, PrunedLinear):
        sizes = [kind.from_matrix(M, rel_error=0.3).n_params_matrix for M in (W, scale * W)]
        assert sizes[0] == sizes[1]
