"""MPOLinear made from a dense weight: by TT-SVD, under a Gram matrix, to a cap, an error or a number of parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpo_core.fitting.metric import Metric
from mpo_core.layers.mpo import MPOLinear
from mpo_core.tensor_train.algebra import rel_error, tt_svd


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_linear(out_features, in_features, *, bias=True, dtype=torch.float64):
    linear = nn.Linear(in_features, out_features, bias=bias, device="meta", dtype=dtype).to_empty(device="cpu")
    for parameter in linear.parameters():
        parameter.data.normal_(generator=seeded(5))
    return linear


@pytest.mark.parametrize("n_sites", [1, 2, 3])
def test_from_linear_is_exact_at_full_chi(n_sites):
    linear = make_linear(12, 18)
    layer = MPOLinear.from_linear(linear, chi=1000, n_sites=n_sites)
    x = torch.randn(5, 18, generator=seeded(2), dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))


def test_from_linear_is_the_tt_svd_at_a_cap():
    linear = make_linear(12, 18)
    layer = MPOLinear.from_linear(linear, chi=3, d_out=[3, 4], d_in=[6, 3])
    for core, expected in zip(layer.cores, tt_svd(linear.weight, [3, 4], [6, 3], 3), strict=True):
        assert torch.equal(core, expected)
    assert 0 < rel_error(linear.weight, layer.to_matrix()) < 1


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_carries_everything_else_over(bias):
    linear = make_linear(12, 18, bias=bias, dtype=torch.bfloat16).eval().requires_grad_(False)
    layer = MPOLinear.from_linear(linear, chi=3)
    assert not layer.training
    assert all(parameter.dtype is torch.bfloat16 for parameter in layer.parameters())
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    if bias:
        assert torch.equal(layer.bias, linear.bias)
        assert layer.bias.data_ptr() != linear.bias.data_ptr()
    else:
        assert layer.bias is None


def test_from_linear_refuses_a_weight_without_values():
    with pytest.raises(ValueError, match="a weight on the meta device has no values"):
        MPOLinear.from_linear(nn.Linear(4, 4, device="meta"), chi=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chi": 2, "bonds": [1, 2, 1]}, "exactly one of"),
        ({"rel_error": 0.1, "max_params": 50}, "`rel_error` allows no other cap than `chi`"),
        ({"rel_error": 0.1, "metric": Metric(torch.eye(18))}, "without `metric`"),
        ({"rel_error": -0.1}, "`0 <= rel_error < 1` must hold, but got rel_error=-0.1"),
        ({"chi": 2, "method": "best"}, "`method` must be one of"),
        ({"chi": 2, "method": "lbfgs"}, "needs a metric other than"),
    ],
)
def test_from_linear_says_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        MPOLinear.from_linear(make_linear(12, 18), **options)


@pytest.mark.parametrize(
    ("W", "message"),
    [
        (torch.ones(3), r"`W` must have shape \(out_features, in_features\), but got \(3,\)"),
        (torch.ones(4, 4, dtype=torch.int64), "`W` must be one of float64, .*, but got torch.int64"),
        (torch.full((4, 4), float("inf")), "`W` must be finite to be decomposed, but 16 entries are not"),
    ],
)
def test_from_matrix_refuses_what_is_no_weight(W, message):
    with pytest.raises(ValueError, match=message):
        MPOLinear.from_matrix(W, chi=2)


def test_from_matrix_refuses_a_bias_of_another_shape():
    with pytest.raises(ValueError, match=r"`bias` must have shape \(4,\), but got \(1,\)"):
        MPOLinear.from_matrix(torch.ones(4, 4), torch.ones(1), chi=2)


@pytest.mark.parametrize("rel", [0.05, 0.3, 0.7])
def test_from_linear_meets_an_error_target_with_bonds_that_follow_the_weight(rel):
    linear = make_linear(24, 36)
    layer = MPOLinear.from_linear(linear, rel_error=rel, n_sites=3)
    assert rel_error(linear.weight, layer.to_matrix()) <= rel
    shorter = MPOLinear.from_linear(linear, bonds=[1, *[bond - 1 for bond in layer.bonds[1:-1]], 1], n_sites=3)
    assert rel_error(linear.weight, shorter.to_matrix()) > rel
    capped = MPOLinear.from_linear(linear, rel_error=rel, chi=2, n_sites=3)
    assert max(capped.bonds) <= 2
    assert capped.chi <= 2


@pytest.mark.parametrize("factorisation", ["balanced", "min_params"])
@pytest.mark.parametrize("max_params", [200, 500, 863, 10_000])
def test_max_params_takes_the_largest_chi_that_fits(factorisation, max_params):
    options = {"factorisation": factorisation, "n_sites": 2}
    linear = make_linear(24, 36)
    layer = MPOLinear.from_linear(linear, max_params=max_params, **options)
    assert layer.n_params_matrix == sum(core.numel() for core in layer.cores) <= max_params
    more = MPOLinear(36, 24, chi=layer.chi + 1, device="meta", **options)
    if max_params < 24 * 36:
        assert more.n_params_matrix > max_params
    else:
        assert rel_error(linear.weight, layer.to_matrix()) < 1e-12
    assert MPOLinear(36, 24, max_params=max_params, device="meta", **options).bonds == layer.bonds


def test_from_linear_in_a_metric_is_better_for_those_inputs():
    linear = make_linear(12, 18)
    x = torch.randn(200, 18, generator=seeded(6), dtype=torch.float64) * torch.logspace(0, -2, 18).double()
    metric = Metric(x.T @ x / len(x))

    def output_error(layer):
        return torch.linalg.norm(x @ (layer.to_matrix() - linear.weight).T)

    plain, whitened, fitted = (
        MPOLinear.from_linear(linear, chi=3, metric=metric, method=method) for method in ("tt_svd", "whitened", None)
    )
    assert output_error(fitted) < output_error(plain) * 0.9
    assert output_error(fitted) <= output_error(whitened)


@pytest.mark.parametrize(("out_features", "in_features"), [(65, 128), (97, 101), (5, 7)])
@pytest.mark.parametrize("n_sites", [2, 3])
def test_padded_layers_are_sliced(out_features, in_features, n_sites):
    linear = make_linear(out_features, in_features)
    x = torch.randn(3, in_features, generator=seeded(2), dtype=torch.float64)
    layer = MPOLinear.from_linear(linear, chi=1000, padding=True, factorisation="min_params", n_sites=n_sites)
    torch.testing.assert_close(layer(x), linear(x))
    d_out, d_in = [11, *[3] * n_sites], [2, *[6] * n_sites]
    for mode in ("reconstruct", "chain", "cached"):
        options = {"d_out": d_out, "d_in": d_in, "padding": True, "dtype": torch.float64, "forward": mode}
        if torch.tensor(d_out).prod() < out_features or torch.tensor(d_in).prod() < in_features:
            with pytest.raises(ValueError, match="must hold"):
                MPOLinear(in_features, out_features, chi=3, generator=seeded(), **options)
            continue
        fresh = MPOLinear(in_features, out_features, chi=3, generator=seeded(), **options).eval()
        W = fresh.to_matrix()
        assert W.shape == (out_features, in_features)
        torch.testing.assert_close(fresh(x), x @ W.T)
    short = MPOLinear.from_linear(linear, rel_error=0.5, padding=True, n_sites=n_sites)
    assert rel_error(linear.weight, short.to_matrix()) <= 0.5
