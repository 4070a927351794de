"""Against tensorly-torch and tensorly on the same cores: independent implementations, whose layout is ours."""

from __future__ import annotations

import warnings

import pytest
import torch

from mpo_core.layers.mpo import FORWARD_MODES, MPOLinear
from mpo_core.tensor_train.algebra import contract, tt_svd

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tensorly
    import tltorch

SHAPES = [
    ((8, 16), (8, 16), 8),
    ((8, 8, 8), (4, 4, 8), 8),
    ((4, 4, 8), (8, 8, 8), 5),
    ((5, 13), (8, 16), 3),
    ((2, 3, 2, 3), (3, 2, 5, 2), 4),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_layer(d_out, d_in, chi, **options):
    sizes = {"d_out": d_out, "d_in": d_in, "chi": chi}
    n_out, n_in = torch.tensor(d_out).prod().item(), torch.tensor(d_in).prod().item()
    return MPOLinear(n_in, n_out, **sizes, bias=False, generator=seeded(), dtype=torch.float64, **options)


@pytest.fixture(autouse=True)
def torch_backend():
    before = tensorly.get_backend()
    tensorly.set_backend("pytorch")
    yield
    tensorly.set_backend(before)


@pytest.mark.parametrize(("d_out", "d_in", "chi"), SHAPES)
@pytest.mark.parametrize("implementation", ["factorized", "reconstructed"])
@pytest.mark.parametrize("mode", FORWARD_MODES)
def test_values_and_gradients_are_those_of_tensorly_torch(d_out, d_in, chi, implementation, mode):
    layer = make_layer(d_out, d_in, chi, forward=mode)
    theirs = [torch.nn.Parameter(core.detach().clone()) for core in layer.cores]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = tltorch.factorized_tensors.tensorized_matrices.BlockTT(
            theirs, tensorized_shape=(d_out, d_in), rank=layer.bonds
        )
        peer = tltorch.FactorizedLinear(
            d_in, d_out, bias=False, factorization=weight, implementation=implementation, dtype=torch.float64
        )
        x = torch.randn(6, layer.in_features, generator=seeded(1), dtype=torch.float64)
        dy = torch.randn(6, layer.out_features, generator=seeded(2), dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = layer(inputs[0]), peer(inputs[1])
        expected = torch.autograd.grad(outputs[1], [inputs[1], *theirs], dy)
    torch.testing.assert_close(outputs[0], outputs[1])
    for ours, other in zip(torch.autograd.grad(outputs[0], [inputs[0], *layer.cores], dy), expected, strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize(("d_out", "d_in", "chi"), SHAPES)
def test_matrix_is_that_of_tensorly(d_out, d_in, chi):
    layer = make_layer(d_out, d_in, chi)
    theirs = tensorly.tt_matrix.tt_matrix_to_matrix([core.detach() for core in layer.cores])
    torch.testing.assert_close(layer.to_matrix().detach(), theirs)


@pytest.mark.parametrize(("d_out", "d_in", "chi"), SHAPES)
def test_tt_svd_is_that_of_tensorly(d_out, d_in, chi):
    W = torch.randn(make_layer(d_out, d_in, chi).to_matrix().shape, generator=seeded(3), dtype=torch.float64)
    ours = tt_svd(W, d_out, d_in, chi)
    bonds = [1, *[core.shape[3] for core in ours]]
    tensorized = W.reshape(*d_out, *d_in)
    theirs = tensorly.decomposition.tensor_train_matrix(tensorized, rank=bonds)
    torch.testing.assert_close(contract(ours), tensorly.tt_matrix.tt_matrix_to_matrix(list(theirs)))
    for core, other in zip(ours, theirs, strict=True):  # both sweep from the left; signs are free
        torch.testing.assert_close(core.abs(), other.abs())
