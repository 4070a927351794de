"""An exported file may hold anything, under a checksum that fits; and an import may be killed."""

from __future__ import annotations

import json
import resource
import signal
import socket
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from study_fixtures import DENSE, cli, results_at, run_at, write_study

from study.commands.exchange import _checksum, export_study, import_study
from study.errors import StudyError
from study.ledger.directory import StudyDirectory


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    work = tmp_path_factory.mktemp("exported")
    run_at(write_study(work, seeds=1, arms=[DENSE, DENSE | {"name": "other", "learning_rate": 0.1}]), work / "a")
    export_study(StudyDirectory(work / "a"), work / "a.parquet", print)
    return work / "a.parquet"


def forged(exported, to, change, **header_changes):
    """The file with its rows changed, and a checksum that fits."""
    table = pq.read_table(pa.OSFile(str(exported)))
    header = json.loads(table.schema.metadata[b"mpo-study"]) | header_changes
    rows = [(row["table"], row["row"]) for row in table.to_pylist()]
    rows = change(rows)
    header["sha256"] = _checksum(header, rows)
    columns = {"table": pa.array([name for name, _ in rows]), "row": pa.array([row for _, row in rows])}
    table = pa.table(columns).replace_schema_metadata({b"mpo-study": json.dumps(header).encode()})
    pq.write_table(table, to, compression="zstd")
    return to


def row(table, **changes):
    """Changes the first row of a table; a key of its JSON content is `content__key`."""

    def change(rows):
        index = next(index for index, (name, _) in enumerate(rows) if name == table)
        plain = json.loads(rows[index][1])
        for key, value in changes.items():
            column, _, inner = key.partition("__")
            if inner:
                content = json.loads(plain[column])
                content[inner] = value
                value = json.dumps(content)
            plain[column] = value
        plain.pop("sha256", None)
        return [*rows[:index], (table, json.dumps(plain)), *rows[index + 1 :]]

    return change


def study_file(change):
    return lambda rows: [(n, json.dumps(change(json.loads(r)))) if n == "study.yaml" else (n, r) for n, r in rows]


def attribute(**changes):
    def change(rows):
        found = []
        for name, text in rows:
            plain = json.loads(text)
            if name == "trial_user_attributes":
                content = json.loads(plain["value_json"]) | changes
                content.pop("sha256", None)
                plain["value_json"] = json.dumps(content)
            found.append((name, json.dumps(plain)))
        return found

    return change


def whole_row(table, text):
    return lambda rows: [(name, text if name == table else row) for name, row in rows]


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
    row("mpo_result", trial=10**30),
    row("mpo_result", seed=-5, content__seed=-5),
    row("mpo_result", content__final={"final/val_loss": NAN, "final/val_acc": 1.0, "train_seconds": 1.0}),
    row("mpo_result", content__started="yesterday"),
    row("mpo_driver", environment="7"),
    row("trials", number=-1),
    row("trial_user_attributes", value_json="{"),
    attribute(duplicate_of=99),
    whole_row("mpo_result", "[]"),
    lambda rows: [*rows, *[row for row in rows if row[0] == "mpo_result"]],
)
FURTHER = (
    study_file(lambda text: ["not", "a", "text"]),
    study_file(lambda text: "a: \x00"),
    row("mpo_study", name="tiny\x1b[2J"),
    row("mpo_study", name=None),
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
    row("mpo_result", content={"a": [1]}),
    row("mpo_result", content=None),
    row("mpo_driver", started=None),
    row("trials", number=10**30),
    row("trials", state="DONE"),
    row("trial_user_attributes", value_json="7"),
    row("trial_values", value="x" * 10),
    attribute(spec={}),
    attribute(duplicate_of="0"),
    attribute(budget_hash=None),
    attribute(tuning_trials=NAN),
    attribute(shape={"n_params": -1}),
    whole_row("mpo_result", "7"),
    whole_row("trials", "{"),
    whole_row("corpus.txt", "7"),
    whole_row("corpus.txt", '"\\ud800"'),
    whole_row("alembic_version", "[]"),
    lambda rows: [row for row in rows if row[0] not in ("trials", "trial_user_attributes")],
    lambda rows: [row for row in rows if row[0] != "mpo_study"],
    lambda rows: [*rows, ("sqlite_master", "{}")],
    lambda rows: [],
)


@pytest.mark.parametrize("change", [*FORGED, *(pytest.param(change, marks=pytest.mark.fault) for change in FURTHER)])
def test_import_of_a_forged_file_is_one_line_and_leaves_nothing(exported, tmp_path, change):
    file = forged(exported, tmp_path / "forged.parquet", change)
    with pytest.raises(StudyError) as error:
        import_study(file, StudyDirectory(tmp_path / "b"))
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["forged.parquet"]


HEADERS = (
    {"study": "../x"},
    {"study": 7},
    {"study": "other"},
    {"uuid": None},
    {"uuid": "0" * 32},
    {"format": "1"},
    {"versions": {}},
    {"versions": None},
    {"versions": {"mpo-study": "1"}},
    {"ledger_schema": None},
)


@pytest.mark.parametrize(
    "header", [*HEADERS[:3], *(pytest.param(each, marks=pytest.mark.fault) for each in HEADERS[3:])]
)
def test_import_of_a_forged_header_is_one_line(exported, tmp_path, header):
    file = forged(exported, tmp_path / "forged.parquet", lambda rows: rows, **header)
    with pytest.raises(StudyError, match="is damaged"):
        import_study(file, StudyDirectory(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_import_of_what_unpacks_to_gigabytes_needs_little_memory(exported, tmp_path):
    """Megabytes of one letter, many times over, in a file of some kilobytes."""
    schema = pq.read_schema(exported)
    file = tmp_path / "bomb.parquet"
    rows = pa.table({"table": ["x"] * 16, "row": ["x" * (1 << 20)] * 16}).replace_schema_metadata(schema.metadata)
    with pq.ParquetWriter(file, rows.schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(8):
            writer.write_table(rows)
    assert file.stat().st_size < 1 << 20
    with pytest.raises(StudyError, match=r"bomb\.parquet: unpacks to more than 64 MiB"):
        import_study(file, StudyDirectory(tmp_path / "b"))
    pq.write_table(pa.concat_tables([rows] * 64), file, compression="zstd")  # each letter once, in a dictionary
    with pytest.raises(StudyError, match=r"bomb\.parquet: unpacks to more than 64 MiB"):
        import_study(file, StudyDirectory(tmp_path / "b"))


@pytest.mark.parametrize("what", ["folder", "/dev/zero"])
def test_import_of_no_file_is_one_line(tmp_path, what):
    with pytest.raises(StudyError, match="is no file"):
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
    forged(exported, tmp_path / "bomb.parquet", study_file(lambda text: BOMB + text))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    code, out, err = cli("import", "bomb.parquet", "b", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("mpo-study: bomb.parquet: is damaged: its study file:")
    assert err.endswith("keys and values, those that aliases repeat included\n")
    assert (
        max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) < 1_200_000
    )  # KiB; torch alone has 600,000
