"""A folder of a compressed Hugging Face model gives that model again, and is nothing that `from_pretrained` takes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from own_kinds import OWN_KINDS
from saved_models import change, shrink
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import mpo_core
from mpo_core.compression import saving
from mpo_core.layers.structured import StructuredLinear

SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOKENS = torch.arange(3, 19).reshape(2, 8)


def make(kind, config, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).to(dtype).eval()


def gpt2(tie=True, **options):
    sizes = {"vocab_size": 30, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 4, **SPECIAL}
    return make(GPT2LMHeadModel, GPT2Config(**sizes, tie_word_embeddings=tie, **options))


def llama(tie=True, dtype=torch.float32, **options):
    return make(LlamaForCausalLM, LlamaConfig(**SIZES, **SPECIAL, tie_word_embeddings=tie, **options), dtype)


def t5(tie=True):
    sizes = {"vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 1, "num_heads": 4}
    config = T5Config(**sizes, tie_word_embeddings=tie, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
    model = make(T5ForConditionalGeneration, config)
    if not tie:  # which T5Config makes `scale_decoder_outputs` of, and leaves the tie to the checkpoint
        model.lm_head.weight = torch.nn.Parameter(model.shared.weight.flip(0).clone())
    return model


def logits(model):
    inputs = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS.flip(1)
    with torch.no_grad():
        return model(**inputs).logits


def tensors(model):
    """Every tensor under all its names, those that no state_dict has too, and which of them are one."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {}
    return {name: (first.setdefault(id(tensor), name), tensor) for name, tensor in named}


def assert_same(loaded, model):
    ours, theirs = tensors(loaded), tensors(model)
    assert {name: first for name, (first, _) in ours.items()} == {name: first for name, (first, _) in theirs.items()}
    for name, (_, tensor) in theirs.items():
        assert ours[name][1].dtype == tensor.dtype
        assert torch.equal(ours[name][1], tensor), name
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", OWN_KINDS)
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", [gpt2, llama, t5])
def test_a_folder_alone_gives_the_model_again(tmp_path, family, tie, kind):
    model = family(tie)
    small = shrink(model, kind)
    mpo_core.save(small, tmp_path)
    before = torch.get_rng_state()
    loaded = mpo_core.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(loaded, small)
    assert type(loaded) is type(model)
    assert loaded.config.to_dict() == small.config.to_dict()
    assert not any(module.training for module in loaded.modules())
    assert getattr(loaded.config, "scale_decoder_outputs", tie) == tie
    assert isinstance(loaded.lm_head, StructuredLinear) == (not tie)
    if kind == "mpo":
        assert_same(mpo_core.load(tmp_path, lambda: family(tie)), small)
        for auto in (AutoModel, AutoModelForCausalLM if family is not t5 else AutoModel, type(model)):
            with pytest.raises(OSError, match="no file named"):
                auto.from_pretrained(tmp_path)


