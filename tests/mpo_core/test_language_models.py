"""Language models of Hugging Face are loaded whole, or not at all."""

from __future__ import annotations

import sys

import language_models
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.utils import logging as transformers_logging

import mpo_core
from mpo_core.models.hugging_face import load_language_model
from mpo_core.models.language_model import check_causal, context_of, head_of


def load(folder, dtype=torch.float32):
    return load_language_model(str(folder), dtype)


@pytest.mark.parametrize("make", [language_models.llama, language_models.gpt2])
def test_a_folder_gives_model_and_tokenizer(tmp_path, make, capfd):
    model = make()
    language_models.write(model, tmp_path)
    capfd.readouterr()
    verbosity = transformers_logging.get_verbosity()
    loaded, tokenizer = load(tmp_path)
    assert transformers_logging.get_verbosity() == verbosity
    assert transformers_logging.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")
    tokens = torch.tensor([tokenizer("w1 w5 w2").input_ids])
    assert tokens.tolist() == [[4, 8, 5]]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert not loaded.training
    assert context_of(loaded) == language_models.CONTEXT
    assert head_of(loaded) == "lm_head"
    assert {parameter.dtype for parameter in load(tmp_path, torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_missing_and_misshapen_weights_are_not_filled_with_random_ones(tmp_path):
    language_models.write(language_models.llama(), tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 16)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights that fit model\.layers\.1\.mlp\.up_proj\.weight$"):
        load(tmp_path)
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"fit model\.layers\.1\.mlp\.down_proj\.weight and 1 more$"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded: Error no file named model\.safetensors"):
        load(tmp_path)


def test_other_kinds_of_models_are_refused(tmp_path):
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        encoder = BertLMHeadModel(BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=16))
        sizes = {"vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 1, "num_heads": 4}
        both = T5ForConditionalGeneration(T5Config(**sizes))
    language_models.write(encoder, tmp_path / "encoder")
    language_models.write(both, tmp_path / "t5")
    with pytest.raises(ValueError, match="is no causal language model: its prediction of a token depends on later"):
        check_causal(load(tmp_path / "encoder")[0], "it")
    with pytest.raises(ValueError, match="is no causal language model, but of the type t5"):
        load(tmp_path / "t5")


def test_places_without_a_model_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"holds no Hugging Face model: it has no config\.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="none is no folder"):
        load(tmp_path / "none")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*not a valid JSON"):
        load(tmp_path)
    language_models.llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be loaded"):
        load(tmp_path)
    mpo_core.save(language_models.llama(), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved holds a model that `mpo_core\.save` wrote: give the dense model"):
        load(tmp_path / "saved")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="such-model is no folder, and cannot be loaded by name: ") as caught:
        load("some-one/no-such-model")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"transformers is not installed: pip install 'mpo-study\[hf\]'"):
        load(tmp_path)
