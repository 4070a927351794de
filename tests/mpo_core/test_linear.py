"""MPOLinear against dense oracles: values, gradients, and what a layer must survive."""

from __future__ import annotations

import copy
import string

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from mpo_core.layers.mpo import MPOLinear
from mpo_core.tensor_train.bonds import clip_bonds

shapes = pytest.mark.parametrize(
    ("out_features", "in_features", "n_sites"),
    [(12, 8, 1), (12, 8, 2), (12, 8, 3), (24, 16, 4), (7, 12, 2), (1, 5, 3)],
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_layer(out_features, in_features, n_sites, *, chi=3, seed=0, **options):
    layer = MPOLinear(
        in_features, out_features, chi=chi, n_sites=n_sites, generator=seeded(seed), dtype=torch.float64, **options
    )
    if layer.bias is not None:
        layer.bias.data.normal_(generator=seeded(seed + 1))
    return layer


def make_linear(out_features, in_features, *, bias=True, dtype=torch.float64):
    linear = nn.Linear(in_features, out_features, bias=bias, device="meta", dtype=dtype).to_empty(device="cpu")
    for parameter in linear.parameters():
        parameter.data.normal_(generator=seeded(5))
    return linear


def einsum_forward(x, cores, bias):
    """y from x and the cores in one contraction over named indices, W never formed."""
    n_sites = len(cores)
    letters = iter(string.ascii_letters)
    bonds, rows, columns = ([next(letters) for _ in range(n)] for n in (n_sites + 1, n_sites, n_sites))
    sites = [bonds[site] + rows[site] + columns[site] + bonds[site + 1] for site in range(n_sites)]
    equation = f"Z{''.join(columns)},{','.join(sites)}->Z{''.join(rows)}"
    y = torch.einsum(equation, x.reshape(len(x), *(core.shape[2] for core in cores)), *cores)
    return y.reshape(len(x), -1) + (0 if bias is None else bias)


@shapes
@pytest.mark.parametrize("bias", [True, False])
def test_mpo_linear_values_and_gradients_match_dense(out_features, in_features, n_sites, bias):
    layer = make_layer(out_features, in_features, n_sites, bias=bias)
    linear = make_linear(out_features, in_features, bias=bias)
    linear.weight.data.copy_(layer.to_matrix())
    if layer.bias is not None:
        linear.bias.data.copy_(layer.bias)
    x = torch.randn(2, 5, in_features, generator=seeded(2), dtype=torch.float64)
    dy = torch.randn(2, 5, out_features, generator=seeded(3), dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(input) for module, input in zip((layer, linear), inputs, strict=True)]
    for output in outputs:
        output.backward(dy)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, linear.bias.grad)


@shapes
def test_mpo_linear_core_gradients_match_one_einsum(out_features, in_features, n_sites):
    layer = make_layer(out_features, in_features, n_sites)
    x = torch.randn(5, in_features, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    dy = torch.randn(5, out_features, generator=seeded(3), dtype=torch.float64)
    variables = [x, layer.bias, *layer.cores]
    oracle = einsum_forward(x, list(layer.cores), layer.bias)
    torch.testing.assert_close(layer(x), oracle)
    for ours, theirs in zip(
        torch.autograd.grad(layer(x), variables, dy), torch.autograd.grad(oracle, variables, dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_mpo_linear_gradients_match_finite_differences():
    layer = make_layer(4, 6, 2, chi=2)
    x = torch.randn(3, 6, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def forward(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *parameters))


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 0), (2, 3, 4)])
def test_mpo_linear_takes_any_leading_shape(leading):
    layer = make_layer(12, 8, 2)
    x = torch.randn(*leading, 8, generator=seeded(2), dtype=torch.float64)
    assert layer(x).shape == (*leading, 12)
    torch.testing.assert_close(layer(x), x @ layer.to_matrix().T + layer.bias)


def test_mpo_linear_reports_clipped_bonds():
    layer = MPOLinear(128, 512, chi=50, n_sites=3, generator=seeded())
    assert (layer.chi, layer.bonds) == (50, (1, 32, 50, 1))
    assert [tuple(core.shape) for core in layer.cores] == [(1, 8, 4, 32), (32, 8, 4, 50), (50, 8, 8, 1)]
    assert "chi=50, d_out=[8, 8, 8], d_in=[4, 4, 8], bonds=[1, 32, 50, 1], bias=True" in repr(layer)


def test_mpo_linear_takes_given_sizes():
    layer = MPOLinear(12, 8, chi=2, d_out=[4, 2], d_in=[2, 6], generator=seeded())
    assert (layer.n_sites, layer.d_out, layer.d_in, layer.bonds) == (2, (4, 2), (2, 6), (1, 2, 1))


def test_mpo_linear_draws_from_its_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (
        MPOLinear(16, 16, chi=3, generator=generator) for generator in (seeded(1), seeded(1), seeded(2))
    )
    MPOLinear.from_linear(make_linear(16, 16), chi=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.to_matrix(), same.to_matrix())
    assert not torch.equal(one.to_matrix(), other.to_matrix())
    assert torch.equal(one.bias, torch.zeros(16))


def test_mpo_linear_on_meta_has_shapes_without_memory():
    layer = MPOLinear(2**16, 2**16, chi=16, n_sites=4, device="meta")
    assert sum(parameter.numel() for parameter in layer.parameters()) == 2 * 16 * 256 * (1 + 16) + 2**16
    assert layer(torch.empty(3, 2**16, device="meta")).shape == (3, 2**16)


