"""Files of tokens: safetensors, written in a stream and read through a memory map.

A file holds the tokens as uint16 or uint32, the tokenizer as JSON, and a description of both. `sha256` is the checksum
of the description, which has that of the tokens; so equal checksums mean equal tokens, splits and vocabularies.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
from pydantic import ValidationError
from torch import Tensor

from study.spec.trial import json_hash
from study.spec.values import Strict

FORMAT = 1
SUFFIX = ".safetensors"
_HEADER = 4096
"""Bytes of the header, which is written last: it holds the checksum."""
_BLOCK = 1 << 24


class Damaged(Exception):
    """A file is not a whole token file."""


class Description(Strict):
    """The content of a token file, and all that its tokens and splits depend on.

    n_predicted_bytes: UTF-8 bytes of the text of all validation tokens but the first.
    """

    format: int
    kind: str
    tokenizer_sha256: str
    text_sha256: str
    tokens_sha256: str
    validation_fraction: float
    vocab_size: int
    n_train: int
    n_predicted_bytes: int

    @property
    def sha256(self) -> str:
        """The checksum by which a study knows the corpus."""
        return json_hash(self.model_dump(mode="json"))


def token_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The smallest type that can hold every token."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class TokenWriter:
    """Writes a token file: blocks of tokens first, then the description.

    Args:
        file: empty, and can be written at any place.
        tokenizer_json: see `Tokenizer.as_json`.
    """

    def __init__(self, file: BinaryIO, tokenizer_json: str, vocab_size: int) -> None:
        self._file, self._type, self._digest, self._n_tokens = file, token_type(vocab_size), hashlib.sha256(), 0
        text = tokenizer_json.encode()
        self._tokenizer = text + b" " * (-len(text) % 8)  # so that the tokens are aligned
        file.write(bytes(8 + _HEADER) + self._tokenizer)

    def write(self, tokens: np.ndarray[Any, Any]) -> None:
        """Add tokens, (n,)."""
        data = tokens.astype(self._type)
        self._file.write(data.data)
        self._digest.update(data.data)
        self._n_tokens += len(data)

    @property
    def sha256(self) -> str:
        """Checksum of the tokens so far."""
        return self._digest.hexdigest()

    def finish(self, description: Description) -> None:
        """Write the header, which makes the file whole."""
        begin = len(self._tokenizer)
        end = begin + self._n_tokens * np.dtype(self._type).itemsize
        content = {
            "__metadata__": {
                "description": description.model_dump_json(),
                "tokenizer_json_sha256": hashlib.sha256(self._tokenizer).hexdigest(),
            },
            "tokenizer": {"dtype": "U8", "shape": [begin], "data_offsets": [0, begin]},
            "tokens": {
                "dtype": "U16" if self._type is np.uint16 else "U32",
                "shape": [self._n_tokens],
                "data_offsets": [begin, end],
            },
        }
        self._file.seek(0)
        self._file.write(_HEADER.to_bytes(8, "little") + json.dumps(content).encode().ljust(_HEADER))


def read(path: Path, sha256: str | None = None) -> tuple[Description, Tensor, str]:
    """Description, tokens (mapped into memory, not read) and the tokenizer's JSON; everything is checked first.

    Args:
        sha256: the checksum that the file must have. Default: any.

    Raises:
        OSError: there is no such file, or it cannot be read.
        Damaged: it is not a whole token file, or another one.
    """
    with path.open("rb"):  # safetensors has its own errors for a file that cannot be read
        pass
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tokens, text = file.get_tensor("tokens"), bytes(file.get_tensor("tokenizer").numpy())
        description = Description.model_validate_json(metadata["description"])
        tokenizer_sha256 = metadata["tokenizer_json_sha256"]
    except (safetensors.SafetensorError, ValidationError, KeyError) as error:
        raise Damaged(f"it is not a whole token file: {str(error).splitlines()[0]}") from None
    if description.format != FORMAT:
        raise Damaged(f"it has format {description.format}, but this version reads {FORMAT}")
    if sha256 not in (None, description.sha256):
        raise Damaged("it has the tokens of another corpus")
    if tokens.dim() != 1 or f"torch.{token_type(description.vocab_size).__name__}" != str(tokens.dtype):
        raise Damaged("its tokens have another type")
    actual, largest = _checked(tokens)
    if actual != description.tokens_sha256 or hashlib.sha256(text).hexdigest() != tokenizer_sha256:
        raise Damaged("its checksum is wrong")
    if not (0 <= description.n_train <= len(tokens) and largest < description.vocab_size):
        raise Damaged("its description does not fit its tokens")
    return description, tokens, text.decode()


def _checked(tokens: Tensor) -> tuple[str, int]:
    """Checksum of the tokens, and the largest of them (-1 if there is none)."""
    digest, largest, array = hashlib.sha256(), -1, tokens.numpy()
    for begin in range(0, len(array), _BLOCK):
        block = array[begin : begin + _BLOCK]
        digest.update(block.data)
        largest = max(largest, int(block.max()))
    return digest.hexdigest(), largest
