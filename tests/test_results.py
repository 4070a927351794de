"""docs/results: from the ledgers that it ships come its reports again, and what the documents say of them."""

from __future__ import annotations

import filecmp
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.places import places
from analysis.shipped import ship
from study.cli import app

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")

ROOT = Path(__file__).parents[1]
RESULTS = Path("docs/results")
DOCUMENTS = (Path("README.md"), RESULTS / "README.md")
STUDIES = sorted(ledger.parent.name for ledger in (ROOT / RESULTS).glob("*/ledger.parquet"))
EXACT = (".md", ".tex", ".html", ".json")
NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """What `make results` does, beside the project."""
    root = tmp_path_factory.mktemp("results")
    for name in STUDIES:
        folder = str(root / "studies" / name)
        for command in (["import", str(ROOT / RESULTS / name / "ledger.parquet"), folder], ["sync", folder]):
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 0, result.output
    for document in DOCUMENTS:
        (root / document).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / document, root / document)
        for place in places(root / document):
            emptied(root / document, place)
    ship(root / "studies", root / RESULTS, [root / document for document in DOCUMENTS])
    return root


def emptied(document, place):
    text = document.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {place} -->", f"<!-- end {place} -->"
    before, after = text.split(begin)[0], text.split(end)[1]
    document.write_text(f"{before}{begin}\n{end}{after}", encoding="utf-8")


def files(folder, suffix):
    return sorted(path.relative_to(folder) for path in folder.rglob(f"*{suffix}") if path.is_file())


def assert_same_drawing(made, shipped):
    """The same but for the last digits of coordinates, which another processor may round otherwise."""
    one, other = made.read_text(encoding="utf-8"), shipped.read_text(encoding="utf-8")
    assert NUMBER.sub("", one) == NUMBER.sub("", other), shipped
    coordinates = [[float(number) for number in NUMBER.findall(text)] for text in (one, other)]
    assert coordinates[0] == pytest.approx(coordinates[1], abs=1e-3), shipped


def test_every_study_of_the_documents_is_shipped_and_every_shipped_one_is_told_of():
    told = {place.partition(":")[0] for document in DOCUMENTS for place in places(ROOT / document)}
    assert told == set(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_ledger_gives_the_tables_and_the_data_of_the_figures(again, name):
    shipped, made = ROOT / RESULTS / name, again / RESULTS / name
    assert files(shipped, "") == sorted([*files(made, ""), Path("ledger.parquet")])
    assert files(shipped, ".csv")
    for path in files(shipped, ".csv"):
        pd.testing.assert_frame_equal(pd.read_csv(made / path), pd.read_csv(shipped / path), rtol=1e-9, obj=str(path))
    for path in files(shipped, ".svg"):
        assert_same_drawing(made / path, shipped / path)
    texts = [path for suffix in EXACT for path in files(shipped, suffix)]
    assert filecmp.cmpfiles(shipped, made, [str(path) for path in texts], shallow=False)[1:] == ([], [])


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_documents_say_what_the_ledgers_say(again, document):
    assert (again / document).read_text(encoding="utf-8") == (ROOT / document).read_text(encoding="utf-8")
