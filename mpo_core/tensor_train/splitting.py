"""How a matrix splits over the sites of a chain at each cap χ, and how many parameters the chain then has."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mpo_core.tensor_train.bonds import clip_bonds, given_sizes, largest_bonds, n_params
from mpo_core.tensor_train.factorisation import factorise
from mpo_core.tensor_train.gauge import n_fixed

Sizes = tuple[int, ...]
Split = Callable[[int], tuple[Sizes, Sizes]]
"""Function from the cap χ to (d_out, d_in)."""


@dataclass(frozen=True)
class Shape:
    """The shape of a chain."""

    d_out: Sizes
    d_in: Sizes
    bonds: Sizes
    n_params: int

    @classmethod
    def at(cls, chi: int, split: Split, gauge: str = "free") -> Shape:
        """The chain with every bond at most chi, in this gauge."""
        d_out, d_in = split(chi)
        bonds = clip_bonds(chi, d_out, d_in)
        saved = n_fixed(bonds) if gauge == "fixed" else 0
        return cls(d_out, d_in, bonds, n_params(bonds, d_out, d_in) - saved)


def splitter(
    out_features: int,
    in_features: int,
    *,
    d_out: Sequence[int] | None = None,
    d_in: Sequence[int] | None = None,
    n_sites: int | None = None,
    factorisation: str = "balanced",
    padding: bool = False,
) -> Split:
    """The split of a matrix: the sizes that are given, or those that `factorise` chooses for each χ."""

    def split(chi: int) -> tuple[Sizes, Sizes]:
        if d_out is None and d_in is None:
            return factorise(out_features, in_features, method=factorisation, n_sites=n_sites, chi=chi, padding=padding)
        return given_sizes(out_features, in_features, d_out, d_in, n_sites, padding)

    return split


def splits_to_try(out_features: int, in_features: int) -> list[tuple[Sizes, Sizes]]:
    """Splits over two sites that make a matrix squarer, for a choice by errors: the longer side is cut in two.

    A cut of the inputs gives two blocks of W with one row space, a cut of the outputs two with one column space. The
    halves are contiguous or interleaved. Without a cut it would be low rank. The other side is whole in one site, so
    its part of a metric is met exactly, and fits take few steps. Other splits, balanced ones among them, had larger
    errors at equal parameters on the matrices of a trained LLaMA.
    """
    m, n = out_features, in_features
    splits: list[tuple[Sizes, Sizes]] = []
    if n >= m and n % 2 == 0:
        splits += [((m, 1), (2, n // 2)), ((1, m), (n // 2, 2))]
    if m >= n and m % 2 == 0:
        splits += [((2, m // 2), (n, 1)), ((m // 2, 2), (1, n))]
    return splits


def smaller_shapes(n_dense: int, split: Split, gauge: str = "free") -> Iterator[Shape]:
    """The chains of χ = 1, 2, … up to the last with fewer than n_dense parameters, or the last useful χ."""
    chi = 1
    shape = Shape.at(chi, split, gauge)
    while shape.n_params < n_dense and max(shape.bonds) == chi:
        yield shape
        chi += 1
        shape = Shape.at(chi, split, gauge)


def chi_within(max_params: int, split: Split, limit: int, gauge: str = "free") -> int:
    """The largest useful χ up to `limit` with at most max_params parameters; the split may depend on χ.

    Raises:
        ValueError: χ = 1 has more.
    """
    smallest = Shape.at(1, split, gauge)
    if smallest.n_params > max_params:
        raise ValueError(
            f"chi=1 needs {smallest.n_params} parameters with d_out={list(smallest.d_out)}, "
            f"d_in={list(smallest.d_in)}, but got max_params={max_params}"
        )
    chi = bisect_right(range(1, limit + 1), max_params, key=lambda chi: Shape.at(chi, split, gauge).n_params)
    useful = min(chi, max(largest_bonds(*split(chi))))
    return useful if split(useful) == split(chi) else chi
