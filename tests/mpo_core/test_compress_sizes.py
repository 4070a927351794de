"""Sizes of compressed layers, by cap, error or budget, for every kind of layer; and what the report says of them."""

from __future__ import annotations

import dataclasses

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
from mpo_core.layers.registry import kind_called
from mpo_core.layers.structured import StructuredLinear
from mpo_core.tensor_train.algebra import rel_error


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_linear(in_features, out_features, seed, decay, dtype):
    """A weight whose singular values fall like exp(-decay k)."""
    layer = nn.Linear(in_features, out_features, device="meta", dtype=dtype).to_empty(device="cpu")
    U, s, Vh = torch.linalg.svd(normal(out_features, in_features, seed=seed), full_matrices=False)
    layer.weight.data = (U * torch.exp(-decay * torch.arange(len(s))) @ Vh).to(dtype)
    layer.bias.data = normal(out_features, seed=seed + 1).to(dtype)
    return layer


def make_model(dtype=torch.float64):
    """One layer that compresses well, one that hardly does, one in between."""
    return nn.Sequential(
        make_linear(24, 36, 0, 0.8, dtype),
        nn.Tanh(),
        make_linear(36, 36, 1, 0.02, dtype),
        nn.Tanh(),
        make_linear(36, 16, 2, 0.3, dtype),
    )


N_DENSE = 24 * 36 + 36 * 36 + 36 * 16


def make_batches(seed=5):
    """Inputs near a few directions."""
    return list((normal(64, 6, seed=seed) @ normal(6, 24, seed=9) + 0.1 * normal(64, 24, seed=seed + 1)).split(16))


def errors(report):
    return [row.rel_error for row in report.rows]


# By cap ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mpo", "low_rank", "monarch"])
def test_compress_by_chi_replaces_every_layer(kind):
    model = make_model()
    compressed, report = compress(model, layer=kind, chi=2)
    layers = [module for module in compressed if not isinstance(module, nn.Tanh)]
    assert {type(layer) for layer in layers} == {kind_called(kind)}
    for layer, row, index in zip(layers, report.rows, (0, 2, 4), strict=True):
        assert row.kind == kind
        assert row.n_params_after == layer.n_params_matrix
        assert row.rel_error == pytest.approx(rel_error(model[index].weight, layer.to_matrix()), abs=1e-14)
        assert torch.equal(layer.bias, model[index].bias)
    x = normal(3, 24)
    torch.testing.assert_close(compressed(x), decompress(compressed)(x))


@pytest.mark.parametrize("init", [None, "variance"])
@pytest.mark.parametrize(
    ("kind", "chi", "n_params", "reason"),
    [
        ("mpo", 1000, 1440, "need 1,440 parameters, and 36×24 has 864"),
        ("low_rank", 24, 1440, "rank=24 has 1,440 parameters, the dense matrix 864"),
        ("monarch", 6, 1728, "rank=6 has 1,728 parameters, the dense matrix 864"),
    ],
)
def test_compress_by_chi_leaves_layers_that_would_grow_dense(kind, chi, n_params, reason, init):
    options = {"layer": kind, "chi": chi, "include": ["0"], "init": init}
    options["generator_for"] = lambda name: torch.Generator().manual_seed(0)
    model = make_model()
    compressed, report = compress(model, **options)
    row = report.rows[0]
    assert (row.kind, row.n_params_after, row.rel_error) == ("dense", 864, 0)
    assert reason in row.reason
    assert torch.equal(compressed[0].weight, model[0].weight)
    _, report = compress(model, allow_growth=True, **options)
    row = report.rows[0]
    assert (row.kind, row.n_params_after) == (kind, n_params)
    assert reason in row.reason


def test_compress_by_chi_leaves_a_layer_that_would_be_as_large_dense():
    model = nn.Sequential(nn.Linear(4, 4))
    _, report = compress(model, layer="low_rank", chi=2)
    assert (report.rows[0].kind, report.rows[0].n_params_after) == ("dense", 16)


