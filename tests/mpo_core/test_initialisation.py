"""Variance of reconstructed weights, by Monte Carlo, and where random numbers come from."""

from __future__ import annotations

import math

import pytest
import torch

from mpo_core.initialisation import normal_, paper_std, variance_std
from mpo_core.linear import MPOLinear


def mean_square_times_n_in(out_features, in_features, *, n_sites, chi, init, n_draws):
    """Mean of W² · N_in over independent draws of the cores, and its standard error."""
    generator = torch.Generator().manual_seed(0)
    layer = MPOLinear(in_features, out_features, chi=chi, n_sites=n_sites, init=init, generator=generator)
    draws = []
    with torch.no_grad():
        for _ in range(n_draws):
            layer.init_cores(init, [generator] * n_sites)
            draws.append(layer.to_matrix().square().mean() * in_features)
    values = torch.stack(draws)
    return float(values.mean()), float(values.std()) / math.sqrt(n_draws)


@pytest.mark.parametrize("n_sites", [1, 2, 3, 4])
def test_variance_init_gives_one_over_n_in(n_sites):
    """Tolerance: four standard errors of the Monte Carlo mean, itself required to be below 3 %."""
    mean, error = mean_square_times_n_in(32, 64, n_sites=n_sites, chi=12, init="variance", n_draws=2000)
    assert error < 0.03
    assert abs(mean - 1) < 4 * error


@pytest.mark.parametrize(("out_features", "in_features"), [(512, 128), (128, 512)])
def test_paper_init_at_three_sites_is_low_by_the_fourth_root_of_n_in(out_features, in_features):
    """Same tolerance, on the variance, which is low by the square root."""
    mean, error = mean_square_times_n_in(out_features, in_features, n_sites=3, chi=4, init="paper", n_draws=300)
    expected = in_features**-0.5
    assert error < 0.03 * expected
    assert abs(mean - expected) < 4 * error


def test_paper_init_is_the_variance_init_at_two_unclipped_sites():
    assert paper_std(128, 8, 2) == pytest.approx(variance_std(128, (1, 8, 1)))
    assert paper_std(128, 8, 3) < variance_std(128, (1, 8, 8, 1))


def test_paper_init_uses_chi_as_asked_for():
    """χ = 300 is clipped to 128, and the paper's standard deviation takes no notice."""
    generator = torch.Generator().manual_seed(0)
    layer = MPOLinear(128, 128, chi=300, init="paper", generator=generator, dtype=torch.float64)
    assert layer.bonds == (1, 128, 1)
    entries = torch.cat([core.detach().flatten() for core in layer.cores])
    assert float(entries.std()) == pytest.approx(128**-0.25 * 300**-0.25, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normal_draws_the_numbers_of_its_generator(dtype):
    tensor = torch.empty(3, 4, dtype=dtype)
    normal_(tensor, 0.5, torch.Generator().manual_seed(7))
    drawn_in = torch.float64 if dtype is torch.float64 else torch.float32
    expected = 0.5 * torch.randn(3, 4, generator=torch.Generator().manual_seed(7), dtype=drawn_in)
    assert torch.equal(tensor, expected.to(dtype))
