"""A ledger that no longer holds what was written is noticed, and says the way back."""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
import subprocess
from contextlib import closing
from functools import partial

import pytest
from study_fixtures import DENSE, MPO, ledger_at, made_up, printed_by_run, run_at, sign_results, substance, write_study

from study.commands.status import study_status
from study.errors import StudyError
from study.ledger.copies import Copies, check_whole
from study.ledger.database import in_one_line, open_database
from study.ledger.directory import StudyDirectory
from study.ledger.growth import Growth
from study.ledger.snapshot import read_ledger

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
STOP_CONTENT = {
    "trial": 0, "rival": 1, "metric": "val_loss", "margin": 0.1, "seeds": [0], "own": [1.0], "rivals": [2.0],
    "after": [0, 0], "when": "now",
}  # fmt: skip


def execute(folder, command, *values):
    with closing(sqlite3.connect(folder / "ledger.db")) as connection, connection:
        return connection.execute(command, values).fetchall()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that was run and has grown, in the folder `study`."""
    work = tmp_path_factory.mktemp("whole")
    file = write_study(work, seeds=1, arms=[DENSE, MPO])
    run_at(file, work / "study")
    run_at(file, work / "study", growth=Growth(seeds=1))
    return work


@pytest.fixture
def study(whole, tmp_path):
    """Its ledger and copy alone, in a folder of a test's own."""
    folder = tmp_path / "study"
    folder.mkdir()
    for path in (whole / "study").iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def read(folder):
    return read_ledger(StudyDirectory(folder).ledger_url, "tiny")


def flip(folder, table, column):
    """Change one digit of a value, as a bad disk would: nothing else of the file is different."""
    [(row, value)] = execute(folder, f"SELECT rowid, {column} FROM {table} LIMIT 1")
    at = max(match.start() for match in re.finditer(r"\d", str(value)))
    other = f"{str(value)[:at]}{(int(str(value)[at]) + 5) % 10}{str(value)[at + 1 :]}"
    execute(folder, f"UPDATE {table} SET {column} = ? WHERE rowid = ?", type(value)(other), row)


def way_back(folder):
    file = folder / "ledger.db"
    return f"rm -f {file}-journal {file}-wal {file}-shm && cp {file}.copy {file}"


@pytest.mark.parametrize(
    ("table", "column"),
    [
        ("mpo_result", "content"),
        ("mpo_result", "seed"),
        ("mpo_result", "sha256"),
        ("mpo_study", "corpus_sha256"),
        ("mpo_study", "config"),
        ("mpo_growth", "config"),
        ("mpo_growth", "made"),
        ("mpo_driver", "environment"),
        ("mpo_driver", "started"),
        ("trial_user_attributes", "value_json"),
        ("trials", "number"),
    ],
)
def test_flipped_digit_is_noticed_by_readers_and_drivers(whole, study, table, column):
    flip(study, table, column)
    command = way_back(study)
    with pytest.raises(StudyError, match="the ledger is damaged: ") as of_reader:
        read(study)
    with pytest.raises(StudyError, match="the ledger is damaged: ") as of_driver:
        ledger_at(whole / "tiny.yaml", study)
    for error in (of_reader, of_driver):
        assert str(error.value).endswith(command)
        assert "\n" not in str(error.value)


