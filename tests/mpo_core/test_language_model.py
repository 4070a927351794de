"""Language models of several architectures, made from scratch: values, roles, FLOPs and decoding."""

from __future__ import annotations

import sys

import pytest
import torch
from own_models import OwnGRU
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mpo_core
from mpo_core import build_language_model, compress, draw_parameters, flops_per_token, generate, logits_of
from mpo_core.models.building import code_of, own_class
from mpo_core.models.language_model import (
    cache_of,
    check_causal,
    check_flops,
    check_trainable,
    context_of,
    head_of,
    parameters_by_role,
)

LLAMA = {
    "config": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN2 = {**LLAMA, "config": "qwen2", "tie_word_embeddings": True}
GPT2 = {"config": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 2}
BERT = {"config": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


class Drops(OwnGRU):
    def forward(self, tokens):
        return nn.functional.dropout(super().forward(tokens), training=self.training)


class Forgets(OwnGRU):
    def init_parameters(self, generator_for):
        nn.init.normal_(self.embedding.weight, generator=generator_for("embedding"))


class Unused(OwnGRU):
    def forward(self, tokens):
        return self.lm_head(self.mix(self.embedding(tokens)))


class Broken(OwnGRU):
    def __init__(self, vocab_size, context):
        raise RuntimeError("two\nlines")


class SeesAll(OwnGRU):
    def forward(self, tokens):
        return self.lm_head(self.embedding(tokens) + self.embedding(tokens).mean(1, keepdim=True))


OWN = "own_models:OwnGRU"
MODELS = {
    "picogpt": ("picogpt", {"d_model": 16, "n_heads": 2, "n_layers": 2}),
    "llama": ("huggingface", LLAMA),
    "qwen2": ("huggingface", QWEN2),
    "gpt2": ("huggingface", GPT2),
    "bert": ("huggingface", BERT),
    "own": (OWN, {"width": 12}),
}


def generator_for(name):
    return torch.Generator().manual_seed(sum(map(ord, name)))


def made(name, context=12, vocab_size=20, **more):
    architecture, settings = MODELS[name]
    model = build_language_model(architecture, {**settings, **more}, vocab_size=vocab_size, context=context)
    draw_parameters(model, generator_for)
    return model


def tokens(batch=2, length=9):
    return torch.randint(20, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_values_come_from_the_generators_alone(name):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = made(name)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    other = made(name)
    for (key, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    assert logits_of(one, tokens()).shape == (2, 9, 20)
    check_causal(one, name)


def test_hugging_face_models_get_the_library_s_own_scales():
    model = made("gpt2", n_embd=128)
    block = model.transformer.h[0]
    assert float(block.mlp.c_fc.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(block.mlp.c_proj.weight.detach().std()) == pytest.approx(0.02 / 2, rel=0.05)  # 1 / √(2 · layers)
    assert float(block.mlp.c_fc.bias.detach().abs().max()) == 0
    assert not torch.equal(block.mlp.c_fc.weight, model.transformer.h[1].mlp.c_fc.weight)
    tied = made("qwen2")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_one_role(name):
    model = made(name)
    roles = parameters_by_role(model)
    assert sorted(each for of_role in roles.values() for each in of_role) == sorted(
        name for name, _ in model.named_parameters()
    )
    small, _ = compress(model, chi=2, exclude=[head_of(model)])
    of_small = parameters_by_role(small)
    assert of_small["embeddings"] == roles["embeddings"]
    assert of_small["head"] == roles["head"]
    assert all(".cores." in each or small.get_parameter(each).ndim == 2 for each in of_small["matrices"])
    assert any(".cores." in each for each in of_small["matrices"])


@pytest.mark.parametrize(("name", "head"), [("llama", ["lm_head.weight"]), ("qwen2", []), ("gpt2", [])])
def test_a_tied_head_is_an_embedding(name, head):
    assert parameters_by_role(made(name))["head"] == head


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert", "picogpt"])
def test_flops_are_those_that_pytorch_counts(name):
    model = made(name)
    if name != "picogpt":
        model.set_attn_implementation("eager")  # PyTorch has no count for the fused product on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits_of(model, tokens(1, 12))
    counted = counter.get_total_flops()
    if name == "picogpt":
        counted = counter.flop_counts["Global"].get(torch.ops.aten.mm, 0)
        counted += counter.flop_counts["Global"].get(torch.ops.aten.addmm, 0)
        counted += 12 * model.other_flops_per_token(12)
    assert 12 * flops_per_token(model, 12) == counted


@pytest.mark.parametrize("name", MODELS)
def test_decoding_with_a_cache_gives_the_same_tokens(name):
    model = made(name)
    assert context_of(model) == 12
    start = tokens(2, 4)
    with_cache = generate(model, start, 12, temperature=0)  # beyond the context
    assert torch.equal(with_cache, generate(model, start, 12, temperature=0, use_cache=False))
    assert (cache_of(model, 2) is None) == (name == "own")


@pytest.mark.parametrize("name", MODELS)
def test_models_that_can_be_trained_pass(name):
    model = made(name)
    if name != "bert":  # its second embedding is constant
        check_trainable(model, name)
        check_flops(model, name)
    assert all(parameter.grad is None for parameter in model.parameters())


def checked(architecture, settings):
    model = build_language_model(architecture, settings, vocab_size=20, context=12)
    draw_parameters(model, generator_for)
    check_trainable(model, "it")
    check_flops(model, "it")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("SeesAll", "it is no causal language model: its prediction of a token depends on later tokens"),
        ("Drops", "it gives another output at each call, for example by dropout"),
        ("Unused", "it never uses its parameter gru.weight_ih_l0"),
        ("Forgets", "the init of Forgets gives mix.weight no value"),
        ("Broken", "Broken cannot be made: two$"),
    ],
)
def test_own_modules_that_cannot_be_studied_are_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        checked(f"{__name__}:{kind}", {})


BART = {"config": "bart", "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": "openai-gpt", "n_embd": 16, "n_head": 2, "n_layer": 1}, "gives .* no value"),
        (
            BART,
            "never uses its parameter",
        ),
        (
            {"config": "diffllama", **SIZES, "num_key_value_heads": 2},
            "FLOPs of .* are not known: they would be counted",
        ),
    ],
)
def test_models_of_the_library_that_cannot_be_studied_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        checked("huggingface", settings)


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("huggingface", {**LLAMA, "config": "lama"}, r"type of a causal language model \(did you mean llama"),
        ("huggingface", {**LLAMA, "hiden_size": 3}, r"llama has no setting hiden_size \(did you mean hidden_size"),
        ("huggingface", {**LLAMA, "hidden_size": 18}, "llama cannot have these settings: .*not a multiple"),
        ("huggingface", {**LLAMA, "attention_dropout": 0.1}, "attention_dropout must be 0: a run is to repeat itself"),
        ("huggingface", {**LLAMA, "vocab_size": 3}, "vocab_size is not a setting: the study gives it"),
        ("huggingface", {**LLAMA, "max_position_embeddings": 3}, "max_position_embeddings is not a setting"),
        ("huggingface", {**GPT2, "n_positions": 3}, "n_positions is not a setting: the study gives it"),
        ("gpt", {}, "must be picogpt, huggingface or MODULE:CLASS, but got 'gpt'"),
        ("nowhere:GPT", {}, "No module named 'nowhere'; Python must be able to import nowhere"),
        ("own_models:GPT", {}, "the module .* has no GPT"),
        ("own_models:nn", {}, "is not a class"),
        (OWN, {"wdth": 3}, "unexpected keyword argument 'wdth'"),
        ("torch.nn:Linear", {"in_features": 2}, "unexpected keyword argument|missing a required argument"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(architecture, settings, message):
    with pytest.raises(ValueError, match=message) as raised:
        build_language_model(architecture, settings, vocab_size=20, context=12)
    assert "\n" not in str(raised.value)


def test_models_whose_flops_are_not_known_are_refused():
    experts = {**LLAMA, "config": "mixtral", "num_local_experts": 2}
    model = build_language_model("huggingface", experts, vocab_size=20, context=12, device="meta")
    with pytest.raises(ValueError, match=r"FLOPs of MixtralForCausalLM are not known: .*, outside linear layers"):
        flops_per_token(model, 12)
    with pytest.raises(ValueError, match="Embedding has no method `other_flops_per_token"):
        flops_per_token(nn.Embedding(3, 4), 12)


def test_the_code_of_an_own_module_is_that_of_its_file(tmp_path, monkeypatch):
    (tmp_path / "own_model.py").write_bytes(b"class A:\r\n    pass\r\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = code_of("own_model:A")
    del sys.modules["own_model"]
    (tmp_path / "own_model.py").write_bytes(b"class A:\n    pass\n")
    assert code_of("own_model:A") == first
    with pytest.raises(ValueError, match="has no source file"):
        code_of("builtins:int")
    assert own_class(OWN).__name__ == "OwnGRU"


def test_shapes_alone_take_no_memory():
    model = build_language_model(
        "huggingface", {**LLAMA, "hidden_size": 65_536}, vocab_size=20, context=12, device="meta"
    )
    assert all(parameter.is_meta for parameter in model.parameters())
    assert mpo_core.n_params(model) > 10**9


def test_the_code_of_a_class_in_a_package_is_that_of_the_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    codes = []
    for name, helper in (("a", "1"), ("b", "1"), ("c", "2")):
        folder = tmp_path / f"own_package_{name}"
        (folder / "inner").mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "inner" / "__init__.py").write_text("")
        (folder / "inner" / "model.py").write_text("class A:\n    pass\n")
        (folder / "helper.py").write_text(f"VALUE = {helper}\n")
        codes.append(code_of(f"own_package_{name}.inner.model:A"))
    assert codes[0] == codes[1] != codes[2]
