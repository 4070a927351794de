from __future__ import annotations

import json
import shutil
import sqlite3

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from study_fixtures import (
    DENSE,
    MPO,
    SEARCHED,
    TUNED,
    contents,
    mlflow_template,  # noqa: F401 (a fixture)
    optuna_states,
    results_at,
    run_at,
    substance,
    write_search,
    write_study,
)

from analysis import run_schema as schema
from study.commands.exchange import export_study, import_study
from study.commands.run import sync
from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.ledger.growth import Growth
from study.ledger.snapshot import read_ledger

pytestmark = pytest.mark.filterwarnings(
    "ignore::optuna.exceptions.ExperimentalWarning", "ignore:::mlflow", "ignore::DeprecationWarning"
)


def export(folder, file):
    said = []
    n_results = export_study(StudyDirectory(folder), file, said.append)
    assert said == []
    return n_results


def dump(folder):
    """Every table of a ledger, row by row, as the database writes it out."""
    with sqlite3.connect(folder / "ledger.db") as connection:
        lines = list(connection.iterdump())
    connection.close()
    return sorted(line for line in lines if line.startswith("INSERT"))


def rewritten(file, change):
    """The exported file with its header and rows changed."""
    table = pq.read_table(pa.OSFile(str(file)))
    header, rows = json.loads(table.schema.metadata[b"mpo-study"]), table.to_pylist()
    change(header, rows)
    table = pa.Table.from_pylist(rows).replace_schema_metadata({b"mpo-study": json.dumps(header).encode()})
    pq.write_table(table, file)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small study that was run, and its file."""
    work = tmp_path_factory.mktemp("exported")
    run_at(
        write_study(work, seeds=1, arms=[DENSE, {"name": "wild", "family": "dense", "learning_rate": 1e30}]), work / "a"
    )
    assert export(work / "a", work / "a.parquet") == 2
    return work


def test_import_makes_the_ledger_that_was_exported(exported, tmp_path):
    assert import_study(exported / "a.parquet", StudyDirectory(tmp_path / "b")) == "tiny"
    assert dump(tmp_path / "b") == dump(exported / "a")
    assert len(dump(tmp_path / "b")) > 10
    assert (tmp_path / "b" / "study.yaml").read_bytes() == (exported / "a" / "study.yaml").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]
    export(tmp_path / "b", tmp_path / "again.parquet")
    one, other = (pd.read_parquet(file) for file in (exported / "a.parquet", tmp_path / "again.parquet"))
    assert one.equals(other)


@pytest.mark.slow
def test_study_in_the_middle_goes_on_after_an_import_as_it_would_have(tmp_path, mlflow_template):  # noqa: F811
    """Sampler, numbers and growth included: TPE's first ten trials are random, those after the import are not."""
    arms = [DENSE, TUNED, SEARCHED]
    file = write_search(tmp_path, sampler="tpe", trials=11, seeds=1, arms=arms, objectives=["val_loss"])
    run_at(file, tmp_path / "a")
    run_at(file, tmp_path / "a", growth=Growth(seeds=1))
    with sqlite3.connect(tmp_path / "a" / "ledger.db") as connection:  # as if it had been stopped before these
        connection.execute("DELETE FROM mpo_result WHERE trial = 1 OR (trial = 4 AND seed = 1)")
    connection.close()
    export(tmp_path / "a", tmp_path / "a.parquet")
    import_study(tmp_path / "a.parquet", StudyDirectory(tmp_path / "b"))
    shutil.copy(mlflow_template, tmp_path / "b" / "mlflow.db")
    growth = Growth(trials=4)
    one, other = run_at(file, tmp_path / "a", growth=growth), run_at(file, tmp_path / "b", growth=growth)
    assert one == other
    assert (one.n_trials, one.n_missing, one.n_complete) == (17, 0, 34)
    name = "search-tpe"
    urls = [StudyDirectory(tmp_path / which).ledger_url for which in "ab"]
    assert read_ledger(urls[0], name).trials == read_ledger(urls[1], name).trials
    assert optuna_states(urls[0]) == optuna_states(urls[1])
    assert substance(tmp_path / "a", name) == substance(tmp_path / "b", name)


