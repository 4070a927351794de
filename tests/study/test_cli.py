from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import sqlite3
import urllib.request
from pathlib import Path

import pytest
from study_fixtures import (
    DENSE,
    MPO,
    SEARCHED,
    cli,
    contents,
    mlflow_template,  # noqa: F401 (a fixture)
    nothing_left_running,  # noqa: F401 (a fixture)
    results_at,
    run_at,
    start_cli,
    substance,
    write_search,
    write_study,
)

INLINE = ("--executor", "inline", "--tracking", "off")


# What is shown --------------------------------------------------------------------------------------------------------


def test_cli_plans_runs_and_shows_a_study(tmp_path):
    write_study(tmp_path)
    code, out, err = cli("plan", "tiny.yaml", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert re.search(r"dense +d_model=8 +0\.01 +6 +[\d,]+ +100\.0%", out)
    assert re.search(r"tuned +χ=2 balanced, from dense \(tt_svd\) +0\.01 +4 ", out)
    assert "8 runs listed" in out
    assert "at 0 to" not in " ".join(out.split())  # GFLOP/s
    assert not (tmp_path / "results").exists()

    code, out, err = cli("run", "tiny.yaml", "--executor", "inline", "--tracking", "off", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == [
        "tiny: 4 trials, 8 runs complete",
        "tracking is off; to write the runs to MLflow: mpo-study sync results/tiny",
    ]

    code, status, err = cli("status", "results/tiny", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert status.splitlines()[-1] == "complete; to write its runs to MLflow: mpo-study sync results/tiny"
    assert len(re.findall(r"^ [0-3] ", status, flags=re.MULTILINE)) == 4
    assert max(map(len, status.splitlines())) <= 120


def test_cli_plan_counts_what_a_sampler_will_choose(tmp_path, command):
    code, out, _ = command("plan", write_search(tmp_path, trials=5))
    assert code == 0
    assert "and 5 searched trials, chosen by sampler random" in out
    assert re.search(r"found +least drawn: χ=1 .* searched ", out)
    assert "10 searched" in out
    assert "note: arm found will not be compared with dense: chosen among 5 trials, and not 1" in out
    code, out, _ = command("plan", write_search(tmp_path, trials=3, arms=[SEARCHED]))
    assert code == 0
    assert "and 3 searched trials, chosen by sampler random" in out


def test_cli_status_shows_what_failed_and_what_repeats(tmp_path, command):
    wild = {"name": "wild", "family": "dense", "learning_rate": 1e30}
    run_at(write_study(tmp_path, seeds=1, arms=[DENSE, wild, MPO | {"chi": [500, 1000]}]), tmp_path / "study")
    code, out, _ = command("status", tmp_path / "study")
    assert code == 0
    assert re.search(r"^ 1 +wild .* 0 +1 +0 +–", out, flags=re.MULTILINE)
    assert "repeats" in out
    assert out.splitlines()[-1].startswith("complete; ")


def test_cli_run_says_where_it_stopped_and_exits_1(tmp_path, command):
    file, folder = write_study(tmp_path, arms=[DENSE, MPO]), tmp_path / "study"
    run_at(file, folder)  # no trial of it needs weights or leaves checkpoints
    with sqlite3.connect(folder / "ledger.db") as connection:
        connection.execute("DELETE FROM mpo_result WHERE trial = 2")
    connection.close()
    own = folder / "storage" / json.loads((folder / "study.json").read_text())["uuid"]
    own.write_text("a file where checkpoints and weights were")
    code, out, err = command("run", file, "--dir", folder, *INLINE)
    assert (code, err) == (1, "")
    assert re.search(r"stopped early with 2 runs missing: .*Not a\sdirectory", out, flags=re.DOTALL)

    own.unlink()
    code, out, _ = command("run", file, "--dir", folder, *INLINE)
    assert code == 0
    assert "tiny: 3 trials, 6 runs complete" in out


def test_cli_run_exits_1_where_every_run_failed(tmp_path, command):
    wild = {"name": "wild", "family": "dense", "learning_rate": 1e30}
    file = write_study(tmp_path, seeds=1, arms=[wild])
    code, out, _ = command("run", file, "--dir", tmp_path / "study", *INLINE)
    assert code == 1
    assert "tiny: 1 trials, 0 runs complete, 1 failed" in out
    code, out, _ = command("run", file, "--dir", tmp_path / "study", *INLINE, "--retry-failed")
    assert code == 1
    assert "0 failed runs will be trained again" in out


def test_cli_says_what_will_not_be_compared_before_the_first_run_alone(tmp_path, command):
    file, folder = write_search(tmp_path, trials=2), tmp_path / "study"
    for expected in (True, False):
        code, out, err = command("run", file, "--dir", folder, *INLINE)
        assert (code, err) == (0, "")
        assert out.startswith("note: arm found will not be compared with dense: ") == expected
        assert ("no difference will be tested: that takes 3 seeds" in out) == expected


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "nothere.yaml"], "nothere.yaml: cannot read the study file: No such file or directory"),
        (
            ["run", "tiny.yaml", "--set", "protocol.stepz=3"],
            "stepz: unknown key (did you mean steps?); allowed: steps, ",
        ),
        (["run", "tiny.yaml", "--set", "seeds"], "--set seeds: must have the form key=value"),
        (["run", "tiny.yaml", "--storage", "foo://x", *INLINE], "--storage foo://x: Protocol not known: foo"),
        (["run", "tiny.yaml", "--storage", "tiny.yaml", *INLINE], "tiny.yaml: cannot write there: Not a directory"),
        (["run", "tiny.yaml", "--dir", "tiny.yaml/x", *INLINE], "--dir tiny.yaml/x: cannot create the folder"),
        (["run", "tiny.yaml", "--address", "127.0.0.1:1", "--tracking", "off"], "--address 127.0.0.1:1: cannot"),
        (
            ["run", "tiny.yaml", "--address", "ray://127.0.0.1:10001", "--tracking", "off"],
            "the Ray client cannot run a study",
        ),
        (["run", "tiny.yaml", "--dir", "50%", *INLINE], "--dir 50%: a study's folder may not have % in its path"),
        (["run", "tiny.yaml", "--storage", "a::b", *INLINE], "--storage a::b: it may not contain ::"),
        (
            ["run", "tiny.yaml", "--storage", "ftp://me:secret@127.0.0.1:1/x", *INLINE],
            "--storage ftp://me:***@127.0.0.1:1/x: [Errno 111] Connection refused",
        ),
        (["run", "tiny.yaml", "--storage", "circle", *INLINE], "circle: cannot write there: Too many levels of"),
        (["run", "tiny.yaml", "--dir", "circle", *INLINE], "--dir circle: cannot create the folder: File exists"),
        (["plan", "tiny.yaml", "--set", "corpus.path=circle"], "circle: cannot read the corpus: Too many levels of"),
        (["status", "circle"], "circle: no study here"),
        (["run", "tiny.yaml", "--tracking", "mlruns"], "--tracking mlruns: "),
        (["plan", "tiny.yaml", "--set", "model.context=5000"], "the corpus is too short"),
        (["status", "nowhere"], "nowhere: no study here"),
        (["ui", "nowhere"], "nowhere: no study here"),
        (["sync", "nowhere"], "nowhere: no study here"),
        (["sync", "done", "--tracking", "off"], "--tracking off: sync writes to MLflow"),
        (["ui", "done"], "done: no runs in MLflow yet; to write them: mpo-study sync done"),
    ],
)
def test_cli_says_a_users_error_in_one_line(tmp_path, monkeypatch, command, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    file = write_study(tmp_path, seeds=3, arms=[DENSE, MPO])  # all of it is compared, so that there is no note
    if "done" in arguments:
        run_at(file, tmp_path / "done", "seeds=1")
    code, out, err = command(*arguments)
    assert code == 2
    assert named in err
    assert err.startswith("mpo-study: ")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "tiny.yaml", "--executor", "slow"], ["--executor", "'ray'", "'inline'"]),
        (["ui", "done", "--port", "99999"], ["--port", "65535"]),
        (["run"], ["Missing argument", "FILE"]),
        (["run", "tiny.yaml", "--fast"], ["--fast"]),
        (["walk"], ["walk"]),
        (["statsu", "done"], ["statsu", "Did you mean", "status"]),
        (["plan", "tiny.yaml", "--jsn"], ["--jsn", "--json"]),
    ],
)
def test_cli_says_what_a_wrong_option_may_be(command, arguments, named):
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    assert all(words in err for words in named)
    assert "Traceback" not in err


