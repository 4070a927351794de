"""Weights whose squares are out of range, and weights that are zero, not finite or in half precision."""

from __future__ import annotations

import math

import pytest
import torch
from structured_linear_case import statistics_of
from torch import nn

from mpo_core.calibration.collecting import collect_statistics
from mpo_core.calibration.moments import Moment
from mpo_core.compression.compress import compress
from mpo_core.compression.rel_errors import rel_errors
from mpo_core.fitting.chain_fit import improve_cores
from mpo_core.fitting.fit import fit_cores
from mpo_core.fitting.metric import Metric
from mpo_core.layers.low_rank import LowRankLinear
from mpo_core.layers.monarch import MonarchLinear
from mpo_core.layers.mpo import MPOLinear
from mpo_core.layers.pruned import PrunedLinear
from mpo_core.tensor_train.algebra import (
    balance_cores,
    contract,
    frobenius_norm,
    inner_product,
    orthogonalize,
    rel_error,
    round_cores,
    tt_svd,
)
from mpo_core.tensor_train.initialisation import spectral_norm

SIZES = [2, 2, 2, 2]
KINDS = {
    "mpo": (MPOLinear, {"chi": 3, "d_out": SIZES, "d_in": SIZES}),
    "low_rank": (LowRankLinear, {"rank": 3}),
    "monarch": (MonarchLinear, {"rank": 1, "n_blocks": (2, 4)}),
    "pruned": (PrunedLinear, {"sparsity": 0.5}),
}
# About 1e-170, 1e160, 1e-30 and 1e30. Powers of two are exact: what is right differs by nothing but the exponent.
exponents = pytest.mark.parametrize(
    ("e", "dtype"), [(-565, torch.float64), (531, torch.float64), (-100, torch.float32), (100, torch.float32)]
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_gram(n=16, seed=1):
    x = normal(50, n, seed=seed) @ normal(n, n, seed=seed + 1)
    return x.T @ x / 50


def output_error(W, W_hat, gram):
    return Metric(gram).error(W, W_hat)


def in_metric(gram, scale=1.0):
    return None if gram is None else Metric(gram * scale)


def spread(e):
    """Exponents of four cores: in one, in all, and two ways in which parts of the chain are out of range alone."""
    return [(e, 0, 0, 0), (e // 4,) * 4, (e, e, -e, -e), (0, -e, 0, e)]


def close(actual, expected, dtype):
    torch.testing.assert_close(actual, expected, rtol=1e-4 if dtype is torch.float32 else 1e-10, atol=0)


@exponents
def test_functions_of_cores_scale_with_them(e, dtype):
    cores = tt_svd(normal(16, 16, dtype=dtype), SIZES, SIZES, 3)
    rounded, W = contract(round_cores(cores, 2)), contract(cores)
    for each in spread(e):
        scaled = [core * 2.0**k for core, k in zip(cores, each, strict=True)]
        factor = 2.0 ** sum(each)
        close(frobenius_norm(scaled) / factor, frobenius_norm(cores), dtype)
        assert spectral_norm(scaled) / factor == pytest.approx(spectral_norm(cores))
        for same in (*(orthogonalize(scaled, site) for site in range(4)), balance_cores(scaled)):
            torch.testing.assert_close(contract(same) / factor, W)
        torch.testing.assert_close(contract(round_cores(scaled, 2)) / factor, rounded)
        inverse = [core * 2.0**-k for core, k in zip(cores, each, strict=True)]
        close(inner_product(scaled, inverse), inner_product(cores, cores), dtype)
    scaled = [cores[0] * 2.0**e, *cores[1:]]
    norms = [float((core.double() / 2.0 ** (e / 4)).norm()) for core in balance_cores(scaled)]
    assert max(norms) == pytest.approx(min(norms), rel=1e-5)
    scaled = [core.requires_grad_() for core in scaled]
    plain = [core.requires_grad_() for core in cores]
    gradients = torch.autograd.grad(frobenius_norm(scaled), scaled)
    expected = torch.autograd.grad(frobenius_norm(plain), plain)
    for core, gradient, wanted in zip((0, 1, 2, 3), gradients, expected, strict=True):
        torch.testing.assert_close(gradient / (1 if core == 0 else 2.0**e), wanted)


def test_a_norm_out_of_range_is_refused_in_words():
    cores = [torch.full((1, 2, 2, 1), 1e30)] * 4
    for function in (lambda cores: orthogonalize(cores, 0), round_cores):
        with pytest.raises(ValueError, match=r"norm of the matrix of these cores is beyond the range of torch.float32"):
            function(cores)
    assert float(frobenius_norm(cores)) == pytest.approx(16e120)


@exponents
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_gram", [False, True])
def test_layers_scale_with_the_weight(e, dtype, kind, with_gram):
    cls, options = KINDS[kind]
    W, gram = normal(16, 16, dtype=dtype), make_gram() if with_gram else None
    expected = cls.from_matrix(W, metric=in_metric(gram), **options).to_matrix()
    actual = cls.from_matrix(W * 2.0**e, metric=in_metric(gram, 2.0**e), **options).to_matrix()
    torch.testing.assert_close(actual / 2.0**e, expected)
    assert rel_error(W * 2.0**e, actual) == pytest.approx(rel_error(W, expected), rel=1e-5)
    if gram is not None:
        error = output_error(W * 2.0**e, actual, gram)
        assert 0 < error == pytest.approx(output_error(W, expected, gram), rel=1e-5)


@pytest.mark.parametrize(("largest", "dtype"), [(1e-42, torch.float32), (1e-318, torch.float64)])
def test_subnormal_weights_have_the_error_of_their_digits(largest, dtype):
    W = torch.full((16, 16), largest, dtype=dtype)
    assert rel_error(W, contract(tt_svd(W, SIZES, SIZES, 1))) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_near_the_end_of_the_range_are_decomposed(dtype):
    W = torch.finfo(dtype).max / 64 * normal(16, 16).sign().to(dtype)
    assert rel_error(W, contract(tt_svd(W, SIZES, SIZES))) < 1e-5


def test_errors_of_weights_of_very_different_size():
    W, gram = normal(6, 6), make_gram(6)
    for factor in (1e-170, 1e160):
        assert rel_error(W, factor * W) == pytest.approx(abs(1 - factor))
        assert rel_error(factor * W, W) == pytest.approx(abs(1 - 1 / factor))
        assert output_error(W, factor * W, gram) == pytest.approx(abs(1 - factor))
        assert output_error(factor * W, W, factor * gram) == pytest.approx(abs(1 - 1 / factor))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_errors_of_what_is_not_finite_are_no_numbers(bad):
    W, gram = normal(6, 6), make_gram(6)
    W_hat = W.clone()
    W_hat[1, 2] = bad
    assert not output_error(W, W_hat, gram) < math.inf
    assert not rel_error(W, W_hat) < math.inf
    assert math.isnan(output_error(W_hat, W, gram))
    assert math.isnan(rel_error(W_hat, W))


@exponents
@pytest.mark.parametrize("method", ["tt_svd", "whitened", "lbfgs"])
def test_fits_scale_with_the_weight(e, dtype, method):
    W, gram = normal(16, 16, dtype=dtype), make_gram()
    options = {"bonds": (1, 2, 3, 2, 1), "metric": Metric(gram), "method": method}
    cores, scaled = fit_cores(W, SIZES, SIZES, **options), fit_cores(W * 2.0**e, SIZES, SIZES, **options)
    torch.testing.assert_close(contract(scaled) / 2.0**e, contract(cores))


@exponents
def test_improve_cores_scales_with_the_weight_and_its_start(e, dtype):
    W, gram = normal(16, 16, dtype=dtype), make_gram()
    start = tt_svd(W, SIZES, SIZES, 3)
    fitted = improve_cores(W, start, Metric(gram))
    assert Metric(gram).error(W, contract(fitted)) < Metric(gram).error(W, contract(start))
    for each in spread(e):
        scaled = [core * 2.0**k for core, k in zip(start, each, strict=True)]
        cores = improve_cores(W * 2.0 ** sum(each), scaled, Metric(gram))
        torch.testing.assert_close(contract(cores) / 2.0 ** sum(each), contract(fitted))


def test_improve_cores_refuses_a_start_that_is_not_finite():
    W, gram = normal(16, 16), make_gram()
    start = tt_svd(W, SIZES, SIZES, 3)
    start[1][0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="`cores` must be finite, but core 1 is not"):
        improve_cores(W, start, Metric(gram))


def make_model(W):
    model = nn.Sequential(nn.Linear(16, 16, dtype=W.dtype), nn.Linear(16, 16, dtype=W.dtype))
    model[0].weight.data, model[1].weight.data = W, W.flip(0) * torch.logspace(0, -2, 16, dtype=W.dtype)
    return model


@exponents
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_compress_scales_with_the_weights(e, dtype, kind, calibrated):
    W = normal(16, 16, dtype=dtype)
    grams = {"0": make_gram(), "1": make_gram(seed=3)}
    statistics, scaled = (statistics_of({name: gram * 2.0**k for name, gram in grams.items()}) for k in (0, e))
    statistics, scaled = (statistics, scaled) if calibrated else (None, None)
    sizes = [{"chi": 2}, {"rel_error": 0.5}, {"keep": 0.6}]
    if kind == "pruned":
        sizes = sizes[1:2] if calibrated else sizes[1:]  # 64 sizes of it are measured for a budget
    for size in sizes if dtype is torch.float64 else sizes[:1]:  # all is computed in float64
        options = {"layer": kind, **size} | ({"factorisation": "balanced"} if kind == "mpo" else {})
        _, expected = compress(make_model(W), statistics=statistics, **options)
        _, report = compress(make_model(W * 2.0**e), statistics=scaled, **options)
        for row, wanted in zip(report.rows, expected.rows, strict=True):
            assert (row.kind, row.n_params_after) == (wanted.kind, wanted.n_params_after)
            assert row.rel_error == pytest.approx(wanted.rel_error, rel=1e-4)
            assert row.error == (wanted.error and pytest.approx(wanted.error, rel=1e-4))


@exponents
def test_rel_errors_scale_with_the_weights(e, dtype):
    W = normal(16, 16, dtype=dtype)
    assert rel_errors(make_model(W * 2.0**e), [2]) == pytest.approx(rel_errors(make_model(W), [2]), rel=1e-5)


# Inputs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "message"),
    [(1e-170, "its calibration inputs are all zero, or too small"), (1e160, "at most 1e.140, .* 1e.160")],
)
def test_inputs_that_cannot_be_squared_are_named(size, message):
    model, batches = make_model(normal(16, 16)), [torch.full((2, 16), size, dtype=torch.float64)]
    with pytest.raises(ValueError, match=f"0: .*{message}"):
        compress(model, chi=2, include=["0"], statistics=collect_statistics(model, batches))


def test_small_inputs_beside_others_count_as_they_are():
    moment = Moment()
    moment.add(torch.tensor([[1e-170, 0.0]], dtype=torch.float64))
    moment.add(torch.zeros(0, 2, dtype=torch.float64))
    moment.add(torch.tensor([[0.0, 3.0]], dtype=torch.float64))
    torch.testing.assert_close(moment.mean(), torch.diag(torch.tensor([0, 4.5], dtype=torch.float64)))


# Zeros, what is not finite, and half precision ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_weight_of_zeros_is_compressed_to_zeros(kind, calibrated, dtype):
    model = make_model(torch.zeros(16, 16, dtype=dtype))
    statistics = statistics_of({"0": make_gram(), "1": make_gram()}) if calibrated else None
    for size in ({"max_params": {"0": 100, "1": 100}}, {"rel_error": 0.5}, {"keep": 0.6}):
        compressed, report = compress(model, layer=kind, statistics=statistics, **size)
        for layer, row in zip(compressed, report.rows, strict=True):
            assert row.kind == kind
            assert torch.equal(layer.to_matrix(), torch.zeros(16, 16, dtype=dtype))
            assert row.rel_error == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("size", [{"max_params": {"0": 100, "1": 100}}, {"keep": 0.5}, {"rel_error": 0.3}])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_weight_that_is_not_finite_is_named(kind, bad, size, calibrated):
    model = make_model(normal(16, 16))
    model[1].weight.data[2, 3] = bad
    statistics = statistics_of({"0": make_gram(), "1": make_gram()}) if calibrated else None
    with pytest.raises(ValueError, match=r"^1: `W` must be finite to be decomposed, but 1 entries are not"):
        compress(model, layer=kind, statistics=statistics, **size)
    with pytest.raises(ValueError, match=r"^1: `W` must be finite"):
        rel_errors(model, [2])


@pytest.mark.parametrize("kind", ["mpo", "low_rank", "monarch"])
@pytest.mark.parametrize("with_gram", [False, True])
def test_norms_beyond_half_precision_are_spread_over_the_factors(kind, with_gram):
    """Entries of 20,000 in a matrix of norm 1,280,000, where float16 ends at 65,504."""
    signs = torch.kron(normal(8).sign(), normal(8, seed=1).sign())
    W = (2e4 * torch.outer(signs, signs)).half()
    cls, gram = KINDS[kind][0], make_gram(64) if with_gram else None
    layer = cls.from_matrix(W, metric=in_metric(gram), **{"chi" if kind == "mpo" else "rank": 2})
    assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())
    assert rel_error(W, layer.to_matrix()) < 0.01


def test_rounding_of_half_precision_cores_stays_within_range():
    W = torch.full((64, 64), 2e4, dtype=torch.float16)
    cores = balance_cores(tt_svd(W.float(), [8, 8], [8, 8], 2))
    rounded = round_cores([core.half() for core in cores], 1)
    assert rel_error(W, contract(rounded)) < 0.01


def test_a_layer_that_overflows_float16_does_not_meet_an_output_error():
    generator = torch.Generator().manual_seed(0)
    W = (torch.randn(16, 16, generator=generator).clamp(-3, 3).double() * 20000).half()
    linear = nn.Linear(16, 16, bias=False, device="meta")
    linear.weight = nn.Parameter(W)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(14))
    statistics = statistics_of({"0": x.T @ x})  # the first Monarch layer found has an infinite entry
    _, report = compress(nn.Sequential(linear), layer="monarch", rel_error=0.5, statistics=statistics)
    assert report.rows[0].error <= 0.5
