"""Block tensor trains: the layer, and its decomposition against Monarch's and a dense oracle."""

from __future__ import annotations

import math

import pytest
import torch
from structured_linear_case import StructuredLinearTestCase, normal, seeded

from mpo_core.layers.block_train import BlockTrainLinear
from mpo_core.layers.monarch import MonarchLinear
from mpo_core.tensor_train.algebra import rel_error
from mpo_core.tensor_train.factorisation import factorise


class TestBlockTrain(StructuredLinearTestCase):
    kind, size = BlockTrainLinear, {"rank": 1, "d_out": [2, 2, 3], "d_in": [5, 2, 2]}


@pytest.mark.slow
class TestOfTwoSites(StructuredLinearTestCase):
    kind, size = BlockTrainLinear, {"rank": 2, "n_sites": 2}


def entry(layer, out, in_):
    """W at one output and input index, by the sum over the ranks: the oracle."""
    row = torch.ones(1, dtype=torch.float64)
    for site, (core, d_out, d_in) in enumerate(zip(layer.cores, layer.d_out, layer.d_in, strict=True)):
        o = out // math.prod(layer.d_out[site + 1 :]) % d_out
        i = in_ // math.prod(layer.d_in[site + 1 :]) % d_in
        before = out // math.prod(layer.d_out[site:])
        after = in_ % math.prod(layer.d_in[site + 1 :])
        block = core[before, after].reshape(d_out, layer.ranks[site + 1], layer.ranks[site], d_in)
        row = block[o, :, :, i] @ row
    return row.squeeze()


@pytest.mark.parametrize("n_sites", [1, 2, 3, 4])
def test_matrix_is_the_sum_over_the_ranks(n_sites):
    d_out, d_in = factorise(24, 36, n_sites=n_sites)
    layer = BlockTrainLinear(36, 24, rank=3, d_out=d_out, d_in=d_in, generator=seeded(), dtype=torch.float64)
    W = layer.to_matrix().detach()
    for out, in_ in [(0, 0), (5, 17), (13, 4), (23, 35), (8, 30)]:
        torch.testing.assert_close(entry(layer, out, in_).detach(), W[out, in_])
    assert layer.n_params_matrix == sum(core.numel() for core in layer.cores)


@pytest.mark.parametrize("n_sites", [1, 2, 3, 4, 6])
def test_without_a_binding_cap_the_decomposition_is_exact(n_sites):
    W = normal(24, 36)
    torch.testing.assert_close(BlockTrainLinear.from_matrix(W, rank=1000, n_sites=n_sites).to_matrix(), W)


def test_two_sites_are_a_monarch_matrix():
    # Monarch cuts the inputs into contiguous parts, one for each block; here a block has every fourth input.
    W = normal(24, 36)
    ours = BlockTrainLinear.from_matrix(W, rank=2, d_out=[6, 4], d_in=[9, 4])
    order = torch.arange(36).reshape(9, 4).T.reshape(-1)
    monarch = MonarchLinear.from_matrix(W[:, order], rank=2, n_blocks=(6, 4))
    torch.testing.assert_close(ours.to_matrix()[:, order], monarch.to_matrix())
    assert ours.n_params_matrix == monarch.n_params_matrix


@pytest.mark.parametrize("n_sites", [2, 3, 4])
def test_the_error_falls_with_the_rank(n_sites):
    W = normal(48, 64)
    errors = [
        rel_error(W, BlockTrainLinear.from_matrix(W, rank=rank, n_sites=n_sites).to_matrix()) for rank in range(1, 7)
    ]
    assert errors == sorted(errors, reverse=True)
    assert all(error < 1 for error in errors)


def test_a_block_train_of_rank_one_may_have_full_rank():
    layer = BlockTrainLinear(64, 64, rank=1, generator=seeded(), dtype=torch.float64)
    assert int(torch.linalg.matrix_rank(layer.to_matrix())) == 64
    assert layer.n_params_matrix == 3 * 4**4
    assert BlockTrainLinear(64, 64, rank=1, n_sites=2).n_params_matrix == 2 * 8**3


@pytest.mark.parametrize("n_sites", [1, 2, 3, 4, 6])
def test_fresh_weights_have_the_variance_of_a_dense_layer(n_sites):
    squares = [
        BlockTrainLinear(96, 64, rank=2, n_sites=n_sites, generator=seeded(seed)).weight.detach().square().mean()
        for seed in range(30)
    ]
    assert 96 * float(torch.stack(squares).mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("power", [-900, 900])
def test_matrices_of_extreme_scale_are_decomposed_alike(power):
    W = normal(24, 36)
    plain = BlockTrainLinear.from_matrix(W, rank=2).to_matrix()
    scaled = BlockTrainLinear.from_matrix(W * 2.0**power, rank=2).to_matrix()
    torch.testing.assert_close(scaled * 2.0**-power, plain)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "exactly one of `rank` and `max_params`"),
        ({"rank": 0}, "`rank >= 1`"),
        ({"rank": 2, "n_sites": 7}, "n_sites"),
        ({"rank": 2, "d_out": [4, 6]}, "`d_out` and `d_in` must be given together"),
        ({"max_params": 3}, "rank 1 needs"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, told):
    with pytest.raises(ValueError, match=told) as raised:
        BlockTrainLinear(36, 24, **options)
    assert "\n" not in str(raised.value)
