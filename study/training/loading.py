"""The corpus that a study file names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from study.errors import StudyError
from study.spec.corpus import BYTES, CHARACTERS
from study.training.corpus import Corpus, corpus_from_bytes
from study.training.documents import Source, check_is_file, read_whole
from study.training.tiny_shakespeare import TINY_SHAKESPEARE_SHA256, cached_text, tiny_shakespeare
from study.training.token_corpus import TokenCorpus, read_token_corpus, tokenised
from study.training.token_file import SUFFIX, Damaged
from study.training.tokenizer import (
    Bytes,
    Characters,
    HuggingFace,
    Tokenizer,
    folder_identity,
    tokenizer_from_folder,
)


def load_corpus(
    path: str | Path | Sequence[str | Path] | None = None,
    sha256: str | None = None,
    validation_fraction: float = 0.1,
    tokenizer: str = CHARACTERS,
    text_column: str = "text",
) -> Corpus:
    """The text in these files as tokens, see `study.spec.config.Corpus`.

    Args:
        path: files of text, or a token file that a study has in its storage. Default: Tiny Shakespeare from the cache
            or, the first time, from its publisher.

    Raises:
        StudyError: no source has the text; it or the tokenizer cannot be used; or its checksum is not the expected one.
    """
    if path is None:
        data, where = tiny_shakespeare()
        if tokenizer == CHARACTERS:
            return corpus_from_bytes(data, where, sha256 or TINY_SHAKESPEARE_SHA256, validation_fraction)
        paths, sha256 = (cached_text(),), sha256 or TINY_SHAKESPEARE_SHA256
    else:
        paths = (Path(path),) if isinstance(path, str | Path) else tuple(map(Path, path))
    source = Source(paths, text_column)
    if source.is_one_text and paths[0].suffix == SUFFIX:
        return _from_token_file(paths[0], sha256, validation_fraction, tokenizer)
    if source.is_one_text and tokenizer == CHARACTERS:
        return corpus_from_bytes(read_whole(paths[0]), str(paths[0]), sha256, validation_fraction)
    made: Tokenizer | None = None
    if tokenizer != CHARACTERS:
        made = Bytes() if tokenizer == BYTES else tokenizer_from_folder(Path(tokenizer))
    found = source.summary(with_alphabet=made is None)
    corpus = tokenised(source, found, made or Characters(found.alphabet), validation_fraction)
    if sha256 not in (None, found.sha256, corpus.sha256):
        of_file = _checksum(paths[0]) if len(paths) == 1 else found.sha256
        if sha256 != of_file:
            raise StudyError(f"{source}: wrong checksum: expected SHA-256 {sha256}, but got {of_file}")
    return corpus


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_token_file(path: Path, sha256: str | None, validation_fraction: float, tokenizer: str) -> TokenCorpus:
    """A corpus that was tokenised before, which must fit the study file."""
    check_is_file(path)
    try:
        corpus = read_token_corpus(path)
    except OSError as error:
        raise StudyError(f"{path}: cannot read the corpus: {error.strerror or error}") from None
    except Damaged as damage:
        raise StudyError(f"{path}: {damage}") from None
    if sha256 not in (None, corpus.sha256, corpus.text_sha256):
        raise StudyError(f"{path}: wrong checksum: expected SHA-256 {sha256}, but got {corpus.sha256}")
    if validation_fraction != corpus.validation_fraction:
        raise StudyError(
            f"{path}: its tokens are split by corpus.validation_fraction={corpus.validation_fraction:g}, but the study "
            f"file has {validation_fraction:g}"
        )
    is_folder = tokenizer not in (CHARACTERS, BYTES)
    is_another = (HuggingFace.kind if is_folder else tokenizer) != corpus.kind
    if is_folder and Path(tokenizer).is_dir():  # it need not be there: the file has the tokenizer
        is_another |= folder_identity(Path(tokenizer)) != corpus.description.tokenizer_sha256
    if is_another:
        raise StudyError(f"{path}: its tokens are those of {corpus.tokenizer}, but corpus.tokenizer is {tokenizer}")
    return corpus
