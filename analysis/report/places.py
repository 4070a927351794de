"""Places in documents for generated text: between lines `<!-- begin NAME -->` and `<!-- end NAME -->`."""

from __future__ import annotations

import re
from pathlib import Path

_MARK = re.compile(r"^<!-- (?:begin|end) (\S+) -->$", re.MULTILINE)
_PLACE = re.compile(r"^<!-- begin (\S+) -->\n(.*?)^<!-- end \1 -->$", re.MULTILINE | re.DOTALL)


def places(document: Path) -> list[str]:
    """Return the names of a document's places, in their order.

    Raises:
        ValueError: a place has no end or no beginning, is inside another, or has the same name as another.
    """
    return [found[1] for found in _found(document, document.read_text(encoding="utf-8"))]


def fill_place(document: Path, name: str, text: str) -> None:
    """Put `text` in the document's place with that name.

    Raises:
        ValueError: the document has no such place, or as `places` does.
    """
    whole = document.read_text(encoding="utf-8")
    found = next((place for place in _found(document, whole) if place[1] == name), None)
    if found is None:
        raise ValueError(f"{document} must have a place <!-- begin {name} --> <!-- end {name} -->")
    filled = "\n".join([whole[: found.start(2)].rstrip("\n"), text.strip("\n"), whole[found.end(2) :]])
    document.write_text(filled, encoding="utf-8")


def _found(document: Path, whole: str) -> list[re.Match[str]]:
    found, marks = list(_PLACE.finditer(whole)), _MARK.findall(whole)
    names = [place[1] for place in found]
    wrong = sorted({name for name in marks if names.count(name) != 1 or marks.count(name) != 2})
    if wrong:
        raise ValueError(
            f"{document}: the places {', '.join(wrong)} must each have one line <!-- begin ... --> and one line "
            "<!-- end ... --> below it, and no other place between them"
        )
    return found