def test_way_back_is_the_command_that_is_named(whole, study):
    execute(study, "DELETE FROM mpo_result WHERE trial = 2")
    Copies(StudyDirectory(study).ledger_url, print).keep()  # so that it is older than what is damaged
    flip(study, "mpo_result", "content")
    with pytest.raises(StudyError) as error:
        run_at(whole / "tiny.yaml", study)
    command = str(error.value).rpartition("train later runs again: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert run_at(whole / "tiny.yaml", study).n_missing == 0
    assert substance(study) == substance(whole / "study")


def test_way_back_leaves_nothing_of_what_sqlite_had_beside_the_file(whole, study):
    """Or it would be applied to the copy."""
    whole_one = read(study)
    Copies(StudyDirectory(study).ledger_url, print).keep()
    with closing(sqlite3.connect(study / "ledger.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("UPDATE mpo_result SET state = 'failed'")
        for name in ("ledger.db-wal", "ledger.db-shm"):
            (study / f"{name}.kept").write_bytes((study / name).read_bytes())
    with pytest.raises(StudyError, match="the ledger is damaged: ") as error:
        read(study)
    for name in ("ledger.db-wal", "ledger.db-shm"):  # as a process that is killed leaves them
        (study / f"{name}.kept").rename(study / name)
    subprocess.run(str(error.value).rpartition("train later runs again: ")[2], shell=True, check=True)
    assert read(study) == whole_one


@pytest.mark.parametrize("harm", [lambda file: file.write_bytes(b""), lambda file: file.unlink()])
def test_ledger_that_is_empty_or_gone_has_the_same_way_back(whole, study, harm):
    harm(study / "ledger.db")
    for act in (partial(study_status, StudyDirectory(study)), partial(ledger_at, whole / "tiny.yaml", study)):
        with pytest.raises(StudyError) as error:
            act()
        assert str(error.value).endswith(way_back(study))


def test_results_whose_table_is_gone_are_not_trained_again(whole, study):
    execute(study, "DROP TABLE mpo_result")
    with pytest.raises(StudyError, match=r"the ledger is damaged: it has no table mpo_result; ") as error:
        ledger_at(whole / "tiny.yaml", study)
    assert str(error.value).endswith(way_back(study))
    execute(study, "DELETE FROM mpo_study")  # a driver that was killed as it began left no row
    (study / "study.json").unlink()
    ledger_at(whole / "tiny.yaml", study).close()


def test_nobody_is_sent_back_where_the_disk_is_full(study):
    """The ledger is whole, and has more than its copy."""
    url = StudyDirectory(study).ledger_url
    engine = open_database(url)
    [(n_pages,)] = execute(study, "PRAGMA page_count")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {n_pages}")
        with pytest.raises(StudyError, match=r"^the ledger cannot be used: .* disk is full$"), in_one_line(url):
            connection.exec_driver_sql("CREATE TABLE large AS SELECT zeroblob(1000000)")
    engine.dispose()


def test_flipped_digit_in_a_decision_to_stop_is_noticed(whole, study):
    ledger = ledger_at(whole / "tiny.yaml", study)
    from study.ledger.checksums import insert
    from study.ledger.tables import stop_table

    with ledger._engine.begin() as connection:
        insert(connection, stop_table, study_uuid=ledger.uuid, trial=0, content=json.dumps(STOP_CONTENT))
    ledger.close()
    assert read(study).trials[0].stop is not None
    flip(study, "mpo_stop", "content")
    with pytest.raises(StudyError, match=r"the row study_uuid .*, trial 0 of mpo_stop is not what was written"):
        read(study)


@pytest.mark.parametrize("offset", range(0, 40, 8))
def test_damaged_byte_anywhere_is_one_line_or_does_no_harm(whole, study, offset):
    """A byte here and there: what is read is what was written, or it is refused."""
    file = study / "ledger.db"
    data = bytearray(file.read_bytes())
    for at in range(offset * len(data) // 40, (offset + 1) * len(data) // 40):
        if chr(data[at]).isdigit():
            data[at] ^= 1
            break
    file.write_bytes(data)
    found = error = None
    try:
        found = read(study)
    except StudyError as refused:
        error = str(refused)
    assert found == read(whole / "study") if error is None else "ledger.db.copy" in error and "\n" not in error


def test_copy_is_never_replaced_by_a_damaged_one(tmp_path, whole, study):
    said = []
    copies, copy = Copies(StudyDirectory(study).ledger_url, said.append), study / "ledger.db.copy"
    copy.unlink()
    copies.keep()
    check_whole(copy)
    kept = copy.read_bytes()
    flip(study, "mpo_result", "content")
    with pytest.raises(StudyError, match="the ledger is damaged: "):
        copies.keep()
    assert copy.read_bytes() == kept
    assert not list(study.glob("*.partial"))
    assert said == []


def test_copy_is_made_at_the_start_and_then_only_now_and_then(tmp_path, monkeypatch):
    n_copies = []
    monkeypatch.setattr(Copies, "keep", lambda self, keep=Copies.keep: (n_copies.append(1), keep(self)))
    run_at(write_study(tmp_path, arms=[DENSE, MPO]), tmp_path / "study")
    assert len(n_copies) == 2  # before the first unit, and after the last
    with closing(sqlite3.connect(tmp_path / "study" / "ledger.db.copy")) as connection:
        assert connection.execute("SELECT count(*) FROM mpo_result").fetchall() == [(6,)]


@pytest.mark.parametrize("name", ["ledger.db.copy", "ledger.db.copy.partial"])
def test_copy_that_cannot_be_made_is_said_and_the_study_goes_on(tmp_path, name):
    file, folder = write_study(tmp_path, seeds=1, arms=[DENSE]), tmp_path / "study"
    (folder / name).mkdir(parents=True)
    outcome, printed = printed_by_run(file, folder, tracking="off")
    assert outcome.n_missing == 0
    assert f"cannot copy the ledger to {folder}/ledger.db.copy, will try again later: " in printed


def test_result_that_lacks_something_is_no_result(tmp_path):
    """With a checksum that fits, as a program with a fault would write it."""
    file, folder = write_study(tmp_path, seeds=1, arms=[DENSE]), tmp_path / "study"
    ledger = ledger_at(file, folder)
    ledger.ask()
    ledger.record(made_up(0, 0))
    ledger.close()
    [(text,)] = execute(folder, "SELECT content FROM mpo_result")
    content = json.loads(text)
    for change in (
        {"final": {}},
        {"seed": 1},
        {"started": "yesterday"},
        {"final": {**content["final"], "final/val_loss": "low"}},
        {"state": "done"},
    ):
        execute(folder, "UPDATE mpo_result SET content = ?", json.dumps(content | change))
        sign_results(folder)
        with pytest.raises(StudyError, match=r"the ledger is damaged: the result of trial 0, seed 0"):
            read(folder)
        with pytest.raises(StudyError, match=shlex.quote("the ledger is damaged").strip("'")):
            ledger_at(file, folder)


def test_ledger_of_a_driver_that_was_killed_as_it_began_has_no_trials_yet(tmp_path):
    """Our row of the study is written before Optuna's."""
    file, folder = write_study(tmp_path), tmp_path / "begun"
    ledger_at(file, folder).close()
    with closing(sqlite3.connect(folder / "ledger.db")) as database, database:
        database.execute("DELETE FROM studies")
    assert read_ledger(StudyDirectory(folder).ledger_url, "tiny").trials == []
