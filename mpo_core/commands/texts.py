"""Read text, and split it into sequences to calibrate on and documents to evaluate on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from hashlib import sha256
from operator import getitem
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ASIDE = 0.2
"""Share of the text that is put aside for evaluation, or more if the tokens need more."""
FEWEST = 5
"""Number of documents from which on whole ones are put aside."""

Pieces = Callable[[], Sequence[Tensor]]
"""The token ids of a document, cut into pieces."""


class Split(NamedTuple):
    """Token ids to calibrate and to evaluate on, from disjoint texts."""

    calibration: Tensor
    """Shape (number of sequences, length)."""
    evaluation: list[Tensor]
    """One entry per document; or per sequence, if they come from fewer than two whole documents."""
    evaluated: str
    """The kind of the entries of `evaluation`: "documents" or "sequences"."""


def read_documents(paths: Sequence[Path]) -> list[str]:
    """A document for each text file and each line of a .jsonl file. Empty and repeated ones are left out.

    Raises:
        ValueError: a file cannot be read, is not UTF-8, or has a line that is no JSON object with a text; or there is
            no text at all.
    """
    documents: list[str] = []
    for path in paths:
        try:
            content = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text") from None
        documents += _texts(path, content) if path.suffix == ".jsonl" else [content]
    distinct = list(dict.fromkeys(document.strip() for document in documents if document.strip()))
    if not distinct:
        raise ValueError(f"there is no text in {', '.join(map(str, paths))}")
    return distinct


def _texts(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{path}, line {number}: each line must be a JSON object with a string "text"')
            yield text


def split(
    documents: Sequence[str],
    tokenise: Callable[[str], Sequence[int]],
    *,
    calibration_tokens: int,
    evaluation_tokens: int,
    length: int,
    seed: int,
    first: int | None = None,
    between: int | None = None,
) -> Split:
    """Sequences of `length` tokens to calibrate on, and documents to evaluate on.

    A fifth of the documents is put aside for evaluation, or more if they are short. The documents alone decide which.
    Of fewer than `FEWEST` documents, the last fifth of each is put aside. `seed` draws the calibration sequences from
    the rest. In both parts, every document gives one piece before any gives a second. Pieces shorter than a sequence
    are joined for calibration. The numbers of tokens are rounded up to whole pieces.

    Args:
        first: token at the beginning of every calibration sequence; `perplexity` puts it in evaluation.
        between: token between pieces that are joined.
    Raises:
        ValueError: the text has too few tokens.
    """
    size = length - (first is not None)
    pieces = cache(lambda document: torch.tensor(tokenise(document), dtype=torch.int64).split(size))
    order = sorted(documents, key=lambda document: sha256(document.encode()).digest())
    if len(order) < FEWEST:
        every = [pieces(document) for document in order]
        share = max(ASIDE, evaluation_tokens / max(1, sum(map(_count, every))))
        ends = [len(each) - min(len(each), math.ceil(share * len(each))) for each in every]
        to_fit = [partial(getitem, each, slice(end)) for each, end in zip(every, ends, strict=True)]
        to_evaluate = [partial(getitem, each, slice(end, None)) for each, end in zip(every, ends, strict=True)]
        drawn = _drawn(to_evaluate, evaluation_tokens)
    else:
        pool: list[Pieces] = [partial(pieces, document) for document in order]
        aside = max(2, round(ASIDE * len(pool)))  # one document has no standard error
        drawn = _drawn(pool[:aside], evaluation_tokens)
        while _count(ids for _, _, ids in drawn) < evaluation_tokens and aside < len(pool) - 1:
            aside += 1
            drawn = _drawn(pool[:aside], evaluation_tokens)
        to_fit, to_evaluate = pool[aside:], pool[:aside]
    n_sequences = math.ceil(calibration_tokens / length)
    sequences = _joined(_rounds(to_fit, seed), n_sequences, size, between)
    if len(sequences) < n_sequences or _count(ids for _, _, ids in drawn) < evaluation_tokens:
        there = [sum(_count(pieces()) for pieces in part) for part in (to_fit, to_evaluate)]
        raise ValueError(
            f"{calibration_tokens:,} tokens to calibrate and {evaluation_tokens:,} to evaluate were asked for, but the "
            f"text has {there[0]:,} and {there[1]:,}: give more text, or smaller --tokens and --evaluation-tokens"
        )
    calibration = torch.stack(sequences)
    if first is not None:
        calibration = torch.nn.functional.pad(calibration, (1, 0), value=first)
    by_document: dict[int, list[Tensor]] = {}
    for index, _, ids in sorted(drawn, key=lambda each: each[:2]):
        by_document.setdefault(index, []).append(ids)
    if len(order) < FEWEST or len(by_document) < 2:
        return Split(calibration, [ids for _, _, ids in drawn], "sequences")
    return Split(calibration, [torch.cat(each) for each in by_document.values()], "documents")


Drawn = tuple[int, int, Tensor]
"""Index of the document, place of the piece in it, and its token ids."""


def _rounds(pool: Sequence[Pieces], seed: int) -> Iterator[Drawn]:
    """All pieces in an order drawn by the seed: each round has at most one of every document."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool), generator=generator).tolist()
    left: dict[int, list[int]] = {}
    while order:
        for index in order:
            pieces = pool[index]()
            if index not in left:
                left[index] = torch.randperm(len(pieces), generator=generator).tolist()
            if left[index]:
                place = left[index].pop()
                yield index, place, pieces[place]
        order = [index for index in order if left[index]]


def _drawn(pool: Sequence[Pieces], n_tokens: int) -> list[Drawn]:
    """The first pieces that together have this number of tokens, or all. A piece of one token predicts nothing."""
    drawn: list[Drawn] = []
    for each in _rounds(pool, seed=0):
        if n_tokens <= 0:
            break
        if len(each[2]) > 1:
            drawn.append(each)
            n_tokens -= len(each[2])
    return drawn


def _joined(drawn: Iterator[Drawn], n_sequences: int, size: int, between: int | None) -> list[Tensor]:
    """At most n_sequences sequences of equal size. Whole pieces stay alone, shorter ones are joined."""
    sequences: list[Tensor] = []
    rest = torch.empty(0, dtype=torch.int64)
    for _, _, ids in drawn:
        if len(sequences) == n_sequences:
            break
        if len(ids) == size:
            sequences.append(ids)
            continue
        separator = [between] if between is not None and len(rest) else []
        rest = torch.cat([rest, torch.tensor(separator, dtype=torch.int64), ids])
        if len(rest) >= size:
            sequences.append(rest[:size])
            rest = rest[size:]
    return sequences


def _count(pieces: Iterable[Tensor]) -> int:
    return sum(map(len, pieces))
