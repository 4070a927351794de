"""How out_features and in_features split into local sizes d_out[l], d_in[l], one pair per site."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import permutations

from mpo_core.tensor_train.bonds import check_sizes, check_whole, clip_bonds, largest_chi, n_params

FACTORISATIONS = ("paper", "balanced", "min_params")

MAX_SITES = 6

PAPER_FACTORISATIONS = {
    (128, 128): ((8, 16), (8, 16)),
    (512, 128): ((8, 8, 8), (4, 4, 8)),
    (128, 512): ((4, 4, 8), (8, 8, 8)),
    (65, 128): ((5, 13), (8, 16)),
}
"""(out_features, in_features) -> (d_out, d_in): Table 2 of the paper."""

Sizes = tuple[int, ...]


def factorise(
    out_features: int,
    in_features: int,
    *,
    method: str = "balanced",
    n_sites: int | None = None,
    chi: int | None = None,
    padding: bool = False,
) -> tuple[Sizes, Sizes]:
    """Split the two sizes of a matrix over sites.

    Args:
        method: "balanced": d_out and d_in are each as equal as possible (smallest sum). d_out is ascending; d_in has
            the order that needs the fewest parameters beside it for large χ without clipped bonds. A site has size 1 if
            primes leave no choice. Another order of d_out, or clipping, can need fewer parameters.
            "min_params": the fewest parameters at the cap `chi`, clipping included, over all ordered splits of both
            sizes. Ties: the most balanced split (smallest sum of all sizes), then the first in order. A 1×1 site at an
            end means that fewer sites do better. If chi compresses nothing, one site is the whole matrix.
            "paper": the paper's Table 2 for its four shapes, "balanced" for any other shape.
        n_sites: L, from 1 to 6. Default: the table's for the paper's four shapes, 2 otherwise.
        chi: the cap on every bond; "min_params" needs it. With padding, "balanced" compares parameters at this cap, or
            for large χ if there is no cap.
        padding: allow prod(d_out) and prod(d_in) above the sizes if that needs fewer parameters. The method is tried on
            each size and on the four smoothest (without large prime factors) above it, up to `max_padding`. Ties: the
            smallest matrix. The paper's table stays as it is.
    Returns:
        (d_out, d_in), each of length L.
    Raises:
        ValueError: a size below 1, an unknown method, L outside 1 to 6, chi below 1 or missing for "min_params", or
            method "paper" with an L that is not the table's.
    """
    _check(out_features, in_features, n_sites)
    if method not in FACTORISATIONS:
        raise ValueError(f"`factorisation` must be one of {', '.join(FACTORISATIONS)}, but got {method!r}")
    if chi is not None:
        check_whole(chi=chi)
    if chi is not None and chi < 1:
        raise ValueError(f"`chi >= 1` must hold, but got chi={chi}")

    if method == "paper" and (out_features, in_features) in PAPER_FACTORISATIONS:
        d_out, d_in = PAPER_FACTORISATIONS[out_features, in_features]
        if n_sites not in (None, len(d_out)):
            raise ValueError(
                f"the paper splits {out_features}×{in_features} over n_sites={len(d_out)}, but got n_sites={n_sites}; "
                "use factorisation='balanced' to choose"
            )
        return d_out, d_in
    n_sites = 2 if n_sites is None else n_sites
    if method == "min_params" and chi is None:
        raise ValueError("factorisation='min_params' needs the `chi` at which to count parameters, but got None")
    if padding:
        return _padded(out_features, in_features, method, n_sites, chi)
    if method != "min_params" or chi is None:
        return _balanced(out_features, in_features, n_sites)
    return _min_params(out_features, in_features, n_sites, chi)


def max_padding(n: int) -> int:
    """The most by which a size may be padded: 1 % of it, or 7 if that is more."""
    return max(7, n // 100)


def factorisations(out_features: int, in_features: int, n_sites: int) -> Iterator[tuple[Sizes, Sizes]]:
    """Iterate over every (d_out, d_in) of exactly n_sites sites, in the order of d_out[0], d_in[0], d_out[1], ....

    Splits are ordered: the mirror image of a split groups other rows and columns of a given W, so it is a different
    split. Splits with a 1×1 site are left out, because the chain is the same without that site. Two sizes with fewer
    than n_sites prime factors together therefore have no split.

    Raises:
        ValueError: a size below 1, or n_sites outside 1 to 6.
    """
    _check(out_features, in_features, n_sites)

    def splits(out: int, in_: int, n_sites: int) -> Iterator[tuple[Sizes, Sizes]]:
        if n_sites == 1:
            if out * in_ > 1:
                yield (out,), (in_,)
            return
        if _n_prime_factors(out) + _n_prime_factors(in_) < n_sites:
            return
        for o in _divisors(out):
            for i in _divisors(in_):
                if o * i > 1:
                    for d_out, d_in in splits(out // o, in_ // i, n_sites - 1):
                        yield (o, *d_out), (i, *d_in)

    return splits(out_features, in_features, n_sites)


def why_not(
    out_features: int, in_features: int, d_out: Sequence[int], d_in: Sequence[int], bonds: Sequence[int]
) -> str | None:
    """Return in a line why the chain does not compress the matrix; None if it has fewer parameters.

    Padding counts against the chain: its parameters are counted with padding, those of the matrix without.

    Raises:
        ValueError: the sizes or bonds do not fit together, or multiply to less than the matrix.
    """
    _check(out_features, in_features, len(d_out))
    count, dense = n_params(bonds, d_out, d_in), out_features * in_features
    if math.prod(d_out) < out_features or math.prod(d_in) < in_features:
        check_sizes(out_features, in_features, d_out, d_in)
    if count < dense:
        return None
    reason = (
        f"d_out={list(d_out)}, d_in={list(d_in)}, bonds={list(bonds)} need {count:,} parameters, "
        f"and {out_features}×{in_features} has {dense:,}"
    )
    if n_params(clip_bonds(1, d_out, d_in), d_out, d_in) >= dense:
        return f"{reason}; at these sizes no chi needs fewer"
    return f"{reason}; chi={largest_chi(dense - 1, d_out, d_in)} is the largest that needs fewer"


def _check(out_features: int, in_features: int, n_sites: int | None) -> None:
    check_whole(out_features=out_features, in_features=in_features)
    if n_sites is not None:
        check_whole(n_sites=n_sites)
    if out_features < 1 or in_features < 1:
        raise ValueError(
            "`out_features` and `in_features` must be at least 1, "
            f"but got out_features={out_features}, in_features={in_features}"
        )
    if n_sites is not None and not 1 <= n_sites <= MAX_SITES:
        raise ValueError(f"`1 <= n_sites <= {MAX_SITES}` must hold, but got n_sites={n_sites}")


@cache
def _balanced(out_features: int, in_features: int, n_sites: int) -> tuple[Sizes, Sizes]:
    d_out, d_in = _most_equal(out_features, n_sites), _most_equal(in_features, n_sites)
    return d_out, min(permutations(d_in), key=lambda order: (*_large_chi_cost(d_out, order), order))


def _large_chi_cost(d_out: Sizes, d_in: Sizes) -> tuple[int, int]:
    # Interior cores grow with χ², the two at the ends with χ, so the interior decides first.
    sizes = [out * in_ for out, in_ in zip(d_out, d_in, strict=True)]
    return sum(sizes[1:-1]), sizes[0] + sizes[-1]


@cache
def _padded(out_features: int, in_features: int, method: str, n_sites: int, chi: int | None) -> tuple[Sizes, Sizes]:
    def split(out: int, in_: int) -> tuple[Sizes, Sizes]:
        if method == "min_params" and chi is not None:
            return _min_params(out, in_, n_sites, chi)
        return _balanced(out, in_, n_sites)

    def cost(split: tuple[Sizes, Sizes]) -> tuple[int, ...]:
        d_out, d_in = split
        count = _large_chi_cost(d_out, d_in) if chi is None else (_n_params(split, chi),)
        return *count, math.prod(d_out) * math.prod(d_in), *d_out

    return min((split(out, in_) for out in _paddings(out_features) for in_ in _paddings(in_features)), key=cost)


def _paddings(n: int) -> list[int]:
    """The size itself, and the four smoothest sizes (without large prime factors) that it may be padded to."""

    def largest_prime(size: int) -> int:
        return _prime_powers(size)[-1][0]

    return [n, *sorted(range(n + 1, n + max_padding(n) + 1), key=lambda size: (largest_prime(size), size))[:4]]


def _n_params(split: tuple[Sizes, Sizes], chi: int) -> int:
    return n_params(clip_bonds(chi, *split), *split)


@cache
def _most_equal(n: int, n_factors: int) -> Sizes:
    return min(_ascending_factors(n, n_factors), key=lambda sizes: (sum(sizes), sizes))


def _ascending_factors(n: int, n_factors: int, smallest: int = 1) -> Iterator[Sizes]:
    """Every way to write n as a product of n_factors factors in ascending order, none below `smallest`."""
    if n_factors == 1:
        yield (n,)
        return
    factor = smallest
    while factor**n_factors <= n:
        if n % factor == 0:
            for rest in _ascending_factors(n // factor, n_factors - 1, factor):
                yield (factor, *rest)
        factor += 1


@cache
def _min_params(out_features: int, in_features: int, n_sites: int, chi: int) -> tuple[Sizes, Sizes]:
    total = out_features * in_features
    chains = _Cheapest(total, chi)

    @cache
    def most_balanced(out: int, in_: int, n_sites: int) -> tuple[int, Sizes, Sizes]:
        """(sum of sizes, d_out, d_in) of the last n_sites sites, which multiply to out and in_."""
        if n_sites == 1:
            return out + in_, (out,), (in_,)
        done = total // (out * in_)
        splits = []
        for size in chains.best_sizes(done, n_sites):
            for o in _divisors(math.gcd(size, out)):
                if in_ % (size // o) == 0:
                    i = size // o
                    rest, d_out, d_in = most_balanced(out // o, in_ // i, n_sites - 1)
                    splits.append((o + i + rest, (o, *d_out), (i, *d_in)))
        return min(splits)

    _, d_out, d_in = most_balanced(out_features, in_features, n_sites)
    return d_out, d_in


class _Cheapest:
    """The fewest parameters of chains over divisors of `total`.

    Bonds, and so parameters, depend only on the products d_out[l] · d_in[l], and any factors of the total can be split
    into the two. The problem is therefore to find a shortest path from 1 to the total over its divisors.
    """

    def __init__(self, total: int, chi: int) -> None:
        self.total = total
        divisors = _divisors(total)
        self.bonds = {done: min(chi, done, total // done) for done in divisors}
        self.after = {done: [after for after in divisors if after % done == 0] for done in divisors}
        self.known: dict[tuple[int, int], int] = {}

    def cost(self, done: int, n_sites: int) -> int:
        """Fewest parameters of the last n_sites cores, if the sizes of the cores before them multiply to `done`."""
        if n_sites == 1:
            return self.bonds[done] * (self.total // done)
        if (done, n_sites) not in self.known:
            self.known[done, n_sites] = min(self._through(done, after, n_sites) for after in self.after[done])
        return self.known[done, n_sites]

    def best_sizes(self, done: int, n_sites: int) -> list[int]:
        """Sizes of the first of these cores that reach the fewest parameters."""
        best = self.cost(done, n_sites)
        return [after // done for after in self.after[done] if self._through(done, after, n_sites) == best]

    def _through(self, done: int, after: int, n_sites: int) -> int:
        return self.bonds[done] * (after // done) * self.bonds[after] + self.cost(after, n_sites - 1)


@cache
def _divisors(n: int) -> list[int]:
    divisors = [1]
    for prime, power in _prime_powers(n):
        divisors = [divisor * prime**k for divisor in divisors for k in range(power + 1)]
    return sorted(divisors)


def _n_prime_factors(n: int) -> int:
    return sum(power for _, power in _prime_powers(n))


@cache
def _prime_powers(n: int) -> list[tuple[int, int]]:
    powers, prime = [], 2
    while prime * prime <= n:
        power = 0
        while n % prime == 0:
            n, power = n // prime, power + 1
        if power:
            powers.append((prime, power))
        prime += 1
    return [*powers, (n, 1)] if n > 1 else powers
