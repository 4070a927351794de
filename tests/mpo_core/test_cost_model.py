"""The choice between ways to apply a chain, under given calibrations and under measured ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.utils.checkpoint

from mpo_core.layers.cost_model import (
    DeviceRates,
    _no_slower_than_larger,
    choose,
    measure_rates,
    rates_of,
    set_rates,
)
from mpo_core.layers.mpo import MPOLinear
from mpo_core.tensor_train.contraction import CHAIN_STATE, MODES, Product, products

FREE = ((1.0, 0.0),)
NONE, EQUAL = dict.fromkeys(MODES, (0.0, 0.0)), dict.fromkeys(MODES, (1e-6, 3e-6))
ONLY_FLOPS = DeviceRates(overhead=NONE, flop=((1.0, 1e-9),), read=FREE, write=FREE)
ONLY_BYTES = DeviceRates(overhead=NONE, flop=FREE, read=((1.0, 1e-9),), write=((1.0, 1e-9),))
ONLY_CALLS = DeviceRates(overhead=EQUAL, flop=FREE, read=FREE, write=FREE)

LARGE = ((1, 4, 1), (64, 64), (64, 64))
SMALL = ((1, 16, 1), (8, 16), (16, 8))


@pytest.fixture
def calibrated():
    """Sets the CPU's rates, and forgets it after the test."""
    yield lambda rates: set_rates("cpu", torch.float32, rates)
    set_rates("cpu", torch.float32, None)


def test_seconds_add_up():
    rates = DeviceRates(NONE, ((2.0, 3.0),), ((1.0, 5.0),), ((1.0, 7.0),), itemsize=2)
    # (2 × 2) @ (2 × 2): 16 FLOPs, 8 elements read, 4 written.
    assert rates.seconds([Product(1, 2, 2, 2)] * 2) == pytest.approx(2 * (16 * 3 + 16 * 5 + 8 * 7))


def test_rates_are_interpolated_by_size_and_constant_beyond():
    rates = DeviceRates(NONE, ((4.0, 3.0), (16.0, 1.0)), FREE, FREE)
    per_flop = {n: rates.seconds([Product(1, n, n, n)]) / (2 * n**3) for n in (1, 4, 8, 16, 100)}
    assert per_flop == pytest.approx({1: 3.0, 4: 3.0, 8: 2.0, 16: 1.0, 100: 1.0})


def test_rate_of_a_thin_product_is_near_that_of_its_smallest_side():
    rates = DeviceRates(NONE, ((8.0, 8.0), (64.0, 1.0)), FREE, FREE)
    for sides in ((8, 512, 512), (512, 8, 512), (np.int64(512), np.int64(512), np.int64(8))):
        m, k, n = sides
        # The mean is 8 · 3^(1/3): on the line from (log 8, 8) to (log 64, 1).
        expected = 8 - 7 * math.log(3) / 3 / math.log(8)
        assert rates.seconds([Product(1, *sides)]) / (2 * m * k * n) == pytest.approx(expected, rel=1e-5)


def test_no_size_is_taken_to_be_slower_than_a_larger_one():
    measured = [(1.0, 3.0), (2.0, 90.0), (4.0, 1.0), (8.0, 2.0), (16.0, 5.0)]
    assert _no_slower_than_larger(measured) == ((1.0, 1.0), (2.0, 1.0), (4.0, 1.0), (8.0, 2.0), (16.0, 5.0))


@pytest.mark.parametrize(
    ("chain", "n_tokens", "training", "rates", "expected"),
    [
        (LARGE, 256, False, ONLY_FLOPS, "chain"),
        (LARGE, 256, True, ONLY_FLOPS, "chain"),
        (LARGE, 1, False, ONLY_BYTES, "chain"),
        (SMALL, 4, False, ONLY_FLOPS, "chain"),
        (SMALL, 8192, False, ONLY_FLOPS, "reconstruct"),
        (SMALL, 8192, True, ONLY_FLOPS, "reconstruct"),
        (SMALL, 8192, True, ONLY_BYTES, "reconstruct"),
    ],
)
def test_choose_takes_the_cheaper(chain, n_tokens, training, rates, expected):
    assert choose(*chain, n_tokens, training=training, rates=rates) == expected


def test_choose_changes_over_where_the_flops_do():
    # research/structured_layers.md, section B: below 8 tokens at χ = 16, 128 × 128 on (8, 16) × (8, 16).
    chain = ((1, 16, 1), (8, 16), (8, 16))
    chosen = [choose(*chain, n, training=False, rates=ONLY_FLOPS) for n in range(1, 16)]
    assert chosen == ["chain"] * 7 + [chosen[7]] + ["reconstruct"] * 7


def test_choose_counts_what_only_gradients_cost():
    # In memory traffic this chain wins a forward, but not with the partial sums of its cores' gradients.
    chain = ((1, 4, 4, 1), (8, 8, 8), (4, 4, 8))
    chosen = [choose(*chain, 64, training=training, rates=ONLY_BYTES) for training in (False, True)]
    assert chosen == ["chain", "reconstruct"]


