"""Bonds within reach, numbers of parameters, the order of merging."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from chains import few, seeds, splits, unfolding_singular_values
from hypothesis import given
from hypothesis import strategies as st

from mpo_core.tensor_train.bonds import check_sizes, clip_bonds, contraction_order, largest_bonds, largest_chi, n_params


@few
@given(splits(), seeds)
def test_largest_bonds_are_the_ranks_of_a_generic_matrix(split, seed):
    W = torch.randn(
        math.prod(split[0]), math.prod(split[1]), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    ranks = [int(np.sum(s > 1e-9 * s[0])) for s in unfolding_singular_values(W, *split)]
    assert largest_bonds(*split) == (1, *ranks, 1)


@pytest.mark.parametrize(
    ("d_out", "d_in", "chi", "bonds", "expected"),
    [
        ([8, 16], [8, 16], 8, (1, 8, 1), 2560),
        ([8, 8, 8], [4, 4, 8], 8, (1, 8, 8, 1), 2816),
        ([8, 8, 8], [4, 4, 8], 64, (1, 32, 64, 1), 32 * 32 + 32 * 32 * 64 + 64 * 64),
        ([5, 13], [8, 16], 64, (1, 40, 1), 40 * 40 + 40 * 208),
        ([7], [3], 4, (1, 1), 21),
    ],
)
def test_n_params_counts_the_entries_of_clipped_cores(d_out, d_in, chi, bonds, expected):
    assert clip_bonds(chi, d_out, d_in) == bonds
    assert n_params(bonds, d_out, d_in) == expected


@few
@given(splits(max_sites=6, max_size=5), st.integers(1, 20))
def test_contraction_order_is_the_cheapest_of_all(split, chi):
    bonds = clip_bonds(chi, *split)
    sizes = [out * in_ for out, in_ in zip(*split, strict=True)]

    def costs(first, last):
        """The cost of every full parenthesisation of sites [first, last)."""
        if last - first == 1:
            return [0]
        volume = bonds[first] * math.prod(sizes[first:last]) * bonds[last]
        return [
            left + right + volume * bonds[middle]
            for middle in range(first + 1, last)
            for left in costs(first, middle)
            for right in costs(middle, last)
        ]

    assert contraction_order(bonds, *split)[1] == min(costs(0, len(sizes)))


def test_check_sizes_refuses_no_sites():
    with pytest.raises(ValueError, match=r"one size of at least 1 per site, but got d_out=\[\], d_in=\[\]"):
        check_sizes(1, 1, [], [])


@st.composite
def capped_splits(draw):
    """A split, and a cap for each of its bonds."""
    d_out, d_in = draw(splits(max_sites=4, max_size=3))
    return d_out, d_in, (1, *draw(st.lists(st.integers(1, 9), min_size=len(d_out) - 1, max_size=len(d_out) - 1)), 1)


@few
@given(capped_splits())
def test_clip_bonds_gives_the_largest_within_caps_and_reach(capped):
    """Against trying all: the answer is reachable, below the caps, and at least any other that is, bond by bond."""
    d_out, d_in, caps = capped
    sizes = [out * in_ for out, in_ in zip(d_out, d_in, strict=True)]

    def within_reach(bonds):
        return all(
            bonds[site + 1] <= bonds[site] * size and bonds[site] <= size * bonds[site + 1]
            for site, size in enumerate(sizes)
        )

    reachable = [bonds for bonds in product(*[range(1, cap + 1) for cap in caps]) if within_reach(bonds)]
    clipped = clip_bonds(caps, d_out, d_in)
    assert clipped in reachable
    assert all(clipped[site] >= bonds[site] for bonds in reachable for site in range(len(caps)))


@few
@given(splits(), st.integers(1, 30))
def test_clip_bonds_of_one_cap_is_that_cap_everywhere(split, chi):
    assert clip_bonds(chi, *split) == clip_bonds((1, *[chi] * (len(split[0]) - 1), 1), *split)
    assert clip_bonds(chi, *split) == tuple(min(chi, bond) for bond in largest_bonds(*split))
    assert clip_bonds(None, *split) == largest_bonds(*split)


@pytest.mark.parametrize("caps", [(1, 3), (1, 3, 3, 1), (1, 0, 1), (2, 3, 1), (1, 3, 2)])
def test_clip_bonds_refuses_caps_that_do_not_fit(caps):
    with pytest.raises(ValueError, match=r"`bonds` must be 1, then a cap of at least 1 between any two of the 2 sites"):
        clip_bonds(caps, [4, 4], [4, 4])


def test_n_params_refuses_bonds_of_other_sites():
    with pytest.raises(ValueError, match=r"`len\(bonds\) == 3` must hold for 2 sites, but got \[1, 1\]"):
        n_params((1, 1), [2, 2], [2, 2])


@few
@given(splits(), st.integers(1, 400))
def test_largest_chi_fits_and_the_next_does_not(split, max_params):
    def count(chi):
        return n_params(clip_bonds(chi, *split), *split)

    if count(1) > max_params:
        with pytest.raises(ValueError, match=rf"`max_params >= {count(1)}` must hold"):
            largest_chi(max_params, *split)
        return
    chi, useful = largest_chi(max_params, *split), max(largest_bonds(*split))
    assert 1 <= chi <= useful
    assert count(chi) <= max_params
    assert chi == useful or count(chi + 1) > max_params
