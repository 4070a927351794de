"""Runs that do not report: what is said of them, what `status` reads, and when a unit counts as dead."""

from __future__ import annotations

import json
import os
import socket

import pytest
from study_fixtures import DENSE, ledger_at, write_study

from study.commands.opening import study_corpus
from study.ledger.directory import StudyDirectory
from study.scheduler.queue import Queue
from study.scheduler.reports import SILENT_SECONDS, Flights, Silence, SilenceWatch, read_reports
from study.spec.study_file import load_config
from study.training.storage import Storage


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def watched(tmp_path, clock):
    """Flights, one look at them, and what was shown at each: (all long silences, those said again)."""
    flights, shown = Flights(clock), []
    watch = SilenceWatch(flights, tmp_path / "reports.json", lambda lines, anew: shown.append((lines, anew)))

    def look(at):
        clock.now = at
        watch.look()
        return shown[-1]

    return flights, look


def test_silence_is_said_after_ten_minutes_and_every_ten_again(watched):
    flights, look = watched
    flights.issue([(3, 0), (4, 0), (4, 1)])
    assert look(5000) == ([], [])  # no worker yet: that is the cluster's business
    flights.note([(3, 0)])
    flights.note([(4, 0), (4, 1)], begins=True)
    assert look(5000 + SILENT_SECONDS - 1) == ([], [])
    both = [
        "trial 3, seed 0 has not reported for 10 minutes",
        "trial 4, seeds 0, 1 have not reported for 10 minutes",
    ]
    assert look(5000 + SILENT_SECONDS) == (both, both)
    lines, anew = look(5000 + SILENT_SECONDS + 59)
    assert (lines, anew) == (both, [])
    flights.note([(3, 0)])
    lines, anew = look(5000 + 2 * SILENT_SECONDS)
    assert lines == anew == ["trial 4, seeds 0, 1 have not reported for 20 minutes"]
    flights.end([(4, 0), (4, 1)])
    assert look(5000 + 3 * SILENT_SECONDS)[1] == ["trial 3, seed 0 has not reported for 19 minutes"]
    flights.note([(4, 0)])  # of a unit that is back already
    assert list(flights) == [(3, 0)]


def test_reports_are_on_record_for_another_process(watched, tmp_path, clock):
    flights, look = watched
    file = tmp_path / "reports.json"
    flights.issue([(3, 0), (3, 1), (7, 2)])
    flights.note([(3, 0), (3, 1)])
    look(120)
    written = file.read_bytes()
    [one] = read_reports(file, os.getpid())
    assert (one.trial, one.seeds) == (3, (0, 1))
    assert 119 <= one.seconds < 180
    assert file.stat().st_mode & 0o777 == 0o600
    flights.note([(7, 2)])
    look(121)
    assert file.read_bytes() != written
    assert {one.trial for one in read_reports(file, os.getpid())} == {3, 7}
    assert read_reports(file, os.getpid() + 1) == []  # of a driver that was killed
    for damaged in ("", "[]", '{"pid": 1}', json.dumps({"pid": os.getpid(), "runs": [[1, 2]]})):
        file.write_text(damaged)
        assert read_reports(file, os.getpid()) == []


def test_watch_looks_without_any_event_and_takes_its_file_with_it(tmp_path):
    flights, file = Flights(), tmp_path / "reports.json"
    flights.issue([(0, 0)])
    flights.note([(0, 0)])
    with SilenceWatch(flights, file, lambda lines, anew: None) as watch:
        while not read_reports(file, os.getpid()):
            assert watch._thread.is_alive()
    assert not file.exists()


def test_status_names_runs_that_have_not_reported_for_long(tmp_path, command, monkeypatch):
    file = write_study(tmp_path, arms=[DENSE])
    folder = tmp_path / "kept"
    ledger = ledger_at(file, folder)
    ledger.ask()
    StudyDirectory(folder).write(ledger.config, ledger.uuid, None, str(tmp_path / "storage"))
    ledger.close()
    (folder / "driver.json").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    clock = Clock()
    flights = Flights(clock)
    flights.issue([(0, 0), (0, 1)])
    flights.note([(0, 0)])
    clock.now = 1530
    flights.note([(0, 1)])
    SilenceWatch(flights, folder / "reports.json", lambda lines, anew: None).look()
    code, out, _ = command("status", folder)
    assert code == 0
    assert "trial 0, seed 0 has not reported for 25 minutes" in out
    assert "seed 1 has not reported" not in out
    running = json.loads(command("status", folder, "--json")[1])["running"]
    assert [(one["trial"], one["seeds"]) for one in running] == [(0, [0]), (0, [1])]
    assert 1500 <= running[0]["seconds_since_report"] < 1800
    (folder / "driver.json").unlink()
    assert json.loads(command("status", folder, "--json")[1])["running"] == []


# A limit --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(tmp_path, clock):
    """Opens a queue over one run, with this limit."""

    def make(limit):
        file = write_study(tmp_path, seeds=1, arms=[DENSE], execution={"unit_timeout": limit} if limit else {})
        config = load_config(file)
        ledger = ledger_at(file, tmp_path / "study")
        storage = Storage(str(tmp_path / "storage"))
        return Queue(config, ledger, storage, study_corpus(config).sha256, in_flight=Flights(clock))

    return make


def test_unit_is_overdue_after_its_limit_and_fails_the_third_time(timed, clock):
    queue = timed(30)
    for _ in range(3):
        unit = queue.next_unit()
        clock.now += 1000
        assert queue.why_overdue(unit) is None  # it waits for a worker
        queue.note_worker(unit)
        clock.now += 31
        assert queue.why_overdue(unit) is None  # to come up takes time
        queue.note_begin(unit)
        queue.note_progress(unit, 0, 2)
        clock.now += 30
        assert queue.why_overdue(unit) is None
        clock.now += 1
        why = queue.why_overdue(unit)
        assert "31 s (execution.unit_timeout)" in why
        assert queue.ledger.results == {}
        queue.note_death(unit, why)
    assert queue.ledger.results[0, 0].failure == f"its worker died 3 times without progress: {why}"
    assert queue.next_unit() == "finished"


def test_worker_that_never_comes_up_is_overdue_after_ten_minutes_at_least(timed, clock):
    queue = timed(30)
    unit = queue.next_unit()
    queue.note_worker(unit)
    clock.now = SILENT_SECONDS + 1
    assert queue.why_overdue(unit) is not None


def test_no_unit_is_overdue_without_a_limit(timed, clock):
    queue = timed(None)
    unit = queue.next_unit()
    queue.note_begin(unit)
    clock.now = 1e9
    assert queue.why_overdue(unit) is None


def test_silence_reads_as_a_sentence():
    assert str(Silence(1, (2,), 3599)) == "trial 1, seed 2 has not reported for 59 minutes"
