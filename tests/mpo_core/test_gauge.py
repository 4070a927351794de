"""The fixed gauge of bonds: the same matrices with fewer numbers, and none of them large."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structured_linear_case import make_linear, metric_of, normal, seeded
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import mpo_core
from mpo_core.compression.compress import compress
from mpo_core.layers.low_rank import LowRankLinear
from mpo_core.layers.mpo import MPOLinear
from mpo_core.tensor_train.algebra import contract, tt_svd
from mpo_core.tensor_train.bonds import n_params
from mpo_core.tensor_train.contraction import chain
from mpo_core.tensor_train.few_rows import chain_of_few_rows, few_rows
from mpo_core.tensor_train.gauge import (
    LARGEST,
    fix_cores,
    fix_rows,
    free_cores,
    n_fixed,
    place_rows,
)

shapes = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**32 - 1))
def test_rows_are_found_again_and_none_is_large(shape, seed):
    M = normal(*shape, seed=seed)
    C, order, R = fix_rows(M)
    n, r = shape
    assert C.shape == (n - r, r)
    assert sorted(order.tolist()) == list(range(n))
    assert C.numel() == 0 or C.abs().max() <= LARGEST
    torch.testing.assert_close(place_rows(C, order) @ R, M)


@pytest.mark.parametrize("decay", [0, 3, 12])
def test_rows_of_badly_conditioned_matrices_stay_small(decay):
    scales = torch.logspace(0, -decay, 60, dtype=torch.float64)
    M = normal(200, 60) * scales @ normal(60, 60, seed=1)
    C, order, R = fix_rows(M)
    assert C.abs().max() <= LARGEST
    torch.testing.assert_close(place_rows(C, order) @ R, M)


def test_rows_of_a_matrix_without_full_rank():
    for M in (torch.zeros(6, 3), torch.outer(normal(6), normal(3, seed=1)).float()):
        C, order, R = fix_rows(M)
        assert torch.isfinite(C).all()
        torch.testing.assert_close(place_rows(C, order) @ R, M)


@pytest.mark.parametrize("n_sites", [1, 2, 3, 4])
def test_a_chain_is_found_again_with_chi_squared_numbers_less_for_each_bond(n_sites):
    d_out, d_in = [2, 3, 2, 2][:n_sites], [3, 2, 2, 3][:n_sites]
    cores = tt_svd(normal(math.prod(d_out), math.prod(d_in)), d_out, d_in, 4)
    stored, orders = fix_cores(cores)
    bonds = (1, *(core.shape[3] for core in cores))
    assert sum(core.numel() for core in stored) == n_params(bonds, d_out, d_in) - n_fixed(bonds)
    again = free_cores(stored, orders, [core.shape for core in cores])
    torch.testing.assert_close(contract(again), contract(cores))


@pytest.mark.parametrize(
    ("kind", "size"), [(LowRankLinear, {"rank": 5}), (MPOLinear, {"chi": 5}), (MPOLinear, {"chi": 5, "n_sites": 3})]
)
def test_the_gauge_is_changed_both_ways_without_a_change_of_the_matrix(kind, size):
    free = kind.from_linear(make_linear(), **size).eval().requires_grad_(False)
    fixed = free.with_gauge("fixed")
    bonds = [free.rank] if kind is LowRankLinear else free.bonds[1:-1]
    assert free.n_params_matrix - fixed.n_params_matrix == sum(bond**2 for bond in bonds)
    assert fixed.n_params_matrix == sum(p.numel() for p in fixed.parameters()) - 12
    for layer in (fixed, fixed.with_gauge("free"), fixed.with_gauge("fixed")):
        torch.testing.assert_close(layer.to_matrix(), free.to_matrix())
        assert torch.equal(layer.bias, free.bias)
        assert not layer.training
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_fewer_parameters_are_counted_flops_and_indices_too():
    layer = LowRankLinear(20, 12, rank=5, gauge="fixed", device="meta")
    assert layer.n_params_matrix == 5 * (20 + 12 - 5)
    assert layer.n_index_bits == 5 * 4
    assert layer.flops(1) == 2 * 5 * (20 + 12 - 5)
    chain = MPOLinear(16, 16, chi=3, n_sites=2, gauge="fixed", device="meta")
    assert chain.n_params_matrix == 2 * 16 * 3 - 9
    assert chain.n_index_bits == 3 * 4


@pytest.mark.parametrize("max_params", [60, 107, 108, 135, 500])
def test_max_params_gives_the_largest_layer_within_it(max_params):
    layer = LowRankLinear(20, 12, max_params=max_params, gauge="fixed", device="meta")
    assert layer.n_params_matrix <= max_params
    assert layer.rank == 12 or (layer.rank + 1) * (32 - layer.rank - 1) > max_params
    chain = MPOLinear(20, 12, max_params=max_params, gauge="fixed", device="meta")
    assert chain.n_params_matrix <= max_params
    larger = MPOLinear(20, 12, chi=chain.chi + 1, gauge="fixed", device="meta")
    assert larger.n_params_matrix > max_params or larger.bonds == chain.bonds


@pytest.mark.parametrize("kind", ["low_rank", "mpo"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_at_equal_parameters_the_fixed_gauge_has_the_lower_error(kind, calibrated):
    model = nn.Sequential(make_linear(48, 64), nn.Tanh(), make_linear(40, 48))
    batches = [normal(60, 64, seed=seed) for seed in range(2)]
    statistics = mpo_core.collect_statistics(model, batches, held_out=0) if calibrated else None
    errors = []
    for gauge in ("free", "fixed"):
        _, report = compress(model, layer=kind, keep=0.5, gauge=gauge, statistics=statistics)
        assert 0.45 < report.kept <= 0.5
        errors.append(sum((row.error if calibrated else row.rel_error) ** 2 for row in report.rows))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("kind", ["low_rank", "mpo"])
def test_bfloat16_adds_little_error_in_the_fixed_gauge(kind):
    W, metric = make_linear(48, 64).weight.detach(), metric_of(48, 64)
    errors = []
    for gauge in ("free", "fixed"):
        layer = mpo_core.kind_called(kind).from_matrix(W, max_params=1500, gauge=gauge, metric=metric)
        exact, rounded = layer.to_matrix(), layer.bfloat16().to_matrix().double()
        errors.append(metric.norm(rounded - exact) / metric.norm(W))
    assert errors[1] < 3 * errors[0] + 1e-3


def test_a_fresh_layer_in_the_fixed_gauge_has_the_matrix_of_one_in_the_free_gauge():
    for kind, size in ((LowRankLinear, {"rank": 5}), (MPOLinear, {"chi": 4, "n_sites": 3})):
        for init in kind.inits:
            free, fixed = (
                kind(20, 12, generator=seeded(3), init=init, gauge=gauge, dtype=torch.float64, **size)
                for gauge in ("free", "fixed")
            )
            torch.testing.assert_close(fixed.to_matrix(), free.to_matrix())


def test_an_optimiser_trains_what_is_stored():
    layer = MPOLinear(20, 12, chi=4, generator=seeded(), gauge="fixed", dtype=torch.float64)
    x, y = normal(200, 20), normal(200, 20) @ normal(20, 12, seed=1)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(100):
        loss = (layer(x) - y).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("size", [{"layer": "low_rank", "chi": 4}, {"chi": 4}])
def test_decay_of_the_matrix_shrinks_it_as_a_dense_one_in_the_fixed_gauge_too(size):
    model = nn.Sequential(make_linear(48, 64, bias=False))
    for gauge in ("free", "fixed"):
        compressed, _ = compress(model, gauge=gauge, **size)
        before = compressed[0].to_matrix().detach()
        groups = mpo_core.param_groups(compressed, 0.01, weight_decay=0.1, decay="matrix")
        optimiser = torch.optim.AdamW(groups)
        for parameter in compressed.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        torch.testing.assert_close(compressed[0].to_matrix(), (1 - 0.01 * 0.1) * before, rtol=0, atol=1e-6)


def test_a_kept_matrix_follows_the_places_of_the_rows():
    layer = MPOLinear(20, 12, chi=3, generator=seeded(), gauge="fixed", forward="cached").eval()
    x = torch.ones(2, 20)
    with torch.no_grad():
        layer(x)
        layer.order_0.copy_(layer.order_0.flip(0))
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.to_matrix(), layer.bias))


def test_the_gauge_of_a_frozen_bias_and_of_shapes_alone():
    layer = LowRankLinear(20, 12, rank=3, generator=seeded())
    layer.bias.requires_grad_(False)
    fixed = layer.with_gauge("fixed")
    assert [parameter.requires_grad for parameter in (fixed.A, fixed.B, fixed.bias)] == [True, True, False]
    for kind, size in ((LowRankLinear, {"rank": 3}), (MPOLinear, {"chi": 3})):
        shapes = kind(20, 12, device="meta", **size).with_gauge("fixed")
        assert next(shapes.parameters()).is_meta
        assert shapes.gauge == "fixed"


def test_an_error_is_met_by_chains_of_the_fewest_parameters_in_the_fixed_gauge():
    linear = make_linear(96, 64)
    for target in (0.5, 0.3):
        layer = MPOLinear.from_linear(linear, rel_error=target, factorisation="min_params", gauge="fixed")
        assert layer.error(linear.weight) <= target
    _, report = compress(nn.Sequential(linear), rel_error=0.5, factorisation="min_params", gauge="fixed")
    assert report.rows[0].kind == "mpo"


def test_budgets_hold_for_layers_of_different_dtypes():
    layers = [make_linear(40, 48, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.float16)]
    _, report = compress(nn.ModuleList(layers), layer="pruned", keep=0.3)
    assert report.kept <= 0.3


def test_even_shares_that_hold_everything_or_nothing():
    model = nn.Sequential(make_linear(48, 64, dtype=torch.float16))
    _, report = compress(model, layer="pruned", keep=1.0, spread="even")
    assert report.rows[0].kind == "dense"
    with pytest.raises(ValueError, match=r"^0: its share, 184 parameters, does not hold the mask or indices alone"):
        compress(model, layer="pruned", keep=0.06, spread="even")
    with pytest.raises(ValueError, match=r"^0: its share is too small: rank 1 needs 112 parameters"):
        compress(model, layer="low_rank", keep=0.01, spread="even")


@pytest.mark.parametrize("kind", [LowRankLinear, MPOLinear])
def test_an_unknown_gauge_is_refused(kind):
    with pytest.raises(ValueError, match="`gauge` must be one of free, fixed, but got 'loose'"):
        kind(20, 12, max_params=200, gauge="loose", device="meta")


def test_masks_count_in_a_budget():
    model = nn.Sequential(make_linear(48, 64, dtype=torch.float32), make_linear(40, 48, dtype=torch.float32))
    n_dense = 48 * 64 + 40 * 48
    for spread in ("errors", "even"):
        compressed, report = compress(model, layer="pruned", keep=0.5, spread=spread)
        assert report.kept <= 0.5
        assert sum(row.n_params_after for row in report.rows) == pytest.approx((0.5 - 1 / 32) * n_dense, rel=0.05)
        assert mpo_core.n_params_compressed(compressed) == sum(row.n_params_after for row in report.rows)


# Applying layers in the fixed gauge -----------------------------------------------------------------------------------

SPLITS = [((12, 1), (2, 10)), ((1, 12), (10, 2)), ((2, 6), (20, 1)), ((6, 2), (1, 20)), ((3, 4), (4, 5))]
APPLIED = [
    (LowRankLinear, {"rank": 4}),
    *((MPOLinear, {"chi": 9, "d_out": d_out, "d_in": d_in, "forward": "chain"}) for d_out, d_in in SPLITS),
    (MPOLinear, {"chi": 8, "d_out": (6, 2, 1), "d_in": (1, 2, 10), "forward": "chain"}),
]
applied = pytest.mark.parametrize(("kind", "size"), APPLIED)


def fixed_layer(kind, size, seed=0, dtype=torch.float64):
    layer = kind(20, 12, gauge="fixed", generator=seeded(seed), dtype=dtype, **size)
    layer.bias.data.normal_(generator=seeded(seed + 1))
    return layer


@applied
@pytest.mark.parametrize("n_tokens", [1, 2, 4, 9])
def test_any_number_of_tokens_has_the_values_and_gradients_of_the_matrix(kind, size, n_tokens):
    """Rows are put in place before the product, after it, or in the state, depending on the number of tokens."""
    layer = fixed_layer(kind, size)
    for x in (normal(n_tokens, 20, seed=1), normal(20, n_tokens, seed=1).T, normal(1, n_tokens, 20, seed=1)):
        x, dy = x.requires_grad_(), normal(*x.shape[:-1], 12, seed=2)
        variables, expected = [x, *layer.parameters()], nn.functional.linear(x, layer.to_matrix(), layer.bias)
        torch.testing.assert_close(layer(x), expected)
        ours, theirs = (torch.autograd.grad(y, variables, dy) for y in (layer(x), expected))
        torch.testing.assert_close(ours, theirs)


@applied
def test_few_tokens_of_stacked_and_of_compiled_layers(kind, size):
    layers = [fixed_layer(kind, size, seed) for seed in (0, 3)]
    parameters, buffers = stack_module_state(layers)
    for n_tokens in (1, 2, 5):
        x = normal(2, n_tokens, 20)
        y = vmap(lambda *state: functional_call(layers[0], state[:2], (state[2],)))(parameters, buffers, x)
        torch.compiler.reset()
        compiled = torch.compile(layers[1], backend="aot_eager", fullgraph=True)
        for index, layer in enumerate(layers):
            torch.testing.assert_close(y[index], layer(x[index]))
        torch.testing.assert_close(compiled(x[1]), y[1])


@applied
def test_few_tokens_in_bfloat16_and_on_the_meta_device(kind, size):
    layer = fixed_layer(kind, size, dtype=torch.float32)
    for n_tokens in (1, 2, 5):
        x = normal(n_tokens, 20, dtype=torch.float32)
        exact = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        rounded = fixed_layer(kind, size, dtype=torch.float32).bfloat16()(x.bfloat16())
        for each in (y, rounded):
            assert each.dtype is torch.bfloat16
            torch.testing.assert_close(each.float(), exact, atol=0.1, rtol=0.05)
        assert fixed_layer(kind, size).to("meta")(x.double().to("meta")).shape == (n_tokens, 12)


@pytest.mark.parametrize("shape", [(3, 40), (40,), (20, 1), (1,)])
def test_an_input_of_another_size_is_refused(shape):
    for kind, size in (APPLIED[0], APPLIED[1]):
        with pytest.raises((RuntimeError, ValueError)):
            fixed_layer(kind, size)(normal(*shape))


@pytest.mark.parametrize("gauge", ["free", "fixed"])
@pytest.mark.parametrize("direction", ["left", "right"])
@pytest.mark.parametrize(("d_out", "d_in"), [*SPLITS, ((2, 3, 2), (5, 2, 2)), ((12,), (20,)), ((2, 1, 6), (1, 10, 2))])
def test_a_chain_of_few_rows_is_the_chain_of_the_cores(d_out, d_in, direction, gauge):
    cores = tt_svd(normal(12, 20), d_out, d_in, 4)
    stored, orders = fix_cores(cores) if gauge == "fixed" else (cores, [])
    shapes = [tuple(core.shape) for core in cores]
    for leading in ((), (1,), (2, 3), (0,)):
        x = normal(*leading, 20, seed=1)
        expected = chain(cores, x, direction)
        torch.testing.assert_close(chain_of_few_rows(stored, orders, shapes, x, direction), expected)


def test_few_tokens_are_those_for_which_less_is_moved():
    shapes = [(1, 12, 2, 9), (9, 1, 10, 1)]
    assert few_rows(shapes, "right", "fixed") == 4  # 4 · 2 columns, and a bond of 9
    assert few_rows(shapes, "left", "fixed") == 0
    assert few_rows([(1, 12, 20, 1)], "right", "fixed") == 0
    layer = MPOLinear(
        20, 12, bonds=(1, 9, 1), d_out=(12, 1), d_in=(2, 10), forward="chain", gauge="fixed", device="meta"
    )
    assert layer.flops(1) == 2 * (2 * (24 - 9) * 9 + 9 * 20)
    free = layer.with_gauge("free")
    assert layer.flops(5) == free.flops(5)
    copied = [sum(step.copied for step in each.products(5)) for each in (layer, free)]
    assert copied[0] - copied[1] == 2 * 24 * 9


def test_low_rank_counts_what_it_computes_for_few_and_for_many_tokens():
    layer = LowRankLinear(20, 12, rank=4, gauge="fixed", device="meta")
    assert [layer.flops(n) for n in (1, 3)] == [n * 2 * 4 * (20 + 12 - 4) for n in (1, 3)]
    assert [layer.flops(n) for n in (4, 9)] == [n * 2 * 4 * (20 + 12) for n in (4, 9)]
