"""Local sizes of the sites."""

from __future__ import annotations

import math
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_core.tensor_train.bonds import clip_bonds, n_params
from mpo_core.tensor_train.factorisation import (
    FACTORISATIONS,
    PAPER_FACTORISATIONS,
    factorisations,
    factorise,
    max_padding,
    why_not,
)

features = st.integers(1, 600)
n_sites = st.integers(1, 6)
chis = st.integers(1, 40)
AWKWARD = (7, 11, 13, 22, 29, 31, 37, 41, 53, 58, 83, 97, 101, 106)
"""Primes and sizes with large ones."""


def count(split, chi):
    """Parameters at the cap chi."""
    return n_params(clip_bonds(chi, *split), *split)


def splittings(n, n_factors):
    """All ordered ways to write n as a product, by trying every tuple of divisors."""
    divisors = [divisor for divisor in range(1, n + 1) if n % divisor == 0]
    return [sizes for sizes in product(divisors, repeat=n_factors) if math.prod(sizes) == n]


@settings(max_examples=100, deadline=None)
@given(features, features, n_sites, st.sampled_from(FACTORISATIONS), chis)
def test_factorise_multiplies_back_on_every_shape(out_features, in_features, n_sites, method, chi):
    if (out_features, in_features) in PAPER_FACTORISATIONS:
        n_sites = None
    d_out, d_in = factorise(out_features, in_features, method=method, n_sites=n_sites, chi=chi)
    assert math.prod(d_out) == out_features
    assert math.prod(d_in) == in_features
    assert len(d_out) == len(d_in)
    assert n_sites in (None, len(d_out))
    assert method == "min_params" or list(d_out) == sorted(d_out)


@pytest.mark.parametrize("n_sites", [1, 2, 3])
@pytest.mark.parametrize(("out_features", "in_features"), [(65, 128), (128, 128), (97, 96), (512, 128), (36, 60)])
def test_balanced_is_as_equal_as_any(out_features, in_features, n_sites):
    d_out, d_in = factorise(out_features, in_features, method="balanced", n_sites=n_sites)
    assert sum(d_out) == min(map(sum, splittings(out_features, n_sites)))
    assert sum(d_in) == min(map(sum, splittings(in_features, n_sites)))


@pytest.mark.parametrize("n_sites", [2, 3, 4])
@pytest.mark.parametrize(("out_features", "in_features"), [(65, 128), (128, 128), (512, 128), (128, 512)])
def test_balanced_orders_d_in_for_the_fewest_parameters(out_features, in_features, n_sites):
    chi = 1000  # unclipped, so that the interior decides
    bonds = (1, *[chi] * (n_sites - 1), 1)
    d_out, d_in = factorise(out_features, in_features, method="balanced", n_sites=n_sites)
    counts = [n_params(bonds, d_out, order) for order in permutations(d_in)]
    assert n_params(bonds, d_out, d_in) == min(counts)


@pytest.mark.parametrize(
    ("shape", "n_sites", "expected"),
    [
        ((128, 128), 2, ((8, 16), (16, 8))),
        ((512, 128), 3, ((8, 8, 8), (4, 4, 8))),
        ((128, 512), 3, ((4, 4, 8), (8, 8, 8))),
        ((65, 128), 2, ((5, 13), (16, 8))),
        ((97, 128), 2, ((1, 97), (16, 8))),
        ((97, 101), 3, ((1, 1, 97), (101, 1, 1))),
        ((64, 64), 1, ((64,), (64,))),
        ((64, 64), 6, ((2,) * 6, (2,) * 6)),
        ((1, 1), 4, ((1,) * 4, (1,) * 4)),
    ],
)
def test_balanced_examples(shape, n_sites, expected):
    assert factorise(*shape, method="balanced", n_sites=n_sites) == expected


@pytest.mark.parametrize(("shape", "expected"), PAPER_FACTORISATIONS.items())
def test_paper_uses_its_table(shape, expected):
    assert factorise(*shape, method="paper") == expected
    assert factorise(*shape, method="paper", n_sites=len(expected[0])) == expected


