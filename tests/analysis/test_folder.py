"""Files that are written together: what the next writing replaces, what it removes, and what it leaves alone."""

from __future__ import annotations

import json

import pytest

from analysis.errors import AnalysisError
from analysis.report.folder import OutputFolder

FOLDER = OutputFolder("sketch", "index.html", "sketch.json", ("index.html", "notes.csv"), ("figures", "tables"))


def maker(**texts):
    """Writes these texts, `figures__a` to figures/a, and index.html."""

    def make(folder):
        for name, text in {"index.html": "page", **texts}.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    return make


def tree(folder):
    """Everything below a folder: files with what is in them, folders with None."""
    return {p.relative_to(folder).as_posix(): p.read_text() if p.is_file() else None for p in folder.rglob("*")}


def test_what_is_written_is_listed_and_replaced_and_removed(tmp_path):
    out = tmp_path / "deep" / "out"
    assert FOLDER.write(out, maker(figures__a="1", figures__b="1")) == ["figures/a", "figures/b", "index.html"]
    (out / "mine").write_text("mine")
    (out / "figures" / "mine").write_text("mine")
    assert FOLDER.write(out, maker(figures__a="2", tables__c="2")) == ["figures/a", "index.html", "tables/c"]
    found = tree(out)
    assert json.loads(found.pop("sketch.json"))["written"] == ["figures/a", "index.html", "tables/c"]
    assert found == {
        "mine": "mine", "figures": None, "figures/mine": "mine", "figures/a": "2", "tables": None, "tables/c": "2",
        "index.html": "page",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["index.html", "figures/a"])
@pytest.mark.parametrize("kind", ["file", "folder", "broken link"])
def test_nothing_of_others_is_replaced(tmp_path, name, kind):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    before = tree(tmp_path)
    with pytest.raises(AnalysisError, match=rf"{name} exists and was not written by a sketch; choose another folder"):
        FOLDER.write(tmp_path, maker(figures__a="1"))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("earlier", [False, True])
def test_a_file_where_a_folder_must_be_is_named_before_anything_moves(tmp_path, earlier):
    if earlier:
        FOLDER.write(tmp_path, maker(tables__c="old"))
    (tmp_path / "figures").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(AnalysisError, match=r"figures exists and is not a folder; choose another folder"):
        FOLDER.write(tmp_path, maker(figures__a="new", tables__c="new"))
    assert tree(tmp_path) == before


def test_a_folder_where_an_earlier_file_was_is_not_removed(tmp_path):
    FOLDER.write(tmp_path, maker(figures__a="1"))
    (tmp_path / "figures" / "a").unlink()
    (tmp_path / "figures" / "a").mkdir()
    before = tree(tmp_path)
    with pytest.raises(AnalysisError, match=r"figures/a exists and was not written by a sketch"):
        FOLDER.write(tmp_path, maker())
    assert tree(tmp_path) == before


def test_what_a_killed_writing_left_is_removed_and_what_others_have_is_not(tmp_path):
    for name, file in ((".new-abcd_123", "figures"), (".new-abcd_124", "thesis.tex"), (".new-thesis", "index.html")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("")
    FOLDER.write(tmp_path, maker())
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [".new-abcd_124", ".new-thesis"]


def test_a_writing_that_breaks_leaves_the_earlier_one(tmp_path):
    FOLDER.write(tmp_path, maker(figures__a="1"))
    before = tree(tmp_path)

    def breaks(folder):
        maker(figures__a="2")(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(AnalysisError, match=r"^cannot write the sketch to .*: No space left on device$"):
        FOLDER.write(tmp_path, breaks)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["../precious", "/etc/precious", "figures/../precious", "precious", "index.html/precious", "figures", ""]
)
def test_a_list_with_names_of_others_is_not_believed(tmp_path, name):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "sketch.json").write_text(json.dumps({"written": [name]}))
    before = tree(tmp_path)
    with pytest.raises(AnalysisError, match=r"sketch\.json names files outside a sketch"):
        FOLDER.write(tmp_path, maker())
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"written": [1]}', '{"written": null}', None])
def test_a_list_that_is_none_is_not_believed(tmp_path, content):
    if content is None:
        (tmp_path / "sketch.json").mkdir()
    else:
        (tmp_path / "sketch.json").write_text(content)
    with pytest.raises(AnalysisError, match=r"sketch\.json is not the list of a sketch's files; choose another folder"):
        FOLDER.write(tmp_path, maker())


@pytest.mark.parametrize("name", ["", "figures", "figures/deep", "figures/a", "sketch.json"])
def test_links_are_refused_and_nothing_behind_them_is_touched(tmp_path, name):
    """Even if a list, which anyone may have written, names what is behind them."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for folder in (elsewhere, elsewhere / "figures", elsewhere / "figures" / "deep"):
        folder.mkdir()
        for file in ("a", "b"):
            (folder / file).write_text("precious")
    listed = json.dumps({"written": ["figures/a", "figures/b", "figures/deep/a", "figures/deep/b"]})
    (elsewhere / "sketch.json").write_text(listed)
    if name:
        (out / name).parent.mkdir(parents=True)
        if name != "sketch.json":
            (out / "sketch.json").write_text(listed)
    (out / name).symlink_to(elsewhere / name)
    before = tree(tmp_path)
    for write in (lambda: FOLDER.check(out), lambda: FOLDER.write(out, maker(figures__a="new"))):
        with pytest.raises(AnalysisError, match=rf"{name} is a symbolic link"):
            write()
    assert tree(tmp_path) == before


def test_a_folder_below_a_link_is_as_good_as_any(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to("disk")
    assert FOLDER.write(tmp_path / "home" / "out", maker()) == ["index.html"]


def test_a_list_with_a_name_that_no_file_can_have_is_not_believed(tmp_path):
    (tmp_path / "sketch.json").write_text(json.dumps({"written": ["figures/a\0b"]}))
    with pytest.raises(AnalysisError, match=r"sketch\.json names files outside a sketch"):
        FOLDER.write(tmp_path, maker())