def test_choose_counts_calls_too():
    # One product with W at hand against two without.
    assert choose(*LARGE, 1, training=False, rates=ONLY_CALLS, modes=("chain", "cached")) == "cached"
    slow_chain = DeviceRates({"reconstruct": (1e-6, 3e-6), "chain": (2e-6, 2e-6)}, FREE, FREE, FREE)
    chosen = [choose(*LARGE, 1, training=training, rates=slow_chain) for training in (False, True)]
    assert chosen == ["reconstruct", "chain"]


def test_choose_knows_that_a_chain_without_gradients_stays_in_the_cache():
    # Beyond two caches' worth of bytes memory is a hundred times as slow.
    edge = 8.0 * CHAIN_STATE
    memory = ((edge, 1e-12), (2 * edge, 1e-10))
    chosen = [
        choose(
            *LARGE,
            8192,
            training=training,
            rates=DeviceRates(NONE, ((1.0, 1e-13),), memory, memory, in_parts=parts),
        )
        for parts, training in ((True, False), (False, False), (True, True))
    ]
    assert chosen == ["chain", "reconstruct", "reconstruct"]


def test_choose_counts_every_part_of_a_chain():
    # Each of the parts has its calls.
    chosen = [
        choose(
            *LARGE,
            n_tokens,
            training=False,
            rates=DeviceRates(EQUAL, ((1.0, 1e-18),), FREE, FREE, in_parts=parts),
        )
        for parts in (True, False)
        for n_tokens in (1, 8192)
    ]
    assert chosen == ["chain", "reconstruct", "chain", "chain"]


def test_calibrate_measures_a_device_that_can_be_predicted():
    rates = measure_rates("cpu", torch.float32)
    assert rates.itemsize == 4
    for curve in (rates.flop, rates.read, rates.write, rates.copy):
        sizes = [size for size, _ in curve]
        assert sizes == sorted(set(sizes))
        assert all(0 < per_unit < 1e-6 for _, per_unit in curve)
    assert set(rates.overhead) == set(MODES)
    assert all(0 < forward < 0.1 and both > forward for forward, both in rates.overhead.values())
    assert rates.in_parts
    # A hundredfold difference in work is beyond any noise; of one part, as calls take long on a busy machine.
    assert choose(*LARGE, 16, training=False, rates=rates) == "chain"
    wide = ((1, 512, 1), (32, 32), (32, 32))
    assert choose(*wide, 4096, training=False, rates=rates) == "reconstruct"


def test_calibration_is_measured_once_and_can_be_given(calibrated):
    calibrated(ONLY_BYTES)
    assert rates_of("cpu", torch.float32) is ONLY_BYTES
    assert rates_of(torch.device("cpu"), torch.float32) is ONLY_BYTES
    calibrated(None)
    measured = rates_of("cpu", torch.float32)
    assert measured is not ONLY_BYTES
    assert rates_of("cpu", torch.float32) is measured


@pytest.mark.slow
def test_calibration_is_measured_in_the_middle_of_anything(calibrated):
    layer = MPOLinear(32, 32, chi=4, generator=torch.Generator().manual_seed(0), forward="auto")
    x = torch.ones(3, 32)
    expected = x @ layer.to_matrix().detach().T
    calibrated(None)
    with torch.inference_mode():
        torch.testing.assert_close(layer.eval()(x), expected)
    calibrated(None)
    y = torch.utils.checkpoint.checkpoint(layer.train(), x.requires_grad_(), use_reentrant=False)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    calibrated(None)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert rates_of("cpu", torch.bfloat16).itemsize == 2


def test_kept_matrix_passes_gradients_to_x(calibrated):
    calibrated(None)
    layer = MPOLinear(512, 512, chi=256, generator=torch.Generator().manual_seed(0), forward="auto")
    layer.eval().requires_grad_(False)
    assert layer._mode(list(layer.cores), 256, True) == "cached"


def test_calibrate_draws_nothing():
    before = torch.get_rng_state()
    measure_rates("cpu", torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("evaluates", "n_tokens", "rates", "mode"),
    [
        (True, 1, ONLY_BYTES, "chain"),
        (True, 1, ONLY_CALLS, "cached"),
        (False, 1, ONLY_FLOPS, "chain"),
        (False, 4096, ONLY_FLOPS, "reconstruct"),
    ],
)
def test_auto_forward_does_what_is_chosen(calibrated, evaluates, n_tokens, rates, mode):
    calibrated(rates)
    layer = MPOLinear(128, 128, chi=16, generator=torch.Generator().manual_seed(0), forward="auto").train(not evaluates)
    x = torch.ones(n_tokens, 128)
    with torch.set_grad_enabled(not evaluates):
        assert layer._mode(list(layer.cores), n_tokens, False) == mode
        y = layer(x)
    torch.testing.assert_close(y, x @ layer.to_matrix().T)
    assert (layer._cache is not None) == (mode == "cached")
    if evaluates:
        steps = products(mode, layer.bonds, layer.d_out, layer.d_in, n_tokens)
        assert layer.flops(n_tokens) == sum(step.flops for step in steps)
