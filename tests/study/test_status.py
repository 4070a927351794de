from __future__ import annotations

import io
import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from rich.console import Console
from study_fixtures import (
    DENSE,
    MPO,
    SEARCHED,
    cli,
    ledger_at,
    made_up,
    nothing_left_running,  # noqa: F401 (a fixture)
    printed_by_run,
    run_at,
    start_cli,
    write_search,
    write_study,
)

from study.commands.show import show_status
from study.commands.status import study_status
from study.ledger.directory import StudyDirectory
from study.ledger.environment import environment, what_changed
from study.ledger.growth import Growth

WILD = {"name": "wild", "family": "dense", "learning_rate": 1e30}


# Status ---------------------------------------------------------------------------------------------------------------


def test_status_of_a_study_that_is_over_says_what_failed_and_what_is_on_the_frontier(tmp_path, command):
    folder = tmp_path / "study"
    file = write_study(tmp_path, seeds=2, arms=[DENSE, WILD, MPO | {"chi": [1, 500, 1000]}])
    run_at(file, folder)
    assert "no frontier yet: no trial has 3 complete seeds and no failed seed" in command("status", folder)[1]
    assert json.loads(command("status", folder, "--json")[1])["frontier"] == []
    run_at(file, folder, growth=Growth(seeds=1))
    code, out, err = command("status", folder, "--json")
    assert (code, err) == (0, "")
    status = json.loads(out)
    assert [(t["number"], t["arm"], t["duplicate_of"], t["missing"]) for t in status["trials"]] == [
        (0, "dense", None, []),
        (1, "wild", None, []),
        (2, "mpo", None, []),
        (3, "mpo", None, []),
        (4, "mpo", 3, []),
    ]
    assert (status["n_complete"], status["n_failed"], status["n_missing"], status["n_unasked"]) == (9, 3, 0, 0)
    failure = status["failures"][0]
    assert (failure["trial"], failure["arm"], failure["seed"]) == (1, "wild", 0)
    assert failure["reason"].startswith("diverged: ")
    assert failure["step"] >= 1
    losses = {t["number"]: t["val_loss"] for t in status["trials"]}
    sizes = {t["number"]: t["n_params"] for t in status["trials"]}
    assert status["frontier"][0]["trial"] == 2  # the smallest
    for point in status["frontier"]:
        number = point["trial"]
        assert (point["n_params"], point["val_loss"], point["n_seeds"]) == (sizes[number], losses[number], 3)
        assert all(sizes[n] > sizes[number] or losses[n] >= losses[number] for n in (0, 2, 3))
    assert status["driver"] is None
    assert status["run_seconds_left"] == 0
    assert status["seconds_left"] is None

    code, out, _ = command("status", folder)
    assert code == 0
    assert re.search(r"^failed: trial 1 seed 0 \(step \d\): diverged: ", out, flags=re.MULTILINE)
    assert "--retry-failed" not in out  # what diverged would do so again
    starred = {int(row) for row in re.findall(r"^ (\d) .* \* *$", out, flags=re.MULTILINE)}
    assert starred == {point["trial"] for point in status["frontier"]}
    assert out.splitlines()[-1] == f"complete; to write its runs to MLflow: mpo-study sync {folder}"


def test_status_fits_a_terminal_of_80_columns(tmp_path):
    folder = StudyDirectory(tmp_path / "study")
    arms = [DENSE, WILD, {"name": "small-by-rank", "family": "low_rank", "as_chi": [2, 3]}, MPO | {"chi": [1, 500]}]
    run_at(write_study(tmp_path, seeds=3, arms=arms), folder.path)
    screen = io.StringIO()
    show_status(Console(file=screen, width=80, force_terminal=True, color_system=None), study_status(folder), folder)
    lines = screen.getvalue().splitlines()
    commands = [line for line in lines if "mpo-study" in line]
    assert [line.strip() for line in commands] == [f"mpo-study sync {folder.path}"]
    assert all(len(line) <= 80 for line in lines if line not in commands)
    assert [line.split()[0] for line in lines if line[1:2].isdigit()] == list("012345")
    assert "mean loss" in " ".join(lines)


