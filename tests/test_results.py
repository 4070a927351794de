"""docs/results: from the ledgers that it ships come its reports again, and what the documents say of them."""

from __future__ import annotations

import filecmp
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from analysis.places import places
from study.definition import definition, differences
from study.directory import StudyDirectory
from study.ledger.snapshot import read_ledger
from study.study_file import load_config

ROOT = Path(__file__).parents[1]
RESULTS = Path("docs/results")
DOCUMENTS = (Path("README.md"), RESULTS / "README.md")
STUDIES = sorted(ledger.parent.name for ledger in (ROOT / RESULTS).glob("*/ledger.parquet"))
EXACT = (".md", ".tex", ".html", ".json")
NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """What `make results` makes of the ledgers and of documents without what it writes there, beside the project."""
    root = tmp_path_factory.mktemp("results")
    shutil.copy(ROOT / "Makefile", root)
    for name in STUDIES:
        (root / RESULTS / name).mkdir(parents=True)
        shutil.copy(ROOT / RESULTS / name / "ledger.parquet", root / RESULTS / name)
    for document in DOCUMENTS:
        shutil.copy(ROOT / document, root / document)
        for place in places(root / document):
            emptied(root / document, place)
    command = ["make", "results", "INSTALLED=", f"BIN={Path(sys.executable).parent}"]
    made = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    return root


def emptied(document, place):
    text = document.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {place} -->", f"<!-- end {place} -->"
    before, after = text.split(begin)[0], text.split(end)[1]
    document.write_text(f"{before}{begin}\n{end}{after}", encoding="utf-8")


@pytest.fixture(scope="module")
def given():
    """The studies that the `mpo-study run FILE --set ...` of the documents are of."""
    configs = []
    for line in (ROOT / RESULTS / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("mpo-study run study/configs/"):
            _, _, file, *options = shlex.split(line, comments=True)
            assert set(options[::2]) <= {"--set"}
            configs.append(load_config(ROOT / file, options[1::2]))
    return configs


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
    assert files(shipped, "") == files(made, "")
    assert files(shipped, ".csv")
    for path in files(shipped, ".csv"):
        pd.testing.assert_frame_equal(pd.read_csv(made / path), pd.read_csv(shipped / path), rtol=1e-9, obj=str(path))
    for path in files(shipped, ".svg"):
        assert_same_drawing(made / path, shipped / path)
    texts = [path for suffix in EXACT for path in files(shipped, suffix)]
    assert filecmp.cmpfiles(shipped, made, [str(path) for path in texts], shallow=False)[1:] == ([], [])


@pytest.mark.parametrize("name", STUDIES)
def test_command_that_is_given_is_that_of_the_study_that_was_run(again, given, name):
    [config] = [config for config in given if config.name == name]
    ledger = read_ledger(StudyDirectory(again / "results" / ".shipped" / name).ledger_url, name)
    assert list(differences(definition(ledger.growths.history[-1]), definition(config))) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_documents_say_what_the_ledgers_say(again, document):
    assert (again / document).read_text(encoding="utf-8") == (ROOT / document).read_text(encoding="utf-8")
