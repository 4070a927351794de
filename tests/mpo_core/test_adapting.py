"""Bonds that change while a chain is trained: gauge, prices, new directions and the choice, against dense oracles."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from structured_linear_case import metric_of, normal

from mpo_core.fitting.adapting import BondPrices, ChainDirections, choose_bonds
from mpo_core.fitting.metric import Metric
from mpo_core.layers.mpo import MPOLinear
from mpo_core.tensor_train.algebra import contract

SIZES = [((3, 4), (5, 4)), ((2, 2, 3), (2, 5, 2)), ((2, 3, 2, 1), (5, 2, 2, 1))]


def chain(d_out, d_in, chi, seed=0):
    layer = MPOLinear(20, 12, chi=chi, d_out=d_out, d_in=d_in, generator=torch.Generator().manual_seed(seed),
                      dtype=torch.float64)  # fmt: skip
    return [core.detach() for core in layer.cores]


def kronecker_metric(d_out, d_in):
    """A metric whose moments are Kronecker products over the sites, so that its whitening is exact."""

    def moment(size, seed):
        A = normal(size, size, seed=seed)
        return A @ A.T / size + torch.eye(size, dtype=torch.float64)

    gram, sensitivity = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for site, (o, i) in enumerate(zip(d_out, d_in, strict=True)):
        gram, sensitivity = torch.kron(gram, moment(i, site)), torch.kron(sensitivity, moment(o, site + 9))
    return Metric(gram, sensitivity)


@pytest.mark.parametrize(("d_out", "d_in"), SIZES)
@pytest.mark.parametrize("has_metric", [False, True])
def test_gauge_keeps_the_matrix_and_carries_gradients(d_out, d_in, has_metric):
    cores = chain(d_out, d_in, 4)
    found = ChainDirections(cores, metric_of(12, 20) if has_metric else None)
    torch.testing.assert_close(contract(found.cores), contract(cores))
    G = normal(12, 20, seed=3)

    def gradients(cores):
        cores = [core.clone().requires_grad_() for core in cores]
        return torch.autograd.grad((contract(cores) * G).sum(), cores)

    torch.testing.assert_close(found.change.carried(gradients(cores)), list(gradients(found.cores)))


@pytest.mark.parametrize(("d_out", "d_in"), SIZES)
def test_loss_of_a_direction_is_the_change_of_the_matrix_in_the_metric(d_out, d_in):
    metric = kronecker_metric(d_out, d_in)
    found = ChainDirections(chain(d_out, d_in, 4), metric)
    W = contract(found.cores)
    for bond, losses in enumerate(found.losses):
        for place, loss in enumerate(losses):
            cut = [core.clone() for core in found.cores]
            cut[bond][..., place] = 0
            assert metric.norm(W - contract(cut)) ** 2 / 2 == pytest.approx(loss, rel=0.01, abs=1e-4 * losses[0])
        assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(("d_out", "d_in"), SIZES[:2])
def test_new_direction_is_the_best_of_its_kind(d_out, d_in):
    """Among changes by one direction that no present one has, none lowers a quadratic model of the loss further."""
    metric = kronecker_metric(d_out, d_in)
    found = ChainDirections(chain(d_out, d_in, 2), metric)
    gradient = normal(12, 20, seed=5)
    growth = found.growth(gradient, gradient, 2)
    W = contract(found.cores)
    for bond, new in enumerate(growth):
        n = len(new.gains)
        assert n > 0
        wider = [core.clone() for core in found.cores]
        wider[bond] = torch.cat([wider[bond], new.columns], dim=3)
        zeros = torch.zeros(n, *wider[bond + 1].shape[1:], dtype=torch.float64)
        wider[bond + 1] = torch.cat([wider[bond + 1], zeros], dim=0)
        torch.testing.assert_close(contract(wider), W)
        # The rows of the first new direction that minimise ⟨gradient, E⟩ + ½ ‖E‖² in the metric.
        shape = zeros[:1].shape
        basis = torch.eye(zeros[0].numel(), dtype=torch.float64)
        changes = []
        for unit in basis:
            moved = [core.clone() for core in wider]
            moved[bond + 1][-n] = unit.reshape(shape[1:])
            changes.append(contract(moved) - W)
        E = torch.stack(changes)
        H = torch.einsum("amn,bmn->ab", E, torch.stack([metric.gradient(each) for each in E]))
        g = torch.einsum("amn,mn->a", E, gradient)
        fall = float(g @ torch.linalg.lstsq(H, g[:, None]).solution[:, 0]) / 2
        # The rows may also mend what the present directions do, so they gain at least as much.
        assert fall >= new.gains[0] * (1 - 1e-6)
        assert new.gains[0] > 0


def test_gradients_of_noise_alone_have_small_gains():
    found = ChainDirections(chain(*SIZES[0], 3))
    signal = sum(found.growth(normal(12, 20, seed=1), normal(12, 20, seed=1), 3)[0].gains)
    noise = [
        sum(found.growth(normal(12, 20, seed=seed), normal(12, 20, seed=seed + 999), 3)[0].gains) for seed in range(60)
    ]
    assert abs(sum(noise)) / 60 < signal / 20
    assert min(noise) < 0


def prices(losses, gains):
    return BondPrices((2, 2), (2, 2), [losses], [gains])


def test_choice_is_the_best_swap_within_the_budget():
    chains = {"a": prices([9, 5, 0.1], [0.2]), "b": prices([9, 8, 7], [6.0, 5.0, 0.05])}
    choose_bonds(chains, sum(chain.n_params for chain in chains.values()))
    assert (chains["a"].bonds, chains["b"].bonds) == ([1, 2, 1], [1, 4, 1])
    assert chains["b"].grown == [1]


def test_choice_fills_free_room_by_gain_and_keeps_its_limits():
    chains = {"a": prices([1.0], [5.0, 4.0, 3.0]), "b": prices([1.0], [2.0, 0.0])}
    choose_bonds(chains, 10_000)
    assert (chains["a"].bonds[1], chains["b"].bonds[1]) == (4, 2)
    chains = {"a": prices([1.0], [5.0, 4.0, 3.0]), "b": prices([1.0], [2.0, 0.0])}
    choose_bonds(chains, 10_000, most_grown=16)
    assert (chains["a"].bonds[1], chains["b"].bonds[1]) == (3, 1)
    chains = {"a": prices([3.0, 1e-3, 1e-4], []), "b": prices([1.0, 0.5], [9.0, 8.0])}
    choose_bonds(chains, sum(chain.n_params for chain in chains.values()), most_cut=8)
    assert (chains["a"].bonds[1], chains["b"].bonds[1]) == (2, 3)


@pytest.mark.parametrize("limits", [{}, {"most_cut": 8}])
def test_nothing_is_cut_for_a_growth_that_does_not_happen(limits):
    # A new direction of "b" takes 16 parameters, for which two of "a" would have to go.
    chains = {"a": prices([9.0, 5.0, 1.0], []), "b": BondPrices((2, 2), (2, 6), [[9.0]], [[4.0]])}
    before = [chain.bonds for chain in chains.values()]
    choose_bonds(chains, sum(chain.n_params for chain in chains.values()), **limits)
    assert [chain.bonds for chain in chains.values()] == before


def test_choice_cuts_until_the_budget_holds():
    chains = {"a": prices([3.0, 2.0, 1.0], []), "b": prices([9.0, 0.5], [])}
    choose_bonds(chains, 3 * 8, most_cut=0)
    assert (chains["a"].bonds[1], chains["b"].bonds[1]) == (2, 1)


def test_bonds_stay_within_reach_whatever_is_chosen():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        d_out, d_in = (2, 2, 2, 2), (2, 2, 2, 2)
        start = [4, 10, 4]
        losses = [sorted(torch.rand(n, generator=generator).tolist(), reverse=True) for n in start]
        gains = [sorted(torch.rand(6, generator=generator).tolist(), reverse=True) for _ in start]
        one = BondPrices(d_out, d_in, losses, gains)
        choose_bonds({"a": one}, int(one.n_params * float(0.5 + torch.rand(1, generator=generator))))
        for (left, right), size in zip(itertools.pairwise(one.bonds), one.sizes, strict=True):
            assert left <= size * right
            assert right <= size * left
        assert math.prod(one.bonds) > 0
