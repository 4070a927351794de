"""The text of a corpus's files: plain text, JSON lines or Parquet, read in pieces so that memory stays bounded."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, BinaryIO, NamedTuple

from study.errors import StudyError
from study.training.corpus import not_utf8

MAX_BYTES = 1_000_000_000
"""Largest text of a corpus of characters: its tokens take eight times as much memory. Others have no limit."""
PIECE_BYTES = 1 << 20
"""A plain text is tokenised in pieces of about this many bytes, cut at a line's end where there is one."""
_ROWS = 256
"""Rows of a Parquet file that are read at once."""


class Piece(NamedTuple):
    """A part of a document, never empty; most documents have one piece."""

    text: str
    ends_document: bool


class TextSummary(NamedTuple):
    """A summary of the text from one reading. alphabet: its distinct characters, sorted, if they were asked for."""

    sha256: str
    n_characters: int
    alphabet: str


@dataclass(frozen=True)
class Source:
    """The files of a corpus, and the column with the text in those that have columns."""

    paths: tuple[Path, ...]
    text_column: str = "text"

    @property
    def is_one_text(self) -> bool:
        """Whether it is one plain text, which is split by position; any other corpus is split by document."""
        return len(self.paths) == 1 and _kind(self.paths[0]) == "plain text"

    def __str__(self) -> str:
        more = len(self.paths) - 1
        return f"{self.paths[0]} and {more} more file{'s' * (more > 1)}" if more else str(self.paths[0])

    def pieces(self) -> Iterator[Piece]:
        """The text, document by document; empty documents are left out.

        Raises:
            StudyError: a file cannot be read, is not UTF-8, or has a line or a column that is no text.
        """
        for path in self.paths:
            check_is_file(path)
            with _naming(path):
                kind = _kind(path)
                if kind == "plain text":
                    yield from _marked(_plain_text(path))
                else:
                    read = _json_lines if kind == "JSON lines" else _parquet
                    yield from (Piece(text, True) for text in read(path, self.text_column) if text)

    def summary(self, *, with_alphabet: bool = False) -> TextSummary:
        """Read the whole text once; for the errors see `pieces`.

        The checksum of one plain text is the SHA-256 of its bytes. With documents, the number of bytes of each follows
        it, in 8 bytes, so that other documents with the same text in sum have another checksum.
        """
        digest, n_characters, n_bytes = hashlib.sha256(), 0, 0
        alphabet: set[str] = set()
        for text, ends_document in self.pieces():
            data = text.encode()
            digest.update(data)
            n_characters += len(text)
            n_bytes += len(data)
            if with_alphabet:
                alphabet |= set(text)
            if ends_document:
                if not self.is_one_text:
                    digest.update(n_bytes.to_bytes(8, "little"))
                n_bytes = 0
        if not n_characters:
            raise StudyError(f"{self}: the corpus is empty")
        return TextSummary(digest.hexdigest(), n_characters, "".join(sorted(alphabet)))


def check_is_file(path: Path) -> int:
    """Size of a regular file in bytes; a device or a pipe may have no end.

    Raises:
        StudyError: there is no such file, or it is of another kind.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise _unreadable(path, error) from None
    if S_ISREG(found.st_mode):
        return found.st_size
    kind = "a folder" if S_ISDIR(found.st_mode) else "a device, pipe or socket"
    raise StudyError(f"{path}: a corpus is a text file, but this is {kind}")


def read_whole(path: Path) -> bytes:
    """The content of a regular file of at most `MAX_BYTES`.

    Raises:
        StudyError: the file is larger, of another kind, or cannot be read.
    """
    size = check_is_file(path)
    if size > MAX_BYTES:
        raise StudyError(f"{path}: a corpus has at most {MAX_BYTES:,} bytes, but this file has {size:,}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> StudyError:
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return StudyError(f"{path}: cannot read the corpus: {reason}")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Convert errors of reading to one line that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged gzip file
        raise _unreadable(path, error) from None


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".jsonl"] or suffixes[-2:] == [".jsonl", ".gz"]:
        return "JSON lines"
    return "Parquet" if suffixes[-1:] == [".parquet"] else "plain text"


def _marked(texts: Iterable[str]) -> Iterator[Piece]:
    """The pieces of one document, the last one marked."""
    before = None
    for text in texts:
        if before is not None:
            yield Piece(before, False)
        before = text
    if before is not None:
        yield Piece(before, True)


def _plain_text(path: Path) -> Iterator[str]:
    """A text file in pieces; byte order marks at its beginning are left out."""
    with path.open("rb") as file:
        begun = _skip_marks(file)
        left = b""
        while data := file.read(PIECE_BYTES):
            data = left + data
            cut = data.rfind(b"\n") + 1 or _end_of_last_character(data)
            if cut:
                yield _decoded(path, data[:cut], begun)
            begun, left = begun + cut, data[cut:]
        if left:
            yield _decoded(path, left, begun)


def _skip_marks(file: BinaryIO) -> int:
    position = 0
    while file.read(len(BOM_UTF8)) == BOM_UTF8:
        position = file.tell()
    file.seek(position)
    return position


def _end_of_last_character(data: bytes) -> int:
    """Where the last character begins, which may not be whole."""
    place = len(data) - 1
    while place > 0 and data[place] & 0xC0 == 0x80 and len(data) - place < 4:
        place -= 1
    return place


def _decoded(path: Path, data: bytes, begun: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(str(path), begun + error.start) from None


def _json_lines(path: Path, column: str) -> Iterator[str]:
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise StudyError(f"{where}: is not UTF-8 text") from None
            if text.strip():
                yield _column_of(where, text, column)


def _column_of(where: str, line: str, column: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{where}: is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise StudyError(f"{where}: must be a JSON object with the column `{column}`")
    if column not in row:
        raise _no_column(where, column, list(row))
    text = row[column]
    if not isinstance(text, str | None):
        raise StudyError(f"{where}: the column `{column}` must be a text, but is {json.dumps(text)[:40]}")
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise StudyError(f"{where}: the column `{column}` is not valid Unicode") from None
    return text or ""


def _no_column(where: str, column: str, columns: Sequence[str]) -> StudyError:
    known = ", ".join(columns)[:200] or "none"
    return StudyError(f"{where}: has no column `{column}`, only {known}; name the column as corpus.text_column")


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa  # imported late: few studies need it
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(str(path), column, file.schema_arrow.names)
            kind: Any = file.schema_arrow.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind  # a category of pandas
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise StudyError(f"{path}: the column `{column}` must be a text, but is {kind}")
            for batch in file.iter_batches(_ROWS, columns=[column]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except UnicodeDecodeError:
        raise StudyError(f"{path}: the column `{column}` is not UTF-8 text") from None
    except pa.ArrowException as error:
        raise StudyError(f"{path}: is not a whole Parquet file: {str(error).splitlines()[0]}") from None
