"""Whole models of Hugging Face: small random configurations, no download."""

from __future__ import annotations

import pytest
import torch
from own_kinds import OWN_KINDS
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from mpo_core.calibration.collecting import collect_statistics, next_token_losses
from mpo_core.compression.compress import compress
from mpo_core.compression.counting import n_params, n_params_compressed
from mpo_core.compression.decompress import decompress
from mpo_core.compression.rel_errors import rel_errors
from mpo_core.fitting.metric import Metric
from mpo_core.layers.low_rank import LowRankLinear
from mpo_core.layers.mpo import MPOLinear

VOCABULARY, WIDTH, LAYERS = 50, 24, 2


def seeded(model, dtype=torch.float64):
    """The constructors draw from the global generator; every value is drawn again, from one of its own."""
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(index)
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = values / WIDTH**0.5 if parameter.ndim == 2 else 1 + 0.1 * values
    return model.to(dtype).eval()


def make_gpt2(dtype=torch.float64):
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=WIDTH, n_layer=LAYERS, n_head=3)
    with torch.random.fork_rng(devices=[]):
        return seeded(GPT2LMHeadModel(config), dtype)


def make_llama(tie, dtype=torch.float64):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tie,
    )
    with torch.random.fork_rng(devices=[]):
        return seeded(LlamaForCausalLM(config), dtype)


def make_tokens(*shape, seed=0):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def mpo_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, MPOLinear)]


GPT2_LAYERS = [
    f"transformer.h.{index}.{layer}"
    for index in range(LAYERS)
    for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
LLAMA_LAYERS = [
    f"model.layers.{index}.{layer}"
    for index in range(LAYERS)
    for layer in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
]


def test_gpt2_at_full_chi_gives_the_same_logits_with_conv1d_replaced():
    model, tokens = make_gpt2(), make_tokens(2, 9)
    compressed, report = compress(model, chi=10_000, allow_growth=True)
    assert mpo_names(compressed) == GPT2_LAYERS
    assert not any(isinstance(module, Conv1D) for module in compressed.modules())
    torch.testing.assert_close(logits(compressed, tokens), logits(model, tokens))
    rows = {row.name: row for row in report.rows}
    assert (rows["transformer.h.0.mlp.c_fc"].out_features, rows["transformer.h.0.mlp.c_fc"].in_features) == (96, 24)
    assert rows["lm_head"].reason == "its weight is shared with transformer.wte, which is not replaced"
    assert compressed.lm_head.weight is compressed.transformer.wte.weight
    assert sum(isinstance(module, Conv1D) for module in model.modules()) == len(GPT2_LAYERS)


def test_gpt2_conv1d_keeps_its_transposed_weight_bias_and_frozen_parameters():
    model = make_gpt2()
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    compressed, report = compress(model, chi=3, include=["*.c_fc"])
    old, new = model.transformer.h[0].mlp.c_fc, compressed.transformer.h[0].mlp.c_fc
    assert torch.equal(new.bias, old.bias)
    assert [core.requires_grad for core in new.cores] == [False, False]
    error = torch.linalg.norm(new.to_matrix() - old.weight.T) / torch.linalg.norm(old.weight)
    assert report.rows[0].rel_error == pytest.approx(float(error), abs=1e-12)
    assert rel_errors(model, [3])[3, "transformer.h.0.mlp.c_fc"] == pytest.approx(float(error))


@pytest.mark.parametrize("kind", [MPOLinear, LowRankLinear])
def test_a_conv1d_alone_is_refused_also_where_it_is_square(kind):
    conv = seeded(Conv1D(8, 8))
    for make in (kind.from_linear, kind.empty_like):
        with pytest.raises(ValueError, match=r"`linear` must be an nn.Linear, but got Conv1D; `compress` takes"):
            make(conv, max_params=64)


def test_gpt2_goes_there_and_back():
    model, tokens = make_gpt2(), make_tokens(2, 9)
    compressed, report = compress(model, keep=0.4, include=["transformer.h.*"])
    dense = decompress(compressed)
    torch.testing.assert_close(logits(dense, tokens), logits(compressed, tokens))
    counted = sum(row.n_params_after for row in report.rows)
    assert counted <= 0.4 * sum(row.n_params_before for row in report.rows)
    assert n_params(model) - n_params(compressed) == sum(row.n_params_before for row in report.rows) - counted
    assert n_params_compressed(model) == n_params_compressed(dense)


def test_gpt2_is_fitted_to_calibration_batches():
    model, held_out = make_gpt2(), make_tokens(8, 12, seed=2)
    batches = [{"input_ids": make_tokens(8, 12, seed=seed)} for seed in (0, 1)]
    distances = []
    for statistics in (None, collect_statistics(model, batches)):
        compressed, report = compress(model, chi=6, include=["transformer.h.*"], statistics=statistics)
        assert all((row.error is None) == (statistics is None) for row in report.rows)
        distances.append(float(torch.linalg.norm(logits(compressed, held_out) - logits(model, held_out))))
    assert distances[1] < distances[0]


def test_gpt2_compressed_generates_and_trains():
    compressed, _ = compress(make_gpt2(torch.float32), chi=4)
    tokens = make_tokens(1, 4)
    greedy = {"do_sample": False, "pad_token_id": 0}
    cached, plain = (
        compressed.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, use_cache=use, **greedy)
        for use in (True, False)
    )
    assert cached.shape == (1, 9)
    assert torch.equal(cached, plain)
    compressed.train()
    compressed(input_ids=tokens, labels=tokens).loss.backward()
    assert all(core.grad.abs().max() > 0 for core in compressed.transformer.h[0].mlp.c_fc.cores)


