from __future__ import annotations

import lzma
import shutil
import sqlite3
from contextlib import closing

import pytest
from study_fixtures import (
    DENSE,
    MPO,
    SEARCHED,
    TUNED,
    changed_export,
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
from study.commands.sync import sync
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


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small study that was run, and its file."""
    work = tmp_path_factory.mktemp("exported")
    run_at(
        write_study(work, seeds=1, arms=[DENSE, {"name": "wild", "family": "dense", "learning_rate": 1e30}]), work / "a"
    )
    assert export(work / "a", work / "a.xz") == 2
    return work


def test_import_makes_the_ledger_that_was_exported(exported, tmp_path):
    assert import_study(exported / "a.xz", StudyDirectory(tmp_path / "b")) == "tiny"
    assert dump(tmp_path / "b") == dump(exported / "a")
    assert len(dump(tmp_path / "b")) > 10
    assert (tmp_path / "b" / "study.yaml").read_bytes() == (exported / "a" / "study.yaml").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]
    export(tmp_path / "b", tmp_path / "again.xz")
    import_study(tmp_path / "again.xz", StudyDirectory(tmp_path / "c"))
    assert dump(tmp_path / "c") == dump(exported / "a")


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
    export(tmp_path / "a", tmp_path / "a.xz")
    import_study(tmp_path / "a.xz", StudyDirectory(tmp_path / "b"))
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


@pytest.mark.slow
def test_import_then_sync_and_analysis_give_what_they_gave(tmp_path, mlflow_template):  # noqa: F811
    from analysis.runs.load import load_study, resolve_study

    arms = [DENSE, MPO | {"chi": [2, 500, 1000]}]  # the last is a repeat
    file = write_study(tmp_path / "work", arms=arms)
    for which in "ab":
        (tmp_path / which).mkdir()
        shutil.copy(mlflow_template, tmp_path / which / "mlflow.db")
    run_at(file, tmp_path / "a", tracking=None)
    export(tmp_path / "a", tmp_path / "a.xz")
    (tmp_path / "b" / "mlflow.db").rename(tmp_path / "empty.db")
    shutil.rmtree(tmp_path / "work")  # neither study file nor text: what came along must do
    import_study(tmp_path / "a.xz", StudyDirectory(tmp_path / "b"))
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
            # Means were also written while seeds were missing; what counts is where they ended. Points of seeds were
            # written when they were measured, or all at the end.
            values = {name: [point[:2] for point in sorted(points)] for name, points in metrics.items()}
            is_trial = key.count("/") == 1
            found[key] = (*plain, ours, {name: points[-1:] if is_trial else points for name, points in values.items()})
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


def another_file(file):
    with closing(sqlite3.connect(file.with_suffix(".db"))) as connection:
        connection.execute("CREATE TABLE x (y)")
    file.write_bytes(lzma.compress(file.with_suffix(".db").read_bytes()))
    file.with_suffix(".db").unlink()


def text_file(file):
    file.write_text("name: tiny\n")


def of_database(*commands):
    return lambda file: changed_export(file, file, lambda connection: [connection.execute(each) for each in commands])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_short, "is not a complete export"),
        (flip_a_byte, "is not a complete export"),
        (of_database("UPDATE mpo_result SET state = 'failed'"), "is damaged: the ledger is damaged: the row"),
        (of_database("DELETE FROM mpo_export WHERE name = 'study.yaml'"), "is damaged: it contains no study file"),
        (of_database("PRAGMA user_version = 99"), "was written by a newer mpo-study; import it with that version"),
        (of_database("UPDATE mpo_study SET schema_version = 99, sha256 = NULL"), "has schema version 99"),
        (another_file, "is not an export of a study"),
        (text_file, "is not a complete export"),
        (lambda file: file.write_bytes(file.read_bytes() + b"more"), "is not a complete export"),
        (lambda file: file.write_bytes(b"PAR1" + file.read_bytes()), "was written by an older mpo-study"),
        (lambda file: file.unlink(), "no such file"),
        (
            of_database("UPDATE alembic_version SET version_num = 'v99'"),
            "install an Optuna with the file's version, and import it again",
        ),
    ],
)
def test_import_refuses_in_one_line_and_leaves_nothing(exported, tmp_path, damage, said):
    file = tmp_path / "copy.xz"
    shutil.copy(exported / "a.xz", file)
    damage(file)
    with pytest.raises(StudyError, match=said) as error:
        import_study(file, StudyDirectory(tmp_path / "b"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "b").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"copy.xz"}


def test_import_names_the_file_with_every_defect_of_its_study_file(exported, tmp_path):
    file = tmp_path / "copy.xz"
    shutil.copy(exported / "a.xz", file)
    of_database("UPDATE mpo_export SET content = 'name: no name\nseeds: 0\narms: []\n' WHERE name = 'study.yaml'")(file)
    with pytest.raises(StudyError) as error:
        import_study(file, StudyDirectory(tmp_path / "b"))
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{file}: is damaged: its study file: ") for line in lines)


def test_import_refuses_a_folder_that_holds_something(exported, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(StudyError, match="b: exists already; give a new or an empty folder"):
        import_study(exported / "a.xz", StudyDirectory(tmp_path / "b"))
    (tmp_path / "b" / "mine.txt").unlink()
    import_study(exported / "a.xz", StudyDirectory(tmp_path / "b"))
    assert len(results_at(tmp_path / "b")) == 2


def test_cli_exports_and_imports(exported, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("export", exported / "a", "out.xz")
    assert (code, err) == (0, "")
    assert out == "out.xz: 2 runs. To create a study from it: mpo-study import out.xz DIR\n"
    code, out, err = command("import", "out.xz", "made")
    assert (code, err) == (0, "")
    assert out.startswith("made: study tiny. To write its runs to MLflow: mpo-study sync made; ")
    code, out, err = command("import", "out.xz", "made")
    assert (code, out) == (2, "")
    assert err == "mpo-study: made: exists already; give a new or an empty folder\n"
    code, out, err = command("export", exported / "a", ".")
    assert (code, out, err) == (2, "", "mpo-study: .: is a folder; give a path for the new file\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, out, err = command("import", "../out.xz", ".")
    assert (code, err) == (0, "")
    assert len(results_at(tmp_path / "here")) == 2
    code, out, err = command("export", exported / "a", "nowhere/out.xz")
    assert (code, out) == (2, "")
    assert err == "mpo-study: nowhere/out.xz: cannot write there: No such file or directory; give another file\n"
    (tmp_path / "two.xz.partial").mkdir()
    code, out, err = command("export", exported / "a", tmp_path / "two.xz")
    assert (code, out) == (2, "")
    assert err == f"mpo-study: {tmp_path}/two.xz: cannot write there: Is a directory; give another file\n"