def test_import_then_sync_and_analysis_give_what_they_gave(tmp_path, mlflow_template):  # noqa: F811
    from analysis.runs.load import load_study, resolve_study

    arms = [DENSE, MPO | {"chi": [2, 500, 1000]}]  # the last is a repeat
    file = write_study(tmp_path / "work", arms=arms)
    for which in "ab":
        (tmp_path / which).mkdir()
        shutil.copy(mlflow_template, tmp_path / which / "mlflow.db")
    run_at(file, tmp_path / "a", tracking=None)
    export(tmp_path / "a", tmp_path / "a.parquet")
    (tmp_path / "b" / "mlflow.db").rename(tmp_path / "empty.db")
    shutil.rmtree(tmp_path / "work")  # neither study file nor text: what came along must do
    import_study(tmp_path / "a.parquet", StudyDirectory(tmp_path / "b"))
    (tmp_path / "empty.db").rename(tmp_path / "b" / "mlflow.db")
    directory = StudyDirectory(tmp_path / "b")
    assert sync(directory.load_config(), directory, None, None) == 4
    assert run_at(directory.study_file, directory.path).n_missing == 0

    def without_ids(folder):
        found = {}
        for key, [(_, *rest)] in contents(folder / "mlflow.db").items():
            *plain, tags, metrics = rest
            # A revision names a state of one database.
            ours = {tag: value for tag, value in tags.items() if tag.startswith("mpo.") and tag != schema.REVISION}
            # Means were also written while seeds were missing; what counts is where they ended.
            is_trial = key.count("/") == 1
            found[key] = (*plain, ours, {name: points[-1:] if is_trial else points for name, points in metrics.items()})
        return found

    assert without_ids(tmp_path / "a") == without_ids(tmp_path / "b")
    one, other = (load_study(resolve_study(tmp_path / which)) for which in "ab")
    for frame in ("trials", "seeds", "rel_errors", "failures"):
        plain = [getattr(runs, frame).drop(columns="run_id", errors="ignore") for runs in (one, other)]
        assert plain[0].equals(plain[1])
    assert len(one.seeds) == 6


# Refusals -------------------------------------------------------------------------------------------------------------


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_byte(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 0xFF
    file.write_bytes(data)


def change_a_result(file):
    def change(header, rows):
        row = next(row for row in rows if row["table"] == "mpo_result")
        row["row"] = row["row"].replace("complete", "failed")

    rewritten(file, change)


def another_file(file):
    pd.DataFrame({"x": [1]}).to_parquet(file)


def text_file(file):
    file.write_text("name: tiny\n")


def newer(**keys):
    return lambda file: rewritten(file, lambda header, rows: header.update(keys))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_short, "is no whole Parquet file"),
        (flip_a_byte, r"is damaged|is no whole Parquet file"),
        (change_a_result, "is damaged; export the study again, or take another copy"),
        (lambda file: rewritten(file, lambda header, rows: rows.pop()), "is damaged"),
        (lambda file: rewritten(file, lambda header, rows: header.pop("versions")), "is damaged"),
        (newer(uuid="another"), "is damaged"),
        (newer(format=2), r"was written by a newer mpo-study \(.+\); import it with that version"),
        (newer(ledger_schema=99), "was written by a newer mpo-study"),
        (another_file, "is no study's export"),
        (text_file, "is no whole Parquet file"),
        (lambda file: file.unlink(), "there is no such file"),
    ],
)
def test_import_refuses_in_one_line_and_leaves_nothing(exported, tmp_path, damage, said):
    file = tmp_path / "copy.parquet"
    shutil.copy(exported / "a.parquet", file)
    damage(file)
    with pytest.raises(StudyError, match=said) as error:
        import_study(file, StudyDirectory(tmp_path / "b"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "b").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"copy.parquet"}


def test_import_refuses_tables_of_another_optuna(exported, tmp_path):
    from study.commands.exchange import _checksum

    def change(header, rows):
        row = next(row for row in rows if row["table"] == "alembic_version")
        row["row"] = json.dumps({"version_num": "v99"})
        header["sha256"] = _checksum(header, [(row["table"], row["row"]) for row in rows])

    file = tmp_path / "copy.parquet"
    shutil.copy(exported / "a.parquet", file)
    rewritten(file, change)
    with pytest.raises(StudyError, match=r"was written with Optuna .*; install the former and import it again"):
        import_study(file, StudyDirectory(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_import_refuses_a_folder_that_holds_something(exported, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(StudyError, match="b: is there already; give a folder that is not"):
        import_study(exported / "a.parquet", StudyDirectory(tmp_path / "b"))
    (tmp_path / "b" / "mine.txt").unlink()
    import_study(exported / "a.parquet", StudyDirectory(tmp_path / "b"))
    assert len(results_at(tmp_path / "b")) == 2


def test_cli_exports_and_imports(exported, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("export", exported / "a", "out.parquet")
    assert (code, err) == (0, "")
    assert out == "out.parquet: 2 runs. To make a study of it: mpo-study import out.parquet DIR\n"
    code, out, err = command("import", "out.parquet", "made")
    assert (code, err) == (0, "")
    assert out.startswith("made: study tiny. To write its runs to MLflow: mpo-study sync made; ")
    code, out, err = command("import", "out.parquet", "made")
    assert (code, out) == (2, "")
    assert err == "mpo-study: made: is there already; give a folder that is not, for the study to be made in\n"
    code, out, err = command("export", exported / "a", ".")
    assert (code, out, err) == (2, "", "mpo-study: .: is a folder; give the file to write\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, out, err = command("import", "../out.parquet", ".")
    assert (code, err) == (0, "")
    assert len(results_at(tmp_path / "here")) == 2
    code, out, err = command("export", exported / "a", "nowhere/out.parquet")
    assert (code, out) == (2, "")
    assert err == "mpo-study: nowhere/out.parquet: cannot write there: No such file or directory; give another file\n"
    (tmp_path / "two.parquet.partial").mkdir()
    code, out, err = command("export", exported / "a", tmp_path / "two.parquet")
    assert (code, out) == (2, "")
    assert err == f"mpo-study: {tmp_path}/two.parquet: cannot write there: Is a directory; give another file\n"
