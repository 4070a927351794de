"""Ways to fill the cores of an MPO, in place, never from the global generator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mpo_core.tensor_train import tt_svd

INITS = ("paper", "variance", "tt_svd")


def paper_std(in_features: int, chi: int, n_sites: int) -> float:
    """Standard deviation of every core entry in the paper's init (section 3.3), with χ as asked for, not clipped.

    Var(W) is then χ^(L-1) σ^(2L) = in_features^(-L/2) for unclipped bonds: 1 / in_features for L = 2 alone.
    """
    return in_features ** (-1 / 4) * chi ** (-(n_sites - 1) / (2 * n_sites))


def variance_std(in_features: int, bonds: Sequence[int]) -> float:
    """Standard deviation of every core entry with which Var(W) = 1 / in_features, for any L and any bonds.

    An entry of W is a sum of prod(bonds) uncorrelated terms, each a product of L independent entries.
    """
    n_sites = len(bonds) - 1
    return (in_features * math.prod(bonds)) ** (-1 / (2 * n_sites))


@torch.no_grad()
def normal_(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with normal numbers of mean 0, drawn on the generator's device, so that a GPU gets the CPU's numbers."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=dtype, device=generator.device) * std)


def normal_cores_(cores: Iterable[Tensor], std: float, generators: Iterable[torch.Generator]) -> None:
    """Fill every core with normal numbers, each from the generator at its place."""
    for core, generator in zip(cores, generators, strict=True):
        normal_(core, std, generator)


@torch.no_grad()
def tt_svd_cores_(cores: Sequence[Tensor], W: Tensor, chi: int) -> None:
    """Fill the cores with the TT-SVD of W (out_features, in_features); their bonds must be those of the cap chi."""
    d_out, d_in = [core.shape[1] for core in cores], [core.shape[2] for core in cores]
    for core, value in zip(cores, tt_svd(W, d_out, d_in, chi), strict=True):
        core.copy_(value)
