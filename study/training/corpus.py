"""A corpus: tokens of a text in two splits; here with one token per character."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from study.errors import StudyError
from study.training.tokenizer import Characters, Unit


class Corpus(ABC):
    """A text as training needs it, whatever its tokenizer."""

    sha256: str
    """Checksum of the text and of everything on which its tokens and splits depend."""
    validation_fraction: float

    @property
    @abstractmethod
    def text_sha256(self) -> str:
        """Checksum of the text alone, equal for every tokenizer."""

    @property
    @abstractmethod
    def tokenizer(self) -> str:
        """The tokenizer, as people read it: characters, bytes, or a folder's name with the start of its checksum."""

    @property
    @abstractmethod
    def unit(self) -> Unit:
        """The unit that a token stands for."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary: every token is below it."""

    @property
    @abstractmethod
    def train(self) -> Tensor:
        """Tokens of the training split, the text's beginning: 1-d, of an integer type."""

    @property
    @abstractmethod
    def validation(self) -> Tensor:
        """Tokens of the validation split, the text's end: 1-d, of an integer type."""

    @property
    @abstractmethod
    def n_predicted_bytes(self) -> int:
        """UTF-8 bytes of the text of all validation tokens but the first, which nothing predicts."""

    @abstractmethod
    def encode(self, text: str) -> Tensor:
        """Tokens of a text, (n,), int64.

        Raises:
            StudyError: the text cannot be encoded.
        """

    @abstractmethod
    def decode(self, tokens: Tensor) -> str:
        """The text of tokens (n,)."""

    def check_context(self, context: int) -> None:
        """Raise a StudyError if a split is too short for one window of `context` tokens and its targets."""
        for name, tokens in (("training", self.train), ("validation", self.validation)):
            if len(tokens) < context + 1:
                raise StudyError(
                    f"the corpus is too short: its {name} split has {len(tokens)} {self.unit}, "
                    f"but a context of {context} needs at least {context + 1}"
                )


@dataclass(frozen=True)
class CharacterCorpus(Corpus):
    """A text as tokens: one integer per character, numbered in the order of the sorted alphabet."""

    text: str
    sha256: str
    validation_fraction: float = 0.1

    @property
    def text_sha256(self) -> str:
        return self.sha256

    @property
    def tokenizer(self) -> str:
        return "characters"

    @property
    def unit(self) -> Unit:
        return "characters"

    @cached_property
    def vocabulary(self) -> str:
        """Every distinct character of the text, sorted; a token is a position in it."""
        return "".join(sorted(set(self.text)))

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> Tensor:
        [encoded] = self._characters.encode([text])
        return torch.from_numpy(encoded.tokens)

    def decode(self, tokens: Tensor) -> str:
        return self._characters.decode(tokens.tolist())

    @cached_property
    def _characters(self) -> Characters:
        return Characters(self.vocabulary)

    @cached_property
    def _tokens(self) -> Tensor:
        return self.encode(self.text)

    @property
    def _n_train(self) -> int:
        return n_train_characters(len(self.text), self.validation_fraction)

    @property
    def train(self) -> Tensor:
        return self._tokens[: self._n_train]

    @property
    def validation(self) -> Tensor:
        return self._tokens[self._n_train :]

    @property
    def n_predicted_bytes(self) -> int:
        return len(self.text[self._n_train + 1 :].encode())


def n_train_characters(n_characters: int, validation_fraction: float) -> int:
    """Length of the training split of one text, in characters, whatever the tokenizer."""
    return int(n_characters * (1 - validation_fraction))


def corpus_from_bytes(data: bytes, where: str, sha256: str | None, validation_fraction: float) -> CharacterCorpus:
    """A corpus of characters from a file's content; `where` names the file in errors.

    A byte order mark at the beginning belongs neither to the text nor to its checksum; `sha256` may be the file's.

    Raises:
        StudyError: the checksum is not the expected one, or the content is empty or not UTF-8.
    """
    text_bytes = data
    while text_bytes.startswith(BOM_UTF8):
        text_bytes = text_bytes.removeprefix(BOM_UTF8)
    of_file, actual = hashlib.sha256(data).hexdigest(), hashlib.sha256(text_bytes).hexdigest()
    if sha256 not in (None, of_file, actual):
        raise StudyError(f"{where}: wrong checksum: expected SHA-256 {sha256}, but got {of_file}")
    try:
        text = text_bytes.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(where, error.start + len(data) - len(text_bytes)) from None
    if not text:
        raise StudyError(f"{where}: the corpus is empty")
    return CharacterCorpus(text, actual, validation_fraction)


def not_utf8(where: str, position: int) -> StudyError:
    """The error about a byte of a text file."""
    return StudyError(f"{where}: a corpus is UTF-8 text, but byte {position} is not")
