"""Trees of tensors: the layer, and the hierarchical SVD against its bound and a dense oracle."""

from __future__ import annotations

import math

import pytest
import torch
from structured_linear_case import StructuredLinearTestCase, make_linear, metric_of, normal, seeded

import mpo_core
from mpo_core.fitting.tree_fit import centred, squared_tails
from mpo_core.layers.mpo import MPOLinear
from mpo_core.layers.tree import TreeLinear
from mpo_core.tensor_train import tree
from mpo_core.tensor_train.algebra import rel_error
from mpo_core.tensor_train.factorisation import factorise
from mpo_core.tensor_train.tree import chain_of, clip_ranks, hierarchical_svd, left_half, n_params, nodes_of, shapes_of


class TestTree(StructuredLinearTestCase):
    kind, size = TreeLinear, {"chi": 3, "d_out": [2, 2, 3], "d_in": [5, 2, 2]}


@pytest.mark.slow
class TestChainOfHalves(StructuredLinearTestCase):
    kind, size = TreeLinear, {"chi": 3, "n_sites": 4, "forward": "chain"}


def dense_of(tensors):
    """W by one sum over all indices, the oracle."""
    n_sites = (len(tensors) + 2) // 2
    operands, letters = [], iter("abcdefghijklmnopqrstuvwxyz")
    outs, ins = [next(letters) for _ in range(n_sites)], [next(letters) for _ in range(n_sites)]
    edges = [next(letters) for _ in tensors]
    if (left := left_half(n_sites)) is not None:
        edges[left] = edges[-1]
    for number, node in enumerate(nodes_of(n_sites)):
        legs = outs[node.first] + ins[node.first] if node.below is None else edges[node.below[0]] + edges[node.below[1]]
        operands.append(legs + edges[number])
    W = torch.einsum(f"{','.join(operands)}->{''.join(outs + ins)}", *tensors)
    return W.reshape(math.prod(W.shape[:n_sites]), -1)