def test_half_precision_and_a_rotary_embedding_that_was_scaled(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    small = shrink(llama(False, torch.bfloat16, rope_parameters=rope))
    logits(small)
    small.model.rotary_emb.inv_freq.mul_(1.5)  # as a long input does
    mpo_core.save(small, tmp_path)
    assert_same(mpo_core.load(tmp_path), small)


def test_frozen_layers_training_and_generation(tmp_path):
    small = shrink(gpt2(attn_implementation="eager")).train()
    small.transformer.wte.requires_grad_(False)
    small.transformer.ln_f.eval()
    small.generation_config.max_new_tokens = 5
    mpo_core.save(small, tmp_path)
    loaded = mpo_core.load(tmp_path)
    for one in (loaded, small):
        assert [name for name, p in one.named_parameters() if not p.requires_grad] == ["transformer.wte.weight"]
        assert [name for name, module in one.named_modules() if not module.training] == ["transformer.ln_f"]
        assert one.config._attn_implementation == "eager"
        one.eval()
    assert_same(loaded, small)
    inputs = {"attention_mask": torch.ones_like(TOKENS), "do_sample": False}
    assert torch.equal(loaded.generate(TOKENS, **inputs), small.generate(TOKENS, **inputs))
    assert loaded.generate(TOKENS, **inputs).shape[1] <= 13


def test_a_decompressed_gpt2_does_not_become_its_transpose(tmp_path):
    """Its square weights fit into a Conv1D, which applies the transpose of an nn.Linear's."""
    dense = mpo_core.decompress(shrink(gpt2()))
    for like in (None, gpt2(), shrink(gpt2())):
        mpo_core.save(dense, tmp_path)
        assert_same(mpo_core.load(tmp_path, like), dense)
    mpo_core.save(gpt2(), tmp_path)
    assert_same(mpo_core.load(tmp_path), gpt2())
    with pytest.raises(ValueError, match=r"c_attn is Conv1D in the saved model, but Linear"):
        mpo_core.load(tmp_path, dense)


def test_a_tokenizer_lies_beside_the_model(tmp_path):
    words = Tokenizer(WordLevel({"to": 0, "be": 1, "?": 2}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    for _ in range(2):
        mpo_core.save(shrink(llama()), tmp_path, tokenizer=tokenizer)
    mpo_core.save(shrink(llama()), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("be").input_ids == [1]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    assert_same(mpo_core.load(tmp_path), shrink(llama()))


def test_other_models_as_like_are_refused(tmp_path):
    small = shrink(llama())
    mpo_core.save(small, tmp_path)
    sizes = {**SIZES, **SPECIAL, "tie_word_embeddings": True}
    for like, message in (
        (gpt2(), "the saved model is a LlamaForCausalLM, but `like` is a GPT2LMHeadModel"),
        (make(MistralForCausalLM, MistralConfig(**sizes)), "LlamaForCausalLM, but `like` is a Mistral"),
        (llama(rms_norm_eps=1e-3), "has rms_norm_eps=1e-06, but the model .* has rms_norm_eps=0.001"),
        (llama(rope_parameters={"rope_type": "default", "rope_theta": 9.0}), r"rope_parameters\.rope_theta=10000\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            mpo_core.load(tmp_path, like)
    eager = llama(attn_implementation="eager", use_cache=False)
    assert torch.allclose(logits(mpo_core.load(tmp_path, eager)), logits(small), atol=1e-5)


class Gated(GPT2LMHeadModel):
    """A class of a user's own."""


def gelu(model):
    model.transformer.h[0].mlp.act = torch.nn.ReLU()
    return model


def eps(model):
    model.transformer.ln_f.eps = 0.1
    return model


def longer(model):
    model.extra = torch.nn.Parameter(torch.ones(2))
    return model


@pytest.mark.parametrize("edit", [gelu, eps, longer, lambda model: make(Gated, model.config)])
def test_a_model_that_its_configuration_does_not_give_needs_like(tmp_path, edit):
    model = edit(gpt2())
    small = shrink(model)
    mpo_core.save(small, tmp_path)
    with pytest.raises(ValueError, match="cannot be built from a configuration alone: give `like`"):
        mpo_core.load(tmp_path)
    assert_same(mpo_core.load(tmp_path, model), small)


def test_weights_that_from_pretrained_would_take_for_these_are_refused(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds model\.safetensors, of another library"):
        mpo_core.save(shrink(model), tmp_path)
    assert not (tmp_path / saving.INDEX).exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"class": "NoSuchModel"}, "NoSuchModel cannot be built: transformers .* has no such model"),
        ({"class": "GPT2Config"}, "has no such model"),
        ({"class": "pipeline"}, "has no such model"),
        ({"implementations": {"_attn_implementation": {"": "somebody/kernel"}}}, "is code that would be downloaded"),
        ({"implementations": {"__class__": {"": "x"}}}, "is code that would be downloaded"),
        ({"implementations": {"_attn_implementation": {"": "unknown"}}}, "cannot be built: .*; give `like`"),
        ({"config": {"n_embd": 16, "n_head": 4, "n_layer": 0}}, "has none of that name"),
    ],
)
def test_an_index_that_names_something_else_runs_nothing(tmp_path, edit, message):
    mpo_core.save(shrink(gpt2()), tmp_path)
    change(tmp_path, lambda content: content["origin"].update(edit))
    with pytest.raises(ValueError, match=message) as error:
        mpo_core.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_compressed_model_goes_on_as_it_would_have(tmp_path):
    small = shrink(llama(False)).train()
    mpo_core.save(small, tmp_path)
    loaded = mpo_core.load(tmp_path)
    for one in (small, loaded):
        optimiser = torch.optim.SGD(mpo_core.param_groups(one, 0.1), 0.1)
        one(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimiser.step()
    assert_same(loaded, small)
    assert_same(mpo_core.decompress(loaded), mpo_core.decompress(small))
    assert_same(copy.deepcopy(loaded), small)
