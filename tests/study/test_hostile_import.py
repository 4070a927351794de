"""An exported file may hold anything, under a checksum that fits; and an import may be killed."""

from __future__ import annotations

import json
import lzma
import resource
import signal
import socket
import subprocess
import sys

import pytest
from study_fixtures import DENSE, changed_export, cli, results_at, run_at, write_study

from study.commands.exchange import export_study, import_study
from study.errors import StudyError
from study.ledger.directory import StudyDirectory


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    work = tmp_path_factory.mktemp("exported")
    run_at(write_study(work, seeds=1, arms=[DENSE, DENSE | {"name": "other", "learning_rate": 0.1}]), work / "a")
    export_study(StudyDirectory(work / "a"), work / "a.xz", print)
    return work / "a.xz"


def columns_of(connection, table):
    return [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]


def row(table, **changes):
    """Changes the first row of a table; a key of its JSON content is `content__key`."""

    def change(connection):
        for key, value in changes.items():
            column, _, inner = key.partition("__")
            if inner:
                [text] = connection.execute(f"SELECT {column} FROM {table} LIMIT 1").fetchone()
                value = json.dumps(json.loads(text) | {inner: value})
            connection.execute(
                f"UPDATE {table} SET {column} = ? WHERE rowid = (SELECT min(rowid) FROM {table})", [value]
            )
        if "sha256" in columns_of(connection, table):
            connection.execute(f"UPDATE {table} SET sha256 = NULL")

    return change


def text(name, change):
    """Changes one of the file's texts."""

    def act(connection):
        [before] = connection.execute("SELECT content FROM mpo_export WHERE name = ?", [name]).fetchone()
        connection.execute("UPDATE mpo_export SET content = ? WHERE name = ?", [change(before), name])

    return act


def study_file(change):
    return text("study.yaml", change)


def attribute(**changes):
    def change(connection):
        rows = connection.execute("SELECT rowid, value_json FROM trial_user_attributes").fetchall()
        for number, before in rows:
            content = json.loads(before) | changes
            content.pop("sha256", None)
            after = [json.dumps(content), number]
            connection.execute("UPDATE trial_user_attributes SET value_json = ? WHERE rowid = ?", after)

    return change


def sql(*commands):
    return lambda connection: [connection.execute(command) for command in commands]


BOMB = "".join(
    f"{key}: &{key} [{', '.join(['*' + before] * 9) if before else '1'}]\n"
    for before, key in zip(["", *"abcdefgh"], "abcdefghi", strict=True)
)
NAN = float("nan")


FORGED = (
    study_file(lambda text: BOMB + text),
    study_file(lambda text: "[" * 5000),
    study_file(lambda text: text.replace("name: tiny", "name: ../../tiny")),
    study_file(lambda text: text.replace("steps: 6", "steps: 7")),
    row("mpo_study", name="../../etc"),
    row("mpo_study", uuid="../.."),
    row("mpo_result", trial=2**62),
    row("mpo_result", seed=-5, content__seed=-5),
    row("mpo_result", content__final={"final/val_loss": NAN, "final/val_acc": 1.0, "train_seconds": 1.0}),
    row("mpo_result", content__started="yesterday"),
    row("mpo_driver", environment="7"),
    row("trials", number=-1),
    row("trials", datetime_start="yesterday"),
    row("trial_user_attributes", value_json="{"),
    attribute(duplicate_of=99),
    sql("CREATE VIEW mine AS SELECT 1"),
    sql("CREATE TRIGGER mine AFTER INSERT ON mpo_result BEGIN DELETE FROM mpo_study; END"),
    sql("CREATE VIRTUAL TABLE mine USING fts5(x)"),
    sql("ALTER TABLE mpo_study ADD COLUMN mine AS (zeroblob(1000000))"),
    sql("ALTER TABLE mpo_study ADD COLUMN mine"),
    sql("CREATE TABLE mine (x)"),
    sql("INSERT INTO mpo_study SELECT 'other', uuid, 1, config, corpus_sha256, created, NULL FROM mpo_study"),
)
FURTHER = (
    study_file(lambda text: b"not a text"),
    study_file(lambda text: "a: \x00"),
    row("mpo_study", name="tiny\x1b[2J"),
    row("mpo_study", uuid=7),
    row("mpo_study", config="[" * 100_000),
    row("mpo_study", config__seeds=10**30),
    row("mpo_study", schema_version="one"),
    row("mpo_result", trial=-1),
    row("mpo_result", trial="first"),
    row("mpo_result", content__final={}),
    row("mpo_result", content__final={"final/val_loss": "low"}),
    row("mpo_result", content__curve=[1, 2]),
    row("mpo_result", content__started=10**400),
    row("mpo_result", content="{" * 100_000),
    row("mpo_result", content=b"\xff"),
    row("mpo_result", content="7"),
    row("mpo_driver", started=b"now"),
    row("trials", number=2**62),
    row("trials", state="DONE"),
    row("trial_user_attributes", value_json="7"),
    row("trial_values", value="x" * 10),
    attribute(spec={}),
    attribute(duplicate_of="0"),
    attribute(budget_hash=None),
    attribute(tuning_trials=NAN),
    attribute(shape={"n_params": -1}),
    text("corpus.txt", lambda text: "7"),
    text("corpus.txt", lambda text: b"\xff"),
    sql("DELETE FROM alembic_version"),
    sql("DELETE FROM trials", "DELETE FROM trial_user_attributes"),
    sql("DELETE FROM mpo_study"),
    sql("DELETE FROM mpo_export WHERE name = 'study.yaml'"),
    sql("DROP TABLE mpo_study"),
)


