"""A corpus of tokens from any tokenizer: the text is tokenised once, in a stream, and its tokens are mapped."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from study.errors import StudyError
from study.spec.cache import CACHE_VARIABLE, cache_folder
from study.spec.trial import json_hash
from study.training.corpus import Corpus, Unit, n_train_characters
from study.training.documents import Piece, Source, TextSummary
from study.training.files import replacing
from study.training.token_file import FORMAT, SUFFIX, Damaged, Description, TokenWriter, read
from study.training.tokenizer import Encoded, HuggingFace, Tokenizer, tokenizer_from_json

_BATCH_PIECES, _BATCH_CHARACTERS = 256, 1 << 21
"""Pieces of text, and characters in them, that are tokenised at once."""


@dataclass(frozen=True, eq=False)
class TokenCorpus(Corpus):
    """The content of a token file; the tokens are mapped into memory."""

    path: Path
    description: Description
    tokens: Tensor
    tokenizer_json: str

    @property
    def sha256(self) -> str:  # type: ignore[override]
        return self.description.sha256

    @property
    def validation_fraction(self) -> float:  # type: ignore[override]
        return self.description.validation_fraction

    @property
    def text_sha256(self) -> str:
        return self.description.text_sha256

    @property
    def tokenizer(self) -> str:
        if self.kind != HuggingFace.kind:
            return self._tokenizer.name
        return f"folder {self.description.tokenizer_sha256[:12]}"  # its name may differ from machine to machine

    @property
    def kind(self) -> str:
        """The kind of its tokenizer."""
        return self.description.kind

    @property
    def unit(self) -> Unit:
        return self._tokenizer.unit

    @property
    def vocab_size(self) -> int:
        return self.description.vocab_size

    @property
    def train(self) -> Tensor:
        return self.tokens[: self.description.n_train]

    @property
    def validation(self) -> Tensor:
        return self.tokens[self.description.n_train :]

    @property
    def n_predicted_bytes(self) -> int:
        return self.description.n_predicted_bytes

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        try:
            return tokenizer_from_json(self.kind, self.tokenizer_json)
        except ValueError as error:
            raise StudyError(f"{self.path}: {error}") from None

    def encode(self, text: str) -> Tensor:
        [encoded] = self._tokenizer.encode([text])
        return torch.from_numpy(encoded.tokens.astype(np.int64))

    def decode(self, tokens: Tensor) -> str:
        return self._tokenizer.decode(tokens.tolist())


def read_token_corpus(path: Path, sha256: str | None = None) -> TokenCorpus:
    """The corpus in a token file; for the errors see `token_file.read`."""
    return TokenCorpus(path, *read(path, sha256))


def tokenised(source: Source, found: TextSummary, tokenizer: Tokenizer, validation_fraction: float) -> TokenCorpus:
    """The tokens of a text, from the cache or else made and put there.

    Args:
        found: what a reading of the source has found.

    Raises:
        StudyError: the text cannot be split, a file cannot be read, or the cache cannot be written.
    """
    key = json_hash([FORMAT, found.sha256, tokenizer.kind, tokenizer.identity, validation_fraction])
    path = cache_folder() / f"tokens-{key}{SUFFIX}"
    with suppress(OSError, Damaged):
        return read_token_corpus(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, has_other_writers=True) as partial, partial.open("r+b") as file:
            writer = TokenWriter(file, tokenizer.as_json(), tokenizer.vocab_size)
            writer.finish(_write(writer, source, found, tokenizer, validation_fraction))
        return read_token_corpus(path)
    except OSError as error:
        raise StudyError(
            f"{path}: cannot write the tokens of the corpus: {error.strerror or error}; the environment variable "
            f"{CACHE_VARIABLE} names another folder"
        ) from None


@dataclass
class _Documents:
    """Numbers of every document: tokens, bytes of text, and bytes of text of the first token."""

    n_tokens: array[int] = field(default_factory=lambda: array("q"))
    n_bytes: array[int] = field(default_factory=lambda: array("q"))
    n_first_bytes: array[int] = field(default_factory=lambda: array("q"))


def _write(
    writer: TokenWriter, source: Source, found: TextSummary, tokenizer: Tokenizer, validation_fraction: float
) -> Description:
    pieces, between = source.pieces(), tokenizer.end_of_text
    if source.is_one_text:  # its splits are two documents, with nothing between them
        pieces, between = _cut(pieces, n_train_characters(found.n_characters, validation_fraction)), None
    documents = _write_documents(writer, pieces, tokenizer, between)
    n_documents = len(documents.n_tokens)
    if source.is_one_text:
        n_training = n_documents - 1
        if n_training < 1:
            raise StudyError(f"{source}: the corpus is too short to be split")
    else:
        n_training = _n_training_documents(source, documents, validation_fraction)
    n_train = sum(documents.n_tokens[:n_training]) + (n_training - 1) * (between is not None)
    n_predicted_bytes = sum(documents.n_bytes[n_training:])
    if between is None:  # otherwise the first validation token is the one between the splits, which has no text
        n_predicted_bytes -= documents.n_first_bytes[n_training]
    if n_predicted_bytes <= 0:
        raise StudyError(f"{source}: the corpus is too short: its validation split has one token")
    return Description(
        format=FORMAT,
        kind=tokenizer.kind,
        tokenizer_sha256=tokenizer.identity,
        text_sha256=found.sha256,
        tokens_sha256=writer.sha256,
        validation_fraction=validation_fraction,
        vocab_size=tokenizer.vocab_size,
        n_train=n_train,
        n_predicted_bytes=n_predicted_bytes,
    )


def _write_documents(
    writer: TokenWriter, pieces: Iterable[Piece], tokenizer: Tokenizer, between: int | None
) -> _Documents:
    """Write the tokens of every document, with the token `between` two of them; one without tokens is left out."""
    documents, n_tokens, n_bytes, n_first_bytes = _Documents(), 0, 0, 0
    for (text, ends_document), encoded in _encoded(pieces, tokenizer):
        if len(encoded.tokens):
            if n_tokens == 0:
                n_first_bytes = n_bytes + encoded.n_first_bytes
                if between is not None and documents.n_tokens:
                    writer.write(np.array([between]))
            writer.write(encoded.tokens)
            n_tokens += len(encoded.tokens)
        n_bytes += len(text.encode())
        if ends_document:
            if n_tokens:
                documents.n_tokens.append(n_tokens)
                documents.n_bytes.append(n_bytes)
                documents.n_first_bytes.append(n_first_bytes)
            n_tokens = n_bytes = n_first_bytes = 0
    return documents


def _encoded(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Piece, Encoded]]:
    batch: list[Piece] = []
    n_characters = 0
    for piece in pieces:
        batch.append(piece)
        n_characters += len(piece.text)
        if len(batch) == _BATCH_PIECES or n_characters >= _BATCH_CHARACTERS:
            yield from zip(batch, tokenizer.encode([one.text for one in batch]), strict=True)
            batch, n_characters = [], 0
    if batch:
        yield from zip(batch, tokenizer.encode([one.text for one in batch]), strict=True)


def _cut(pieces: Iterable[Piece], position: int) -> Iterator[Piece]:
    """The pieces of one text, cut in two documents at a position in characters."""
    for text, ends_document in pieces:
        if 0 < position <= len(text):
            yield Piece(text[:position], True)
            text = text[position:]
            position = 0
        position = max(0, position - len(text))
        if text:
            yield Piece(text, ends_document)


def _n_training_documents(source: Source, documents: _Documents, validation_fraction: float) -> int:
    """Number of documents before the last ones, which hold at least that fraction of all tokens of documents."""
    n_documents, total, held = len(documents.n_tokens), sum(documents.n_tokens), 0
    if n_documents < 2:
        raise StudyError(
            f"{source}: a split by documents needs at least 2 documents, but got {n_documents}; give more, or one "
            "plain text file, which is split by position"
        )
    for n_validation in range(1, n_documents):
        held += documents.n_tokens[-n_validation]
        if held >= validation_fraction * total:
            return n_documents - n_validation
    raise StudyError(
        f"{source}: all documents but the first hold {held / total:.3f} of the tokens, less than "
        f"corpus.validation_fraction={validation_fraction:g}; give a smaller fraction, or more documents"
    )