def test_paper_balances_shapes_outside_its_table():
    assert factorise(256, 64, method="paper") == factorise(256, 64, method="balanced", n_sites=2)
    assert factorise(256, 64, method="paper", n_sites=3) == factorise(256, 64, method="balanced", n_sites=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_features": 8, "in_features": 8, "method": "min_params"}, "needs the `chi` at which to count parameters"),
        ({"out_features": 8, "in_features": 8, "chi": 0}, "`chi >= 1` must hold, but got chi=0"),
        (
            {"out_features": 512, "in_features": 128, "method": "paper", "n_sites": 2},
            r"the paper splits 512×128 over n_sites=3, but got n_sites=2; use factorisation='balanced'",
        ),
        ({"out_features": 8, "in_features": 8, "n_sites": 0}, "`1 <= n_sites <= 6` must hold, but got n_sites=0"),
        ({"out_features": 8, "in_features": 8, "n_sites": 7}, "`1 <= n_sites <= 6` must hold, but got n_sites=7"),
        ({"out_features": 8, "in_features": 8, "method": "best"}, "must be one of paper, balanced, min_params, but"),
        ({"out_features": 0, "in_features": 8}, "must be at least 1, but got out_features=0, in_features=8"),
    ],
)
def test_factorise_says_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        factorise(**arguments)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 72), st.integers(1, 72), st.integers(1, 3), chis)
def test_min_params_is_the_cheapest_of_all_and_of_these_the_most_balanced(out_features, in_features, n_sites, chi):
    everything = list(product(splittings(out_features, n_sites), splittings(in_features, n_sites)))
    chosen = factorise(out_features, in_features, method="min_params", n_sites=n_sites, chi=chi)
    fewest = min(count(split, chi) for split in everything)
    cheapest = [split for split in everything if count(split, chi) == fewest]
    assert chosen == min(cheapest, key=lambda split: (sum(split[0]) + sum(split[1]), split))


@pytest.mark.parametrize(
    ("shape", "n_sites", "chi", "expected", "per_chi"),
    [
        ((128, 128), 2, 8, ((8, 16), (16, 8)), 256),
        ((65, 128), 2, 8, ((5, 13), (16, 8)), 184),
        ((50257, 768), 2, 16, ((29, 1733), (192, 4)), 12500),
        ((97, 101), 2, 16, ((1, 97), (101, 1)), 198),  # two primes: as a low-rank matrix
    ],
)
def test_min_params_examples(shape, n_sites, chi, expected, per_chi):
    assert factorise(*shape, method="min_params", n_sites=n_sites, chi=chi) == expected
    assert count(expected, chi) == per_chi * chi


@pytest.mark.parametrize("shape", [(50257, 768), (4096, 11008)])
def test_min_params_at_six_sites_of_large_matrices_beats_balanced(shape):
    """These have far too many splits to try each: 38 million pairs for the second."""
    for chi in (4, 64):
        chosen = factorise(*shape, method="min_params", n_sites=6, chi=chi)
        assert (math.prod(chosen[0]), math.prod(chosen[1])) == shape
        assert count(chosen, chi) < count(factorise(*shape, method="balanced", n_sites=6), chi)


@pytest.mark.parametrize("method", FACTORISATIONS)
@pytest.mark.parametrize(
    ("shape", "n_sites"), [((97, 128), 2), ((97, 101), 3), ((128, 128), 2), ((1009, 30), 4), ((50257, 768), 3)]
)
def test_padding_never_costs_parameters_and_stays_within_its_limit(method, shape, n_sites):
    for chi in (4, 16):
        arguments = {"method": method, "n_sites": n_sites, "chi": chi}
        padded = factorise(*shape, **arguments, padding=True)
        plain = factorise(*shape, **arguments)
        for sizes, features in zip(padded, shape, strict=True):
            assert features <= math.prod(sizes) <= features + max_padding(features)
        assert count(padded, chi) <= count(plain, chi)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(AWKWARD), st.sampled_from([*AWKWARD, 16, 24]), st.integers(2, 4), st.integers(1, 6))
