"""Tables of measured numbers, put where a document has their name: no figure there is typed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def put_table(document: str, name: str, caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Replace what stands between `<!-- begin name -->` and `<!-- end name -->` by a table and its caption.

    Args:
        document: path from the project's root.
    Raises:
        ValueError: the document has no such place.
    """
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{document} must have a place {begin} {end} for the table")
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *rows)]
    path.write_text("\n".join([before + begin, caption, "", *lines, end + after]), encoding="utf-8")