@pytest.mark.parametrize(
    ("arm", "failure", "search", "why", "what_next"),
    [
        (DENSE, "lost its process", {}, "all 2 runs failed", "fix the cause, then give the command above"),
        (WILD, None, {}, "all 2 runs diverged", "lower the learning rates"),
        (
            SEARCHED,
            None,
            {"sampler": "random", "trials": 2, "max_params": 0.001},
            "every trial was skipped",
            "widen the limits",
        ),
    ],
)
def test_run_and_status_say_that_nothing_succeeded(tmp_path, command, arm, failure, search, why, what_next):
    file, folder = write_study(tmp_path, seeds=2, arms=[arm], search=search), tmp_path / "study"
    if failure is not None:
        ledger = ledger_at(file, folder)
        ledger.ask()
        ledger.record(*(made_up(0, seed, failure=failure) for seed in range(2)))
        StudyDirectory(folder).write(ledger.config, ledger.uuid, None, StudyDirectory(folder).storage_url())
        ledger.close()
    _, out, err = command("run", file, "--dir", folder, "--executor", "inline", "--tracking", "off")
    assert err == ""
    assert out.splitlines()[-1].startswith("nothing succeeded: ")
    assert f"mpo-study status {folder}" in out.splitlines()[-1]
    code, out, _ = command("status", folder)
    assert code == 0
    assert why in out.splitlines()[-1]
    assert what_next in out.splitlines()[-1]
    assert ("--retry-failed" in out) == (failure is not None)
    assert "complete;" not in out


def test_status_tells_the_trials_of_a_grid_of_rates_apart(tmp_path, command):
    rates = {"learning_rate": [0.01, 0.02], "embedding_learning_rate": [0.01, 0.3]}
    run_at(write_study(tmp_path, seeds=1, arms=[DENSE | rates]), tmp_path / "kept")
    code, out, _ = command("status", tmp_path / "kept")
    rows = re.findall(r"^ *\d +dense .*?embeddings ([\d.]+) +([\d.]+) +[\d,]+ +1 +0 +0 ", out, flags=re.MULTILINE)
    assert code == 0
    assert sorted(rows) == [("0.01", "0.01"), ("0.01", "0.02"), ("0.3", "0.01"), ("0.3", "0.02")]


