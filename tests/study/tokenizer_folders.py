"""Folders with small tokenizers of Hugging Face, trained on a given text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

END = "<|end|>"


def byte_pairs(folder: Path, text: str, vocab_size: int = 280, *, has_end: bool = True) -> Path:
    """A tokenizer of pairs of bytes, as GPT-2 has; every text can be encoded."""
    pairs = Tokenizer(BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END] * has_end, initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token=END if has_end else None).save_pretrained(folder)
    return folder


def words(folder: Path, vocabulary: list[str]) -> Path:
    """A tokenizer with a token for each word, which drops the spaces between them, and one for all other words."""
    known = Tokenizer(WordLevel({word: token for token, word in enumerate(["?", *vocabulary])}, unk_token="?"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=known, unk_token="?").save_pretrained(folder)
    return folder
