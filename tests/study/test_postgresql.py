"""A study whose ledger, and whose MLflow, are in a real PostgreSQL."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace

import optuna
import pytest
import sqlalchemy as sa
import sqlalchemy.exc
from rich.console import Console
from services import POSTGRESQL_PASSWORD, _postgresql, everything_in, new_database  # noqa: F401 (fixtures)
from study_fixtures import (
    DENSE,
    MPO,
    cli,
    ledger_at,
    nothing_left_running,  # noqa: F401 (a fixture)
    optuna_states,
    run_at,
    start_cli,
    write_search,
    write_study,
)

from analysis import run_schema as schema
from analysis.runs.load import StudyAddress, load_study, resolve_study
from study.commands.exchange import export_study, import_study
from study.commands.opening import study_corpus
from study.commands.run import run_study
from study.commands.sync import sync
from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.ledger.growth import Growth
from study.ledger.ledger import Ledger
from study.ledger.lock import hold_ledger
from study.ledger.snapshot import read_ledger
from study.spec.study_file import load_config
from study.tracking.background import BackgroundTracker
from study.tracking.opening import open_tracker, study_record
from study.training.storage import Storage

pytestmark = [
    pytest.mark.service,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings(
        "ignore:::mlflow", "ignore::DeprecationWarning", "ignore::optuna.exceptions.ExperimentalWarning"
    ),
]


def run_in(directory: StudyDirectory, file, tracking="off", **options):
    console = Console(file=io.StringIO(), width=200)
    return run_study(load_config(file), directory, console, executor="inline", tracking=tracking, **options)


def substance_of(url, name="tiny"):
    """What a ledger's results say, by what was trained and the seed: all of it but times and names of files."""
    snapshot = read_ledger(url, name)
    specs = {trial.number: trial.spec.model_dump_json() for trial in snapshot.trials}
    return {
        (specs[r.trial], r.seed): (
            r.state,
            {key: value for key, value in r.final.items() if key != "train_seconds"},
            r.curve,
            r.rel_errors,
        )
        for r in snapshot.results
    }


def test_ledger_in_postgresql_says_what_one_in_a_file_says(tmp_path, new_database):  # noqa: F811
    file = write_study(tmp_path)
    url = new_database("same")
    outcome = run_in(StudyDirectory(tmp_path / "kept", url), file)
    local = run_at(file, tmp_path / "local")
    assert outcome == local
    assert not (tmp_path / "kept" / "ledger.db").exists()
    local_url = StudyDirectory(tmp_path / "local").ledger_url
    assert substance_of(url) == substance_of(local_url)
    assert optuna_states(url) == optuna_states(local_url)


def test_ledger_url_is_remembered_where_nobody_else_reads_it(tmp_path, new_database):  # noqa: F811
    file = write_study(tmp_path)
    url = new_database("remembered")
    run_in(StudyDirectory(tmp_path / "kept", url), file)
    manifest = tmp_path / "kept" / schema.STUDY_MANIFEST
    assert stat.S_IMODE(manifest.stat().st_mode) == 0o600
    assert json.loads(manifest.read_text())["ledger"] == url
    again = StudyDirectory(tmp_path / "kept")
    assert again.ledger_url == url
    before = read_ledger(url, "tiny").results
    run_in(again, file)
    assert read_ledger(url, "tiny").results == before  # nothing was trained again
    assert POSTGRESQL_PASSWORD.encode() not in everything_in(tmp_path).replace(manifest.read_bytes(), b"")


def test_search_in_postgresql_chooses_what_one_in_a_file_chooses(tmp_path, new_database):  # noqa: F811
    file = write_search(tmp_path, sampler="tpe", trials=12, seeds=1, objectives=["val_loss"])
    url = new_database("search")
    run_in(StudyDirectory(tmp_path / "kept", url), file)
    run_at(file, tmp_path / "local")
    local = read_ledger(StudyDirectory(tmp_path / "local").ledger_url, "search-tpe")
    assert read_ledger(url, "search-tpe").trials == local.trials


