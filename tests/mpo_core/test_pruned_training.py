"""A pruned layer in training: what is zero stays zero."""

from __future__ import annotations

import pytest
import torch

from mpo_core.layers.pruned import PrunedLinear


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer():
    return PrunedLinear.from_matrix(normal(12, 20), normal(12, seed=1), sparsity=0.7)


OPTIMISERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, weight_decay=0.1, centered=True),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=OPTIMISERS)
def test_pruned_entries_stay_zero_through_training(optimiser):
    layer = make_layer()
    before, mask = layer.to_matrix().detach().clone(), layer.mask.clone()
    optimise = optimiser(layer.parameters())
    for step in range(5):
        optimise.zero_grad()
        (layer(normal(6, 20, seed=step)) - normal(6, 12, seed=10 + step)).square().sum().backward()
        assert not layer.weight.grad[~mask].any()
        assert layer.weight.grad[mask].all()
        optimise.step()
    assert not layer.weight[~mask].any()
    assert not torch.equal(layer.to_matrix(), before)
    assert torch.equal(layer.to_matrix() != 0, mask)
    assert layer.n_params_matrix == int(mask.sum()) == 72


def test_pruned_matrix_stays_zero_even_where_the_weight_does_not():
    layer = make_layer()
    layer.weight.data.add_(1)
    assert not layer.to_matrix()[~layer.mask].any()
    torch.testing.assert_close(layer(torch.eye(20, dtype=torch.float64)) - layer.bias, layer.to_matrix().T)
