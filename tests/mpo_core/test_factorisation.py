"""Local sizes of the sites."""

from __future__ import annotations

import math
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_core.factorisation import FACTORISATIONS, PAPER_FACTORISATIONS, factorise
from mpo_core.tensor_train import n_params

features = st.integers(1, 600)
n_sites = st.integers(1, 6)


def splittings(n, n_factors):
    """All ordered ways to write n as a product, by trying every tuple of divisors."""
    divisors = [divisor for divisor in range(1, n + 1) if n % divisor == 0]
    return [sizes for sizes in product(divisors, repeat=n_factors) if math.prod(sizes) == n]


@settings(max_examples=100, deadline=None)
@given(features, features, n_sites, st.sampled_from(FACTORISATIONS))
def test_factorise_multiplies_back_on_every_shape(out_features, in_features, n_sites, method):
    if (out_features, in_features) in PAPER_FACTORISATIONS:
        n_sites = None
    d_out, d_in = factorise(out_features, in_features, method=method, n_sites=n_sites)
    assert math.prod(d_out) == out_features
    assert math.prod(d_in) == in_features
    assert len(d_out) == len(d_in)
    assert n_sites in (None, len(d_out))
    assert list(d_out) == sorted(d_out)


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
    assert factorise(*shape) == expected
    assert factorise(*shape, method="paper", n_sites=len(expected[0])) == expected


def test_paper_balances_shapes_outside_its_table():
    assert factorise(256, 64) == factorise(256, 64, method="balanced", n_sites=2)
    assert factorise(256, 64, n_sites=3) == factorise(256, 64, method="balanced", n_sites=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"out_features": 512, "in_features": 128, "n_sites": 2},
            r"the paper splits 512×128 over n_sites=3, but got n_sites=2; use factorisation='balanced'",
        ),
        ({"out_features": 8, "in_features": 8, "n_sites": 0}, "`1 <= n_sites <= 6` must hold, but got n_sites=0"),
        ({"out_features": 8, "in_features": 8, "n_sites": 7}, "`1 <= n_sites <= 6` must hold, but got n_sites=7"),
        ({"out_features": 8, "in_features": 8, "method": "best"}, "must be one of paper, balanced, but got 'best'"),
        ({"out_features": 0, "in_features": 8}, "must be at least 1, but got out_features=0, in_features=8"),
    ],
)
def test_factorise_says_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        factorise(**arguments)