def test_two_studies_share_a_database_and_directories_do_not_matter(tmp_path, new_database):  # noqa: F811
    url = new_database("shared")
    one, other = write_study(tmp_path / "a"), write_study(tmp_path / "b", name="other", seeds=1)
    run_in(StudyDirectory(tmp_path / "one", url), one)
    run_in(StudyDirectory(tmp_path / "other", url), other)
    before = read_ledger(url, "tiny").results
    assert len(before) == 8
    assert len(read_ledger(url, "other").results) == 4
    run_in(StudyDirectory(tmp_path / "a new machine", url), one)
    assert read_ledger(url, "tiny").results == before


def test_study_in_postgresql_grows_and_is_exported_to_a_file(tmp_path, new_database):  # noqa: F811
    url, file = new_database("grown"), write_search(tmp_path, sampler="tpe", trials=3, seeds=1)
    kept = StudyDirectory(tmp_path / "kept", url)
    run_in(kept, file)
    assert run_in(kept, file, growth=Growth(trials=2, seeds=1)).n_missing == 0
    there = read_ledger(url, "search-tpe")
    assert {seed for _, seed in ((r.trial, r.seed) for r in there.results)} == {0, 1}

    export_study(kept, tmp_path / "study.xz", print)
    import_study(tmp_path / "study.xz", StudyDirectory(tmp_path / "imported"))
    here_url = StudyDirectory(tmp_path / "imported").ledger_url
    assert read_ledger(here_url, "search-tpe") == there
    assert optuna_states(here_url) == optuna_states(url)


def test_second_driver_is_refused_and_the_first_is_named(tmp_path, new_database):  # noqa: F811
    url = new_database("held")
    file = write_study(tmp_path)
    refused = pytest.raises(StudyError, match=rf"another driver runs it in this ledger: process {os.getpid()}@")
    with hold_ledger(url, "tiny"), hold_ledger(url, "another-study"), refused:
        run_in(StudyDirectory(tmp_path / "elsewhere", url), file)
    assert run_in(StudyDirectory(tmp_path / "elsewhere", url), file).n_missing == 0


