"""A study whose large things are in a real S3 server, and that outlives the machine of its driver."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import sqlite3
import time
from contextlib import closing

import pytest
from disturbance import wait_for_results
from services import S3_SECRET, _s3, bucket, everything_in, s3_server  # noqa: F401 (fixtures)
from study_fixtures import (
    DENSE,
    cli,
    contents,
    nothing_left_running,  # noqa: F401 (a fixture)
    printed_by_run,
    results_at,
    run_at,
    runs_in,
    start_cli,
    substance,
    write_study,
)
from tokenizer_folders import byte_pairs

from study.commands.exchange import export_study, import_study
from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.ledger.growth import Growth
from study.spec.cache import CACHE_VARIABLE
from study.training.checkpoints import Checkpoints, Damaged, unpack_tensors
from study.training.storage import Storage

pytestmark = [
    pytest.mark.service,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning"),
]

LONG = {"protocol": {"steps": 400, "eval_every": 40}, "execution": {"checkpoint_seconds": 0.1, "backup_seconds": 0.5}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the long study gives when nobody disturbs it, with its storage in a folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_at(write_study(folder, **LONG), folder / "kept")
    return substance(folder / "kept")


def wait_for_backup(url, path, n):
    """Wait until the ledger's newest copy has that many results; it is read at that path."""
    storage, deadline = Storage(url), time.monotonic() + 300
    while time.monotonic() < deadline:
        for key in storage.keys("backup/tiny/ledger")[-1:]:
            path.write_bytes(storage.read(key))
            with closing(sqlite3.connect(path)) as ledger:
                if ledger.execute("SELECT count(*) FROM mpo_result").fetchone()[0] >= n:
                    return
        time.sleep(0.1)
    raise AssertionError(f"no backup has {n} results")


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


# Objects --------------------------------------------------------------------------------------------------------------


def test_storage_keeps_objects_in_s3(bucket):  # noqa: F811
    storage, other = Storage(f"{bucket}/below"), Storage(f"{bucket}/below")
    assert storage.keys("a/b") == storage.keys_below("a") == []
    for key in ("a/b/one", "a/b/two", "a/three"):
        storage.write(key, key.encode())
    assert other.read("a/b/two") == b"a/b/two"
    assert other.keys("a/b") == ["a/b/one", "a/b/two"]
    assert other.keys_below("a") == ["a/b/one", "a/b/two", "a/three"]
    assert (other.exists("a/b/one"), other.exists("a/b"), other.exists("x")) == (True, False, False)
    storage.delete("a/b/one")
    storage.delete("a/b/one")
    assert not other.exists("a/b/one")  # what it listed before is not believed
    storage.delete_folder("a")
    storage.delete_folder("a")
    assert other.keys_below("a") == []
    with pytest.raises(FileNotFoundError):
        other.read("a/three")


