"""The integers of a tensor-train matrix: bonds within reach, numbers of parameters, the cheapest order of merging."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from numbers import Integral, Real


def largest_bonds(d_out: Sequence[int], d_in: Sequence[int]) -> tuple[int, ...]:
    """The largest useful bonds (1, ..., 1): each is the largest possible rank of its unfolding.

    Raises:
        ValueError: d_out and d_in differ in length, are empty, or contain a size below 1.
    """
    sizes = site_sizes(d_out, d_in)
    return tuple(min(math.prod(sizes[:site]), math.prod(sizes[site:])) for site in range(len(sizes) + 1))


def clip_bonds(chi_or_bonds: int | Sequence[int] | None, d_out: Sequence[int], d_in: Sequence[int]) -> tuple[int, ...]:
    """Return the bonds (1, χ_1, ..., χ_{L-1}, 1) under a cap, each within reach of its two neighbours.

    Args:
        chi_or_bonds: one cap for all bonds; a sequence (1, χ_1, ..., χ_{L-1}, 1) of one cap for each; or None for no
            cap. Within reach means bonds[l+1] <= bonds[l] · d_out[l] · d_in[l], and likewise from the right.
    Raises:
        ValueError: a cap below 1, a number of caps other than L + 1, caps other than 1 at the two ends, or the sizes
            are refused by `largest_bonds`.
    """
    largest = largest_bonds(d_out, d_in)
    if chi_or_bonds is None:
        return largest
    if not isinstance(chi_or_bonds, str) and isinstance(chi_or_bonds, Sequence):
        caps = list(chi_or_bonds)
        check_whole(**{f"bonds[{place}]": cap for place, cap in enumerate(caps)})
        if len(caps) != len(largest) or min(caps) < 1 or caps[0] != 1 or caps[-1] != 1:
            raise ValueError(
                f"`bonds` must be 1, then a cap of at least 1 between any two of the {len(d_out)} sites, then 1, "
                f"but got bonds={caps}"
            )
    else:
        check_whole(chi=chi_or_bonds)
        if int(chi_or_bonds) < 1:
            raise ValueError(f"`chi >= 1` must hold, but got chi={chi_or_bonds}")
        caps = [int(chi_or_bonds)] * len(largest)
    bonds = [min(int(cap), bond) for cap, bond in zip(caps, largest, strict=True)]
    sizes = site_sizes(d_out, d_in)
    for site, size in enumerate(sizes):
        bonds[site + 1] = min(bonds[site + 1], bonds[site] * size)
    for site, size in reversed(list(enumerate(sizes))):
        bonds[site] = min(bonds[site], size * bonds[site + 1])
    return tuple(bonds)


def n_params(bonds: Sequence[int], d_out: Sequence[int], d_in: Sequence[int]) -> int:
    """Number of entries of all cores (paper, Eq. 3).

    Raises:
        ValueError: the number of bonds is not L + 1, or the sizes are refused by `largest_bonds`.
    """
    sizes = site_sizes(d_out, d_in)
    if len(bonds) != len(sizes) + 1:
        raise ValueError(f"`len(bonds) == {len(sizes) + 1}` must hold for {len(sizes)} sites, but got {list(bonds)}")
    return sum(bonds[site] * size * bonds[site + 1] for site, size in enumerate(sizes))


def largest_chi(max_params: int, d_out: Sequence[int], d_in: Sequence[int]) -> int:
    """The largest cap, up to the largest useful one, whose cores have at most `max_params` entries.

    Raises:
        ValueError: not even chi = 1 fits, or the sizes are refused by `largest_bonds`.
    """
    check_whole(max_params=max_params)
    at_least = n_params(clip_bonds(1, d_out, d_in), d_out, d_in)
    if at_least > max_params:
        raise ValueError(
            f"`max_params >= {at_least}` must hold for d_out={list(d_out)}, d_in={list(d_in)}, "
            f"which have that many at chi=1, but got max_params={max_params}"
        )
    fits = range(1, max(largest_bonds(d_out, d_in)) + 1)
    return bisect_right(fits, max_params, key=lambda chi: n_params(clip_bonds(chi, d_out, d_in), d_out, d_in))


def contraction_order(
    bonds: Sequence[int], d_out: Sequence[int], d_in: Sequence[int]
) -> tuple[dict[tuple[int, int], int], int]:
    """The order of pairwise merges of neighbours with the fewest multiply-adds: the matrix-chain problem.

    Returns:
        split: sites [first, last) are best merged from [first, split) and [split, last).
        cost: multiply-adds of all merges together.
    """
    n_sites, sizes = len(d_out), site_sizes(d_out, d_in)
    split: dict[tuple[int, int], int] = {}
    cost = {(site, site + 1): 0 for site in range(n_sites)}
    for width in range(2, n_sites + 1):
        for first in range(n_sites - width + 1):
            last = first + width
            volume = bonds[first] * math.prod(sizes[first:last]) * bonds[last]
            for middle in range(first + 1, last):
                total = cost[first, middle] + cost[middle, last] + volume * bonds[middle]
                if (first, last) not in split or total < cost[first, last]:
                    cost[first, last], split[first, last] = total, middle
    return split, cost[0, n_sites]


def check_sizes(out_features: int, in_features: int, d_out: Sequence[int], d_in: Sequence[int]) -> None:
    """Raise ValueError unless d_out and d_in split out_features and in_features over the same number of sites."""
    site_sizes(d_out, d_in)
    for name, sizes, features_name, features in (
        ("d_out", d_out, "out_features", out_features),
        ("d_in", d_in, "in_features", in_features),
    ):
        if math.prod(sizes) != features:
            raise ValueError(
                f"`prod({name}) == {features_name}` must hold, but got {name}={list(sizes)}, {features_name}={features}"
            )


def given_sizes(
    out_features: int,
    in_features: int,
    d_out: Sequence[int] | None,
    d_in: Sequence[int] | None,
    n_sites: int | None,
    padding: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the given d_out and d_in; with `padding` they may exceed the features.

    Raises:
        ValueError: one of the two is missing, or they do not split the features over n_sites (None: any number).
    """
    if d_out is None or d_in is None:
        raise ValueError(f"`d_out` and `d_in` must be given together, but got d_out={d_out}, d_in={d_in}")
    if not padding or math.prod(d_out) < out_features or math.prod(d_in) < in_features:
        check_sizes(out_features, in_features, d_out, d_in)
    if n_sites not in (None, len(d_out)):
        raise ValueError(f"`n_sites == len(d_out)` must hold, but got n_sites={n_sites}, d_out={list(d_out)}")
    site_sizes(d_out, d_in)
    return tuple(map(int, d_out)), tuple(map(int, d_in))


