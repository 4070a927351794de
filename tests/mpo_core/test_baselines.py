"""Low-rank, Monarch and pruned layers: dense oracles, optimality, budgets, and what training must not undo."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structured_linear_case import StructuredLinearTestCase, gram_of, make_linear, normal, seeded
from torch import nn

from mpo_core.fitting.metric import Metric
from mpo_core.layers.low_rank import LowRankLinear
from mpo_core.layers.monarch import MonarchLinear
from mpo_core.layers.mpo import MPOLinear
from mpo_core.layers.pruned import PrunedLinear
from mpo_core.tensor_train.algebra import rel_error
from mpo_core.tensor_train.initialisation import normal_

KINDS = {
    "low_rank": (LowRankLinear, {"rank": 3}),
    "monarch": (MonarchLinear, {"rank": 2, "n_blocks": (3, 4)}),
    "pruned": (PrunedLinear, {"sparsity": 0.7}),
}
kinds = pytest.mark.parametrize(("kind", "size"), KINDS.values(), ids=KINDS)


class TestMPO(StructuredLinearTestCase):
    kind, size = MPOLinear, {"chi": 2}


class TestThreeSites(StructuredLinearTestCase):
    kind, size = MPOLinear, {"chi": 2, "n_sites": 3, "forward": "chain"}

    def test_flops_are_those_that_pytorch_counts(self):
        """`test_contraction` has them: a chain sums parts in an order of its own."""


class TestLowRank(StructuredLinearTestCase):
    kind, size = KINDS["low_rank"]


class TestLowRankInTheFixedGauge(StructuredLinearTestCase):
    kind, size = LowRankLinear, {"rank": 3, "gauge": "fixed"}


class TestMPOInTheFixedGauge(StructuredLinearTestCase):
    kind, size = MPOLinear, {"chi": 3, "n_sites": 3, "gauge": "fixed"}


class TestMonarch(StructuredLinearTestCase):
    kind, size = KINDS["monarch"]


class TestPruned(StructuredLinearTestCase):
    kind, size = KINDS["pruned"]


# As a layer -----------------------------------------------------------------------------------------------------------


def test_matrices_are_what_the_docstrings_say():
    low_rank = LowRankLinear(20, 12, rank=3, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(low_rank.to_matrix(), low_rank.A @ low_rank.B)
    monarch = MonarchLinear(20, 12, rank=2, n_blocks=(3, 4), generator=seeded(), dtype=torch.float64)
    L, R = monarch.L.detach().numpy(), monarch.R.detach().numpy()
    for row, column in np.ndindex(3, 4):
        block = monarch.to_matrix().detach().numpy()[4 * row : 4 * row + 4, 5 * column : 5 * column + 5]
        np.testing.assert_allclose(block, L[row, :, column, :] @ R[column, row], atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (LowRankLinear, {"rank": 10}),
        (MonarchLinear, {"rank": 3}),
        (MonarchLinear, {"rank": 2, "n_blocks": (16, 4)}),
        (PrunedLinear, {"sparsity": 0.9}),
    ],
)
def test_fresh_matrices_have_variance_one_over_in_features(kind, size):
    squares = [kind(256, 144, **size, generator=seeded(seed)).to_matrix().square().mean() for seed in range(20)]
    # 20 draws, each with a relative standard error of at most a fifth.
    assert 256 * sum(squares).item() / 20 == pytest.approx(1, abs=0.08)


def test_svd_fresh_is_the_truncated_svd_of_a_dense_draw():
    layer = LowRankLinear(20, 12, rank=3, init="svd_fresh", generator=seeded(), dtype=torch.float64)
    W = torch.empty(12, 20, dtype=torch.float64)
    normal_(W, 20**-0.5, seeded())
    nearest = LowRankLinear.from_matrix(W, rank=3)
    assert torch.equal(layer.A, nearest.A)
    assert torch.equal(layer.B, nearest.B)


# From a matrix --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (LowRankLinear, {"rank": 12}),
        (LowRankLinear, {"rank": 1000}),
        (MonarchLinear, {"rank": 1000}),
        (MonarchLinear, {"rank": 12, "n_blocks": 1}),
        (PrunedLinear, {"sparsity": 0.0}),
        (PrunedLinear, {"max_params": 10_000}),
    ],
)
def test_from_linear_is_exact_at_full_size(kind, size):
    linear, x = make_linear(), normal(5, 20, seed=1)
    torch.testing.assert_close(kind.from_linear(linear, **size)(x), linear(x))


def test_low_rank_is_the_truncated_svd():
    linear = make_linear()
    s = np.linalg.svd(linear.weight.detach().numpy(), compute_uv=False)
    error = rel_error(linear.weight, LowRankLinear.from_linear(linear, rank=5).to_matrix())
    assert error == pytest.approx(np.sqrt(np.sum(s[5:] ** 2) / np.sum(s**2)), abs=1e-12)


@pytest.mark.parametrize("n_blocks", [(3, 4), (1, 1), (12, 20), (4, 2)])
def test_monarch_is_every_blocks_truncated_svd(n_blocks):
    linear = make_linear()
    W = linear.weight.detach().numpy()
    discarded = 0.0
    for rows in np.split(W, n_blocks[0]):
        for block in np.split(rows, n_blocks[1], axis=1):
            discarded += np.sum(np.linalg.svd(block, compute_uv=False)[1:] ** 2)
    layer = MonarchLinear.from_linear(linear, rank=1, n_blocks=n_blocks)
    assert rel_error(linear.weight, layer.to_matrix()) ** 2 == pytest.approx(discarded / np.sum(W**2), abs=1e-12)


def test_monarch_with_one_block_is_low_rank():
    linear = make_linear()
    monarch = MonarchLinear.from_linear(linear, rank=4, n_blocks=1)
    torch.testing.assert_close(monarch.to_matrix(), LowRankLinear.from_linear(linear, rank=4).to_matrix())


def test_pruned_keeps_the_best_entries_of_all_choices():
    W = normal(2, 4)
    layer = PrunedLinear.from_matrix(W, max_params=3)
    best = min(
        (sum(W.flatten()[i] ** 2 for i in range(8) if i not in kept), kept) for kept in combinations(range(8), 3)
    )
    assert set(layer.mask.flatten().nonzero().flatten().tolist()) == set(best[1])
    assert torch.equal(layer.to_matrix(), torch.where(layer.mask, W, 0))


def test_pruned_keeps_the_first_of_equal_entries():
    layer = PrunedLinear.from_matrix(torch.ones(3, 4), max_params=5)
    assert layer.mask.flatten().tolist() == [True] * 5 + [False] * 7


def test_monarch_under_a_gram_has_the_best_left_factor():
    linear, gram = make_linear(), gram_of(20)
    layer = MonarchLinear.from_linear(linear, rank=1, n_blocks=(3, 4), metric=Metric(gram), max_steps=0)
    layer.L.requires_grad_()
    difference = layer.to_matrix() - linear.weight.detach()
    (gradient,) = torch.autograd.grad((difference @ gram * difference).sum(), layer.L)
    assert gradient.abs().max() < 1e-9 * torch.linalg.norm(linear.weight.detach() @ gram)


# Sizes ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1.2), st.sampled_from(list(KINDS)))
def test_max_params_takes_the_largest_layer_that_fits(out_features, in_features, fraction, name):
    kind, budget = KINDS[name][0], round(fraction * out_features * in_features)
    smallest = {"low_rank": out_features + in_features, "monarch": out_features + in_features, "pruned": 1}[name]
    if budget < smallest:
        with pytest.raises(ValueError, match="max_params"):
            kind(in_features, out_features, max_params=budget, device="meta")
        return
    layer = kind(in_features, out_features, max_params=budget, device="meta")
    assert layer.n_params_matrix <= budget
    if name == "pruned":
        assert layer.n_params_matrix == min(budget, out_features * in_features)
    else:
        blocks = {"n_blocks": layer.n_blocks} if name == "monarch" else {}
        more = kind(in_features, out_features, rank=layer.rank + 1, device="meta", **blocks)
        assert more.n_params_matrix > budget or more.rank == layer.rank


def test_n_params_matrix_counts_what_the_matrix_needs():
    assert LowRankLinear(20, 12, rank=3, device="meta").n_params_matrix == 3 * 32
    assert MonarchLinear(128, 128, rank=1, n_blocks=(16, 8), device="meta").n_params_matrix == 3072
    assert MonarchLinear(128, 128, rank=1, device="meta").n_blocks == (8, 8)
    pruned = PrunedLinear(20, 12, sparsity=0.75, generator=seeded())
    assert pruned.n_params_matrix == PrunedLinear(20, 12, sparsity=0.75, device="meta").n_params_matrix == 60
    assert math.isclose(60, int((pruned.to_matrix() != 0).sum()))


@kinds
@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_rel_error_takes_the_smallest_layer_that_meets_it(kind, size, target):
    linear = make_linear()
    blocks = {name: value for name, value in size.items() if name == "n_blocks"}
    layer = kind.from_linear(linear, rel_error=target, **blocks)
    assert rel_error(linear.weight, layer.to_matrix()) <= target
    if kind is PrunedLinear:
        smaller = kind.from_linear(linear, max_params=layer.n_params_matrix - 1)
    elif layer.rank == 1:
        return
    else:
        smaller = kind.from_linear(linear, rank=layer.rank - 1, **blocks)
    assert rel_error(linear.weight, smaller.to_matrix()) > target


def test_structures_say_what_they_are():
    layers = [kind(20, 12, **size, generator=seeded()) for kind, size in KINDS.values()]
    assert [layer.structure() for layer in layers] == ["rank=3", "n_blocks=(3, 4), rank=2", "kept=72"]
    assert repr(layers[0]) == "LowRankLinear(in_features=20, out_features=12, rank=3, bias=True)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankLinear(4, 4, generator=seeded()), "exactly one of `rank` and `max_params` must be given"),
        (lambda: LowRankLinear(4, 4, rank=0, generator=seeded()), "`rank >= 1` must hold, but got rank=0"),
        (
            lambda: LowRankLinear(4, 4, rank=2, init="paper", generator=seeded()),
            "must be 'variance' or 'svd_fresh', but got 'paper'",
        ),
        (lambda: PrunedLinear(4, 4, sparsity=0.5, init="svd_fresh", generator=seeded()), "must be 'variance', but got"),
        (lambda: LowRankLinear(4, 4, max_params=7, device="meta"), "rank 1 needs 8 parameters, but got max_params=7"),
        (lambda: LowRankLinear(0, 4, rank=1, device="meta"), "must be at least 1, but got in_features=0"),
        (lambda: MonarchLinear(4, 6, rank=1, n_blocks=4), r"`n_blocks` must divide out_features=6 and in_features=4"),
        (lambda: MonarchLinear(4, 6, rank=1, n_blocks=(0, 2)), r"but got n_blocks=\(0, 2\)"),
        (lambda: PrunedLinear(4, 4, sparsity=1.0), "`0 <= sparsity < 1` must hold, but got sparsity=1.0"),
        (lambda: PrunedLinear(4, 4, max_params=0), "`max_params >= 1` must hold, but got max_params=0"),
        (lambda: PrunedLinear.from_matrix(torch.full((2, 2), math.nan), sparsity=0.5), "4 entries are not"),
        (lambda: LowRankLinear.from_matrix(torch.ones(2, 2), rel_error=1.0), "`0 <= rel_error < 1` must hold"),
        (lambda: LowRankLinear.from_matrix(torch.ones(2, 2), rank=1, rel_error=0.5), "exactly one of `rank`, `max_par"),
        (
            lambda: LowRankLinear.from_matrix(torch.ones(2, 2), rel_error=0.5, metric=Metric(torch.eye(2))),
            "without `metric`",
        ),
        (
            lambda: MonarchLinear.from_matrix(torch.ones(2, 2), rank=1, metric=Metric(torch.eye(3))),
            r"`gram` must have shape \(2",
        ),
        (lambda: LowRankLinear.from_linear(nn.Linear(4, 4, device="meta"), rank=1), "on the meta device has no values"),
    ],
)
def test_baselines_say_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_error_needs_no_more_than_the_numerical_rank(dtype):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(64, 3, generator=generator, dtype=dtype) @ torch.randn(3, 64, generator=generator, dtype=dtype)
    assert LowRankLinear.from_matrix(W, rel_error=0).rank == 3
    assert MonarchLinear.from_matrix(W, rel_error=0, n_blocks=4).rank == 3
    torch.testing.assert_close(LowRankLinear.from_matrix(W, rel_error=0).to_matrix(), W, rtol=1e-4, atol=1e-4)
