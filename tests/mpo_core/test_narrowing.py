"""Hidden units of MLPs: which can be removed, which go, and what is left of the model."""

from __future__ import annotations

from itertools import combinations, product

import language_models
import pytest
import torch
from structured_linear_case import metric_of, normal, square_losses
from torch import nn

from mpo_core import (
    GPTConfig,
    PicoGPT,
    collect_statistics,
    compress,
    decompress,
    load,
    next_token_losses,
    save,
)
from mpo_core.compression.allocation import together
from mpo_core.fitting.elimination import eliminate, refit
from mpo_core.fitting.ladders import Rung
from mpo_core.models.dense_layers import find_dense_layers
from mpo_core.models.hidden_units import find_hidden_units


def best_error(W, metric, left):
    """The least squared error with these inputs alone, from normal equations of all entries at once."""
    G, S = metric.gram, metric.sensitivity
    A = torch.kron(S, G[left][:, left])
    b = (S @ W @ G[:, left]).reshape(-1)
    W_hat = torch.zeros_like(W)
    W_hat[:, left] = torch.linalg.solve(A, b).reshape(len(W), len(left))
    return metric.norm(W - W_hat) ** 2, W_hat[:, left]


def test_refit_columns_are_the_best_in_the_metric():
    W, metric = normal(4, 6), metric_of(4, 6)
    left = torch.tensor([0, 2, 5])
    torch.testing.assert_close(refit(W, metric, left), best_error(W, metric, left)[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("with_sensitivity", [True, False])
def test_elimination_knows_the_error_of_what_is_left(with_sensitivity):
    W, metric = normal(5, 60), metric_of(5, 60, with_sensitivity=with_sensitivity)
    found = eliminate(W, metric, [60, 37, 12, 1])
    assert list(found) == [60, 37, 12, 1]
    for size, (left, error, weighted) in found.items():
        assert len(left) == size
        assert left.tolist() == sorted(set(left.tolist()))
        W_hat = torch.zeros_like(W)
        W_hat[:, left] = refit(W, metric, left)
        assert error == pytest.approx(metric.norm(W - W_hat) ** 2, rel=1e-8, abs=1e-12)
        torch.testing.assert_close(weighted, metric.outputs_weighted(W_hat[:, left]), rtol=1e-8, atol=1e-8)


def test_one_input_less_is_the_best_choice_and_several_are_among_the_best():
    for seed in range(5):
        W, metric = normal(4, 8, seed=seed), metric_of(4, 8, seed=seed)
        for size in (7, 5):
            error = eliminate(W, metric, [size])[size][1]
            errors = sorted(best_error(W, metric, torch.tensor(left))[0] for left in combinations(range(8), size))
            assert errors[0] * (1 - 1e-9) <= error <= errors[0 if size == 7 else len(errors) // 10] * (1 + 1e-9)


def test_together_is_the_best_of_all_combinations_on_the_hull():
    ladders = [
        [Rung(size, float(error), size // 8) for size, error in zip((8, 24, 40, 80), errors, strict=True)]
        for errors in ((9, 4, 3.5, 0), (5, 3, 1, 0.5), (7, 1, 0.9, 0))
    ]
    rungs = together(ladders)
    assert [rung.cost for rung in rungs] == sorted({rung.cost for rung in rungs})
    for price in (0.005, 0.02, 0.05, 0.1, 0.2):  # no other combination is better at any price
        assert min(rung.error + price * rung.n_params for rung in rungs) == pytest.approx(
            min(sum(r.error + price * r.n_params for r in one) for one in product(*ladders))
        )


# Which units can be removed -------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A norm makes every unit depend on the others."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(self.norm(self.up(x)))


class Softmaxed(Normed):
    def forward(self, x):
        return self.down(self.up(x).softmax(-1))


class Residual(Normed):
    """A residual connection must not hide a small difference."""

    def forward(self, x):
        return 1e5 * x + self.down(nn.functional.rms_norm(self.up(x).relu(), (self.up.out_features,)))


def units_of(model):
    return {
        (group.inner, group.outer, group.n) for group in find_hidden_units(model, find_dense_layers(model, "*", ()))
    }


def test_units_of_mlps_are_found_and_no_others():
    mlp = "model.layers.{}.mlp."
    llama = {
        ((mlp.format(i) + "gate_proj", mlp.format(i) + "up_proj"), mlp.format(i) + "down_proj", 24) for i in (0, 1)
    }
    assert units_of(language_models.llama()) == llama
    gpt2 = {((f"transformer.h.{i}.mlp.c_fc",), f"transformer.h.{i}.mlp.c_proj", 64) for i in (0, 1)}
    assert units_of(language_models.gpt2()) == gpt2
    pico = PicoGPT(GPTConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=9, context=8))
    pico.init_parameters(lambda _: torch.Generator().manual_seed(0), "variance")
    assert units_of(pico) == {(("blocks.0.feed_forward.up",), "blocks.0.feed_forward.down", 64)}
    chain = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3))
    assert units_of(chain) == {(("0",), "2", 9)}  # a layer belongs to one group only
    assert units_of(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))) == {(("0",), "2", 4)}
    attention = nn.TransformerEncoderLayer(8, 2, 8).self_attn
    for other in (Normed(), Softmaxed(), Residual(), attention):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert units_of(nn.ModuleList([other, nn.Linear(2, 2)]).to(dtype)) == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_units_are_found_in_half_precision_and_hooks_do_not_see_the_test(dtype):
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 8)).to(dtype)
    model[1].register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    state = torch.get_rng_state()
    assert units_of(model) == {(("0",), "3", 32)}
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