@pytest.mark.parametrize("kind", ["mpo", "low_rank", "monarch"])
def test_compress_draws_fresh_parameters_of_every_kind_by_name(kind):
    drawn = []

    def generator_for(name):
        drawn.append(name)
        return torch.Generator().manual_seed(len(name))

    before = torch.get_rng_state()
    compressed, report = compress(make_model(), layer=kind, chi=2, init="variance", generator_for=generator_for)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(drawn) == {name for name, _ in compressed.named_parameters() if not name.endswith("bias")}
    assert errors(report) == [None] * 3
    assert all(float(value.detach().abs().max()) > 0 for value in compressed.parameters())


# By error -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_compress_by_error_meets_it_or_leaves_the_layer_dense(kind):
    model = make_model()
    compressed, report = compress(model, layer=kind, rel_error=0.3)
    for row in report.rows:
        layer = compressed.get_submodule(row.name)
        if row.kind == "dense":
            assert torch.equal(layer.weight, model.get_submodule(row.name).weight)
            assert row.reason == f"no {kind} layer with fewer parameters found within rel_error 0.3"
            assert (row.n_params_after, row.rel_error) == (row.n_params_before, 0)
        else:
            assert rel_error(model.get_submodule(row.name).weight, layer.to_matrix()) <= 0.3
            assert row.n_params_after < row.n_params_before
    if kind != "pruned":
        assert report.rows[1].kind == "dense"
    if kind == "low_rank":
        assert report.rows[0].kind == "low_rank"


@pytest.mark.parametrize("factorisation", ["balanced", "min_params"])
def test_compress_by_error_of_a_chain_finds_few_parameters(factorisation):
    """A weight that is a chain of bond 3, and noise below the target."""
    chain = MPOLinear(24, 36, chi=3, factorisation=factorisation, generator=torch.Generator().manual_seed(0)).double()
    model = nn.Sequential(make_linear(24, 36, 0, 0.8, torch.float64))
    W = chain.to_matrix().detach()
    model[0].weight.data = W + 1e-3 * float(W.std()) * normal(36, 24)
    _, report = compress(model, rel_error=0.01, factorisation=factorisation)
    assert report.rows[0].n_params_after <= sum(core.numel() for core in chain.cores)
    assert report.rows[0].rel_error <= 0.01


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_compress_by_error_is_about_outputs_where_calibrated(kind):
    model, batches = make_model(), make_batches()
    statistics = collect_statistics(model, batches)
    _, by_weights = compress(model, layer=kind, rel_error=0.2, include=["0"])
    compressed, report = compress(model, layer=kind, rel_error=0.2, include=["0"], statistics=statistics)
    row = report.rows[0]
    assert row.kind == kind
    assert row.error <= 0.2
    W_hat, metric = compressed[0].to_matrix(), statistics.metric("0", "outputs")
    assert row.error == pytest.approx(metric.error(model[0].weight, W_hat))
    if kind != "pruned":
        assert row.n_params_after <= by_weights.rows[0].n_params_after


