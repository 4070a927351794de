"""How parameters are allocated to layers, and the ladders that the allocation goes by."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_core.compression.allocation import allocate
from mpo_core.fitting.fit import fit_cores, low_rank_svd
from mpo_core.fitting.ladders import N_MEASURED, Rung, chain_ladder
from mpo_core.fitting.metric import Metric
from mpo_core.layers.low_rank import LowRankLinear
from mpo_core.layers.mpo import MPOLinear
from mpo_core.tensor_train.algebra import contract, rel_error, tt_svd
from mpo_core.tensor_train.factorisation import factorise

ladders = st.lists(
    st.lists(st.builds(Rung, st.integers(1, 30), st.floats(0, 1)), min_size=1, max_size=5), min_size=1, max_size=4
).map(lambda lists: {str(index): ladder for index, ladder in enumerate(lists)})


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_gram(size, seed=0):
    x = normal(3 * size, size, seed=seed) * torch.logspace(0, -2, size)
    return x.T @ x


def total(chosen):
    return sum(rung.n_params for rung in chosen), sum(rung.error for rung in chosen)


@settings(max_examples=200, deadline=None)
@given(ladders, st.integers(0, 60))
def test_allocate_stays_within_and_leaves_no_step_that_fits(ladders, extra):
    budget = sum(min(rung.n_params for rung in ladder) for ladder in ladders.values()) + extra
    chosen = allocate(ladders, budget)
    assert all(chosen[name] in ladder for name, ladder in ladders.items())
    spent, _ = total(chosen.values())
    assert spent <= budget
    for name, ladder in ladders.items():
        for rung in ladder:
            fits = spent - chosen[name].n_params + rung.n_params <= budget
            assert not fits or rung.error >= chosen[name].error


@settings(max_examples=100, deadline=None)
@given(ladders, st.integers(0, 60))
def test_allocate_is_within_one_step_of_the_best_of_all(ladders, extra):
    """No choice with the budget less the largest step does better: greed along convex hulls is optimal to one step."""
    budget = sum(min(rung.n_params for rung in ladder) for ladder in ladders.values()) + extra
    _, error = total(allocate(ladders, budget).values())
    spans = [max(r.n_params for r in ladder) - min(r.n_params for r in ladder) for ladder in ladders.values()]
    choices = [total(choice) for choice in product(*ladders.values())]
    smaller = [best for spent, best in choices if spent <= budget - max(spans)]
    assert error <= min(smaller, default=len(ladders)) + 1e-9


def test_allocate_prefers_the_steepest_step():
    ladders = {"a": [Rung(10, 0.9), Rung(20, 0.1)], "b": [Rung(10, 0.9), Rung(20, 0.8), Rung(40, 0.0)]}
    assert allocate(ladders, 30) == {"a": Rung(20, 0.1), "b": Rung(10, 0.9)}
    assert allocate(ladders, 40) == {"a": Rung(20, 0.1), "b": Rung(20, 0.8)}
    assert allocate(ladders, 60) == {"a": Rung(20, 0.1), "b": Rung(40, 0.0)}


def test_allocate_looks_beyond_a_shallow_step_to_a_steep_one():
    ladders = {"a": [Rung(10, 0.9), Rung(20, 0.7)], "b": [Rung(10, 0.9), Rung(20, 0.8), Rung(40, 0.0)]}
    assert allocate(ladders, 50) == {"a": Rung(10, 0.9), "b": Rung(40, 0.0)}


def test_allocate_refuses():
    with pytest.raises(
        ValueError, match="the smallest sizes of all layers have 30 parameters together, but got max_params=29"
    ):
        allocate({"a": [Rung(10, 1)], "b": [Rung(20, 1)]}, 29)
    with pytest.raises(ValueError, match="at least one layer"):
        allocate({}, 10)
    with pytest.raises(ValueError, match="a has no size to choose from"):
        allocate({"a": []}, 10)


def test_chain_ladder_of_two_sites_holds_the_errors_of_tt_svd():
    W = normal(12, 12) ** 3
    ladder = chain_ladder(W, Metric(), lambda chi: ((3, 4), (4, 3)))
    assert [rung.n_params for rung in ladder] == [24, 48, 72, 96, 120]
    for chi, rung in enumerate(ladder, start=1):
        assert rung.error == pytest.approx(rel_error(W, contract(tt_svd(W, [3, 4], [4, 3], chi))) ** 2, abs=1e-12)


def test_chain_ladder_bounds_the_errors_of_three_sites():
    W = normal(24, 16) ** 3
    split = (2, 4, 3), (4, 2, 2)
    ladder = chain_ladder(W, Metric(), lambda chi: split)
    errors = [rel_error(W, contract(tt_svd(W, *split, chi))) ** 2 for chi in range(1, len(ladder) + 1)]
    assert all(rung.error >= error - 1e-12 for rung, error in zip(ladder, errors, strict=True))
    assert ladder[-1].n_params < 24 * 16 <= ladder[-1].n_params * 2
    assert len({rung.error for rung in ladder}) > 3


def test_chain_ladder_holds_output_errors_under_a_kronecker_gram():
    W, gram = normal(12, 12), torch.kron(make_gram(4, 1), make_gram(3, 2))
    for chi, rung in enumerate(chain_ladder(W, Metric(gram), lambda chi: ((3, 4), (4, 3))), start=1):
        cores = fit_cores(W, [3, 4], [4, 3], chi=chi, metric=Metric(gram), method="whitened")
        assert rung.error == pytest.approx(Metric(gram).error(W, contract(cores)) ** 2, abs=1e-9)


def test_chain_ladder_follows_a_split_that_depends_on_chi_and_pads():
    W = normal(13, 11)
    splits = [factorise(13, 11, method="min_params", chi=chi, padding=True) for chi in range(1, 20)]
    ladder = chain_ladder(W, Metric(make_gram(11)), lambda chi: splits[chi - 1])
    assert 0 < len(ladder) < 19
    assert all(0 <= rung.error <= 1 for rung in ladder)
    assert ladder[-1].error < ladder[0].error


def test_chain_ladder_of_zero_costs_nothing_to_represent():
    ladder = chain_ladder(torch.zeros(12, 12), Metric(), lambda chi: ((3, 4), (4, 3)))
    assert {rung.error for rung in ladder} == {0.0}


@pytest.mark.parametrize("metric", [Metric(), Metric(make_gram(9))])
def test_low_rank_ladder_is_exact(metric):
    W = normal(12, 9)
    ladder = LowRankLinear.rungs(W, metric)
    assert [rung.n_params for rung in ladder] == [21, 42, 63, 84, 105]
    for rank, rung in enumerate(ladder, start=1):
        W_hat = torch.matmul(*low_rank_svd(W, rank, metric))
        error = metric.error(W, W_hat)
        assert rung.error == pytest.approx(error**2, abs=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("n_sites", [2, 3])
def test_a_calibrated_ladder_of_chains_holds_the_errors_of_fits(n_sites):
    """Exact where it was measured, near in between; the bound that it starts from is off by a factor of 100."""
    for spread in (0, 2):
        linear = torch.nn.Linear(32, 24, bias=False, dtype=torch.float64, device="meta").to_empty(device="cpu")
        linear.weight.data = normal(24, 32)
        inputs = normal(32, 32, seed=1) * torch.logspace(0, -spread, 32, dtype=torch.float64)
        metric = Metric(inputs @ inputs.T)
        ladder = MPOLinear.rungs(linear.weight.detach(), metric, n_sites=n_sites)
        assert len(ladder) > N_MEASURED
        ratios = []
        for rung in ladder:
            layer = MPOLinear.from_linear(linear, max_params=rung.n_params, n_sites=n_sites, metric=metric)
            assert layer.n_params_matrix == rung.n_params
            ratios.append(layer.error(linear.weight, metric) ** 2 / rung.error)
        assert ratios[0] == pytest.approx(1)
        assert ratios[-1] == pytest.approx(1)
        assert sum(ratio == pytest.approx(1) for ratio in ratios) >= N_MEASURED - 1
        assert 0.7 < min(ratios) <= max(ratios) < 1.5
