"""Layers made by hand, and arguments of the wrong kind: one clear line, or the same as plain integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from own_kinds import OWN_KINDS
from torch import nn

from mpo_core.compression.compress import compress
from mpo_core.compression.rel_errors import rel_errors
from mpo_core.fitting.chain_fit import improve_cores
from mpo_core.fitting.fit import fit_cores, low_rank_svd
from mpo_core.fitting.metric import Metric
from mpo_core.layers.low_rank import LowRankLinear
from mpo_core.layers.monarch import MonarchLinear
from mpo_core.layers.mpo import MPOLinear
from mpo_core.layers.pruned import PrunedLinear
from mpo_core.tensor_train.algebra import orthogonalize, round_cores, tt_svd
from mpo_core.tensor_train.bonds import clip_bonds, largest_chi
from mpo_core.tensor_train.factorisation import factorise

KINDS = [(MPOLinear, "chi"), (LowRankLinear, "rank"), (MonarchLinear, "rank"), (PrunedLinear, "max_params")]
kinds = pytest.mark.parametrize(("kind", "size"), KINDS)


@kinds
def test_a_layer_made_by_hand_draws_from_torchs_own_generator(kind, size):
    torch.manual_seed(3)
    first, second = kind(30, 70, **{size: 4}), kind(30, 70, **{size: 4})
    torch.manual_seed(3)
    again = kind(30, 70, **{size: 4})
    assert torch.equal(first.to_matrix(), again.to_matrix())
    assert not torch.equal(first.to_matrix(), second.to_matrix())
    given = kind(30, 70, **{size: 4}, generator=torch.Generator().manual_seed(3))
    assert torch.equal(given.to_matrix(), first.to_matrix())
    assert first(torch.ones(2, 30)).shape == (2, 70)


@kinds
def test_a_generator_that_is_given_is_all_that_is_drawn_from(kind, size):
    before = torch.get_rng_state()
    kind(30, 70, **{size: 4}, generator=torch.Generator().manual_seed(0))
    kind(30, 70, **{size: 4}, device="meta")
    assert torch.equal(torch.get_rng_state(), before)


def model():
    return nn.Sequential(nn.Linear(12, 8))


W = torch.arange(96.0).reshape(8, 12)
CORES = tt_svd(W, [2, 4], [3, 4], 2)
EYE = torch.eye(12, dtype=torch.float64)
CALLS = {
    "in_features": lambda n: MPOLinear(n, 8, chi=2),
    "out_features": lambda n: PrunedLinear(12, n, max_params=5),
    "chi": lambda n: MPOLinear(12, 8, chi=n),
    "bonds[1]": lambda n: MPOLinear(12, 8, bonds=(1, n, 1)),
    "d_out[0]": lambda n: MPOLinear(12, 8, chi=2, d_out=(n, 4), d_in=(3, 4)),
    "n_sites": lambda n: MPOLinear(12, 8, chi=2, n_sites=n),
    "max_params": lambda n: MPOLinear(12, 8, max_params=n),
    "rank": lambda n: LowRankLinear(12, 8, rank=n),
    "max_params ": lambda n: LowRankLinear(12, 8, max_params=n),
    "n_blocks[0]": lambda n: MonarchLinear(12, 8, rank=1, n_blocks=n),
    "n_blocks[1]": lambda n: MonarchLinear(12, 8, rank=1, n_blocks=(2, n)),
    "max_params  ": lambda n: PrunedLinear(12, 8, max_params=n),
    "chi ": lambda n: compress(model(), chi=n),
    "chi  ": lambda n: compress(model(), chi=n, factorisation="min_params"),
    "n_sites ": lambda n: compress(model(), chi=2, n_sites=n),
    "max_params['0']": lambda n: compress(model(), max_params={"0": n}),
    "n_tokens": lambda n: compress(model(), chi=2, n_tokens=n),
    "chi   ": lambda n: list(rel_errors(model(), [n]).values()),
    "chi    ": lambda n: tt_svd(W, [2, 4], [3, 4], n),
    "bonds[1] ": lambda n: tt_svd(W, [2, 4], [3, 4], bonds=(1, n, 1)),
    "d_in[1]": lambda n: tt_svd(W, [2, 4], [3, n], 2),
    "chi     ": lambda n: round_cores(CORES, n),
    "site": lambda n: orthogonalize(CORES, n),
    "chi      ": lambda n: fit_cores(W, [2, 4], [3, 4], chi=n),
    "max_steps": lambda n: improve_cores(W, CORES, Metric(EYE), max_steps=n),
    "max_steps ": lambda n: fit_cores(W, [2, 4], [3, 4], chi=2, metric=Metric(EYE), max_steps=n),
    "rank ": lambda n: low_rank_svd(W, n),
    "chi       ": lambda n: clip_bonds(n, [2, 4], [3, 4]),
    "max_params   ": lambda n: largest_chi(n, [2, 4], [3, 4]),
    "out_features ": lambda n: factorise(n, 12),
}
GOOD = {"d_in[1]": 4, "max_params": 60, "max_params['0']": 60, "site": 1}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("number", [True, 4.0, np.float64(4), "4", np.True_])
def test_a_whole_number_is_asked_for_by_name(name, number):
    with pytest.raises(ValueError, match="must be a whole number, but got") as error:
        CALLS[name](number)
    assert f"`{name.strip()}`" in str(error.value)


@pytest.mark.parametrize("name", CALLS)
def test_whole_numbers_of_numpy_are_taken(name):
    number = GOOD.get(name.strip(), 2)
    torch.manual_seed(0)
    plain = CALLS[name](number)
    torch.manual_seed(0)
    assert repr(CALLS[name](np.int64(number))) == repr(plain)
    assert "np." not in repr(plain)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compress(model(), keep=True), "`0 < keep <= 1` must hold, but got keep=True"),
        (lambda: compress(model(), rel_error=False), "`rel_error` must be a number, but got False"),
        (lambda: compress(model(), rel_error="0.1"), "`rel_error` must be a number, but got '0.1'"),
        (lambda: tt_svd(W, [8], [12], rel_error=True), "`rel_error` must be a number, but got True"),
        (lambda: PrunedLinear(12, 8, sparsity=False), "`sparsity` must be a number, but got False"),
        (lambda: LowRankLinear.from_matrix(W, rel_error=float("nan")), "`0 <= rel_error < 1` must hold"),
        (lambda: MPOLinear(12, 8, bonds=4), "`bonds` must be a sequence of whole numbers, but got 4"),
        (
            lambda: MPOLinear(12, 8, chi=2, dtype=torch.float8_e5m2),
            "`dtype` must be one of .* torch.float8",
        ),
        (lambda: PrunedLinear(12, 8, max_params=9, dtype=torch.int8), "`dtype` must be one of .* torch.int8"),
        (lambda: LowRankLinear(12, 8, rank=2, dtype=torch.complex64), "`dtype` must be one of .*complex64"),
    ],
)
def test_other_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64])
@pytest.mark.parametrize("layer", OWN_KINDS)
@pytest.mark.parametrize("size", [{"rel_error": 0.1}, {"keep": 0.5}, {"max_params": {"0": 60}}])
def test_a_weight_that_is_no_number_to_decompose_is_named(dtype, layer, size):
    dense = model()
    dense[0].weight = nn.Parameter(dense[0].weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"^0: .* must be one of float64, float32, bfloat16, float16, but got"):
        compress(dense, layer=layer, **size)
    if layer != "pruned":
        with pytest.raises(ValueError, match=r"^0: .* must be one of"):
            compress(dense, layer=layer, chi=2)
    with pytest.raises(ValueError, match=r"^0: .* must be one of"):
        rel_errors(dense, [2])
