"""docs/results: the shipped ledgers give their reports again, and the documents hold what the reports say."""

from __future__ import annotations

import filecmp
import json
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from functools import cache, partial
from pathlib import Path

import pytest

from analysis.commands.shipped import place_text, ship_study
from analysis.report.places import places
from study.commands.exchange import import_study
from study.commands.sync import sync
from study.ledger.directory import StudyDirectory
from study.ledger.snapshot import read_ledger
from study.spec.definition import definition, differences
from study.spec.search_space import listed_specs
from study.spec.study_file import read_config
from study.training.model import trial_shape

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")

ROOT = Path(__file__).parents[1]
RESULTS = Path("docs/results")
DOCUMENTS = (Path("docs/findings.md"), Path("README.md"), RESULTS / "README.md")
STUDIES = sorted(ledger.parent.name for ledger in (ROOT / RESULTS).glob("*/ledger.db.xz"))
NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in STUDIES])
def study(request, tmp_path_factory):
    """A shipped study made again from its ledger: its name, its folder, its shipped files, its findings."""
    name, folder = request.param, StudyDirectory(tmp_path_factory.mktemp("study") / "made")
    import_study(ROOT / RESULTS / name / "ledger.db.xz", folder, None)
    sync(folder.load_config(), folder, None, None)
    made = tmp_path_factory.mktemp("shipped") / name
    return name, folder, made, ship_study(folder.path, made)


@cache
def shipped_commands():
    """The studies that the `mpo-study run FILE --set ...` of the documents are of."""
    configs = []
    for line in (ROOT / RESULTS / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("mpo-study run study/configs/"):
            _, _, file, *options = shlex.split(line, comments=True)
            assert set(options[::2]) <= {"--set"}
            configs.append(read_config(ROOT / file, options[1::2]))
    return configs


def files(folder, suffix):
    return sorted(path.relative_to(folder) for path in folder.rglob(f"*{suffix}") if path.is_file())


def place_of(document, name):
    text = (ROOT / document).read_text(encoding="utf-8")
    return text.split(f"<!-- begin {name} -->")[1].split(f"<!-- end {name} -->")[0].strip("\n")


def assert_same_drawing(made, shipped):
    """The same but for the last digits of coordinates, which another processor may round otherwise."""
    one, other = made.read_text(encoding="utf-8"), shipped.read_text(encoding="utf-8")
    assert NUMBER.sub("", one) == NUMBER.sub("", other), shipped
    coordinates = [[float(number) for number in NUMBER.findall(text)] for text in (one, other)]
    assert coordinates[0] == pytest.approx(coordinates[1], abs=1e-3), shipped


def test_documents_show_every_shipped_study_and_no_other():
    shown = {place.partition(":")[0] for document in DOCUMENTS for place in places(ROOT / document)}
    assert shown == set(STUDIES)


def test_ledger_gives_the_files_that_are_shipped(study):
    name, _, made, _ = study
    shipped = ROOT / RESULTS / name
    assert files(shipped, "") == sorted([*files(made, ""), Path("ledger.db.xz")])
    assert_same_drawing(made / "frontier.svg", shipped / "frontier.svg")
    texts = [str(path) for path in files(shipped, ".md")]
    assert "trials.md" in texts
    assert filecmp.cmpfiles(shipped, made, texts, shallow=False)[1:] == ([], [])


def test_documents_say_what_the_ledger_says(study):
    name, _, _, findings = study
    for document in DOCUMENTS:
        for place in places(ROOT / document):
            if place.partition(":")[0] == name:
                text = place_text(ROOT / document, place, {name: findings}, ROOT / RESULTS)
                assert place_of(document, place) == text.strip("\n"), (document, place)


def test_command_in_the_documents_is_that_of_the_study_that_was_run(study):
    name, folder, _, _ = study
    [config] = [config for config in shipped_commands() if config.name == name]
    ledger = read_ledger(folder.ledger_url, name)
    recorded = definition(ledger.growths.history[-1])
    recorded["model"].pop("sha256", None)  # of a pretrained model's files, which are not here
    assert list(differences(recorded, definition(config))) == []


def test_trials_of_the_ledger_are_those_that_the_study_lists_now(study):
    """A study that is continued finds its trials again: specs and identities are what they were."""
    name, folder, _, _ = study
    ledger = read_ledger(folder.ledger_url, name)
    assert set(listed_specs(ledger.growths.history[-1])) <= {trial.spec for trial in ledger.trials}
    with closing(sqlite3.connect(folder.path / "ledger.db")) as connection:
        query = "SELECT value_json FROM trial_user_attributes WHERE key = 'trial'"
        written = [json.loads(content)["spec"] for (content,) in connection.execute(query)]
    key = partial(json.dumps, sort_keys=True)
    assert sorted(map(key, written)) == sorted(key(trial.spec.model_dump(mode="json")) for trial in ledger.trials)
    arms = {trial.spec.arm: trial for trial in ledger.trials}.values()
    # A pretrained model's trials are made of its files, which are not here.
    for trial in (each for each in arms if each.spec.model.architecture == "picogpt"):
        now = trial_shape(trial.spec, trial.shape.vocab_size, 1000, trial.spec.model)
        assert now.identity == trial.shape.identity


@pytest.mark.slow
def test_make_results_writes_reports_and_fills_documents(tmp_path):
    """The command itself, on one study, beside the project."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / RESULTS / "paper").mkdir(parents=True)
    shutil.copy(ROOT / RESULTS / "paper" / "ledger.db.xz", tmp_path / RESULTS / "paper")
    for document in DOCUMENTS:
        (tmp_path / document).write_text("<!-- begin paper:trials -->\n<!-- end paper:trials -->\n", encoding="utf-8")
    command = ["make", "results", "INSTALLED=", f"BIN={Path(sys.executable).parent}"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    shipped = ROOT / RESULTS / "paper"
    assert files(tmp_path / RESULTS / "paper", "") == files(shipped, "")
    for document in DOCUMENTS:
        text = (tmp_path / document).read_text(encoding="utf-8")
        assert place_of(DOCUMENTS[0], "paper:trials") in text