def test_storage_that_does_not_answer_is_an_os_error_in_one_line(tmp_path, monkeypatch):
    with s3_server() as (server, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        storage = Storage("s3://bucket/folder")
        server.kill()
        server.wait()
        with pytest.raises(OSError, match=r"^s3://bucket/folder: Could not connect") as caught:
            storage.write("a", b"x")
        assert len(str(caught.value).splitlines()) == 1
        with pytest.raises(StudyError, match=r"--storage s3://bucket/folder: cannot write there: .*Could not connect"):
            run_at(write_study(tmp_path), tmp_path / "kept", storage_url="s3://bucket/folder")


def test_bucket_that_is_not_there_is_said(tmp_path, bucket):  # noqa: F811
    with pytest.raises(StudyError, match=r"--storage s3://another: cannot write there: .*bucket does not exist"):
        run_at(write_study(tmp_path), tmp_path / "kept", storage_url="s3://another")


# Whole studies --------------------------------------------------------------------------------------------------------


def test_study_with_s3_is_the_study_without(tmp_path, bucket):  # noqa: F811
    file = write_study(tmp_path, execution={"keep_weights": True})
    run_at(file, tmp_path / "kept", storage_url=f"{bucket}/studies")
    run_at(file, tmp_path / "local")
    assert substance(tmp_path / "kept") == substance(tmp_path / "local")
    storage = Storage(f"{bucket}/studies")
    for result in results_at(tmp_path / "kept").values():
        tensors, content = unpack_tensors(storage.read(result.weights))
        assert tensors
        assert content["seed"] == result.seed
    assert storage.keys_below(f"{StudyDirectory(tmp_path / 'kept').uuid()}/checkpoints") == []
    assert not (tmp_path / "kept" / "storage").exists()


def test_damaged_checkpoint_in_s3_is_said_and_an_older_one_used(tmp_path, bucket, monkeypatch):  # noqa: F811
    file = write_study(tmp_path, execution={"checkpoint_seconds": 0})

    class Stop(BaseException):
        pass

    save, n_saved = Checkpoints.save, []

    def save_and_stop(self, *args):
        save(self, *args)
        n_saved.append(1)
        if len(n_saved) == 4:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(Stop):
            run_at(file, tmp_path / "kept", storage_url=bucket)
    storage = Storage(bucket)
    [*_, newest] = storage.keys_below(f"{StudyDirectory(tmp_path / 'kept').uuid()}/checkpoints")
    storage.write(newest, storage.read(newest)[:-5])
    with pytest.raises(Damaged):
        unpack_tensors(storage.read(newest))
    _, printed = printed_by_run(file, tmp_path / "kept", tracking="off")
    [said] = [line for line in printed.splitlines() if "damaged checkpoint" in line]
    assert newest in said
    assert "continuing from the older one" in said
    run_at(file, tmp_path / "local")
    assert substance(tmp_path / "kept") == substance(tmp_path / "local")


def test_study_on_ray_with_s3_killed_and_resumed_ends_as_if_undisturbed(tmp_path, bucket, undisturbed):  # noqa: F811
    write_study(tmp_path, **LONG)
    command = ("run", "tiny.yaml", "--dir", "kept", "--storage", f"{bucket}/here")
    driver = start_cli(*command, cwd=tmp_path)
    wait_for_results(driver, 2)
    time.sleep(0.3)
    kill(driver)
    code, out, err = cli("run", "tiny.yaml", "--dir", "kept", cwd=tmp_path)  # the storage is remembered
    assert code == 0, out + err
    assert "4 trials, 8 runs complete" in out
    assert substance(tmp_path / "kept") == undisturbed
    assert S3_SECRET not in out + err
    assert S3_SECRET.encode() not in everything_in(tmp_path)
    keys = Storage(f"{bucket}/here").keys_below("")
    assert not [key for key in keys if "tune" in key or "checkpoints" in key]


def test_workers_of_ray_copy_the_tokens_from_s3(tmp_path, bucket, monkeypatch):  # noqa: F811
    write_study(tmp_path, arms=[DENSE], corpus={"tokenizer": "pairs"})
    byte_pairs(tmp_path / "pairs", (tmp_path / "text.txt").read_text(encoding="utf-8"))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    code, out, err = cli("run", "tiny.yaml", "--dir", "kept", "--storage", bucket, cwd=tmp_path)
    assert code == 0, out + err
    run_at(tmp_path / "tiny.yaml", tmp_path / "local")
    assert substance(tmp_path / "kept") == substance(tmp_path / "local")
    [key] = Storage(bucket).keys("corpus")
    copy = tmp_path / "cache" / key.removeprefix("corpus/")
    assert copy.read_bytes() == Storage(bucket).read(key)


# A new machine --------------------------------------------------------------------------------------------------------


def test_finished_study_is_brought_back_into_an_empty_directory(tmp_path, bucket):  # noqa: F811
    file = write_study(tmp_path, execution={"keep_weights": True})
    first = run_at(file, tmp_path / "kept", tracking=None, storage_url=bucket)
    before, runs = results_at(tmp_path / "kept"), contents(tmp_path / "kept" / "mlflow.db")
    files = everything_in(tmp_path / "kept" / "mlartifacts")
    shutil.rmtree(tmp_path / "kept")
    again, printed = printed_by_run(file, tmp_path / "kept", storage_url=bucket)
    assert printed.strip() == f"study tiny was restored from its backup in {bucket}"
    assert again == first
    assert results_at(tmp_path / "kept") == before  # with their times: nothing was trained
    assert contents(tmp_path / "kept" / "mlflow.db") == runs
    assert everything_in(tmp_path / "kept" / "mlartifacts") == files


def test_finished_study_is_brought_back_into_another_directory(tmp_path, bucket):  # noqa: F811
    """MLflow knows its artifacts by absolute paths, so its database is written again, from the ledger."""
    file = write_study(tmp_path)
    run_at(file, tmp_path / "kept", tracking=None, storage_url=bucket)
    before = results_at(tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept")
    run_at(file, tmp_path / "elsewhere", tracking=None, storage_url=bucket)
    assert results_at(tmp_path / "elsewhere") == before
    runs = runs_in(tmp_path / "elsewhere" / "mlflow.db")
    assert len(runs) == 1 + 4 + 8
    assert {len(same) for same in runs.values()} == {1}


@pytest.mark.fault
def test_study_outlives_its_head_node(tmp_path, bucket, undisturbed):  # noqa: F811
    """The driver, its Ray and its whole folder are lost, twice, in the middle of the study."""
    write_study(tmp_path, **LONG)
    command = ("run", "tiny.yaml", "--dir", "kept", "--storage", bucket)
    kept: dict = {}
    for n_more in (1, 2):
        driver = start_cli(*command, cwd=tmp_path)
        wait_for_results(driver, len(kept) + n_more)
        kept |= {key: result.ended for key, result in results_at(tmp_path / "kept").items()}
        wait_for_backup(bucket, tmp_path / "copy.db", len(kept))
        kill(driver)
        shutil.rmtree(tmp_path / "kept")
    code, out, err = cli(*command, cwd=tmp_path)
    assert code == 0, out + err
    assert "study tiny was restored from its backup" in out
    assert substance(tmp_path / "kept") == undisturbed
    ended = {key: result.ended for key, result in results_at(tmp_path / "kept").items()}
    assert kept.items() <= ended.items()  # what was copied was not trained again
    runs = runs_in(tmp_path / "kept" / "mlflow.db")
    assert len(runs) == 1 + 4 + 8
    assert {len(same) for same in runs.values()} == {1}


def test_damaged_copy_of_the_ledger_is_passed_over(tmp_path, bucket):  # noqa: F811
    file = write_study(tmp_path, seeds=1, arms=[DENSE], execution={"backup_seconds": 0})
    run_at(file, tmp_path / "kept", storage_url=bucket)
    storage = Storage(bucket)
    [older, newest] = storage.keys("backup/tiny/ledger")
    storage.write(newest, storage.read(newest)[:-1])
    shutil.rmtree(tmp_path / "kept")
    outcome, printed = printed_by_run(file, tmp_path / "kept", storage_url=bucket, tracking="off")
    assert outcome.n_complete == 1
    assert f"damaged backup {newest}: removed; the older one {older} is restored" in printed
    for key in storage.keys("backup/tiny/ledger"):
        storage.write(key, b"damaged")
    shutil.rmtree(tmp_path / "kept")
    with pytest.raises(StudyError, match=r"every copy of the study's ledger there is damaged \(backup/tiny/ledger/0"):
        run_at(file, tmp_path / "kept", storage_url=bucket)
    assert older not in storage.keys("backup/tiny/ledger")  # two are kept


def test_two_directories_cannot_both_own_a_backup(tmp_path, bucket):  # noqa: F811
    file = write_study(tmp_path, seeds=1, arms=[DENSE])
    run_at(file, tmp_path / "first", storage_url=bucket)
    run_at(file, tmp_path / "first")
    run_at(file, tmp_path / "second", storage_url=bucket)  # restored
    with pytest.raises(StudyError, match=r"another driver wrote a newer backup of study tiny than the one of .*first"):
        run_at(file, tmp_path / "first")
    assert run_at(file, tmp_path / "second").n_complete == 1


def test_import_is_refused_where_the_storage_has_the_studys_own_backup(tmp_path, bucket):  # noqa: F811
    file = write_study(tmp_path, seeds=1, arms=[DENSE])
    run_at(file, tmp_path / "first", storage_url=bucket)
    export_study(StudyDirectory(tmp_path / "first"), tmp_path / "study.xz", print)
    with pytest.raises(StudyError, match="has a backup of study tiny, so no import is needed: run the study with that"):
        import_study(tmp_path / "study.xz", StudyDirectory(tmp_path / "imported"), bucket)
    assert not (tmp_path / "imported").exists()


def test_growth_asked_for_again_goes_on_in_a_folder_that_is_brought_back(tmp_path, bucket):  # noqa: F811
    file = write_study(tmp_path, seeds=1, arms=[DENSE])
    run_at(file, tmp_path / "lost", storage_url=bucket)
    shutil.rmtree(tmp_path / "lost")
    assert run_at(file, tmp_path / "new", storage_url=bucket, growth=Growth(seeds=1)).n_complete == 2


def test_study_goes_on_while_its_backup_cannot_be_written(tmp_path, bucket, monkeypatch):  # noqa: F811
    file = write_study(tmp_path, execution={"backup_seconds": 0})
    write, broken = Storage.write, [True]

    def refuse(self, key, data):
        if key.startswith("backup/") and broken[0]:
            raise PermissionError("Access Denied")
        write(self, key, data)

    monkeypatch.setattr(Storage, "write", refuse)
    outcome, printed = printed_by_run(file, tmp_path / "kept", tracking="off", storage_url=bucket)
    assert dataclasses.replace(outcome, backup_trouble=None) == run_at(file, tmp_path / "local")
    assert outcome.backup_trouble == "Access Denied"
    assert printed.count("cannot back up the study's databases, will try again: Access Denied") == 1
    broken[0] = False
    assert run_at(file, tmp_path / "kept").backup_trouble is None
    before = results_at(tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept")
    run_at(file, tmp_path / "kept", storage_url=bucket)
    assert results_at(tmp_path / "kept") == before
