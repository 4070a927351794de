"""How out_features and in_features split into local sizes d_out[l], d_in[l], one pair per site."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import permutations

FACTORISATIONS = ("paper", "balanced")

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
    out_features: int, in_features: int, *, method: str = "paper", n_sites: int | None = None
) -> tuple[Sizes, Sizes]:
    """Split the two sizes of a matrix over sites.

    Args:
        method: "balanced": d_out and d_in each as equal as possible (smallest sum), d_out ascending, d_in in the order
            that needs the fewest parameters beside it as long as no bond is clipped and χ is large; a site has size 1
            where primes leave no choice. Another order of d_out, or clipping, can need fewer.
            "paper": the paper's Table 2 for its four shapes, "balanced" for any other.
        n_sites: L, from 1 to 6. None: the table's for the paper's four shapes, 2 otherwise.
    Returns:
        (d_out, d_in), each of length L.
    Raises:
        ValueError: a size below 1, an unknown method, L outside 1 to 6, or method "paper" with an L that is not the
            table's.
    """
    if out_features < 1 or in_features < 1:
        raise ValueError(
            "`out_features` and `in_features` must be at least 1, "
            f"but got out_features={out_features}, in_features={in_features}"
        )
    if method not in FACTORISATIONS:
        raise ValueError(f"`factorisation` must be one of {', '.join(FACTORISATIONS)}, but got {method!r}")
    if n_sites is not None and not 1 <= n_sites <= MAX_SITES:
        raise ValueError(f"`1 <= n_sites <= {MAX_SITES}` must hold, but got n_sites={n_sites}")

    if method == "paper" and (out_features, in_features) in PAPER_FACTORISATIONS:
        d_out, d_in = PAPER_FACTORISATIONS[out_features, in_features]
        if n_sites not in (None, len(d_out)):
            raise ValueError(
                f"the paper splits {out_features}×{in_features} over n_sites={len(d_out)}, but got n_sites={n_sites}; "
                "use factorisation='balanced' to choose"
            )
        return d_out, d_in
    return _balanced(out_features, in_features, 2 if n_sites is None else n_sites)


@cache
def _balanced(out_features: int, in_features: int, n_sites: int) -> tuple[Sizes, Sizes]:
    d_out = min(_ascending_factors(out_features, n_sites), key=lambda sizes: (sum(sizes), sizes))
    d_in = min(_ascending_factors(in_features, n_sites), key=lambda sizes: (sum(sizes), sizes))

    def cost(d_in: Sizes) -> tuple[int, int, Sizes]:
        # Interior cores grow with χ², the two at the ends with χ, so the interior decides first.
        sizes = [out * in_ for out, in_ in zip(d_out, d_in, strict=True)]
        return sum(sizes[1:-1]), sizes[0] + sizes[-1], d_in

    return d_out, min(permutations(d_in), key=cost)


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