# Compression ----------------------------------------------------------------------------------------------------------


def narrow_example(seed=0):
    """An MLP in which a third of the units matters."""
    model = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 8))
    for index, parameter in enumerate(model.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed + index, dtype=torch.float32)
    model[2].weight.data[:, 16:] *= 0.01
    batches = list(normal(10, 200, 8, seed=seed + 9, dtype=torch.float32))
    return model, batches, collect_statistics(model, batches, loss=square_losses)


def losses_of(report):
    return [(row.predicted_loss, row.held_out_loss) for row in report.rows]


@pytest.mark.parametrize("layer", ["low_rank", "mpo", "auto"])
def test_units_that_do_not_matter_go(layer):
    model, _, statistics = narrow_example()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wide, narrow = (compress(model, keep=0.35, statistics=statistics, layer=layer, narrow=n) for n in (False, True))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    small, report = narrow
    assert (small[0].out_features, small[2].in_features) == (18, 18)
    assert report.kept <= 0.35
    assert [row.n_params_before for row in report.rows] == [384, 384]
    assert report.n_params_before == sum(p.numel() for p in model.parameters())
    assert report.n_params_after == sum(p.numel() for p in small.parameters())
    assert all(row.reason.startswith("18 of 48 hidden units") for row in report.rows)
    assert sum(loss for loss, _ in losses_of(report)) < 0.1 * sum(loss for loss, _ in losses_of(wide[1]))


def test_the_predicted_loss_includes_the_units_that_are_gone():
    model, _, statistics = narrow_example()
    small, report = compress(model, keep=0.3, statistics=statistics, layer="low_rank", narrow=True)
    left = next(
        left
        for left, _, _ in eliminate(
            model[2].weight.detach(), statistics.metric("2", "loss"), [small[2].in_features]
        ).values()
    )
    W_hat = torch.zeros(8, 48, dtype=torch.float64)
    W_hat[:, left] = decompress(small)[2].weight.detach().double()
    for held_out, loss in ((False, report.rows[1].predicted_loss), (True, report.rows[1].held_out_loss)):
        metric = statistics.metric("2", "loss", held_out=held_out)
        assert loss == pytest.approx(metric.norm(model[2].weight.detach().double() - W_hat) ** 2 / 2, rel=1e-6)
    # The rows that are left of the first layer are its own, as far as their rank goes.
    torch.testing.assert_close(small[0].bias, model[0].bias[left])


@pytest.mark.filterwarnings("ignore:the predicted loss")
def test_a_language_model_with_fewer_units_is_saved_loaded_and_generates(tmp_path):
    for model in (language_models.llama(), language_models.gpt2()):
        tokens = [torch.randint(30, (1, 40), generator=torch.Generator().manual_seed(seed)) for seed in range(10)]
        statistics = collect_statistics(model, tokens, loss=next_token_losses)
        options = {"keep": 0.5, "statistics": statistics, "exclude": "lm_head", "layer": "low_rank"}
        small, report = compress(model, narrow=True, gauge="fixed", **options)
        assert any("hidden units" in (row.reason or "") for row in report.rows)
        assert report.kept <= 0.5
        folder = tmp_path / type(model).__name__
        for one in (small, decompress(small)):
            save(one, folder)
            for again in (load(folder), load(folder, like=model), load(folder, like=one)):
                assert torch.equal(again.eval()(tokens[0]).logits, one.eval()(tokens[0]).logits)
            save(again, folder)
            assert torch.equal(load(folder).eval()(tokens[0]).logits, one(tokens[0]).logits)
        greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(load(folder).generate(tokens[0], **greedy), small.generate(tokens[0], **greedy))