def test_cli_prints_no_traceback_where_a_shell_starts_it(tmp_path):
    code, out, err = cli("run", "nothere.yaml", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err == "mpo-study: nothere.yaml: cannot read the study file: No such file or directory\n"


# Signals and locks ----------------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_cli_ctrl_c_stops_a_study_that_goes_on_later(tmp_path):
    file = write_study(tmp_path, protocol={"steps": 300, "eval_every": 20}, execution={"checkpoint_seconds": 0.1})
    first = start_cli("run", file, "--dir", "kept", *INLINE, cwd=tmp_path)
    assert any(line.startswith("3/8") for line in first.stdout)  # it reads no further

    first.send_signal(signal.SIGSTOP)  # or it might be over before the others have begun
    code, out, err = cli("run", file, "--dir", "kept", *INLINE, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"mpo-study: kept: another driver runs this study: process {first.pid} on \S+\n", err)
    assert cli("status", "kept", cwd=tmp_path)[0] == 0

    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGCONT)
    out, err = first.communicate(timeout=300)
    assert first.returncode == 130
    assert "stopped; finished runs are kept. To continue, give the same command again" in out
    assert "Traceback" not in out + err
    n_done = len(results_at(tmp_path / "kept"))
    assert 3 <= n_done < 8

    code, out, _ = cli("run", file, "--dir", "kept", *INLINE, cwd=tmp_path)
    assert code == 0
    assert "4 trials, 8 runs complete" in out
    assert out.splitlines()[0].startswith(f"{n_done + 1}/8")
    run_at(file, tmp_path / "undisturbed")
    assert substance(tmp_path / "kept") == substance(tmp_path / "undisturbed")


