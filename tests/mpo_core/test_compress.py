"""Compressing whole models: what changes, what must not, and what is reported."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from structured_linear_case import statistics_of

from mpo_core.compression.compress import compress
from mpo_core.compression.counting import n_params, n_params_compressed
from mpo_core.compression.decompress import decompress
from mpo_core.compression.rel_errors import rel_errors
from mpo_core.layers.low_rank import LowRankLinear
from mpo_core.layers.mpo import MPOLinear
from mpo_core.models.picogpt import GPTConfig, PicoGPT

SMALL = GPTConfig(vocab_size=11, d_model=12, n_heads=3, n_layers=2, context=10, d_ff=20)
PER_BLOCK = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
    "feed_forward.up",
    "feed_forward.down",
)
LAYERS = [*(f"blocks.{index}.{layer}" for index in range(SMALL.n_layers) for layer in PER_BLOCK), "lm_head"]


def generators(seed=0):
    return lambda name: torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def make_model(config=SMALL, dtype=None):
    model = PicoGPT(config, dtype=dtype)
    model.init_parameters(generators())
    return model


def make_tokens(*shape):
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def mpo_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, MPOLinear)]


@pytest.mark.parametrize(("chi", "total"), [(4, 42_336), (8, 79_168), (16, 177_408), (32, 472_192)])
def test_totals_are_those_of_the_papers_code(chi, total):
    dense = PicoGPT(GPTConfig(), device="meta")
    compressed, report = compress(dense, chi=chi, init="variance", factorisation="paper")
    assert (n_params(dense), n_params(compressed)) == (808_448, total)
    assert (report.n_params_before, report.n_params_after) == (808_448, total)
    assert n_params_compressed(dense) == sum(row.n_params_before for row in report.rows) == 794_752
    assert n_params_compressed(compressed) == sum(row.n_params_after for row in report.rows) == total - 13_696
    assert all(row.rel_error is None for row in report.rows)


@pytest.mark.parametrize(("factorisation", "n_sites"), [("paper", None), ("balanced", 1), ("balanced", 3)])
def test_compress_preserves_the_outputs_at_full_chi(factorisation, n_sites):
    model, tokens = make_model(dtype=torch.float64), make_tokens(2, 10)
    compressed, report = compress(model, chi=1000, allow_growth=True, factorisation=factorisation, n_sites=n_sites)
    torch.testing.assert_close(compressed(tokens), model(tokens))
    assert mpo_names(compressed) == [row.name for row in report.rows] == LAYERS
    assert max(row.rel_error for row in report.rows) < 1e-13


@pytest.mark.parametrize("init", [None, "paper", "variance"])
def test_compress_carries_everything_else_over_and_keeps_the_model(init):
    model = make_model().eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(generator=generators(1)(name))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compressed, _ = compress(model, chi=2, init=init, generator_for=generators())

    assert mpo_names(model) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    carried = {name: value for name, value in compressed.state_dict().items() if ".cores." not in name}
    assert set(carried) == set(before) - {f"{name}.weight" for name in LAYERS}
    assert all(torch.equal(value, before[name]) for name, value in carried.items())
    assert torch.equal(compressed.positions, model.positions)
    assert not any(module.training for module in compressed.modules())
    storages = {parameter.data_ptr() for parameter in model.parameters()}
    assert storages.isdisjoint(parameter.data_ptr() for parameter in compressed.parameters())


def test_compress_draws_every_core_by_its_own_name():
    model = make_model()
    before = torch.get_rng_state()
    everything, _ = compress(model, chi=2, init="variance", generator_for=generators())
    head, _ = compress(model, chi=2, init="variance", generator_for=generators(), include=["lm_head"])
    assert torch.equal(torch.get_rng_state(), before)
    for site in range(2):
        name = f"lm_head.cores.{site}"
        assert torch.equal(everything.get_parameter(name), head.get_parameter(name))
    drawn = []
    compress(
        model,
        chi=2,
        init="paper",
        include=["lm_head"],
        generator_for=lambda name: drawn.append(name) or generators()(name),
    )
    assert drawn == ["lm_head.cores.0", "lm_head.cores.1"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*"], [], LAYERS),
        (["*"], ["lm_head"], LAYERS[:-1]),
        (["blocks.*.attention.*"], ["*.output"], [name for name in LAYERS if name.endswith(("query", "key", "value"))]),
        ("blocks.1.*", "*.attention.*", ["blocks.1.feed_forward.up", "blocks.1.feed_forward.down"]),
        ("lm_head", (), ["lm_head"]),
        (["blocks.1.feed_forward.up", "lm_head"], [], ["blocks.1.feed_forward.up", "lm_head"]),
    ],
)
def test_compress_chooses_layers_by_name(include, exclude, expected):
    compressed, report = compress(make_model(), chi=2, include=include, exclude=exclude)
    assert mpo_names(compressed) == [row.name for row in report.rows] == expected


def test_compress_keeps_dtype_and_frozen_weights():
    model = make_model(dtype=torch.bfloat16)
    model.lm_head.weight.requires_grad_(False)
    compressed, _ = compress(model, chi=2)
    assert {parameter.dtype for parameter in compressed.parameters()} == {torch.bfloat16}
    frozen = [name for name, parameter in compressed.named_parameters() if not parameter.requires_grad]
    assert frozen == ["lm_head.cores.0", "lm_head.cores.1"]


def test_compressed_state_dict_round_trips_through_safetensors():
    compressed, _ = compress(make_model(), chi=3)
    shell, _ = compress(PicoGPT(SMALL), chi=3, init="variance", generator_for=generators(5))
    shell.load_state_dict(load(save(compressed.state_dict())))
    tokens = make_tokens(2, 10)
    assert torch.equal(shell(tokens), compressed(tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["head"]}, r"no nn.Linear .* matches include=\['head'\], exclude=\[\]; it has lm_head, blocks"),
        ({"include": "head"}, r"no nn.Linear .* matches include=\['head'\], exclude=\[\]; it has lm_head, blocks"),
        ({"exclude": ["*"]}, r"matches include=\['\*'\], exclude=\['\*'\]"),
        ({"chi": None, "keep": 0.5, "allow_growth": True}, "`allow_growth` is allowed only with `chi`"),
        ({"init": "best"}, "`init` of layer='mpo' must be one of paper, variance, .*, but got 'best'"),
        (
            {"init": "variance"},
            "query: init 'variance' needs `generator_for`",
        ),
        ({"layer": "best"}, "no kind of layer is called 'best', only mpo, low_rank, "),
        ({"chi": None}, "exactly one of `chi`, `rel_error`, `keep` and `max_params` must be given, .* but got none"),
        ({"keep": 0.5}, "exactly one of .* but got chi and keep"),
        ({"chi": None, "keep": 1.5}, "`0 < keep <= 1` must hold, but got keep=1.5"),
        ({"chi": None, "keep": True}, "`0 < keep <= 1` must hold, but got keep=True"),
        (
            {"chi": None, "max_params": 7},
            "the smallest sizes of all layers have .* parameters together, but got max_params=7",
        ),
        ({"chi": None, "max_params": {"lm_head": 50}}, "blocks.0.attention.query: `max_params` has no entry for it"),
        (
            {"chi": None, "max_params": {"head": 50}},
            "`max_params` names head, but no layer to be replaced has that name",
        ),
        ({"chi": None, "layer": lambda name, linear: linear}, "must return a StructuredLinear or None, .* Linear"),
        ({"chi": None, "rel_error": 1.0}, "`0 <= rel_error < 1` must hold, but got rel_error=1.0"),
        (
            {"chi": None, "rel_error": 0.1, "init": "variance"},
            "init 'variance' needs .* `max_params` by layer",
        ),
        ({"layer": lambda name, linear: None}, "none with a function as `layer`, but got chi"),
        ({"layer": "pruned"}, "blocks.0.attention.query: a pruned layer cannot be sized by `chi`"),
        ({"method": "lbfgs"}, "blocks.0.attention.query: `method` 'lbfgs' needs a metric"),
        ({"statistics": statistics_of({"other": torch.eye(12)})}, "measure no layer .*query: no calibration input"),
        ({"metric": "best"}, "`metric` must be one of weights, outputs, loss, but got 'best'"),
        ({"metric": "outputs"}, "metric 'outputs' needs `statistics`"),
        ({"metric": "loss", "statistics": statistics_of({})}, "metric 'loss' needs statistics of a loss"),
        ({"chi": None, "keep": 0.5, "spread": "best"}, "`spread` must be one of loss, errors, even, but got 'best'"),
        ({"chi": None, "keep": 0.5, "spread": "loss"}, "spread 'loss' needs the metric 'loss'"),
        ({"spread": "even"}, "spread 'even' goes with `keep` or one number"),
        ({"chi": 2.5}, "blocks.0.attention.query: `chi` must be a whole number, but got 2.5"),
        ({"chi": 2.0, "layer": "low_rank"}, "blocks.0.attention.query: `rank` must be a whole number, but got 2.0"),
        ({"chi": None, "keep": "half"}, "`0 < keep <= 1` must hold, but got keep='half'"),
        ({"chi": None, "max_params": 0.5}, "`max_params` must be a whole number, but got 0.5"),
        (
            {"chi": None, "max_params": {"lm_head": 0.5}},
            "must be a whole number, but got 0.5",
        ),
        ({"budget": 0.5}, "layer='mpo' has no option `budget`; it has d_in, d_out, factorisation"),
        ({"bonds": [1, 2, 1]}, "layer='mpo' has no option `bonds`"),
        ({"init": "variance", "method": "lbfgs"}, "layer='mpo' has no option `method`"),
        ({"n_tokens": 0}, "`n_tokens >= 1` must hold, but got n_tokens=0"),
        ({"n_tokens": 1.5}, "`n_tokens` must be a whole number, but got 1.5"),
        ({"layer": "low_rank", "method": "lbfgs"}, "layer='low_rank' has no option `method`; it has gauge"),
        (
            {"layer": "monarch", "forward": "chain"},
            "layer='monarch' has no option `forward`; it has max_steps, n_blocks",
        ),
        ({"layer": "pruned", "n_sites": 2}, "layer='pruned' has no option `n_sites`; it has none"),
        ({"init": "variance", "statistics": statistics_of({})}, "init 'variance' draws fresh parameters, so"),
        (
            {"chi": None, "layer": lambda name, linear: LowRankLinear(3, 4, rank=1, device="meta")},
            r"blocks.0.attention.query: `layer` must return a layer of shape \(12, 12\), but LowRankLinear has .*=3",
        ),
        ({"chi": 0}, "blocks.0.attention.query: `chi >= 1` must hold, but got chi=0"),
        ({"n_sites": 7}, "blocks.0.attention.query: `1 <= n_sites <= 6` must hold"),
    ],
)
def test_compress_says_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        compress(make_model(), **{"chi": 2, **options})


def test_compress_refuses_weights_that_have_diverged():
    model = make_model()
    model.lm_head.weight.data[3, 4] = float("nan")
    for size in ({"chi": 2}, {"keep": 0.5}, {"rel_error": 0.1}):
        with pytest.raises(ValueError, match=r"lm_head: `W` must be finite to be decomposed, but 1 entries"):
            compress(model, **size)


def test_compress_refuses_to_decompose_on_meta():
    with pytest.raises(ValueError, match=r"blocks.0.attention.query: a weight on the meta device has no values"):
        compress(PicoGPT(SMALL, device="meta"), chi=2)


@pytest.mark.parametrize(("factorisation", "n_sites"), [("paper", None), ("balanced", 3)])
def test_rel_errors_are_those_of_compression(factorisation, n_sites):
    model, chis = make_model(dtype=torch.float64), (1, 3, 1000)
    errors = rel_errors(model, chis, factorisation=factorisation, n_sites=n_sites)
    assert set(errors) == {(chi, name) for chi in chis for name in LAYERS}
    for chi in chis:
        for row in compress(model, chi=chi, factorisation=factorisation, n_sites=n_sites)[1].rows:
            assert errors[chi, row.name] == pytest.approx(row.rel_error, abs=1e-13)


def test_rel_errors_of_two_sites_are_singular_value_tails():
    model = make_model(dtype=torch.float64)
    errors = rel_errors(model, [3])
    W = model.lm_head.weight.detach().numpy()
    s = np.linalg.svd(W.reshape(1, 11, 4, 3).transpose(0, 2, 1, 3).reshape(4, 33), compute_uv=False)
    assert errors[3, "lm_head"] == pytest.approx(np.sqrt(np.sum(s[3:] ** 2) / np.sum(s**2)), abs=1e-13)


def test_rel_errors_of_random_weights_are_near_one():
    """Matrices without structure barely compress; facts.md, point 5, from the paper's code at one seed."""
    errors = rel_errors(make_model(GPTConfig()), (4, 8, 16, 32), factorisation="paper")
    for chi, largest, mean in ((4, 0.988, 0.950), (8, 0.965, 0.899), (16, 0.891, 0.795), (32, 0.630, 0.558)):
        values = [error for (cap, _), error in errors.items() if cap == chi]
        assert max(values) == pytest.approx(largest, abs=0.004)
        assert sum(values) / len(values) == pytest.approx(mean, abs=0.004)