def test_padding_with_min_params_chooses_among_smooth_sizes(out_features, in_features, n_sites, chi):
    """The smallest of the cheapest, candidates found by the largest prime factor of each size up to 7 more."""

    def candidates(n):
        def largest_prime(size):
            return max(d for d in range(2, size + 1) if size % d == 0 and all(d % smaller for smaller in range(2, d)))

        return [n, *sorted(range(n + 1, n + 8), key=lambda size: (largest_prime(size), size))[:4]]

    def cost(split):
        return count(split, chi), math.prod(split[0]) * math.prod(split[1])

    pairs = product(candidates(out_features), candidates(in_features))
    arguments = {"method": "min_params", "n_sites": n_sites, "chi": chi}
    fewest = min(cost(factorise(*pair, **arguments)) for pair in pairs)
    assert cost(factorise(out_features, in_features, **arguments, padding=True)) == fewest


def test_padding_helps_awkward_sizes_and_leaves_smooth_ones():
    arguments = {"method": "balanced", "n_sites": 3, "chi": 8}
    assert count(factorise(97, 101, **arguments, padding=True), 8) < 0.8 * count(factorise(97, 101, **arguments), 8)
    for method in ("balanced", "min_params"):
        assert factorise(128, 128, method=method, n_sites=2, chi=8, padding=True) == ((8, 16), (16, 8))
    assert factorise(65, 128, method="paper", padding=True) == PAPER_FACTORISATIONS[65, 128]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 72), st.integers(1, 72), st.integers(1, 4))
def test_factorisations_are_all_without_a_site_of_one_by_one(out_features, in_features, n_sites):
    found = list(factorisations(out_features, in_features, n_sites))
    expected = {
        (d_out, d_in)
        for d_out, d_in in product(splittings(out_features, n_sites), splittings(in_features, n_sites))
        if all(out * in_ > 1 for out, in_ in zip(d_out, d_in, strict=True))
    }
    assert len(found) == len(expected)
    assert set(found) == expected
    assert found == sorted(found, key=lambda split: list(zip(*split, strict=True)))


def test_factorisations_come_one_by_one_and_are_checked_at_once():
    first = next(iter(factorisations(4096, 11008, 6)))
    assert (math.prod(first[0]), math.prod(first[1])) == (4096, 11008)
    with pytest.raises(ValueError, match="`1 <= n_sites <= 6` must hold, but got n_sites=7"):
        factorisations(8, 8, 7)


@settings(max_examples=60, deadline=None)
@given(features, features, st.integers(1, 4), chis)
def test_why_not_is_silent_exactly_where_parameters_are_saved(out_features, in_features, n_sites, chi):
    split = factorise(out_features, in_features, method="balanced", n_sites=n_sites)
    reason = why_not(out_features, in_features, *split, clip_bonds(chi, *split))
    dense = out_features * in_features
    assert (reason is None) == (count(split, chi) < dense)
    if reason is not None:
        largest = max((other for other in range(1, chi) if count(split, other) < dense), default=None)
        expected = "no chi needs fewer" if largest is None else f"chi={largest} is the largest that needs fewer"
        assert reason.endswith(expected)
        assert "\n" not in reason


def test_why_not_counts_padding_against_the_chain():
    assert why_not(97, 3, (10, 10), (3, 1), (1, 7, 1)) is None
    assert why_not(97, 3, (10, 10), (3, 1), (1, 8, 1)) == (
        "d_out=[10, 10], d_in=[3, 1], bonds=[1, 8, 1] need 320 parameters, and 97×3 has 291; "
        "chi=7 is the largest that needs fewer"
    )
    with pytest.raises(ValueError, match=r"`prod\(d_out\) == out_features` must hold"):
        why_not(101, 3, (10, 10), (3, 1), (1, 7, 1))
