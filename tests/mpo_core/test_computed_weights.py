"""Layers whose weight is not simply there: the compressed model computes what the model does, or says what to do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.weight_norm import weight_norm as old_weight_norm

from mpo_core.compression.compress import compress
from mpo_core.compression.counting import n_params_compressed
from mpo_core.compression.decompress import decompress
from mpo_core.compression.rel_errors import rel_errors
from mpo_core.layers.low_rank import LowRankLinear

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_model(bias=True):
    layers = [nn.Linear(8, 12, bias=bias), nn.Tanh(), nn.Linear(12, 8, bias=bias), nn.Tanh(), nn.Linear(8, 8)]
    model = nn.Sequential(*layers).double()
    for index, parameter in enumerate(model.parameters()):
        parameter.data = normal(*parameter.shape, seed=index)
    return model


def prune_both(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    if layer.bias is not None:
        prune.random_unstructured(layer, "bias", 0.5)


def remove_pruning(layer):
    prune.remove(layer, "weight")
    if layer.bias is not None:
        prune.remove(layer, "bias")


def remove_parametrization(layer):
    parametrize.remove_parametrizations(layer, "weight")


WAYS = {
    "weight_norm": (old_weight_norm, remove_weight_norm, "remove_weight_norm"),
    "spectral_norm": (old_spectral_norm, remove_spectral_norm, "remove_spectral_norm"),
    "prune": (prune_both, remove_pruning, "prune.remove"),
    "parametrized weight_norm": (parametrizations.weight_norm, remove_parametrization, "remove_parametrizations"),
    "parametrized spectral_norm": (parametrizations.spectral_norm, remove_parametrization, "remove_parametrizations"),
}


def computed(way, bias, when, training=True):
    """A model whose layers 0 and 2 compute their weight, which has changed since in the last of cases."""
    model = make_model(bias).train(training)
    for index in (0, 2):
        WAYS[way][0](model[index])
    if when != "made":
        model(normal(3, 8)).sum().backward()
    if when == "stepped":
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                parameter += normal(*parameter.shape, seed=50 + index)
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("when", "exclude", "training"),
    [
        ("made", (), True),
        ("run", (), True),
        ("run", ("0", "2"), False),
        ("stepped", (), True),
        ("stepped", (), False),
    ],
)
def test_a_computed_weight_stays_with_a_reason(way, bias, when, exclude, training):
    model = computed(way, bias, when, training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compressed, report = compress(model, chi=64, allow_growth=True, exclude=exclude)
    n_matrices = n_params_compressed(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert n_matrices == 8 * 12 * 2 + 64
    assert len(report.rows) == (1 if exclude else 3)
    for row in report.rows[:-1]:
        assert row.kind == "dense"
        assert "its weight is computed from other parameters" in row.reason
        assert WAYS[way][2] in row.reason
    assert report.rows[-1].kind == "mpo"
    assert set(rel_errors(model, [2])) == {(2, "4")}
    x = normal(3, 8, seed=9)
    torch.testing.assert_close(compressed.eval()(x), model.eval()(x))
    torch.testing.assert_close(decompress(compressed)(x), model(x))


@pytest.mark.parametrize("way", WAYS)
def test_a_computed_weight_is_compressed_after_what_the_reason_says(way):
    model = computed(way, True, "stepped").eval()
    with pytest.raises(ValueError, match=f"^0 cannot be replaced: its weight is computed .*{WAYS[way][2]}"):
        compress(model, chi=2, include=["0"])
    with pytest.raises(ValueError, match=f"`linear` cannot be decomposed: its weight is computed .*{WAYS[way][2]}"):
        LowRankLinear.from_linear(model[0], rank=2)
    x = normal(3, 8, seed=9)
    y = model(x)
    for index in (0, 2):
        WAYS[way][1](model[index])
    compressed, report = compress(model, chi=64, allow_growth=True)
    assert [row.kind for row in report.rows] == ["mpo"] * 3
    torch.testing.assert_close(compressed(x), y)


def test_a_pruned_bias_alone_is_named():
    model = make_model()
    prune.random_unstructured(model[0], "bias", 0.5)
    _, report = compress(copy.deepcopy(prune_free(model)), chi=2)
    assert report.rows[0].reason.startswith("its bias is computed from other parameters")
    assert "prune.remove(layer, 'bias')" in report.rows[0].reason


def prune_free(model):
    """Ready for deepcopy, which torch refuses for a bias that is the result of a computation."""
    model[0].bias = model[0].bias.detach()
    return model


def test_other_layers_may_compute_their_weights_too():
    model = nn.Sequential(old_weight_norm(nn.Conv1d(2, 3, 1)), nn.Flatten(), nn.Linear(12, 12))
    compressed, report = compress(model, chi=64, allow_growth=True)
    x = torch.ones(5, 2, 4)
    torch.testing.assert_close(compressed(x), model(x))
    assert report.rows[0].kind == "mpo"


def halve(_module, args):
    return (args[0] / 2,)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_pre_hook(halve),
        lambda layer: layer.register_forward_hook(lambda _module, _args, y: 2 * y),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
        lambda layer: layer.__setattr__("forward", lambda x: 3 * x),
    ],
)
def test_a_layer_that_does_more_stays(change):
    model = make_model()
    change(model[4])
    compressed, report = compress(model, chi=64, allow_growth=True)
    assert [row.kind for row in report.rows] == ["mpo", "mpo", "dense"]
    assert "first" in report.rows[2].reason
    x = normal(3, 8)
    torch.testing.assert_close(compressed(x), model(x))


@pytest.mark.parametrize(
    ("add", "name"),
    [
        (lambda layer: layer.add_module("lora", nn.Linear(8, 8).double()), "lora"),
        (lambda layer: layer.register_parameter("gain", nn.Parameter(torch.ones(8))), "gain"),
        (lambda layer: layer.register_buffer("scale", torch.ones(8)), "scale"),
    ],
)
def test_a_layer_that_holds_more_stays(add, name):
    model = make_model()
    add(model[4])
    compressed, report = compress(model, chi=64, allow_growth=True)
    assert [row.kind for row in report.rows[:3]] == ["mpo", "mpo", "dense"]
    assert report.rows[2].reason == f"it also holds {name}, which another layer would not"
    assert hasattr(compressed[4], name)


def test_a_budget_that_no_layer_can_take_says_why():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].register_forward_pre_hook(halve)
    for size in ({"keep": 0.5}, {"max_params": 40}):
        with pytest.raises(ValueError, match=r"^no layer can be replaced; for example 0: it has hooks"):
            compress(model, **size)


def test_outputs_that_a_module_keeps_are_copied_as_values():
    model = make_model()
    model.register_buffer("last", model(normal(3, 8)))
    model.outputs, model.named = [model(normal(3, 8))], {"a": (model(normal(3, 8)),)}
    compressed, _ = compress(model, chi=2)
    for kept, value in (
        (compressed.last, model.last),
        (compressed.outputs[0], model.outputs[0]),
        (compressed.named["a"][0], model.named["a"][0]),
    ):
        assert torch.equal(kept, value)
        assert kept.is_leaf


class WithLora(nn.Linear):
    """A subclass that computes more than its weight says."""

    def forward(self, x):
        return super().forward(x) + x


def test_a_subclass_stays_and_is_named():
    model = make_model()
    model[4] = WithLora(8, 8).double()
    compressed, report = compress(model, chi=64, allow_growth=True)
    assert (report.rows[2].kind, report.rows[2].rel_error) == ("dense", 0)
    assert "WithLora" in report.rows[2].reason
    torch.testing.assert_close(compressed(normal(3, 8)), model(normal(3, 8)))


def test_a_weight_in_a_buffer_stays():
    model = make_model()
    W = model[4].weight.detach()
    del model[4].weight
    model[4].register_buffer("weight", W)
    compressed, report = compress(model, chi=2)
    assert "is a buffer" in report.rows[2].reason
    assert torch.equal(compressed[4].weight, W)


def test_a_weight_shared_with_a_layer_that_stays_is_kept():
    model = make_model()
    model.append(nn.Linear(8, 8).double())
    model[5].weight = model[4].weight
    model[5].register_forward_pre_hook(halve)
    compressed, report = compress(model, chi=2, include="[45]")
    assert report.rows[0].reason == "its weight is shared with 5, which is not replaced"
    assert compressed[4].weight is compressed[5].weight


def test_layers_that_share_weight_and_bias_go_on_doing_so():
    model = make_model()
    model.append(nn.Linear(8, 8).double())
    model[5].weight, model[5].bias = model[4].weight, model[4].bias
    compressed, _ = compress(model, chi=2, include="[45]")
    assert compressed[4].bias is compressed[5].bias
    assert compressed[4].cores[0] is compressed[5].cores[0]


def test_the_bias_of_a_sharer_that_another_module_holds_is_not_copied():
    model = make_model()
    model.append(nn.Linear(8, 8).double())
    model[5].weight = model[4].weight
    model.register_parameter("also", model[5].bias)
    compressed, report = compress(model, chi=2, include="[45]")
    assert {row.reason for row in report.rows} == {"its bias is shared with another module"}
    assert compressed.also is compressed[5].bias


def test_the_bias_keeps_its_own_dtype():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data = model[0].weight.data.bfloat16()
    model[0].bias.requires_grad_(False)
    compressed, _ = compress(model, layer="low_rank", chi=2)
    assert (compressed[0].A.dtype, compressed[0].bias.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(compressed[0].bias, model[0].bias)
    assert (compressed[0].A.requires_grad, compressed[0].bias.requires_grad) == (True, False)


def test_decompress_names_a_structured_layer_that_does_more():
    layer = LowRankLinear(8, 8, rank=2, generator=torch.Generator().manual_seed(0))
    prune.l1_unstructured(layer, "A", 0.5)
    with pytest.raises(ValueError, match=r"^0 cannot be replaced: it has hooks"):
        decompress(nn.Sequential(layer))
