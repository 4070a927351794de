"""The canonical gauge around a site, and gradients carried to it, against the gradient there."""

from __future__ import annotations

import pytest
import torch
from structured_linear_case import normal

from mpo_core.tensor_train.algebra import contract
from mpo_core.tensor_train.gauge_changes import with_centre


@pytest.mark.parametrize("site", [0, 1, 2])
def test_gradients_carried_to_another_centre_are_the_gradients_there(site):
    cores = [normal(1, 2, 3, 4, seed=1), normal(4, 3, 2, 4, seed=2), normal(4, 2, 2, 1, seed=3)]
    G = normal(12, 12, seed=4)

    def gradients(cores):
        cores = [core.clone().requires_grad_() for core in cores]
        return torch.autograd.grad((contract(cores) * G).sum(), cores)

    after, change = with_centre(cores, site)
    torch.testing.assert_close(contract(after), contract(cores))
    torch.testing.assert_close(change.carried(gradients(cores)), list(gradients(after)))
    assert float(after[site].norm()) == pytest.approx(float(contract(cores).norm()))


@pytest.mark.parametrize("site", [0, 1, 2])
def test_second_moments_are_carried_as_those_of_uncorrelated_entries(site):
    cores = [normal(1, 2, 3, 4, seed=1), normal(4, 3, 2, 4, seed=2), normal(4, 2, 2, 1, seed=3)]
    _, change = with_centre(cores, site)
    variances = [normal(*core.shape, seed=5).square() for core in cores]
    carried = change.carried(variances, power=2)
    for at, core in enumerate(cores):
        expected = torch.zeros_like(core)
        for entry in range(core.numel()):  # what the entry of an old gradient gives in the new one
            unit = torch.zeros(core.numel(), dtype=core.dtype)
            unit[entry] = 1
            given = [unit.reshape(own.shape) if place == at else torch.zeros_like(own)
                     for place, own in enumerate(cores)]  # fmt: skip
            expected += change.carried(given)[at].square() * variances[at].flatten()[entry]
        torch.testing.assert_close(carried[at], expected)


def test_a_bond_out_of_reach_is_refused():
    with pytest.raises(ValueError, match="within reach"):
        with_centre([normal(1, 1, 2, 5), normal(5, 2, 2, 1)], 1)