def nodes_for(tensors):
    return nodes_of((len(tensors) + 2) // 2)


def to_matrix(tensors):
    return tree.to_matrix(tensors, nodes_for(tensors))


def drawn(d_out, d_in, chi, seed=0):
    shapes = shapes_of(clip_ranks(chi, d_out, d_in), d_out, d_in)
    return [normal(*shape, seed=seed + place) for place, shape in enumerate(shapes)]


@pytest.mark.parametrize("n_sites", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("chi", [1, 3, 40])
def test_matrix_is_the_sum_over_all_indices(n_sites, chi):
    d_out, d_in = factorise(48, 72, n_sites=n_sites)
    tensors = drawn(d_out, d_in, chi)
    torch.testing.assert_close(to_matrix(tensors), dense_of(tensors))
    assert sum(tensor.numel() for tensor in tensors) == n_params(chi, d_out, d_in)
    assert len(chain_of(tensors, nodes_for(tensors))) == min(2, n_sites)


@pytest.mark.parametrize("n_sites", [1, 2, 3, 4, 5, 6])
def test_without_a_binding_cap_the_decomposition_is_exact(n_sites):
    W = normal(24, 36)
    d_out, d_in = factorise(24, 36, n_sites=n_sites)
    torch.testing.assert_close(to_matrix(hierarchical_svd(W, d_out, d_in, 10_000)), W)


@pytest.mark.parametrize("n_sites", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("chi", [1, 2, 5, 9])
def test_error_is_within_the_bound_of_the_singular_values(n_sites, chi):
    d_out, d_in = factorise(24, 36, n_sites=n_sites)
    for seed in range(3):
        W = normal(24, 24, seed=seed) * torch.logspace(0, -2, 24, dtype=torch.float64) @ normal(24, 36, seed=seed + 9)
        tensors = hierarchical_svd(W, d_out, d_in, chi)
        squared = rel_error(W, to_matrix(tensors)) ** 2
        cuts = [tail[rank] for tail, rank in zip(squared_tails(W, d_out, d_in), clip_ranks(chi, d_out, d_in)[:-1],
                                                 strict=True)]  # fmt: skip
        # No tree of these ranks is nearer to W than the largest cut.
        assert max(cuts) * (1 - 1e-9) <= squared + 1e-12
        assert squared <= sum(cuts) + 1e-12
        for tensor in tensors[:-1]:
            M = tensor.reshape(-1, tensor.shape[2])
            torch.testing.assert_close(M.T @ M, torch.eye(M.shape[1], dtype=torch.float64))


def test_two_sites_are_an_mpo():
    W = normal(24, 36)
    sizes = {"d_out": [4, 6], "d_in": [6, 6], "chi": 5}
    of_tree, mpo = TreeLinear.from_matrix(W, **sizes), MPOLinear.from_matrix(W, **sizes)
    torch.testing.assert_close(of_tree.to_matrix(), mpo.to_matrix())
    assert of_tree.n_params_matrix == mpo.n_params_matrix


def test_a_tree_of_small_ranks_is_found_again():
    for n_sites in (3, 4, 6):
        d_out, d_in = factorise(64, 96, n_sites=n_sites)
        tensors = drawn(d_out, d_in, 3)
        W = to_matrix(tensors)
        torch.testing.assert_close(to_matrix(hierarchical_svd(W, d_out, d_in, 3)), W)


def test_centred_factors_are_the_same_tree_with_the_singular_values_on_its_edges():
    d_out, d_in = factorise(24, 36, n_sites=5)
    tensors = hierarchical_svd(normal(24, 36), d_out, d_in, 4)
    factors, values = centred(tensors, nodes_for(tensors))
    isometries = [factor / value for factor, value in zip(factors, values, strict=True)]
    W = to_matrix(tensors)
    torch.testing.assert_close(to_matrix(isometries), W)
    # The squares of what lies beyond rank k on each edge.
    for tail, value in zip(squared_tails(W, d_out, d_in), values[:-1], strict=True):
        beyond = value.square().flip(0).cumsum(0).flip(0) / W.square().sum()
        torch.testing.assert_close(beyond.tolist(), tail[: len(value)], atol=1e-9, rtol=1e-6)
    for factor, value in zip(factors[:-1], values[:-1], strict=True):
        M = factor.reshape(-1, factor.shape[2])
        torch.testing.assert_close(M.T @ M, torch.diag(value.square()), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("n_sites", [1, 2, 3, 4, 5, 6])
def test_fresh_weights_have_the_variance_of_a_dense_layer(n_sites):
    squares = [
        TreeLinear(96, 64, chi=4, n_sites=n_sites, generator=seeded(seed)).weight.detach().square().mean()
        for seed in range(200)
    ]
    assert 96 * float(torch.stack(squares).mean()) == pytest.approx(1, abs=0.2)


def test_steps_of_the_fit_lower_the_error_in_the_metric():
    linear, metric = make_linear(48, 64), metric_of(48, 64)
    for chi in (2, 4, 8):
        start = TreeLinear.from_linear(linear, chi=chi, metric=metric, max_steps=0)
        fitted = TreeLinear.from_linear(linear, chi=chi, metric=metric)
        assert fitted.error(linear.weight, metric) < start.error(linear.weight, metric)


@pytest.mark.parametrize("forward", ["reconstruct", "chain"])
def test_flops_are_those_of_forming_and_of_each_token(forward):
    layer = TreeLinear(36, 24, chi=4, forward=forward)
    assert layer.flops(0) > 0
    assert layer.flops(3) == layer.flops(0) + 3 * (layer.flops(1) - layer.flops(0))
    model = torch.nn.Sequential(layer)
    assert mpo_core.reconstruct_flops(model) == layer.flops(0)
    if forward == "reconstruct":
        assert layer.flops(1) - layer.flops(0) == 2 * 36 * 24


@pytest.mark.parametrize("power", [-900, 900])
def test_matrices_of_extreme_scale_are_decomposed_alike(power):
    W = normal(24, 36)
    plain = TreeLinear.from_matrix(W, chi=4).to_matrix()
    scaled = TreeLinear.from_matrix(W * 2.0**power, chi=4).to_matrix()
    torch.testing.assert_close(scaled * 2.0**-power, plain)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "exactly one of `chi` and `max_params`"),
        ({"chi": 0}, "`chi >= 1`"),
        ({"chi": 2, "n_sites": 7}, "n_sites"),
        ({"chi": 2, "forward": "cached"}, "`forward` must be one of reconstruct, chain"),
        ({"chi": 2, "factorisation": "min_params"}, "`factorisation` must be one of paper, balanced"),
        ({"max_params": 3}, "chi 1 needs"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, told):
    with pytest.raises(ValueError, match=told) as raised:
        TreeLinear(36, 24, **options)
    assert "\n" not in str(raised.value)
