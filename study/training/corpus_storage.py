"""The corpus in a study's storage, from which every worker reads it."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from study.spec.cache import cache_folder
from study.training.corpus import CharacterCorpus, Corpus, corpus_from_bytes
from study.training.files import replacing
from study.training.storage import Storage
from study.training.token_corpus import TokenCorpus, read_token_corpus
from study.training.token_file import SUFFIX, Damaged


def store_corpus(storage: Storage, corpus: Corpus) -> None:
    """Put the corpus where every worker finds it; replaces a damaged one.

    Raises:
        OSError: the storage cannot be written.
    """
    if isinstance(corpus, CharacterCorpus):
        key = _text_key(corpus.sha256)
        if not storage.exists(key) or hashlib.sha256(storage.read(key)).hexdigest() != corpus.sha256:
            storage.write(key, corpus.text.encode("utf-8"))
    elif isinstance(corpus, TokenCorpus) and not _has_tokens(storage, corpus):
        storage.put(token_key(corpus.sha256), corpus.path)


def stored_corpus(storage: Storage, sha256: str, validation_fraction: float) -> Corpus:
    """The corpus that `store_corpus` put there. Tokens of a remote storage are copied to the cache first.

    Raises:
        OSError: the corpus is missing or damaged.
    """
    key = token_key(sha256)
    if storage.exists(key):
        return _stored_tokens(storage, key, sha256)
    key = _text_key(sha256)
    data = storage.read(key)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise OSError(f"{storage.shown}/{key} is damaged: its checksum is wrong")
    return corpus_from_bytes(data, f"{storage.shown}/{key}", sha256, validation_fraction)


def token_key(sha256: str) -> str:
    """Key of the token file of a corpus."""
    return f"corpus/{sha256}{SUFFIX}"


def _text_key(sha256: str) -> str:
    return f"corpus/{sha256}.txt"


def _has_tokens(storage: Storage, corpus: TokenCorpus) -> bool:
    key = token_key(corpus.sha256)
    if not storage.exists(key):
        return False
    path = storage.local_path(key)
    if path is None:  # workers check the content of their copies
        return storage.size(key) == corpus.path.stat().st_size
    try:
        read_token_corpus(path, corpus.sha256)
    except Damaged:
        return False
    return True


def _stored_tokens(storage: Storage, key: str, sha256: str) -> TokenCorpus:
    path = storage.local_path(key)
    if path is None:
        path = cache_folder() / Path(key).name
        with suppress(OSError, Damaged):
            return read_token_corpus(path, sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, has_other_writers=True) as partial:
            storage.fetch(key, partial)
    try:
        return read_token_corpus(path, sha256)
    except Damaged as damage:
        raise OSError(f"{storage.shown}/{key} is damaged: {damage}") from None
