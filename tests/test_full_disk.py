"""Disks that are full or read-only, real ones: a study stops with a line, loses nothing, and goes on later."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from study_fixtures import DENSE, ENVIRONMENT, MPO, TUNED, cli, results_at, run_at, substance, write_study

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
OPTIONS = ("run", "tiny.yaml", "--dir", "kept", "--executor", "inline", "--tracking", "off")


@pytest.fixture
def work(tmp_path):
    """A folder with a study's file; of its arms, the dense one alone writes weights, for the one after it."""
    write_study(tmp_path, arms=[MPO, DENSE, TUNED])
    (tmp_path / "kept" / "storage").mkdir(parents=True)
    return tmp_path


def run_with(work, *mounts, options=OPTIONS, after="true"):
    """Exit code, standard output and standard error of `mpo-study`, in a mount namespace that ends with it."""
    command = shlex.join([sys.executable, "-m", "study", *options])
    script = " && ".join([*mounts, f"{{ {command}; code=$?; {after}; exit $code; }}"])
    alone = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    ended = subprocess.run(
        [*alone, "sh", "-c", script],
        cwd=work,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "mount:" not in ended.stderr
    return ended.returncode, ended.stdout, ended.stderr


def of_size(size, folder):
    return f"mount -t tmpfs -o size={size} tmpfs {folder}"


def read_only(folder):
    return f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}"


def check_goes_on(work, done, folder="kept"):
    """The same command ends the study, and trains nothing again that was done."""
    code, out, err = cli(*OPTIONS[:3], folder, *OPTIONS[4:], cwd=work)
    assert code == 0, out + err
    results = results_at(work / folder)
    assert results | done == results
    run_at(work / "tiny.yaml", work / "undisturbed")
    assert substance(work / folder) == substance(work / "undisturbed")


def test_storage_that_is_full_stops_the_study(work):
    code, out, err = run_with(work, of_size("8k", "kept/storage"))
    assert (code, err) == (1, "")
    assert "stopped early with 4 runs missing: [Errno 28] No space left on device; fix this" in out
    done = results_at(work / "kept")
    assert sorted(done) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(result.state == "complete" for result in done.values())
    check_goes_on(work, done)


def test_storage_that_is_read_only_stops_the_study(work):
    code, out, err = run_with(work, read_only("kept/storage"))
    assert (code, out) == (2, "")
    assert err == f"mpo-study: --storage {work}/kept/storage: cannot write there: Read-only file system\n"
    run_at(work / "tiny.yaml", work / "another", storage_url=str(work / "kept" / "storage"))  # the corpus is there now
    code, out, err = run_with(work, read_only("kept/storage"))
    assert (code, err) == (1, "")
    assert "stopped early with 4 runs missing: [Errno 30] Read-only file system" in out
    done = results_at(work / "kept")
    assert len(done) == 4
    check_goes_on(work, done)


def test_study_folder_that_is_full_stops_the_study(work):
    """The ledger grows with each result; what it took before its disk was full is there."""
    write_study(work, arms=[MPO, DENSE, TUNED], seeds=8)
    options = (*OPTIONS, "--storage", str(work / "elsewhere"))
    code, out, err = run_with(work, of_size("180k", "kept"), options=options, after="cp -a kept saved")
    assert (code, err) == (1, "")
    assert "the ledger cannot be written: (sqlite3.OperationalError) database or disk is full; fix this" in out
    done = results_at(work / "saved")
    assert 0 < len(done) < 32
    assert f"{len(done)} runs complete" in out
    check_goes_on(work, done, "saved")


@pytest.mark.parametrize("size", ["1k", "8k", "40k", "120k"])
def test_study_folder_that_is_full_from_the_start_is_one_line(work, size):
    fill = "(head --bytes=1M /dev/zero > kept/filler; true)" if size == "1k" else "true"
    options = (*OPTIONS, "--storage", str(work / "elsewhere"))
    code, out, err = run_with(work, of_size(size, "kept"), fill, options=options)
    assert (code, out) == (2, "")
    [line] = [line for line in err.splitlines() if not line.startswith("head: ")]
    assert "No space left on device" in line or "disk is full" in line or "disk I/O error" in line


def test_study_folder_that_is_read_only_is_one_line(work):
    run_at(work / "tiny.yaml", work / "kept")
    done = results_at(work / "kept")
    code, out, err = run_with(work, read_only("kept"))
    assert (code, out, err) == (2, "", "mpo-study: --dir kept: cannot write there: Read-only file system\n")
    assert results_at(work / "kept") == done
