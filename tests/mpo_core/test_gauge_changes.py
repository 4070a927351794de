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
    second = change.carried([core.square() for core in gradients(cores)], power=2)
    assert all((tensor >= 0).all() for tensor in second)


def test_a_bond_out_of_reach_is_refused():
    with pytest.raises(ValueError, match="within reach"):
        with_centre([normal(1, 1, 2, 5), normal(5, 2, 2, 1)], 1)