def test_lock_ends_with_its_holder(new_database):  # noqa: F811
    url = new_database("killed")
    script = (
        f"import time\nfrom study.ledger.lock import hold_ledger\n"
        f"with hold_ledger({url!r}, 'tiny'):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StudyError, match=rf"process {holder.pid}@"), hold_ledger(url, "tiny"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    deadline = time.monotonic() + 300
    while True:
        try:
            with hold_ledger(url, "tiny"):
                return
        except StudyError:  # the server notices a moment later
            assert time.monotonic() < deadline
            time.sleep(0.05)


def drop_connections(url, like="%"):
    """End the connections to a database whose applications have such a name, as a restart of the server does."""
    engine = sa.create_engine(url.replace("/" + sa.make_url(url).database + "?", "/postgres?"))
    query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :n AND application_name LIKE :like"
    with engine.connect() as connection:
        connection.execute(sa.text(query), {"n": sa.make_url(url).database, "like": like})
    engine.dispose()


def allow_connections(url, *, allowed):
    name = sa.make_url(url).database
    engine = sa.create_engine(url.replace(f"/{name}?", "/postgres?"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS {allowed}'))
    engine.dispose()


def after_records(monkeypatch, n, act):
    """Have something happen once that many results are recorded."""
    record, n_recorded = Ledger.record, 0

    def counted(self, *results):
        nonlocal n_recorded
        stopped = record(self, *results)
        n_recorded += 1
        if n_recorded == n:
            act()
        return stopped

    monkeypatch.setattr(Ledger, "record", counted)


class OnLine(io.StringIO):
    """Takes what is printed, and does something once a line has these words."""

    def __init__(self, words, act):
        super().__init__()
        self._words, self._act, self.is_done = words, act, False

    def write(self, text):
        if self._words in text and not self.is_done:
            self.is_done = True
            self._act()
        return super().write(text)


def run_printing_to(stream, directory, file, **options):
    console = Console(file=stream, width=200)
    return run_study(load_config(file), directory, console, executor="inline", tracking="off", **options)


@pytest.mark.parametrize("like", ["mpo-study %", "%"], ids=["the hold", "all"])
def test_lost_connections_are_made_anew_and_the_study_goes_on(tmp_path, new_database, monkeypatch, like):  # noqa: F811
    url, file = new_database(f"lost {len(like)}"), write_study(tmp_path)
    with hold_ledger(url, "tiny") as hold:
        assert hold.is_held()
        drop_connections(url)
        assert not hold.is_held()

    after_records(monkeypatch, 2, lambda: drop_connections(url, like))
    stream = io.StringIO()
    outcome = run_printing_to(stream, StudyDirectory(tmp_path / "kept", url), file)
    assert (outcome.aborted, outcome.n_complete, outcome.n_missing) == (None, 8, 0)
    said = stream.getvalue()
    assert said.count("the ledger is unreachable, waiting at most") == said.count("the ledger is reachable again") == 1
    run_at(file, tmp_path / "local")
    assert substance_of(url) == substance_of(StudyDirectory(tmp_path / "local").ledger_url)
    assert optuna_states(url) == optuna_states(StudyDirectory(tmp_path / "local").ledger_url)


def test_results_wait_while_the_ledger_is_away(tmp_path, new_database, monkeypatch):  # noqa: F811
    """It takes no connection from its second result on, until that was said."""
    url, file = new_database("away"), write_search(tmp_path, sampler="tpe", trials=4, seeds=1)

    def go_away():
        allow_connections(url, allowed=False)
        drop_connections(url)

    after_records(monkeypatch, 2, go_away)
    stream = OnLine("the ledger is unreachable", lambda: allow_connections(url, allowed=True))
    outcome = run_printing_to(stream, StudyDirectory(tmp_path / "kept", url), file)
    assert stream.is_done
    assert (outcome.aborted, outcome.n_complete, outcome.n_missing) == (None, 5, 0)
    run_at(file, tmp_path / "local")
    local = StudyDirectory(tmp_path / "local").ledger_url
    assert substance_of(url, "search-tpe") == substance_of(local, "search-tpe")
    assert optuna_states(url) == optuna_states(local)


def test_ledger_that_stays_away_stops_the_study_in_one_line(tmp_path, new_database, monkeypatch):  # noqa: F811
    url, file = new_database("gone"), write_study(tmp_path)

    def go_away():
        allow_connections(url, allowed=False)
        drop_connections(url)

    with monkeypatch.context() as patch:
        patch.setattr("study.ledger.outage.PATIENCE_SECONDS", 0.0)
        after_records(patch, 2, go_away)
        outcome = run_printing_to(io.StringIO(), StudyDirectory(tmp_path / "kept", url), file)
    assert outcome.aborted.startswith("the ledger is unreachable: ")
    assert "\n" not in outcome.aborted
    assert POSTGRESQL_PASSWORD not in outcome.aborted
    assert (outcome.n_complete, outcome.n_missing) == (2, 6)
    allow_connections(url, allowed=True)
    assert run_in(StudyDirectory(tmp_path / "kept", url), file).n_missing == 0


def test_hold_that_another_driver_took_meanwhile_stops_the_study(tmp_path, new_database, monkeypatch):  # noqa: F811
    url, file = new_database("taken"), write_study(tmp_path)
    with contextlib.ExitStack() as other, monkeypatch.context() as patch:

        def take():
            drop_connections(url)
            other.enter_context(hold_ledger(url, "tiny"))

        after_records(patch, 2, take)
        outcome = run_printing_to(io.StringIO(), StudyDirectory(tmp_path / "kept", url), file)
    said = r"the ledger was unreachable for a while, and now: "
    said += r"study tiny: another driver runs it in this ledger: process \d+@"
    assert re.match(said, outcome.aborted)
    assert (outcome.n_complete, outcome.n_missing) == (2, 6)
    assert run_in(StudyDirectory(tmp_path / "kept", url), file).n_missing == 0


def test_study_that_another_driver_finished_meanwhile_is_not_gone_on_with(tmp_path, new_database, monkeypatch):  # noqa: F811
    url, file = new_database("finished"), write_study(tmp_path)

    def finish():
        drop_connections(url)
        with monkeypatch.context() as other:
            other.undo()
            assert run_in(StudyDirectory(tmp_path / "elsewhere", url), file).n_missing == 0

    with monkeypatch.context() as patch:
        after_records(patch, 2, finish)
        outcome = run_printing_to(io.StringIO(), StudyDirectory(tmp_path / "kept", url), file)
    assert outcome.aborted == "the ledger was unreachable for a while, and now: another driver has worked on this study"
    assert len(read_ledger(url, "tiny").results) == 8
    assert len(read_ledger(url, "tiny").trials) == 4


def test_act_whose_answer_was_lost_is_done_once(tmp_path, new_database, monkeypatch):  # noqa: F811
    """The connection fails just after each kind of write, which is then tried again."""
    url, file = new_database("answers"), write_study(tmp_path, arms=[DENSE, MPO | {"chi": [2, 500, 1000]}], seeds=1)
    asked, told, recorded = [], [], []

    def once(done, act, name):
        original = getattr(act, name)

        def failing(self, *arguments, **options):
            answer = original(self, *arguments, **options)
            if not done:
                done.append(1)
                raise sa.exc.OperationalError("", None, ConnectionError("its answer was lost"))
            return answer

        monkeypatch.setattr(act, name, failing)

    once(asked, optuna.storages.RDBStorage, "set_trial_user_attr")
    once(told, optuna.Study, "tell")
    once(recorded, Ledger, "_tell_what_is_over")
    outcome = run_printing_to(io.StringIO(), StudyDirectory(tmp_path / "kept", url), file)
    assert asked == told == recorded == [1]
    assert (outcome.aborted, outcome.n_trials, outcome.n_complete, outcome.n_missing) == (None, 4, 3, 0)
    assert len(optuna_states(url)) == 4
    assert {state for state, _ in optuna_states(url)} == {"COMPLETE"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:////tmp/x.db", r"--ledger sqlite:.*: must be a PostgreSQL database"),
        ("http://user:secret-word@host/x", r"--ledger http://user:\*\*\*@host/x: must be a PostgreSQL database"),
        ("nonsense", r"--ledger nonsense: must be a PostgreSQL database"),
    ],
)
def test_ledger_url_that_is_none_is_refused(tmp_path, url, message):
    with pytest.raises(StudyError, match=message):
        StudyDirectory(tmp_path, url)


def test_ledger_that_cannot_be_reached_is_one_line_without_its_password(tmp_path):
    url = f"postgresql://postgres:{POSTGRESQL_PASSWORD}@127.0.0.1:9/x"
    code, out, err = cli("run", write_study(tmp_path), "--dir", "kept", "--ledger", url, cwd=tmp_path)
    assert code == 2
    assert re.match(r"mpo-study: cannot open the ledger postgresql://postgres:\*\*\*@127.0.0.1:9/x: ", err)
    assert len(err.splitlines()) == 1
    assert POSTGRESQL_PASSWORD not in out + err


def test_mlflow_in_a_database_that_is_away_is_said_at_once_and_the_study_goes_on(tmp_path):
    url = f"postgresql://postgres:{POSTGRESQL_PASSWORD}@127.0.0.1:9/x"
    file = write_study(tmp_path, seeds=1, arms=[DENSE])
    code, out, err = cli("run", file, "--dir", "kept", "--executor", "inline", "--tracking", url, cwd=tmp_path)
    assert code == 1, err
    assert "cannot reach MLflow at postgresql://postgres:***@127.0.0.1:9/x: " in out
    assert "1 runs complete" in out
    assert POSTGRESQL_PASSWORD not in out + err


@pytest.mark.fault
def test_study_on_postgresql_alone_killed_and_resumed_holds_each_run_once(tmp_path, new_database):  # noqa: F811
    """The ledger and MLflow in two databases, the units on Ray; no password in any word."""
    ledger, mlflow = new_database("ledger"), new_database("mlflow")
    long = {"protocol": {"steps": 400, "eval_every": 40}, "execution": {"checkpoint_seconds": 0.1}}
    write_study(tmp_path, **long)
    command = ("run", "tiny.yaml", "--dir", "kept", "--ledger", ledger, "--tracking", mlflow)
    driver = start_cli(*command, cwd=tmp_path)
    for line in driver.stdout:
        if line.startswith("3/"):
            break
    else:
        raise AssertionError(driver.stderr.read())
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    code, out, err = cli("run", "tiny.yaml", "--dir", "kept", cwd=tmp_path)  # both are remembered
    assert code == 0, err
    assert "4 trials, 8 runs complete" in out
    assert POSTGRESQL_PASSWORD not in out + err
    run_at(tmp_path / "tiny.yaml", tmp_path / "local")
    assert substance_of(ledger) == substance_of(StudyDirectory(tmp_path / "local").ledger_url)
    loaded = load_study(resolve_study(tmp_path / "kept"))
    assert (len(loaded.seeds), len(loaded.failures), len(loaded.unfinished)) == (8, 0, 0)
    assert not (tmp_path / "kept" / "mlflow.db").exists()
    code, out, err = cli("status", "kept", cwd=tmp_path)
    assert (code, POSTGRESQL_PASSWORD in out + err) == (0, False)
    assert "complete" in out.splitlines()[-1]


def test_mlflow_is_back_after_its_database_was_restarted(tmp_path, _postgresql, new_database):  # noqa: F811, PT019
    file, directory, url, said = write_study(tmp_path), StudyDirectory(tmp_path / "kept"), new_database("restarted"), []
    run_at(file, directory.path)
    config, ledger = load_config(file), ledger_at(file, directory.path)
    storage, record = Storage(directory.storage_url()), study_record(config, ledger, study_corpus(config))
    claims = {"margins": {}, "contrasts": [{"arm": "a" * 64, "against": "b" * 64}] * 100}
    record = replace(record, claims=json.dumps(claims), description="χ" * 30_000)  # more than a column of it takes
    background = BackgroundTracker(lambda sign: open_tracker(url, directory, storage, record), said.append)
    first, *others = ledger.trials.values()

    def put(*trials):
        for trial in trials:
            background.put(trial, ledger.on_record(trial), 2)
        while background.n_pending:
            time.sleep(0.05)

    put(first)
    from pgserver._commands import pg_ctl  # which looks for a folder that the fixture gives it

    pg_ctl(["-w", "-m", "fast", "stop"], pgdata=_postgresql.pgdata, user=_postgresql.system_user)
    background.put(others[0], ledger.on_record(others[0]), 2)
    while not said:
        time.sleep(0.05)
    _postgresql.ensure_postgres_running()
    put(*others)
    assert background.close(0) is None
    assert said[0].startswith("MLflow is unreachable, the study continues and will write to it later: ")
    assert (len(said), said[1]) == (2, "MLflow is reachable again")
    runs = load_study(StudyAddress(url, "tiny", ledger.uuid))
    assert (len(runs.seeds), len(runs.claims.contrasts), runs.n_missing) == (8, 100, 0)
    ledger.close()
    sync(config, directory, None, url)  # whose claims are others
    assert len(load_study(StudyAddress(url, "tiny", ledger.uuid)).claims.contrasts) < 100
    before = everything_of(url)
    sync(config, directory, None, url)
    assert everything_of(url) == before
    assert len(before["runs"]) == 13


def everything_of(url):
    """All rows of MLflow's runs."""
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        found = {
            table: sorted(map(tuple, connection.execute(sa.text(f"SELECT * FROM {table}"))), key=str)
            for table in ("runs", "tags", "params", "metrics", "latest_metrics")
        }
    engine.dispose()
    return found


def test_artifacts_of_a_moved_folder_open_where_mlflow_is_in_postgresql(tmp_path, new_database):  # noqa: F811
    file, url = write_study(tmp_path, seeds=1, arms=[DENSE]), new_database("moved")
    run_at(file, tmp_path / "kept", tracking=url)
    (tmp_path / "kept").rename(tmp_path / "moved")
    assert run_at(file, tmp_path / "moved", tracking=None).tracking_trouble is None
    assert str(everything_of(url)).count(f"file://{tmp_path}/moved/mlartifacts/") == 3
    assert f"{tmp_path}/kept" not in str(everything_of(url)["runs"])
    assert not (tmp_path / "kept").exists()
