"""Puts tables of measured numbers into documents, at the places with their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis.report.places import fill_place

ROOT = Path(__file__).parents[1]


def put_table(document: str, name: str, caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Replace the text at the place `name` (see `analysis.report.places`) by a table and its caption.

    Args:
        document: path from the project's root.
    Raises:
        ValueError: the document has no such place.
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *rows)]
    fill_place(ROOT / document, name, "\n".join([caption, "", *lines]))