@pytest.mark.parametrize("words", [("status",), ("run", "tiny.yaml", "--dir"), ("sync",)])
def test_ledger_whose_trials_are_gone_is_said_to_be_damaged(tmp_path, command, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_at(write_study(tmp_path, seeds=1, arms=[DENSE]), tmp_path / "kept")
    with closing(sqlite3.connect(tmp_path / "kept" / "ledger.db")) as ledger, ledger:
        ledger.execute("DELETE FROM trial_user_attributes")
    code, _, err = command(*words, "kept")
    assert code == 2
    assert err.startswith(
        "mpo-study: the ledger is damaged: it has results of trial 0, but the trial is missing; to restore the copy of "
    )
    assert len(err.splitlines()) == 1


def test_status_in_the_middle_of_a_search_says_what_is_left_and_how_to_go_on(tmp_path, command):
    file, folder = write_search(tmp_path, trials=3), tmp_path / "study"
    ledger = ledger_at(file, folder)
    StudyDirectory(folder).write(ledger.config, ledger.uuid, None, "")
    ledger.ask()
    ledger.ask()
    ledger.record(made_up(0, 0))
    ledger.record(made_up(1, 1, failure="its worker died 3 times without progress: killed"))
    ledger.record_growth("refine --seeds +1", more_seeds={0: [5]})
    ledger.close()
    status = study_status(StudyDirectory(folder))
    assert [(row.complete, row.failed, row.missing) for row in status.trials] == [([0], [], [1, 5]), ([], [1], [0])]
    assert (status.n_complete, status.n_failed, status.n_missing, status.n_unasked) == (1, 1, 3 + 2 * 2, 2)
    flops = [row.trial.shape.flops for row in status.trials]
    # made_up runs take a second each
    expected = (2 * flops[0] + flops[1] + 4 * sum(flops) / 2) / flops[0]
    assert status.run_seconds_left == pytest.approx(expected)
    code, out, _ = command("status", folder)
    again = f"mpo-study run {folder}/study.yaml --dir {folder}"
    assert code == 0
    assert "failed: trial 1 seed 1: its worker died 3 times without progress: killed" in out
    assert f"to train failed runs again, except diverged ones: {again} --retry-failed" in out
    assert "and 2 trials that have not begun" in out
    last = out.splitlines()[-1]
    assert last.startswith("2 runs done, 7 missing, ")
    assert last.endswith(f"; no driver is running. To continue: {again}")


@pytest.mark.fault
def test_status_of_a_running_study_names_its_driver_and_the_time_left(tmp_path):
    file = write_study(tmp_path, protocol={"steps": 3000, "eval_every": 1000}, arms=[DENSE, MPO])
    driver = start_cli("run", file, "--dir", "kept", "--executor", "inline", "--tracking", "off", cwd=tmp_path)
    assert any(line.startswith("1/6") for line in driver.stdout)  # it reads no further
    code, out, err = cli("status", "kept", "--json", cwd=tmp_path)
    assert (code, err) == (0, "")
    status = json.loads(out)
    assert status["driver"]["pid"] == driver.pid
    assert status["seconds_left"] > 0
    driver.kill()
    driver.communicate()
    code, out, _ = cli("status", "kept", "--json", cwd=tmp_path)
    assert json.loads(out)["driver"] is None  # although the killed one has left its name behind
    assert (tmp_path / "kept" / "driver.json").exists()


# Plan -----------------------------------------------------------------------------------------------------------------


def test_plan_for_machines_says_what_the_table_says(tmp_path, command):
    code, out, err = command("plan", write_search(tmp_path, trials=5), "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert (plan["name"], plan["n_seeds"], plan["n_trials_searched"], plan["n_runs_listed"]) == (
        "search-random",
        2,
        5,
        2,
    )
    [trial] = plan["trials"]
    assert (trial["arm"], trial["n_params"], trial["spec"]["protocol"]["steps"]) == (
        "dense",
        trial["n_params_dense"],
        6,
    )
    assert plan["run_seconds_listed"] == pytest.approx(2 * trial["seconds"])
    [search] = plan["searches"]
    assert plan["run_seconds_searched"] == pytest.approx(2 * 5 * search["seconds"])
    assert plan["run_seconds"] == pytest.approx(plan["run_seconds_listed"] + plan["run_seconds_searched"])
    assert 0 < plan["seconds"] <= plan["run_seconds"]
    assert search["least"]["n_params"] < search["median"]["n_params"] <= search["largest"]["n_params"]
    assert any("arm found will not be compared with dense" in line for line in plan["not_compared"])


# What a study runs on -------------------------------------------------------------------------------------------------


def test_what_changed_names_python_torch_program_and_commit():
    now = environment()
    assert what_changed(now, now) == []
    before = now | {
        "python": "3.10.1",
        "packages": now["packages"] | {"torch": "2.0", "mpo-study": "0.0.1", "ray": "1.0"},
        "git_commit": "0" * 40,
        "cpus": 999,
    }
    words = what_changed(before, now | {"git_commit": "f" * 40})
    assert words == [
        f"python was 3.10.1, is {now['python']}",
        f"torch was 2.0, is {now['packages']['torch']}",
        f"mpo-study was 0.0.1, is {now['packages']['mpo-study']}",
        f"the git commit was {'0' * 12}, is {'f' * 12}",
    ]
    assert what_changed({}, now) == []
    assert what_changed(before, now | {"git_commit": None})[3:] == []


def test_run_warns_in_one_line_where_it_ran_on_something_else_before(tmp_path, monkeypatch):
    file, folder = write_search(tmp_path, trials=1, seeds=1), tmp_path / "study"
    real = environment()
    old = real | {"packages": real["packages"] | {"torch": "2.0"}}
    monkeypatch.setattr("study.commands.run.environment", lambda: old)
    _, printed = printed_by_run(file, folder, tracking="off")
    assert "warning" not in printed
    monkeypatch.setattr("study.commands.run.environment", lambda: real)
    for n_warnings in (1, 0):  # once for each change
        _, printed = printed_by_run(file, folder, tracking="off", growth=Growth(trials=1))
        lines = [
            line for line in printed.splitlines() if line.startswith("warning: since the last run of this study, ")
        ]
        assert len(lines) == n_warnings
        assert all(
            f"torch was 2.0, is {real['packages']['torch']}; this may change the results" in line for line in lines
        )
    ledger = ledger_at(file, folder)
    assert ledger.environments[0] == old
    assert ledger.environments[-1] == real


def test_status_needs_neither_torch_nor_the_kinds_of_layer_of_the_study(tmp_path):
    run_at(write_study(tmp_path, arms=[DENSE, {"name": "low", "family": "low_rank", "as_chi": 2}]), tmp_path / "study")
    text = (tmp_path / "study" / "study.yaml").read_text(encoding="utf-8").replace("low_rank", "of_another_package")
    (tmp_path / "study" / "study.yaml").write_text(text, encoding="utf-8")
    script = "import sys; sys.argv[1:] = ['status', 'study']; from study.commands.cli import main\n"
    script += "try: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.split()[-1]) == (0, "False"), ended.stderr


def test_a_study_of_another_schema_version_is_one_line(tmp_path, command):
    run_at(write_study(tmp_path), tmp_path / "study")
    manifest = tmp_path / "study" / "study.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    code, _, err = command("status", str(tmp_path / "study"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "schema version 1, but this mpo-study reads 2" in err