def test_n_params_counts_what_is_trainable_and_n_params_compressed_all_matrices():
    model = make_model()
    total, matrices = n_params(model), n_params_compressed(model)
    assert matrices == 2 * (4 * 144 + 2 * 240) + 11 * 12
    assert total == matrices + 11 * 12 + 2 * (12 + 20 + 12 + 4 * 12) + 2 * 12
    model.embedding.weight.requires_grad_(False)
    assert n_params(model) == total - 11 * 12
    assert n_params_compressed(model) == matrices


def test_a_budget_may_be_a_number_of_numpy():
    model = make_model()
    numbers, plain = (compress(model, max_params=budget)[1] for budget in (np.int64(1500), 1500))
    assert [row.bonds for row in numbers.rows] == [row.bonds for row in plain.rows]
    assert compress(model, keep=np.float64(0.5))[1].n_params_after == compress(model, keep=0.5)[1].n_params_after


def test_decompress_of_a_layer_itself_is_a_linear_layer():
    layer = MPOLinear(12, 8, chi=2, generator=torch.Generator().manual_seed(0))
    dense = decompress(layer)
    assert type(dense) is torch.nn.Linear
    assert torch.equal(dense.weight, layer.to_matrix())


def test_bonds_without_any_are_refused_in_words():
    with pytest.raises(ValueError, match=r"`bonds` must be 1, then a cap .*, but got bonds=\[\]"):
        MPOLinear(12, 8, bonds=[], device="meta")


def test_compress_refuses_to_fit_a_meta_weight_to_inputs():
    with pytest.raises(ValueError, match=r"query: a weight on the meta device has no values"):
        compress(PicoGPT(SMALL, device="meta"), keep=0.5, statistics=statistics_of({}))


def test_max_params_names_the_first_of_layers_that_share_a_weight():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="`max_params` names 1, which shares the weight of 0"):
        compress(model, max_params={"1": 30})
