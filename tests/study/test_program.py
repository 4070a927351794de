"""Fingerprints of the program, and the folder that Ray has for itself."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from study.scheduler.private_folder import private_folder, remove_leftovers
from study.training.program import PACKAGES, code_in, program

ROOT = Path(__file__).parents[2]


def folders_in(parent):
    return {name: str(parent / name) for name in PACKAGES}


@pytest.fixture
def copy(tmp_path):
    """A copy of the three packages, without what Python compiled."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def test_program_names_what_this_process_imports():
    found = program()
    assert {name: found[name] for name in PACKAGES} == folders_in(ROOT)
    assert found["code"] == code_in(folders_in(ROOT))
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["numpy"] == np.__version__


def test_code_does_not_depend_on_how_it_was_copied(copy):
    code = code_in(folders_in(ROOT))
    assert code_in(folders_in(copy)) == code
    training = copy / "study" / "training" / "train.py"
    training.write_bytes(training.read_bytes().replace(b"\n", b"\r\n"))
    training.chmod(0o600)
    (copy / "study" / "notes").mkdir()
    (copy / "study" / "notes" / "no_package.py").write_text("1 / 0")
    (copy / "study" / "configs" / "mine.yaml").write_text("name: mine")
    (copy / "study" / "training" / ".#train.py").symlink_to("somebody@somewhere")  # how Emacs says that it edits a file
    (copy / "study" / "__pycache__").mkdir()
    (copy / "study" / "__pycache__" / "train.cpython-311.pyc").write_bytes(b"anything")
    assert code_in(folders_in(copy)) == code


def change(copy):
    path = copy / "study" / "training" / "train.py"
    path.write_text(path.read_text(encoding="utf-8").replace("loss += nn", "loss += 10 * nn"), encoding="utf-8")


def rename(copy):
    (copy / "mpo_core" / "values.py").rename(copy / "mpo_core" / "valves.py")


def add(copy):
    (copy / "analysis" / "figures" / "more.py").touch()


def move(copy):
    (copy / "study" / "commands" / "plan.py").rename(copy / "study" / "ledger" / "plan.py")


@pytest.mark.parametrize("alter", [change, rename, add, move])
def test_code_changes_with_any_file_of_a_package(copy, alter):
    before = code_in(folders_in(copy))
    alter(copy)
    assert code_in(folders_in(copy)) != before


def test_folder_without_code_has_no_fingerprint(tmp_path):
    for name in PACKAGES:
        (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match="is not the folder of package"):
        code_in(folders_in(tmp_path))


@pytest.mark.service
def test_code_of_a_wheel_is_that_of_its_checkout(copy, tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    assert code_in(folders_in(tmp_path / "installed")) == code_in(folders_in(ROOT))


# The folder that Ray has for itself -----------------------------------------------------------------------------------


@pytest.fixture
def place(monkeypatch):
    """A folder whose path is short enough for Ray, first among the places that are tried."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def test_private_folder_is_its_users_alone_and_goes_with_the_run(tmp_path, place):
    with private_folder(tmp_path) as folder:
        assert folder.parent == place
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "secret").write_text("a password")
    assert list(place.iterdir()) == []


def test_private_folder_takes_away_what_a_killed_run_of_the_study_left(tmp_path, place):
    own, other = tmp_path / "own", tmp_path / "other"
    names = []
    for study in (own, other):
        with private_folder(study) as folder:
            names.append(folder.name)
    left, of_other = place / names[0], place / names[1]
    for path in (left, of_other):
        path.mkdir()
        (path / "experiment_state.json").touch()
    link = place / f"{names[0][:10]}link"
    link.symlink_to(of_other)
    remove_leftovers(own)
    assert sorted(place.iterdir()) == sorted([of_other, link])
    assert (of_other / "experiment_state.json").exists()


@pytest.mark.parametrize("kind", ["too_long", "missing", "a_file"])
def test_private_folder_is_elsewhere_where_the_first_place_does_not_suit(tmp_path, monkeypatch, kind):
    asked = tmp_path / ("x" * 60)
    if kind == "too_long":
        asked.mkdir()
    elif kind == "a_file":
        asked = Path(tempfile.mkstemp(dir="/tmp")[1])
    monkeypatch.setenv("RAY_TMPDIR", str(asked))
    monkeypatch.setenv("TMPDIR", str(asked))
    with private_folder(tmp_path) as folder:
        assert folder.parent == Path("/tmp")
        assert len(os.fsencode(folder)) < 40
    if kind == "a_file":
        asked.unlink()
