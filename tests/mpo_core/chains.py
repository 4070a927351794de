"""Random chains of cores, and numpy oracles for them that share no code with mpo_core."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

few = settings(max_examples=60, deadline=None)


@st.composite
def splits(draw, max_sites=4, max_size=4):
    """(d_out, d_in) over 1 to max_sites sites, sizes of 1 among them."""
    n_sites = draw(st.integers(1, max_sites))
    sizes = st.lists(st.integers(1, max_size), min_size=n_sites, max_size=n_sites)
    return draw(sizes), draw(sizes)


seeds = st.integers(0, 2**32 - 1)


def random_matrix(d_out, d_in, seed):
    """Entries of a heavy-tailed distribution, so that singular values differ."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(math.prod(d_out), math.prod(d_in), generator=generator, dtype=torch.float64) ** 3


def random_cores(bonds, d_out, d_in, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = zip(bonds[:-1], d_out, d_in, bonds[1:], strict=True)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def chain(cores):
    """Sites as one array (bond, o_0, i_0, o_1, i_1, ..., bond) by a sum over each bond in turn; no sites: (1, 1)."""
    block = np.eye(cores[0].shape[0] if cores else 1)
    for core in cores:
        block = np.tensordot(block, core, axes=(-1, 0))
    return block


def dense(cores):
    block = chain(cores)[0, ..., 0]
    n_sites = len(cores)
    rows, columns = block.shape[0::2], block.shape[1::2]
    return block.transpose(*range(0, 2 * n_sites, 2), *range(1, 2 * n_sites, 2)).reshape(
        math.prod(rows), math.prod(columns)
    )


def unfolding_singular_values(W, d_out, d_in):
    """Singular values of W's own unfolding at each inner bond."""
    n_sites = len(d_out)
    tensor = W.numpy().reshape(*d_out, *d_in)
    values = []
    for site in range(1, n_sites):
        left = [*range(site), *range(n_sites, n_sites + site)]
        right = [axis for axis in range(2 * n_sites) if axis not in left]
        rows = math.prod(tensor.shape[axis] for axis in left)
        values.append(np.linalg.svd(tensor.transpose(left + right).reshape(rows, -1), compute_uv=False))
    return values
