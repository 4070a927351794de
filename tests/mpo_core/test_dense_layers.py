"""Which layers are replaced in models of any kind, and what is done about weights held in common."""

from __future__ import annotations

import pytest
import torch
from own_kinds import OWN_KINDS
from structured_linear_case import statistics_of
from torch import nn

from mpo_core.calibration.collecting import collect_statistics
from mpo_core.compression.compress import compress
from mpo_core.compression.counting import n_params, n_params_compressed
from mpo_core.compression.decompress import decompress
from mpo_core.layers.mpo import MPOLinear


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill(model):
    """Every parameter drawn from a generator of its own place; modules are made on the meta device."""
    model = model.to_empty(device="cpu").double()
    for index, parameter in enumerate(model.parameters()):
        parameter.data = normal(*parameter.shape, seed=index) / parameter.shape[-1] ** 0.5
    return model


def linear(in_features, out_features, bias=True):
    return nn.Linear(in_features, out_features, bias=bias, device="meta")


def mpo_names(model):
    return [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, MPOLinear)]


def mean_square(x):
    return x.T @ x / len(x)


def tied_pair():
    """Two layers with one weight and a bias each."""
    model = fill(nn.Sequential(linear(8, 8), nn.Tanh(), linear(8, 8)))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_layers_that_share_a_weight_share_its_structure(kind):
    model = tied_pair()
    compressed, report = compress(model, layer=kind, max_params={"0": 40})
    own = [{name: p for name, p in layer.named_parameters() if name != "bias"} for layer in compressed[::2]]
    assert all(own[0][name] is own[1][name] for name in own[0])
    assert torch.equal(compressed[0].bias, model[0].bias)
    assert torch.equal(compressed[2].bias, model[2].bias)
    assert [(row.n_params_before, row.n_params_after <= 40) for row in report.rows] == [(64, True), (0, True)]
    assert report.rows[1].reason == "shares the parameters of 0"
    assert n_params(compressed) == n_params_compressed(compressed) + 16 == report.rows[0].n_params_after + 16

    compressed(normal(3, 8)).sum().backward()
    compressed.zero_grad()
    with torch.no_grad():
        next(iter(own[0].values())).mul_(2)
    assert torch.equal(compressed[0].to_matrix(), compressed[2].to_matrix())
    dense = decompress(compressed)
    assert dense[0].weight is dense[2].weight
    assert dense[0].bias is not dense[2].bias
    torch.testing.assert_close(dense(normal(3, 8)), compressed(normal(3, 8)))


def test_a_shared_weight_is_fitted_to_the_inputs_of_all_its_layers():
    model, batches = tied_pair(), [normal(50, 8, seed=3) * torch.logspace(0, -2, 8)]
    grams = [mean_square(x) for x in (batches[0], torch.tanh(model[0](batches[0])).detach())]
    both, _ = compress(model, chi=2, statistics=collect_statistics(model, batches))
    summed, _ = compress(model, chi=2, statistics=statistics_of({"0": grams[0] + grams[1]}))
    first, _ = compress(model, chi=2, statistics=collect_statistics(model, batches, modules=["0"]))
    torch.testing.assert_close(both[0].to_matrix(), summed[0].to_matrix())
    assert not torch.allclose(both[0].to_matrix(), first[0].to_matrix())


def test_a_module_under_two_names_stays_one_module():
    shared = linear(8, 8)
    model = fill(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, linear(8, 4))}))
    compressed, report = compress(model, chi=2)
    assert compressed["a"] is compressed["b"][0]
    assert mpo_names(compressed) == ["a", "b.0", "b.1"]
    assert [row.name for row in report.rows] == ["a", "b.0", "b.1"]
    assert report.n_params_after == n_params(compressed)
    dense = decompress(compressed)
    assert dense["a"] is dense["b"][0]


def embedding_and_head(tie):
    model = fill(nn.ModuleDict({"embedding": nn.Embedding(10, 8, device="meta"), "head": linear(8, 10, bias=False)}))
    if tie:
        model["head"].weight = model["embedding"].weight
    model["middle"] = fill(linear(8, 8))
    return model


