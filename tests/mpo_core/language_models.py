"""Folders of tiny random models of Hugging Face with a tokenizer, and text for them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(27)]
UNKNOWN, BEGIN, END = "?", "<s>", "</s>"
CONTEXT = 64


def llama(tie: bool = True, context: int = CONTEXT) -> LlamaForCausalLM:
    """With grouped heads."""
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tie,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _seeded(LlamaForCausalLM, config)


def gpt2() -> GPT2LMHeadModel:
    """With Conv1D."""
    sizes = {"vocab_size": len(WORDS) + 3, "n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 4}
    return _seeded(GPT2LMHeadModel, GPT2Config(**sizes, initializer_range=0.3, bos_token_id=1, eos_token_id=2))


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word."""
    vocabulary = {word: i for i, word in enumerate([UNKNOWN, BEGIN, END, *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END)


def text(n_words: int, seed: int = 0) -> str:
    """Random words."""
    drawn = torch.randint(len(WORDS), (n_words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in drawn)


def write(model, folder) -> None:
    """As a folder of Hugging Face."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def _seeded(kind, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()
