"""The corpus of a study file: which text, and what its tokens are."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from study.spec.cache import in_cache
from study.spec.values import FixedOrListed, Strict

CHARACTERS, BYTES = "characters", "bytes"
"""Tokenizers that need no folder."""
MODEL_TOKENIZER = "model"
"""The tokenizer in the folder of the pretrained model."""


class Corpus(Strict):
    """The text and its tokens. Default: Tiny Shakespeare, one token per character."""

    path: FixedOrListed[str] | None = Field(
        default=None,
        description="A file or a list of files, relative to the study file: UTF-8 text, JSON lines (`.jsonl`, "
        "`.jsonl.gz`) or Parquet (`.parquet`). A byte order mark at a text's beginning is dropped; line ends stay as "
        "they are.",
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        default=None, description="The checksum that the file, the text or the recorded corpus must have."
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="Share of the text, from its end, that is held out for validation."
    )
    tokenizer: str = Field(
        default=CHARACTERS,
        exclude_if=lambda value: value == CHARACTERS,
        description="`characters`, `bytes`, `model` (that of the pretrained model), or a folder with a Hugging Face "
        "tokenizer, relative to the study file.",
    )
    text_column: str = Field(
        default="text",
        exclude_if=lambda value: value == "text",
        description="The column with the text in JSON lines and Parquet.",
    )

    @property
    def given_paths(self) -> tuple[str, ...]:
        """The files as they are given; empty for the default text."""
        return () if self.path is None else (self.path,) if isinstance(self.path, str) else self.path

    @property
    def paths(self) -> tuple[str, ...]:
        """The files on this machine; empty for the default text."""
        return tuple(in_cache(path) or path for path in self.given_paths)

    @property
    def tokenizer_folder(self) -> str | None:
        """The folder of the tokenizer on this machine, if it has one."""
        if self.tokenizer in (CHARACTERS, BYTES):
            return None
        return in_cache(self.tokenizer) or self.tokenizer