# MLflow ---------------------------------------------------------------------------------------------------------------


@pytest.mark.service
def test_cli_sync_then_ui_serve_the_runs_on_this_machine_alone(tmp_path, mlflow_template):  # noqa: F811
    run_at(write_study(tmp_path, seeds=1, arms=[DENSE, MPO]), tmp_path / "kept")
    shutil.copy(mlflow_template, tmp_path / "kept" / "mlflow.db")
    code, out, err = cli("sync", "kept", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out == "MLflow has all 3 trials of tiny. To view them: mpo-study ui kept\n"
    before = contents(tmp_path / "kept" / "mlflow.db")
    assert len(before) == 1 + 3 + 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "text.txt", "tiny.yaml"]

    (tmp_path / "kept").rename(tmp_path / "moved")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_cli("ui", "moved", "--port", str(port), cwd=tmp_path)
    try:
        page = f"http://127.0.0.1:{port}/#/experiments/1/runs?workflowType=machine_learning"
        assert server.stdout.readline() == f"MLflow: {page}\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as answer:  # it is up by then
            assert answer.read() == b"OK"
        [(run_id, *_)] = next(runs for key, runs in before.items() if key.endswith("/summary"))
        file = f"http://127.0.0.1:{port}/get-artifact?path=study.yaml&run_uuid={run_id}"
        with urllib.request.urlopen(file, timeout=60) as answer:
            assert answer.read() == (tmp_path / "moved" / "study.yaml").read_bytes()
        assert _listeners(port) == {"0100007F"}
        code, _, err = cli("ui", "moved", "--port", str(port), cwd=tmp_path)
        assert code == 2
        assert err == f"mpo-study: --port {port}: cannot listen there: Address already in use; give another port\n"
    finally:
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=300)
    assert "Traceback" not in err
    assert _listeners(port) == set()
    assert contents(tmp_path / "moved" / "mlflow.db") == before


def _listeners(port):
    """Addresses, as the kernel writes them, at which anybody on this machine listens on the port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, its_port = local.split(":")
            if state == "0A" and int(its_port, 16) == port:
                found.add(address)
    return found