@pytest.mark.parametrize("kind", OWN_KINDS)
@pytest.mark.parametrize("target", [0.005, 0.003, 0.001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compress_by_error_holds_after_rounding_to_low_precision(kind, target, dtype):
    """The factors are within reach of the target, and may miss it once rounded."""
    model = nn.Sequential(make_linear(64, 64, 0, 0.8, dtype))
    compressed, report = compress(model, layer=kind, rel_error=target)
    assert report.rows[0].rel_error <= target * 1.00001
    if report.rows[0].kind == "dense":
        assert "with fewer parameters found within rel_error" in report.rows[0].reason
        assert torch.equal(compressed[0].weight, model[0].weight)


def test_compress_by_output_error_finds_a_size_within_a_step_of_the_smallest():
    model = nn.Sequential(make_linear(64, 64, 0, 0.05, torch.float32))
    inputs = (normal(200, 12) @ normal(12, 64, seed=1) + 0.1 * normal(200, 64, seed=2)).float()
    statistics = collect_statistics(model, [inputs])
    _, report = compress(model, rel_error=0.1, statistics=statistics)
    row = report.rows[0]
    assert row.error <= 0.1
    smaller, _ = compress(model, max_params={"0": int(row.n_params_after / 1.1)}, statistics=statistics)
    assert smaller[0].error(model[0].weight, statistics.metric("0", "outputs")) > 0.1


# By budget ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", OWN_KINDS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_compress_spreads_a_budget(kind, calibrated):
    model, budget = make_model(), 1500
    statistics = collect_statistics(model, make_batches()) if calibrated else None
    compressed, report = compress(model, layer=kind, max_params=budget, statistics=statistics)
    spent = sum(row.n_params_after for row in report.rows)
    assert 0.85 * budget < spent <= budget
    assert spent == n_params_compressed(compressed)
    assert report.n_params_after == n_params(compressed) == spent + 36 + 36 + 16
    if not calibrated:
        _, evenly = compress(make_model(), layer=kind, max_params=budget, spread="even")
        assert sum(error**2 for error in errors(report)) < sum(error**2 for error in errors(evenly))


def test_compress_spreads_a_budget_better_than_one_cap_for_all():
    model = make_model()
    _, uniform = compress(model, layer="low_rank", chi=10)
    total = sum(row.n_params_after for row in uniform.rows)
    _, report = compress(model, layer="low_rank", max_params=total)
    assert sum(error**2 for error in errors(report)) < 0.8 * sum(error**2 for error in errors(uniform))


@pytest.mark.slow
def test_compress_spreads_a_calibrated_budget_by_the_errors_of_fits():
    """One layer whose inputs lie in few directions, which only a fit makes use of, and one whose inputs do not."""
    for seed in range(2):
        model = nn.Sequential(*[nn.Linear(16, 16, bias=False, device="meta").to_empty(device="cpu") for _ in range(2)])
        for index, layer in enumerate(model):
            layer.weight.data = normal(16, 16, seed=seed + 50 * index).float() / 4
        inputs = normal(16, 16, seed=seed + 1) * torch.logspace(0, -1.5, 16, dtype=torch.float64)
        options = {"n_sites": 2}
        options["statistics"] = statistics_of({"0": inputs @ inputs.T, "1": torch.eye(16, dtype=torch.float64)})

        def total(max_params, model=model, options=options):
            return sum(row.error**2 for row in compress(model, max_params=max_params, **options)[1].rows)

        best = min(total({"0": size, "1": 256 - size}) for size in range(32, 225, 32))
        assert total(256) < 1.05 * best


def test_compress_takes_a_fraction_a_number_or_a_number_per_layer():
    model = make_model()
    _, fraction = compress(model, keep=0.5)
    _, number = compress(model, max_params=N_DENSE // 2)
    assert errors(fraction) == errors(number)
    budget = {"0": 300, "2": 2000, "4": 250}
    _, each = compress(model, max_params=budget)
    assert [row.kind for row in each.rows] == ["mpo", "dense", "mpo"]
    assert each.rows[1].reason == "its share, 2,000 parameters, holds the dense matrix"
    assert all(row.n_params_after <= budget[row.name] for row in each.rows if row.kind == "mpo")
    with pytest.raises(ValueError, match=r"^0: chi=1 needs 60 parameters"):
        compress(model, max_params={**budget, "0": 3})


def test_compress_with_a_full_budget_keeps_what_is_dense():
    _, report = compress(make_model(), max_params=N_DENSE)
    assert [row.kind for row in report.rows] == ["dense"] * 3


# DeviceRates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mpo", "low_rank", "monarch"])
def test_calibration_lowers_the_output_error(kind):
    model, batches, held_out = make_model(), make_batches(), torch.cat(make_batches(seed=70))
    plain, _ = compress(model, layer=kind, chi=2)
    aware, report = compress(model, layer=kind, chi=2, statistics=collect_statistics(model, batches))
    y = model(held_out)
    assert torch.linalg.norm(aware(held_out) - y) < 0.9 * torch.linalg.norm(plain(held_out) - y)
    assert all(row.error is not None for row in report.rows)


def test_method_is_that_of_the_fit():
    model = make_model()
    statistics = collect_statistics(model, make_batches())
    found = {
        method: compress(model, chi=2, include=["0"], statistics=statistics, method=method)[1].rows[0]
        for method in ("tt_svd", "whitened", "lbfgs")
    }
    assert found["lbfgs"].error < min(found["tt_svd"].error, found["whitened"].error)
    assert found["tt_svd"].rel_error == compress(model, chi=2, include=["0"])[1].rows[0].rel_error


# The rest -------------------------------------------------------------------------------------------------------------


def test_compress_takes_a_function_as_layer():
    def layer(name, linear):
        return kind_called("low_rank").from_linear(linear, rank=3) if name == "2" else None

    compressed, report = compress(make_model(), layer=layer)
    assert [row.kind for row in report.rows] == ["dense", "low_rank", "dense"]
    assert report.rows[0].reason == "`layer` left it dense"
    assert isinstance(compressed[2], StructuredLinear)


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_decompress_brings_dense_layers_back(kind):
    model = make_model(torch.float32).eval()
    model[0].weight.requires_grad_(False)
    compressed, _ = compress(model, layer=kind, keep=0.6)
    before = {name: value.clone() for name, value in compressed.state_dict().items()}
    dense = decompress(compressed)
    x = normal(5, 24).float()
    torch.testing.assert_close(dense(x), compressed(x))
    assert {name: value.shape for name, value in dense.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    assert not any(isinstance(module, StructuredLinear) for module in dense.modules())
    assert [name for name, value in dense.named_parameters() if not value.requires_grad] == ["0.weight"]
    assert not any(module.training for module in dense.modules())
    assert all(torch.equal(value, before[name]) for name, value in compressed.state_dict().items())
    assert {p.data_ptr() for p in dense.parameters()}.isdisjoint(p.data_ptr() for p in compressed.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", OWN_KINDS)
def test_compress_takes_bfloat16(kind):
    model = make_model(torch.bfloat16)
    statistics = collect_statistics(model, [normal(8, 24).bfloat16()])
    compressed, report = compress(model, layer=kind, keep=0.5, statistics=statistics)
    assert {parameter.dtype for parameter in compressed.parameters()} == {torch.bfloat16}
    assert torch.isfinite(compressed(normal(2, 24).bfloat16())).all()
    assert all(row.error < 1 for row in report.rows)


def test_n_params_of_a_pruned_model_are_those_kept():
    compressed, report = compress(make_model(), layer="pruned", max_params={"0": 100, "2": 200, "4": 300})
    assert n_params_compressed(compressed) == 600
    assert n_params(compressed) == report.n_params_after == 600 + 36 + 36 + 16


def test_report_reads_as_a_table_and_becomes_a_frame():
    model = make_model()
    statistics = collect_statistics(model, make_batches())
    _, report = compress(model, chi=4, include=["0", "4"], statistics=statistics, n_tokens=10)
    lines = str(report).splitlines()
    assert lines[0].split() == (
        [
            "layer",
            "out×in",
            "d_out",
            "d_in",
            "bonds",
            "before",
            "after",
            "rel_error",
            "error",
            "kFLOP/token",
            "kB/token",
        ]
    )
    row = report.rows[0]
    assert lines[1].split()[:7] == ["0", "36×24", "6·6", "4·6", "1·4·1", "864", "240"]
    assert lines[1].split()[7:9] == [f"{row.rel_error:.4f}", f"{row.error:.4f}"]
    assert lines[-1] == f"model: 2,824 -> {report.n_params_after:,} parameters, {2824 / report.n_params_after:.2f}×"
    frame = report.to_frame()
    assert list(frame.columns) == [field.name for field in dataclasses.fields(row)]
    assert frame.loc[0, "n_params_after"] == 240
    assert list(frame["name"]) == ["0", "4"]


def test_report_counts_flops_and_bytes_per_token():
    _, report = compress(make_model(), layer="low_rank", chi=4, include=["0"], n_tokens=10)
    assert report.rows[0].flops_per_token == 2 * 4 * (24 + 36)
    _, dense = compress(make_model(), layer=lambda name, linear: None, include=["0"], n_tokens=10)
    assert dense.rows[0].flops_per_token == 2 * 24 * 36
    assert dense.rows[0].bytes_per_token == 8 * (24 * 36 + 10 * (24 + 36)) / 10
    assert "`layer` left it dense" in str(dense).splitlines()[1]
