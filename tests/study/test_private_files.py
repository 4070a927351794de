"""What a study writes is for its user alone, and what it is told to write to is a place of its own."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from study_fixtures import DENSE, TUNED, cli, mlflow_template, run_at, write_study  # noqa: F401 (a fixture)

from study.commands.exchange import export_study, import_study
from study.errors import StudyError
from study.ledger.directory import StudyDirectory

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")
OTHERS = stat.S_IRWXG | stat.S_IRWXO


@pytest.fixture(autouse=True)
def _usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def open_to_others(folder):
    return [path for path in [folder, *folder.rglob("*")] if path.stat().st_mode & OTHERS]


def test_all_that_a_study_writes_is_for_its_user_alone(tmp_path, mlflow_template):  # noqa: F811
    file = write_study(tmp_path, seeds=1, arms=[DENSE, TUNED], execution={"keep_weights": True})
    run_at(file, tmp_path / "new" / "study", storage_url=str(tmp_path / "storage"))
    shutil.copy(mlflow_template, tmp_path / "new" / "study" / "mlflow.db")
    (tmp_path / "new" / "study" / "mlflow.db").chmod(0o600)
    run_at(file, tmp_path / "new" / "study", tracking="sqlite:///mlflow.db")
    export_study(StudyDirectory(tmp_path / "new" / "study"), tmp_path / "study.xz", print)
    import_study(tmp_path / "study.xz", StudyDirectory(tmp_path / "imported"))
    for folder in ("new/study", "storage", "imported"):
        assert open_to_others(tmp_path / folder) == []
        assert len(list((tmp_path / folder).rglob("*"))) > 3
    assert (tmp_path / "study.xz").stat().st_mode & OTHERS == 0
    assert (tmp_path / "new").stat().st_mode & OTHERS != 0  # a folder above it is nobody's secret
    assert os.umask(0o022) == 0o022


def test_study_in_a_folder_that_was_there_leaves_that_as_it_is(tmp_path):
    (tmp_path / "mine").mkdir(mode=0o755)
    run_at(write_study(tmp_path, seeds=1, arms=[DENSE]), tmp_path / "mine")
    assert open_to_others(tmp_path / "mine") == [tmp_path / "mine"]


def as_nobody(*command, cwd):
    """As another user, who may not read what is the first one's alone."""
    # As root first, where that user may not read this installation.
    script = (
        "import os, sys\nfrom study.commands.cli import main\nimport study.commands.exchange\n"
        "os.setgroups([])\nos.setegid(65534)\nos.seteuid(65534)\nsys.argv = ['mpo-study', *sys.argv[1:]]\nmain()"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, *command], cwd=cwd, capture_output=True, text=True, check=False, timeout=600
    )
    return process.returncode, process.stdout, process.stderr


@pytest.mark.fault
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("shut", [True, False], ids=["the folder is shut", "the files are"])
def test_command_of_another_user_is_one_line(tmp_path, shut):
    file, folder = write_study(tmp_path, seeds=1, arms=[DENSE]), tmp_path / "kept"
    if not shut:
        folder.mkdir(mode=0o755)
    run_at(file, folder)
    for parent in [tmp_path, *tmp_path.parents][:-2]:
        parent.chmod(parent.stat().st_mode | 0o055)
    for command in (
        ("status", folder),
        ("sync", folder),
        ("export", folder, "x.xz"),
        ("run", file, "--dir", folder),
    ):
        code, out, err = as_nobody(*map(str, command), cwd=tmp_path)
        assert (code, out) == (2, ""), err
        assert len(err.splitlines()) == 1, err
        assert "Permission denied" in err


@pytest.mark.parametrize(
    "place", ["/", "//", "/.", "{home}", "{home}/", "{above}", "", "{study}", "{study}/.", "memory://"]
)
def test_storage_that_is_no_folder_of_its_own_is_refused(tmp_path, monkeypatch, place):
    home, folder = tmp_path / "users" / "me", tmp_path / "study"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    given = place.format(home=home, above=home.parent, study=folder)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(StudyError, match=r"--storage .*: must be a separate folder") as error:
        StudyDirectory(folder).storage(given)
    assert "\n" not in str(error.value)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["{home}/mine", "{study}/storage", "/mnt/shared", "memory://large", "s3://bucket"])
def test_storage_that_is_a_folder_of_its_own_is_taken(tmp_path, monkeypatch, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "study"
    assert StudyDirectory(folder).storage(place.format(home=tmp_path, study=folder)).shown


@pytest.mark.fault
def test_cli_refuses_the_root_for_a_storage(tmp_path):
    write_study(tmp_path)
    before = set(Path("/").iterdir())
    code, out, err = cli("run", "tiny.yaml", "--dir", "kept", "--storage", "/", "--executor", "inline", cwd=tmp_path)
    assert code == 2
    assert all(line.startswith("note: ") for line in out.splitlines())
    assert err.startswith("mpo-study: --storage /: must be a separate folder")
    assert set(Path("/").iterdir()) == before
