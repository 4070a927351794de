"""What Ray's workers run, how long they may be silent, and what Ray leaves behind."""

# ruff: noqa: F811 (fixtures are imported, and then the names of parameters)
from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from disturbance import (
    LONG,
    check_whole,
    descendants,
    kill,
    start,
    undisturbed,  # noqa: F401 (a fixture)
    wait_for_trainer,
    work,  # noqa: F401 (a fixture)
)
from study_fixtures import (
    DENSE,
    ENVIRONMENT,
    cli,
    mlflow_template,  # noqa: F401 (a fixture)
    nothing_left_running,  # noqa: F401 (a fixture)
    results_at,
    run_at,
    substance,
    write_study,
)

from analysis import run_schema as schema
from analysis.runs.load import load_study, resolve_study
from study.training.program import PACKAGES, this_program

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def installed(*arguments, cwd, **environment):
    """`mpo-study` as an installation has it: with `-P`, Python imports nothing from the working folder."""
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "study", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


def checkout(folder: Path, old: str = "", new: str = "") -> Path:
    """The three packages elsewhere, with a word of `study/training/train.py` replaced."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    training = folder / "study" / "training" / "train.py"
    text = training.read_text(encoding="utf-8")
    assert old in text
    training.write_text(text.replace(old, new), encoding="utf-8")
    return folder


def tenfold(folder: Path) -> Path:
    return checkout(folder, "loss += nn.functional", "loss += 10 * nn.functional")


# Which program --------------------------------------------------------------------------------------------------------


def other_checkout(folder: Path) -> None:
    tenfold(folder)


def modules_of_known_names(folder: Path) -> None:
    for name in ("analysis", "study", "run_schema", "torch", "numpy", "ray", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\nraise SystemExit(3)\n")


def empty_folders(folder: Path) -> None:
    for name in PACKAGES:
        (folder / name).mkdir()


@pytest.mark.parametrize("fill", [other_checkout, modules_of_known_names, empty_folders])
def test_workers_run_the_drivers_program_wherever_it_is_started(tmp_path, fill):
    file = write_study(tmp_path, arms=[DENSE], seeds=1)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    fill(cwd)
    for folder, executor in (("ray", "ray"), ("inline", "inline")):
        options = ("--dir", tmp_path / folder, "--executor", executor, "--tracking", "off")
        code, out, err = installed("run", file, *options, cwd=cwd)
        assert code == 0, out + err
    run_at(file, tmp_path / "here")
    assert substance(tmp_path / "ray") == substance(tmp_path / "inline") == substance(tmp_path / "here")
    [result] = results_at(tmp_path / "ray").values()
    assert result.ran_on[schema.PROGRAM] == this_program()["fingerprint"]
    assert not (cwd / "executed").exists()


def test_workers_run_the_drivers_program_where_it_is_not_the_installed_one(tmp_path):
    file = write_study(tmp_path, arms=[DENSE], seeds=1)
    other = tenfold(tmp_path / "other")
    code, out, err = cli("run", file, "--dir", tmp_path / "kept", "--tracking", "off", cwd=other)
    assert code == 0, out + err
    run_at(file, tmp_path / "here")
    [result], [own] = results_at(tmp_path / "kept").values(), results_at(tmp_path / "here").values()
    assert result.final["final/val_loss"] == pytest.approx(10 * own.final["final/val_loss"])
    assert result.ran_on[schema.PROGRAM] != own.ran_on[schema.PROGRAM]


def test_node_with_another_program_is_refused_in_one_line_naming_both_places(tmp_path):
    """The worker's machine has not the driver's folder, as another machine may have none, and another checkout."""
    file = write_study(tmp_path, arms=[DENSE])
    drivers, nodes = checkout(tmp_path / "drivers"), tenfold(tmp_path / "nodes")
    script = f"""
import contextlib, os, sys
if any("default_worker" in word for word in sys.orig_argv):
    sys.path.insert(0, {str(nodes)!r})
    with contextlib.suppress(OSError):
        os.rename({str(drivers / "study")!r}, {str(drivers / "away")!r})
