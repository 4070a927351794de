"""Places in documents: what stands there is replaced, and nothing else."""

from __future__ import annotations

import pytest

from analysis.report.places import fill_place, places

DOCUMENT = """A place begins with `<!-- begin a -->`: keep this.

<!-- begin a -->
old
<!-- end a -->
between
<!-- begin b:part -->
<!-- end b:part -->
"""


def test_a_place_is_filled_and_the_rest_stays(tmp_path):
    document = tmp_path / "a.md"
    document.write_text(DOCUMENT)
    assert places(document) == ["a", "b:part"]
    for _ in range(2):
        fill_place(document, "a", "new\n\nlines\n")
        fill_place(document, "b:part", "more")
    assert document.read_text() == DOCUMENT.replace("\nold\n", "\nnew\n\nlines\n").replace(
        "<!-- begin b:part -->\n", "<!-- begin b:part -->\nmore\n"
    )
    with pytest.raises(ValueError, match="must have a place <!-- begin c -->"):
        fill_place(document, "c", "")


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        (["begin a"], "a"),
        (["end a"], "a"),
        (["begin a", "end a", "begin a", "end a"], "a"),
        (["begin a", "begin b", "end b", "end a"], "b"),
        (["begin a", "begin b", "end a", "end b"], "b"),
        (["begin a", "begin a", "end a"], "a"),
    ],
)
def test_places_that_cannot_be_told_apart_are_refused(lines, wrong, tmp_path):
    document = tmp_path / "a.md"
    document.write_text("".join(f"<!-- {line} -->\ntext\n" for line in lines))
    before = document.read_text()
    for call in (lambda: places(document), lambda: fill_place(document, "a", "new")):
        with pytest.raises(ValueError, match=f"the places {wrong} must each have one line"):
            call()
    assert document.read_text() == before