@pytest.mark.parametrize("tie", [False, True])
def test_llama_at_full_chi_gives_the_same_logits(tie):
    model, tokens = make_llama(tie), make_tokens(2, 9)
    compressed, report = compress(model, chi=10_000, allow_growth=True)
    assert mpo_names(compressed) == LLAMA_LAYERS + ([] if tie else ["lm_head"])
    torch.testing.assert_close(logits(compressed, tokens), logits(model, tokens))
    kept = [row.name for row in report.rows if row.kind == "dense"]
    assert kept == (["lm_head"] if tie else [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", OWN_KINDS)
def test_llama_in_bfloat16_takes_every_kind_of_layer(kind):
    model = make_llama(tie=False, dtype=torch.bfloat16)
    statistics = collect_statistics(model, [make_tokens(4, 12)], loss=next_token_losses)
    compressed, report = compress(model, layer=kind, keep=0.6, exclude=["lm_head"], statistics=statistics)
    assert {parameter.dtype for parameter in compressed.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(compressed, make_tokens(2, 9))).all()
    assert sum(row.n_params_after for row in report.rows) <= 0.6 * sum(row.n_params_before for row in report.rows)
    for row in report.rows:
        assert row.error < 1
        assert row.predicted_loss >= 0


def test_llama_reports_the_output_error_of_what_it_holds():
    model, batches = make_llama(tie=False), [make_tokens(4, 12)]
    seen = []
    name = "model.layers.0.mlp.down_proj"
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    logits(model, batches[0])
    handle.remove()
    compressed, report = compress(model, chi=4, include=[name], statistics=collect_statistics(model, batches))
    x, W = seen[0], model.get_submodule(name).weight.detach()
    error = Metric(x.T @ x).error(W, compressed.get_submodule(name).to_matrix())
    assert report.rows[0].error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
@pytest.mark.parametrize("kind", OWN_KINDS)
def test_t5_reads_the_weight_of_a_layer_and_runs(activation, kind):
    """T5 asks `wo.weight` for its dtype in every forward."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=40,
        num_layers=LAYERS,
        num_heads=3,
        feed_forward_proj=activation,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        model = seeded(T5ForConditionalGeneration(config))
    compressed, report = compress(model, layer=kind, keep=0.5, spread="even", include=["*.wi*", "*.wo"])
    assert all(row.kind == kind for row in report.rows if row.name.endswith("wo"))
    tokens = make_tokens(2, 9)
    with torch.no_grad():
        ours, theirs = (
            one(input_ids=tokens, decoder_input_ids=tokens).logits for one in (compressed, decompress(compressed))
        )
    torch.testing.assert_close(ours, theirs)