"""
    (drivers / "sitecustomize.py").write_text(script)
    options = ("--dir", tmp_path / "kept", "--tracking", "off")
    code, out, err = installed("run", file, *options, cwd=tmp_path, PYTHONPATH=str(drivers))
    assert code == 1, out + err
    [line] = [line for line in out.splitlines() if "has another program" in line]
    assert str(nodes / "study") in line
    assert str(drivers / "study") in line
    assert "Traceback" not in out + err
    assert results_at(tmp_path / "kept") == {}


def test_study_grown_from_two_checkouts_says_so_as_it_grows_and_in_its_report(tmp_path):
    file, kept = write_study(tmp_path, arms=[DENSE], seeds=1), tmp_path / "kept"
    options = ("--dir", kept, "--executor", "inline")
    code, out, err = installed("run", file, *options, cwd=tmp_path)
    assert code == 0, out + err
    other = tenfold(tmp_path / "other")
    code, out, err = installed("run", file, *options, "--seeds", "+2", cwd=tmp_path, PYTHONPATH=str(other))
    assert code == 0, out + err
    [line] = [line for line in out.splitlines() if line.startswith("warning: since the last run of this study")]
    assert f"the fingerprint of this program was {this_program()['fingerprint']}, is " in line
    runs = load_study(resolve_study(kept))
    assert sorted(runs.programs.values()) == [1, 2]
    assert runs.n_of_several_programs == 1


# A worker that hangs --------------------------------------------------------------------------------------------------


def test_worker_that_hangs_is_on_record_and_its_unit_is_tried_again(work, undisturbed):
    driver = start(work, "--set", "execution.unit_timeout=15")
    hung = wait_for_trainer(driver)
    while not running(work):
        assert driver.poll() is None
    os.kill(hung, signal.SIGSTOP)
    out, err = driver.communicate()
    assert driver.returncode == 0, out + err
    assert "4 trials, 8 runs complete" in out
    assert "Traceback" not in out + err
    check_whole(work, undisturbed)
    assert not Path(f"/proc/{hung}").exists()
    assert not (work / "kept" / "reports.json").exists()


def running(work):
    if not (work / "kept" / "study.yaml").exists():
        return []
    code, out, err = cli("status", "kept", "--json", cwd=work)
    assert code == 0, err
    return json.loads(out)["running"]


# What Ray leaves behind -----------------------------------------------------------------------------------------------

SECRET = "a-secret-in-the-address-of-a-storage"


@pytest.fixture
def place(monkeypatch):
    """A short folder of this test alone, where Ray's private one comes to be."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        yield Path(folder)


def test_storage_url_is_in_no_file_of_ray_and_in_no_command_line_of_a_worker(tmp_path, place):
    write_study(tmp_path, **LONG | {"protocol": {"steps": 1_000_000, "eval_every": 100}})
    driver = start(tmp_path, "--tracking", "off", "--storage", tmp_path / SECRET)
    wait_for_trainer(driver)
    while not list((tmp_path / SECRET).glob("*/checkpoints/*/*.safetensors")):
        assert driver.poll() is None
    [private] = place.glob("mpo*")
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    files = [path for path in place.rglob("*") if path.is_file()]
    assert any(path.name.startswith("experiment_state") for path in files)
    assert any(path.name.startswith("gcs_server") for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    for pid in descendants(driver.pid):
        for kind in ("cmdline", "environ"):
            assert SECRET.encode() not in Path(f"/proc/{pid}/{kind}").read_bytes()
    kill([driver.pid, *descendants(driver.pid)])
    driver.communicate()
    assert private.exists()

    write_study(tmp_path, **LONG | {"protocol": {"steps": 1_000_000, "eval_every": 100}})
    driver = start(tmp_path, "--tracking", "off")
    wait_for_trainer(driver)
    assert not private.exists()
    driver.send_signal(signal.SIGINT)
    driver.communicate()
    assert driver.returncode == 130
    assert list(place.glob("mpo*")) == []


def test_study_runs_where_the_temporary_folder_is_too_long_for_sockets(tmp_path, monkeypatch):
    write_study(tmp_path, arms=[DENSE], seeds=1)
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    code, out, err = cli("run", "tiny.yaml", "--dir", "kept", "--tracking", "off", cwd=tmp_path)
    assert code == 0, out + err
    assert "1 runs complete" in out
