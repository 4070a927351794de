from __future__ import annotations

import pytest
import torch
from torch import nn

from mpo_core.layers.low_rank import LowRankLinear
from mpo_core.layers.monarch import MonarchLinear
from mpo_core.layers.mpo import MPOLinear
from mpo_core.layers.pruned import PrunedLinear
from mpo_core.param_groups import param_groups


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def structured(cls, in_features=128, out_features=128, **size):
    return cls(in_features, out_features, generator=generator(), dtype=torch.float64, **size)


LAYERS = {
    "mpo": lambda: structured(MPOLinear, chi=16, d_out=[8, 16], d_in=[8, 16]),
    "mpo3": lambda: structured(MPOLinear, 128, 512, chi=8, d_out=[8, 8, 8], d_in=[4, 4, 8]),
    "low_rank": lambda: structured(LowRankLinear, rank=16),
    "monarch": lambda: structured(MonarchLinear, rank=2, n_blocks=8),
    "pruned": lambda: structured(PrunedLinear, sparsity=0.5),
}


def multipliers(model, **options):
    """Multiplier and decay of each parameter, by its name."""
    groups = param_groups(model, 1e-3, **options)
    found = {id(p): (group["lr_mult"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert all(group["lr"] == pytest.approx(1e-3 * group["lr_mult"], rel=1e-15) for group in groups)
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("mpo", {"cores.0": 8.0, "cores.1": 0.25}),
        ("mpo3", {"cores.0": 128 / 4 / 3, "cores.1": 128 / 32 / 3, "cores.2": 128 / 64 / 3}),
        ("low_rank", {"A": 4.0, "B": 0.5}),
        ("monarch", {"L": 128 / 16 / 2, "R": 128 / 16 / 2}),
        ("pruned", {"weight": 1.0}),
    ],
)
def test_param_groups_mup_rates_are_those_of_the_fan_in(layer, expected):
    found = multipliers(LAYERS[layer](), rule="mup")
    assert {name: mult for name, (mult, _) in found.items() if name != "bias"} == pytest.approx(expected)
    assert found["bias"][0] == 1.0


def test_param_groups_hold_every_trainable_parameter_once():
    model = nn.Sequential(nn.Linear(128, 128), *(make() for make in LAYERS.values()), nn.LayerNorm(128))
    model.append(model[1])  # a layer used twice
    model[0].weight.requires_grad_(False)
    held = [p for group in param_groups(model, 0.1, rule="mup", weight_decay=0.1) for p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, held)) == sorted(map(id, trainable))


def test_param_groups_of_a_dense_model_are_one():
    [group] = param_groups(nn.Linear(3, 4), 0.1, rule="mup", weight_decay=0.3, decay="matrix")
    assert (group["lr"], group["lr_mult"], group["weight_decay"]) == (0.1, 1.0, 0.3)


@pytest.mark.parametrize("decay", ["parameter", "matrix"])
def test_embeddings_have_a_rate_of_their_own_and_the_decay_of_what_is_no_factor(decay):
    model = nn.Sequential(nn.Embedding(5, 128), LAYERS["mpo"]())
    with_own = multipliers(model, rule="mup", weight_decay=0.1, decay=decay, embedding_lr=3e-2)
    without = multipliers(model, rule="mup", weight_decay=0.1, decay=decay)
    assert with_own.pop("0.weight") == (pytest.approx(30.0), 0.1)
    assert without.pop("0.weight") == (1.0, 0.1)
    assert with_own == without


@pytest.mark.parametrize("rule", ["uniform", "mup"])
@pytest.mark.parametrize("layer", LAYERS)
def test_param_groups_decay_of_the_matrix_is_that_of_a_dense_weight(layer, rule):
    lr, weight_decay = 1e-3, 0.1
    shrinkage = {}
    for decay in ("parameter", "matrix"):
        model = LAYERS[layer]()
        before = model.to_matrix().detach().clone()
        optimiser = torch.optim.AdamW(param_groups(model, lr, rule=rule, weight_decay=weight_decay, decay=decay))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # only the decay acts
        optimiser.step()
        ratio = (model.to_matrix().detach() / before)[before != 0]
        assert float(ratio.std()) < 1e-12
        shrinkage[decay] = 1 - float(ratio.mean())
    assert shrinkage["matrix"] == pytest.approx(lr * weight_decay, rel=1e-3)
    factors = [mult for name, (mult, _) in multipliers(LAYERS[layer](), rule=rule).items() if name != "bias"]
    assert shrinkage["parameter"] == pytest.approx(lr * weight_decay * sum(factors), rel=2e-3)


@pytest.mark.parametrize("rule", ["uniform", "mup"])
@pytest.mark.parametrize("layer", ["mpo", "mpo3", "low_rank"])
def test_in_the_fixed_gauge_decay_of_the_matrix_is_exact_and_rates_are_those_of_the_free_gauge(layer, rule):
    free = LAYERS[layer]()
    fixed = free.with_gauge("fixed")
    own = {name: mult for name, (mult, _) in multipliers(fixed, rule=rule).items()}
    assert own == {name: mult for name, (mult, _) in multipliers(free, rule=rule).items()}
    before = fixed.to_matrix().detach()
    optimiser = torch.optim.AdamW(param_groups(fixed, 0.1, rule=rule, weight_decay=0.5, decay="matrix"))
    for parameter in fixed.parameters():
        parameter.grad = torch.zeros_like(parameter)  # only the decay acts
    optimiser.step()
    torch.testing.assert_close(fixed.to_matrix().detach(), (1 - 0.1 * 0.5) * before, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "adam"}, "`rule` must be one of uniform, mup, but got 'adam'"),
        ({"decay": "all"}, "`decay` must be one of parameter, matrix, but got 'all'"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"embedding_lr": -0.1}, "embedding_lr=-0.1, lr=0.1"),
        ({"embedding_lr": float("nan")}, "embedding_lr=nan, lr=0.1"),
        ({"embedding_lr": 0.1, "lr": 0.0}, "embedding_lr=0.1, lr=0.0"),
    ],
)
def test_param_groups_say_what_is_allowed(change, message):
    with pytest.raises(ValueError, match=message):
        param_groups(nn.Linear(2, 2), **({"lr": 0.1} | change))


@pytest.mark.parametrize("rule", ["uniform", "mup"])
def test_rates_of_matrices_alone_are_scaled(rule):
    embedding, tied = nn.Embedding(16, 16), nn.Linear(16, 16, bias=False)
    tied.weight = embedding.weight
    plain, mpo = nn.Linear(16, 16), MPOLinear(16, 16, chi=2)
    model = nn.ModuleDict({"embedding": embedding, "norm": nn.LayerNorm(16), "plain": plain, "mpo": mpo, "head": tied})
    before, after = ({id(parameter): (group["lr"], group["weight_decay"]) for group in
                      param_groups(model, 0.1, rule=rule, weight_decay=0.3, decay="matrix", matrix_scale=scale)
                      for parameter in group["params"]} for scale in (1.0, 0.25))  # fmt: skip
    scaled = {id(plain.weight), *map(id, mpo.cores)}
    for key, (rate, decay) in before.items():
        assert after[key] == pytest.approx((rate * (0.25 if key in scaled else 1), decay))
    with pytest.raises(ValueError, match="`matrix_scale` must be above 0, but got 0"):
        param_groups(model, 0.1, matrix_scale=0)