@pytest.mark.parametrize("change", [*FORGED, *(pytest.param(change, marks=pytest.mark.fault) for change in FURTHER)])
def test_import_of_a_forged_file_is_one_line_and_leaves_nothing(exported, tmp_path, change):
    file = changed_export(exported, tmp_path / "forged.xz", change)
    with pytest.raises(StudyError) as error:
        import_study(file, StudyDirectory(tmp_path / "b"))
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["forged.xz"]


def test_import_of_what_unpacks_to_gigabytes_needs_little_disk(tmp_path):
    file = tmp_path / "bomb.xz"
    with lzma.open(file, "wb", preset=0) as bomb:
        for _ in range(80):
            bomb.write(bytes(1 << 20))
    assert file.stat().st_size < 1 << 16
    with pytest.raises(StudyError, match=r"bomb\.xz: unpacks to more than 64 MiB"):
        import_study(file, StudyDirectory(tmp_path / "b"))


def test_import_of_a_file_that_needs_a_large_memory_is_refused(exported, tmp_path):
    file = tmp_path / "large.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 28}]
    file.write_bytes(lzma.compress(lzma.decompress(exported.read_bytes()), filters=filters))
    with pytest.raises(StudyError, match="is not a complete export"):
        import_study(file, StudyDirectory(tmp_path / "b"))


@pytest.mark.parametrize("what", ["folder", "/dev/zero"])
def test_import_of_no_file_is_one_line(tmp_path, what):
    with pytest.raises(StudyError, match="is not a file"):
        import_study(tmp_path if what == "folder" else tmp_path.__class__(what), StudyDirectory(tmp_path / "b"))


@pytest.mark.fault
def test_import_that_was_killed_leaves_nothing_after_the_next(exported, tmp_path):
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nimport study.commands.exchange as exchange\n"
        "from study.ledger.directory import StudyDirectory\n"
        "exchange._move = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "exchange.import_study(Path(sys.argv[1]), StudyDirectory(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", script, str(exported), str(tmp_path / "b")]
    assert subprocess.run(command, check=False, timeout=600).returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".b-import-")
    of_another_machine = tmp_path / f".b-import-not-{socket.gethostname()}-1-x"
    of_one_at_work = tmp_path / f".b-import-{socket.gethostname()}-1-x"  # process 1 is always there
    of_another_machine.mkdir()
    of_one_at_work.mkdir()
    import_study(exported, StudyDirectory(tmp_path / "b"))
    assert set(tmp_path.iterdir()) == {tmp_path / "b", of_another_machine, of_one_at_work}
    assert len(results_at(tmp_path / "b")) == 2


@pytest.mark.fault
def test_alias_bomb_in_an_imported_file_needs_little_memory(exported, tmp_path):
    changed_export(exported, tmp_path / "bomb.xz", study_file(lambda text: BOMB + text))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    code, out, err = cli("import", "bomb.xz", "b", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("mpo-study: bomb.xz: is damaged: its study file:")
    assert err.endswith("keys and values, counting each use of an alias\n")
    assert (
        max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) < 1_200_000
    )  # KiB; torch alone has 600,000