def test_state_dict_round_trips_through_safetensors():
    layer = make_layer(12, 8, 3)
    assert list(layer.state_dict()) == ["bias", "cores.0", "cores.1", "cores.2"]
    other = MPOLinear(8, 12, chi=3, n_sites=3, device="meta", dtype=torch.float64)
    other.load_state_dict(load(save(layer.state_dict())), assign=True)
    assert torch.equal(other.to_matrix(), layer.to_matrix())
    assert torch.equal(other.bias, layer.bias)


def test_deepcopy_shares_nothing():
    layer = make_layer(12, 8, 2)
    before = layer.to_matrix().detach().clone()
    twin = copy.deepcopy(layer)
    twin.cores[0].data.zero_()
    assert torch.equal(layer.to_matrix(), before)
    assert not twin.to_matrix().any()


def test_autocast_keeps_the_reconstruction_in_float32():
    layer = MPOLinear(64, 64, chi=8, n_sites=3, generator=seeded())
    x = torch.randn(5, 64, generator=seeded(2))
    outside = layer.to_matrix()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, y = layer.to_matrix(), layer(x)
    assert torch.equal(inside, outside)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, nn.functional.linear(x.bfloat16(), outside.bfloat16(), layer.bias.bfloat16()))
    y.float().sum().backward()
    assert all(core.grad.dtype is torch.float32 for core in layer.cores)


def test_compile_captures_the_whole_graph():
    layer = make_layer(24, 16, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 16, generator=seeded(2), dtype=torch.float64)
    cores = list(layer.cores)
    torch.testing.assert_close(compiled(x), layer(x))
    for ours, theirs in zip(
        torch.autograd.grad(compiled(x).square().sum(), cores),
        torch.autograd.grad(layer(x).square().sum(), cores),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("n_sites", [1, 2, 3])
def test_stacked_layers_under_vmap_match_single_ones(n_sites):
    layers = [make_layer(12, 8, n_sites, seed=seed) for seed in (0, 10, 20)]
    parameters, buffers = stack_module_state(layers)
    x = torch.randn(3, 5, 8, generator=seeded(2), dtype=torch.float64)

    def loss(parameters, buffers, x):
        return functional_call(layers[0], (parameters, buffers), (x,)).square().sum()

    losses, gradients = vmap(loss)(parameters, buffers, x), vmap(grad(loss))(parameters, buffers, x)
    for index, layer in enumerate(layers):
        alone = layer(x[index]).square().sum()
        alone.backward()
        torch.testing.assert_close(losses[index], alone)
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(gradients[name][index], parameter.grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chi": 0}, "`chi >= 1` must hold, but got chi=0"),
        (
            {"chi": 2, "d_out": [8, 8], "d_in": [8, 8]},
            r"`prod\(d_out\) == out_features` must hold, but got d_out=\[8, 8\], out_features=65",
        ),
        ({"chi": 2, "d_out": [5, 13]}, r"must be given together, but got d_out=\[5, 13\], d_in=None"),
        ({"chi": 2, "d_out": [5, 13], "d_in": [8, 8], "n_sites": 3}, "`n_sites == len.*but got n_sites=3"),
        ({"chi": 2, "factorisation": "best"}, "`factorisation` must be one of .*, but got 'best'"),
        ({"chi": 2, "n_sites": 9}, "`1 <= n_sites <= 6` must hold, but got n_sites=9"),
        ({"chi": 2, "init": "tt_svd"}, "`init` of fresh cores must be one of .*, but got 'tt_svd'"),
        ({"chi": 2, "forward": "fast"}, "`forward` must be one of reconstruct, chain, cached, auto, but got 'fast'"),
        ({}, "exactly one of `chi`, `bonds` and `max_params` must be given, but got chi=None, bonds=None, max_pa"),
        ({"chi": 2, "bonds": [1, 2, 1]}, r"must be given, but got chi=2, bonds=\[1, 2, 1\], max_params=None"),
        ({"bonds": [1, 2, 2, 1]}, "`bonds` must be 1, then a cap"),
        (
            {"max_params": 100},
            r"chi=1 needs 144 parameters with d_out=\[5, 13\], d_in=\[8, 8\], but got max_params=100",
        ),
        ({"chi": 2, "d_out": [4, 16], "d_in": [8, 8], "padding": True}, "`prod.d_out. == out_features` must hold"),
    ],
)
def test_mpo_linear_says_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        MPOLinear(64, 65, **{"generator": seeded(), **options})


def test_bonds_are_taken_as_given():
    layer = MPOLinear(36, 24, bonds=[1, 2, 5, 1], n_sites=3, generator=seeded())
    assert (layer.bonds, layer.chi) == ((1, 2, 5, 1), 5)
    again = MPOLinear.from_linear(make_linear(24, 36), bonds=layer.bonds, n_sites=3)
    assert [core.shape for core in again.cores] == [core.shape for core in layer.cores]


def test_structure_and_counts_are_reported():
    layer = MPOLinear(128, 512, chi=8, n_sites=3, device="meta")
    assert layer.n_params_matrix == 2816
    assert layer.structure() == "chi=8, d_out=[8, 8, 8], d_in=[4, 4, 8], bonds=[1, 8, 8, 1]"


def test_bonds_are_those_of_clip_bonds():
    layer = MPOLinear(60, 36, chi=5, n_sites=3, device="meta")
    assert layer.bonds == clip_bonds(5, layer.d_out, layer.d_in)