def check_whole(**numbers: object) -> None:
    """Raise ValueError unless these are whole numbers of Python or numpy; True and False do not count."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise ValueError(f"`{name}` must be a whole number, but got {number!r}")


def check_fraction(**numbers: object) -> None:
    """Raise ValueError unless these are numbers in [0, 1)."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Real):
            raise ValueError(f"`{name}` must be a number, but got {number!r}")
        if not 0 <= float(number) < 1:
            raise ValueError(f"`0 <= {name} < 1` must hold, but got {name}={number}")


def site_sizes(d_out: Sequence[int], d_in: Sequence[int]) -> list[int]:
    """Return d_out[l] · d_in[l] of every site; ValueError unless both have one size of at least 1 per site."""
    for name, sizes in (("d_out", d_out), ("d_in", d_in)):
        if not all(type(size) is int for size in sizes):
            check_whole(**{f"{name}[{site}]": size for site, size in enumerate(sizes)})
    if len(d_out) != len(d_in) or not d_out or min(*d_out, *d_in) < 1:
        raise ValueError(
            "`d_out` and `d_in` must hold one size of at least 1 per site, "
            f"but got d_out={list(d_out)}, d_in={list(d_in)}"
        )
    return [int(out) * int(in_) for out, in_ in zip(d_out, d_in, strict=True)]
