"""Tokenizers: characters, bytes, or the tokenizer in a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from study.errors import StudyError, first_line
from study.spec.corpus import BYTES, CHARACTERS
from study.spec.trial import json_hash

Unit = Literal["characters", "bytes", "tokens"]
MAX_VOCABULARY = 1_000_000
"""Largest vocabulary: every token has a row of the embeddings and of the logits."""
_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken", "tekken.json"),
)
"""Names of a tokenizer's own files in a folder, which may hold a whole model."""
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class Encoded(NamedTuple):
    """Tokens of a text, (n,); and the UTF-8 bytes of the text that the first of them stands for."""

    tokens: np.ndarray[Any, Any]
    n_first_bytes: int


class Tokenizer(ABC):
    """Makes tokens of texts, and text of tokens.

    kind: which class it is, in a token file. name: as people read it. identity: checksum of all that it depends on.
    end_of_text: the token between documents; None if it has none.
    """

    kind: str
    name: str
    identity: str
    unit: Unit
    vocab_size: int
    end_of_text: int | None = None

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """The tokens of each text; no token is added to them.

        Raises:
            StudyError: a text cannot be encoded.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; parts that are no UTF-8 text are replaced."""

    @abstractmethod
    def as_json(self) -> str:
        """All that `decode` and `encode` need, as JSON, for `tokenizer_from_json`."""


class Characters(Tokenizer):
    """One token for each character of an alphabet, numbered in its order. It has no end-of-text token."""

    kind, name, unit = CHARACTERS, CHARACTERS, "characters"

    def __init__(self, alphabet: str) -> None:
        self.vocab_size, self._alphabet = len(alphabet), alphabet
        self.identity = hashlib.sha256(alphabet.encode()).hexdigest()
        self._positions = {character: token for token, character in enumerate(alphabet)}

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        try:
            return [
                Encoded(np.array([self._positions[character] for character in text], np.int64), len(text[:1].encode()))
                for text in texts
            ]
        except KeyError as error:
            raise StudyError(f"the character {error.args[0]!r} is not in the corpus's vocabulary") from None

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self._alphabet[token] for token in tokens)

    def as_json(self) -> str:
        return json.dumps(self._alphabet)


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8. Byte 0 is the end-of-text token."""

    kind, name, unit = BYTES, BYTES, "bytes"
    identity, vocab_size, end_of_text = BYTES, 256, 0

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        return [Encoded(np.frombuffer(text.encode(), np.uint8), 1) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    def as_json(self) -> str:
        return "null"


class HuggingFace(Tokenizer):
    """A fast tokenizer of Hugging Face. Text that looks like a special token is encoded as text.

    Args:
        backend: a `tokenizers.Tokenizer`.
    """

    kind, unit = "hugging_face", "tokens"

    def __init__(self, backend: Any, name: str, identity: str, end_of_text: int | None) -> None:
        self._backend, self.name, self.identity, self.end_of_text = backend, name, identity, end_of_text
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            Encoded(np.array(encoding.ids, np.int64), self._n_first_bytes(text, encoding) if encoding.ids else 0)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _n_first_bytes(self, text: str, encoding: Any) -> int:
        """Bytes of the text that the first token stands for, also if it is a part of a character."""
        first, whole = encoding.tokens[0], len(text[: encoding.offsets[0][1]].encode())
        if encoding.ids[0] in self._added:
            return whole
        if _BYTE_TOKEN.fullmatch(first) and not text.startswith(first):
            return 1
        return min(whole, len(first)) if self._has_byte_letters else whole  # it may have a space that the text lacks

    @cached_property
    def _added(self) -> set[int]:
        return set(self._backend.get_added_tokens_decoder())

    @cached_property
    def _has_byte_letters(self) -> bool:
        """Whether each letter of a token stands for one byte."""
        return '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str())["decoder"])

    def decode(self, tokens: Sequence[int]) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=False)

    def as_json(self) -> str:
        about = {"name": self.name, "identity": self.identity, "end_of_text": self.end_of_text}
        return json.dumps(about | {"backend": json.loads(self._backend.to_str())}, ensure_ascii=False)


def tokenizer_from_json(kind: str, text: str) -> Tokenizer:
    """The tokenizer whose `as_json` this is.

    Raises:
        StudyError: the package of the tokenizer is not installed.
        ValueError: the text is not of such a tokenizer.
    """
    content = json.loads(text)
    if kind == CHARACTERS:
        return Characters(str(content))
    if kind == BYTES:
        return Bytes()
    if kind != HuggingFace.kind:
        raise ValueError(f"unknown kind of tokenizer: {kind}")
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:
        raise _lacking("tokenizers") from None
    try:
        backend = Backend.from_str(json.dumps(content.pop("backend")))
        return HuggingFace(backend, **content)
    except Exception as error:  # the library's errors have no class of their own
        raise ValueError(f"the tokenizer cannot be read: {str(error)[:200]}") from None


def tokenizer_from_folder(folder: Path) -> HuggingFace:
    """The tokenizer in a Hugging Face folder, from local files alone, without running code from the folder.

    Raises:
        StudyError: transformers is not installed; the folder holds no tokenizer, or none that can be used here.
    """
    shown = f"corpus.tokenizer: {folder}"
    if not folder.is_dir():
        raise StudyError(f"{shown}: is not a folder; give `{CHARACTERS}`, `{BYTES}` or a folder with a tokenizer")
    identity = folder_identity(folder)
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise _lacking("transformers") from None
    try:
        loaded: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer has its own errors
        raise StudyError(f"{shown}: the tokenizer cannot be read: {first_line(error)[:300]}") from None
    if not loaded.is_fast:
        raise StudyError(f"{shown}: only fast tokenizers can be used; save this one with a tokenizer.json")
    found = HuggingFace(loaded.backend_tokenizer, folder.name, identity, loaded.eos_token_id)
    if not 0 < found.vocab_size <= MAX_VOCABULARY:
        raise StudyError(
            f"{shown}: a vocabulary has 1 to {MAX_VOCABULARY:,} tokens, but this one has {found.vocab_size:,}"
        )
    return found


def folder_identity(folder: Path) -> str:
    """SHA-256 of the tokenizer's own files in a folder, which does not depend on the folder's name.

    Raises:
        StudyError: it has no such files, or they cannot be read.
    """
    try:
        files = [path for path in sorted(folder.iterdir()) if any(fnmatch(path.name, one) for one in _FILES)]
        configuration = folder / "config.json"
        if files and configuration.is_file() and not _names_its_class(folder):
            files.append(configuration)
        contents = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
    except OSError as error:
        raise StudyError(f"corpus.tokenizer: {folder}: cannot be read: {error.strerror or error}") from None
    if not contents:
        raise StudyError(f"corpus.tokenizer: {folder}: has no tokenizer, for example no tokenizer.json")
    return json_hash(contents)


def _names_its_class(folder: Path) -> bool:
    """Whether the tokenizer's own files say of which class it is; else the model's configuration decides."""
    try:
        return "tokenizer_class" in json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False


def _lacking(package: str) -> StudyError:
    return StudyError(
        f"the tokenizer of a folder needs the package {package}, which is not installed: pip install 'mpo-study[hf]'"
    )
