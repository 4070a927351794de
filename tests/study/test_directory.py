from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from study_fixtures import ledger_at, run_at, write_study

from analysis.runs.load import resolve_study
from study.errors import StudyError
from study.ledger.directory import DEFAULT_TRACKING_URI, StudyDirectory
from study.spec.study_file import load_config


@pytest.fixture
def directory(tmp_path):
    return StudyDirectory(tmp_path / "study")


def test_locked_makes_the_folder_and_names_its_holder(directory):
    with directory.locked():
        assert json.loads((directory.path / "driver.json").read_text())["pid"] == os.getpid()
    assert not (directory.path / "driver.json").exists()


def test_locked_refuses_a_second_driver_and_names_the_first(directory):
    with directory.locked():
        second = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from study.ledger.directory import StudyDirectory\n"
                "with StudyDirectory(sys.argv[1]).locked(): pass",
                str(directory.path),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    assert second.returncode == 1
    assert f"another driver runs this study: process {os.getpid()} on" in second.stderr


def test_locked_is_free_after_its_holder_failed(directory):
    with pytest.raises(ZeroDivisionError), directory.locked():
        1 / 0  # noqa: B018
    with directory.locked():
        assert directory.path.is_dir()


def test_locked_leaves_nothing_if_it_is_refused_before_a_study_is_begun(directory):
    with pytest.raises(StudyError, match="refused"), directory.locked():
        raise StudyError("refused")
    assert not directory.path.exists()
    directory.path.mkdir()
    (directory.path / "mine.txt").touch()
    with pytest.raises(StudyError, match="refused"), directory.locked():
        raise StudyError("refused")
    assert [path.name for path in directory.path.iterdir()] == ["mine.txt"]
    directory.ledger_file.touch()
    with pytest.raises(StudyError, match="refused"), directory.locked():
        raise StudyError("refused")
    assert (directory.path / "driver.lock").exists()


def test_locked_ignores_what_a_dead_driver_left(directory):
    directory.path.mkdir()
    (directory.path / "driver.lock").touch()
    (directory.path / "driver.json").write_text('{"pid": 1, "ho')
    with directory.locked():
        assert json.loads((directory.path / "driver.json").read_text())["pid"] == os.getpid()


def test_locked_refuses_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    below = StudyDirectory(tmp_path / "file" / "x")
    with pytest.raises(StudyError, match=r"--dir .*cannot create the folder"), below.locked():
        pass


def test_load_config_gives_back_the_study_that_ran(tmp_path, directory):
    file = write_study(tmp_path)
    run_at(file, directory.path, "protocol.steps=4", "seeds=1")
    assert directory.load_config() == load_config(file, ["protocol.steps=4", "seeds=1"])


def test_load_config_refuses_a_folder_without_a_study(directory):
    with pytest.raises(StudyError, match="no study here"):
        directory.load_config()


def test_load_config_refuses_a_folder_without_its_ledger(tmp_path, directory):
    file = write_study(tmp_path)
    ledger = ledger_at(file, directory.path)
    directory.write(load_config(file), ledger.uuid, None, directory.storage_url())
    ledger.close()
    (directory.path / "ledger.db").unlink()
    with pytest.raises(StudyError, match="ledger is missing"):
        directory.load_config()
    assert not (directory.path / "ledger.db").exists()


def test_check_is_for_refuses_another_study(tmp_path, directory):
    config = load_config(write_study(tmp_path))
    directory.check_is_for(config)
    directory.path.mkdir()
    directory.write(config, "uuid", None, directory.storage_url())
    directory.check_is_for(config)
    with pytest.raises(StudyError, match="is the folder of study tiny; give other another --dir"):
        directory.check_is_for(config.model_copy(update={"name": "other"}))


def test_manifest_is_what_the_analysis_reads(tmp_path, directory):
    config = load_config(write_study(tmp_path))
    directory.path.mkdir()
    directory.write(config, "some-uuid", DEFAULT_TRACKING_URI, directory.storage_url())
    (directory.path / "mlflow.db").touch()
    moved = tmp_path / "moved"
    shutil.move(directory.path, moved)
    address = resolve_study(moved)
    assert address.tracking_uri == StudyDirectory(moved).resolve_tracking_uri(DEFAULT_TRACKING_URI)
    assert (address.experiment, address.uuid) == ("tiny", "some-uuid")


def test_storage_in_the_folder_moves_with_it(tmp_path, directory):
    config = load_config(write_study(tmp_path))
    directory.path.mkdir()
    assert directory.storage_url() == str(directory.path / "storage")
    directory.write(config, "uuid", None, directory.storage_url())
    shutil.move(directory.path, tmp_path / "moved")
    assert StudyDirectory(tmp_path / "moved").storage_url() == str(tmp_path / "moved" / "storage")


def test_storage_elsewhere_is_remembered(tmp_path, directory):
    config = load_config(write_study(tmp_path))
    directory.path.mkdir()
    directory.write(config, "uuid", None, "memory://large")
    assert directory.storage_url() == "memory://large"


@pytest.mark.parametrize(
    ("uri", "resolved"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{folder}/mlflow.db"),
        ("sqlite:////tmp/other.db", "sqlite:////tmp/other.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("postgresql://user@host/db", "postgresql://user@host/db"),
    ],
)
def test_resolve_tracking_uri_starts_from_the_folder(directory, uri, resolved):
    assert directory.resolve_tracking_uri(uri) == resolved.format(folder=directory.path)


@pytest.mark.parametrize("name", ["why?", "50%", "run#3"])
def test_directory_refuses_a_path_that_databases_read_otherwise(tmp_path, name):
    with pytest.raises(StudyError, match=r"a study's folder may not have . in its path"):
        StudyDirectory(tmp_path / name / "study")


def test_manifest_is_for_its_owner_alone(tmp_path, directory):
    directory.path.mkdir()
    directory.write(load_config(write_study(tmp_path)), "uuid", "postgresql://me:secret@host/db", "memory://x")
    assert (directory.path / "study.json").stat().st_mode & 0o077 == 0