@pytest.mark.filterwarnings("ignore:the predicted loss")
def test_a_narrowed_model_is_compressed_again_and_still_loads(tmp_path):
    model = language_models.llama()
    tokens = [torch.randint(30, (1, 40), generator=torch.Generator().manual_seed(seed)) for seed in range(10)]

    def narrowed(one, keep):
        statistics = collect_statistics(one, tokens, loss=next_token_losses)
        return compress(
            one, keep=keep, statistics=statistics, exclude="lm_head", layer="low_rank", gauge="fixed", narrow=True
        )[0]

    once = decompress(narrowed(model, 0.6))
    twice = narrowed(once, 0.6)
    assert twice.model.layers[0].mlp.down_proj.in_features < once.model.layers[0].mlp.down_proj.in_features < 24
    for number, one in enumerate((twice, decompress(twice), compress(once, chi=2, exclude="lm_head")[0])):
        save(one, tmp_path / str(number))
        for again in (load(tmp_path / str(number)), load(tmp_path / str(number), like=model)):
            assert torch.equal(again(tokens[0]).logits, one(tokens[0]).logits)


def test_the_layers_of_the_result_are_the_callers_own():
    """Nothing is shared with the model, frozen weights stay frozen, and a computed tensor is no obstacle."""
    model, batches, statistics = narrow_example()
    model[1].kept = model[0](batches[0])
    model[0].weight.requires_grad_(False)
    small, _ = compress(model.train(), keep=0.35, statistics=statistics, layer="low_rank", narrow=True)
    assert small.training
    assert [name for name, parameter in small.named_parameters() if not parameter.requires_grad] == ["0.weight"]
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in small.parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("gauge", ["free", "fixed"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_the_budget_holds_for_every_kind(keep, gauge):
    model, _, statistics = narrow_example()
    for layer in ("low_rank", "mpo", "auto", ("mpo", {"n_sites": 4})):
        report = compress(model, keep=keep, statistics=statistics, layer=layer, gauge=gauge, narrow=True)[1]
        assert report.kept <= keep


def test_options_that_need_a_shape_keep_it():
    model, _, statistics = narrow_example()
    splits = {"0": ("mpo", {"d_out": (8, 6), "d_in": (2, 4)}), "2": "low_rank"}
    small, _ = compress(model, keep=0.4, statistics=statistics, layer=splits, narrow=True)
    assert small[0].out_features == 48
    small, _ = compress(model, keep=0.9, statistics=statistics, layer="monarch", n_blocks=4, narrow=True)
    assert small[0].out_features % 4 == 0


def test_part_of_an_mlp_is_not_narrowed():
    model, _, statistics = narrow_example()
    for options in ({"exclude": "0"}, {"include": "0"}, {"layer": {"2": "low_rank"}}):
        with pytest.warns(UserWarning, match="`narrow` found no hidden units that can be removed"):
            small, _ = compress(model, keep=0.5, statistics=statistics, narrow=True, **options)
        assert small[2].in_features == 48


def test_bad_weights_and_statistics_are_named():
    model, _, statistics = narrow_example()
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 8))
    other = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 8))
    model[2].weight.data[0, 0] = torch.nan
    for one, message in ((bare, "0: a weight on the meta"), (model, "2: .*finite"), (other, "0: .* shape .40, 40.")):
        with pytest.raises(ValueError, match=f"^{message}"):
            compress(one, keep=0.5, statistics=statistics, narrow=True)


def test_a_model_of_other_sizes_is_still_refused(tmp_path):
    model, _, statistics = narrow_example()
    save(compress(model, keep=0.35, statistics=statistics, layer="low_rank", narrow=True)[0], tmp_path)
    other = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 8))
    with pytest.raises(
        ValueError, match=r"0 goes from 8 to 18 features in the saved model, but .* Linear from 8 to 40"
    ):
        load(tmp_path, like=other)


def test_a_model_without_removable_units_stays_as_wide():
    model = nn.ModuleDict({"a": nn.Linear(8, 6), "b": nn.Linear(8, 6)})
    batches = list(normal(5, 60, 8, dtype=torch.float32))
    statistics = collect_statistics(model, batches, loss=lambda model, x: (model["a"](x) * model["b"](x)).sum(-1))
    options = {"keep": 0.5, "statistics": statistics, "layer": "low_rank"}
    with pytest.warns(UserWarning, match="`narrow` found no hidden units that can be removed"):
        assert compress(model, narrow=True, **options)[1] == compress(model, **options)[1]


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.5, "metric": "outputs"},
        {"keep": 0.5, "spread": "even"},
        {"chi": 2},
        {"keep": 0.5, "metric": "weights"},
    ],
)
def test_narrowing_needs_a_budget_that_is_spread_by_the_loss(options):
    model, _, statistics = narrow_example()
    with pytest.raises(ValueError, match="`narrow` needs `keep` or one number as `max_params`, and spread 'loss'"):
        compress(model, statistics=statistics, layer="low_rank", narrow=True, **options)