def test_a_weight_that_is_an_embedding_too_stays_dense_with_a_reason():
    model = embedding_and_head(tie=True)
    compressed, report = compress(model, chi=2)
    assert mpo_names(compressed) == ["middle"]
    assert compressed["head"].weight is compressed["embedding"].weight
    row = report.rows[0]
    assert (row.name, row.kind, row.n_params_after, row.rel_error) == ("head", "dense", 80, 0)
    assert row.reason == "its weight is shared with embedding, which is not replaced"
    assert "its weight is shared with embedding" in str(report)
    with pytest.raises(ValueError, match="head cannot be replaced: its weight is shared with embedding"):
        compress(model, chi=2, include=["head"])
    assert mpo_names(compress(embedding_and_head(tie=False), chi=2)[0]) == ["head", "middle"]


def test_a_weight_shared_with_a_layer_left_out_stays_dense():
    compressed, report = compress(tied_pair(), chi=2, exclude=["2"])
    assert mpo_names(compressed) == []
    assert compressed[0].weight is compressed[2].weight
    assert report.rows[0].reason == "its weight is shared with 2, which is not replaced"


def test_a_shared_bias_keeps_its_layers_dense():
    model = fill(nn.Sequential(linear(8, 8), linear(8, 8)))
    model[1].bias = model[0].bias
    compressed, report = compress(model, chi=2)
    assert mpo_names(compressed) == []
    assert {row.reason for row in report.rows} == {"its bias is shared with another module"}


def test_attention_of_pytorch_is_left_alone():
    model = fill(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, device="meta"), "head": linear(8, 8)}))
    compressed, report = compress(model, chi=2)
    assert mpo_names(compressed) == ["head"]
    assert [row.name for row in report.rows if row.kind == "dense"] == ["attention.out_proj"]
    assert "NonDynamicallyQuantizableLinear, whose owner may read its weight" in report.rows[0].reason
    x = normal(2, 3, 8)
    assert torch.equal(compressed["attention"](x, x, x)[0], model["attention"](x, x, x)[0])
    with pytest.raises(ValueError, match=r"attention\.out_proj cannot be replaced"):
        compress(model, chi=2, include=["attention.out_proj"])


@pytest.mark.parametrize("kind", OWN_KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_of_pytorch_still_runs(training, kind):
    """In evaluation it reads the weights of its two layers and hands them to a kernel of its own."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, device="meta")
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2), "head": linear(8, 8)})
    model = fill(model).train(training)
    compressed, report = compress(model, layer=kind, keep=0.5, spread="even")
    small = [row.name for row in report.rows if row.kind == kind]
    assert {"encoder.layers.0.linear1", "encoder.layers.1.linear2"} <= set(small)
    assert not any("self_attn" in name for name in small)
    with torch.no_grad():
        x = normal(2, 3, 8)
        torch.testing.assert_close(compressed["encoder"](x), decompress(compressed)["encoder"](x))
        assert not torch.allclose(compressed["encoder"](x), model["encoder"](x))


def test_transformer_decoder_of_pytorch_is_compressed():
    decoder = fill(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True, device="meta")).eval()
    compressed, _ = compress(decoder, chi=1000, allow_growth=True)
    assert mpo_names(compressed) == ["linear1", "linear2"]
    with torch.no_grad():
        torch.testing.assert_close(compressed(*[normal(2, 3, 8)] * 2), decoder(*[normal(2, 3, 8)] * 2))


def test_a_lazy_layer_that_has_no_weight_yet_is_left_with_a_reason():
    model = nn.Sequential(fill(linear(8, 8)), nn.LazyLinear(4))
    compressed, report = compress(model, chi=2)
    assert mpo_names(compressed) == ["0"]
    assert report.rows[1].reason == "its weight has no shape yet: run the model once first"
    assert (report.rows[1].n_params_before, report.rows[1].out_features) == (0, 4)
    assert "no shape yet" in str(report)


def test_the_model_itself_must_contain_the_layer():
    with pytest.raises(ValueError, match=r"no nn\.Linear inside the model matches .*; it has none"):
        compress(fill(linear(8, 8)), chi=2)
