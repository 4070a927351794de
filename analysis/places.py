"""Places in documents whose text is generated: between `<!-- begin NAME -->` and `<!-- end NAME -->`."""

from __future__ import annotations

import re
from pathlib import Path


def fill_place(document: Path, name: str, text: str) -> None:
    """Put `text` where the document has a place of that name.

    Raises:
        ValueError: the document has no such place.
    """
    whole = document.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, found, rest = whole.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{document} must have a place {begin} {end}")
    document.write_text("\n".join([before + begin, text.strip("\n"), end + after]), encoding="utf-8")


def places(document: Path) -> list[str]:
    """The names of a document's places, in their order."""
    return re.findall(r"^<!-- begin (\S+) -->$", document.read_text(encoding="utf-8"), re.MULTILINE)
