from __future__ import annotations

import sqlite3

import pytest
import torch
from sqlalchemy.exc import OperationalError
from study_fixtures import DENSE, MPO, SEARCHED, TUNED, ledger_at, made_up, write_search, write_study

from study.commands.opening import study_corpus
from study.ledger.lock import Hold
from study.scheduler.queue import Queue, study_chis
from study.spec.study_file import load_config
from study.training.storage import Storage
from study.training.unit import Unit, checkpoints_of


@pytest.fixture
def open_queue(tmp_path):
    """Opens a queue over the study of a file, each time over the same ledger."""

    def make(file, **options):
        config = load_config(file)
        ledger = ledger_at(file, tmp_path / "study")
        return Queue(config, ledger, Storage(str(tmp_path / "storage")), study_corpus(config).sha256, **options)

    return make


def names(units):
    return [(unit.spec.arm, unit.spec.chi, unit.seeds) for unit in units]


def take(queue, n):
    return [queue.next_unit() for _ in range(n)]


def finish(queue, unit, failure=None):
    weights = {} if failure else {"weights": f"{unit.trial}-{unit.seeds[0]}"}
    result = made_up(unit.trial, unit.seeds[0], failure=failure)
    queue.complete([type(result)(**(result.__dict__ | weights))])


def test_queue_issues_every_run_of_the_study_once(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, arms=[MPO, TUNED, DENSE]))
    issued = []
    while isinstance(unit := queue.next_unit(), Unit):
        issued.append(unit)
        finish(queue, unit)
    expected = [("mpo", 2), ("mpo", 4), ("tuned", 2), ("dense", None)]
    assert sorted(names(issued), key=str) == sorted(((a, c, (s,)) for a, c in expected for s in (0, 1)), key=str)
    assert unit == "finished"
    assert queue.next_unit() == "finished"


def test_queue_waits_for_a_start_seed_by_seed(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, arms=[TUNED, DENSE]))
    first, second = take(queue, 2)
    assert names([first, second]) == [("dense", None, (0,)), ("dense", None, (1,))]
    assert queue.next_unit() is None
    finish(queue, second)
    third = queue.next_unit()
    assert names([third]) == [("tuned", 2, (1,))]
    assert third.starts.weights == {1: "0-1"}
    assert third.starts.tokens == first.spec.train_tokens
    assert queue.next_unit() is None
    finish(queue, third)
    assert queue.next_unit() is None
    finish(queue, first)
    finish(queue, queue.next_unit())
    assert queue.next_unit() == "finished"


def test_queue_keeps_the_weights_of_starts_alone(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, seeds=1, arms=[DENSE, MPO, TUNED]))
    kept = {}
    while isinstance(unit := queue.next_unit(), Unit):
        kept[unit.spec.arm] = unit.keep_weights
        finish(queue, unit)
    assert kept == {"dense": True, "mpo": False, "tuned": False}


def test_queue_fails_what_depends_on_a_failed_start(tmp_path, open_queue):
    told = []
    queue = open_queue(write_study(tmp_path, arms=[DENSE, TUNED]), on_result=told.append)
    first, second = take(queue, 2)
    finish(queue, first, failure="diverged: far off")
    finish(queue, second)
    third = queue.next_unit()
    assert names([third]) == [("tuned", 2, (1,))]
    failed = queue.ledger.results[1, 0]
    assert failed.state == "failed"
    assert failed.failure == "its start (arm dense, seed 0) failed: diverged: far off"
    assert failed in told
    finish(queue, third)
    assert queue.next_unit() == "finished"


def test_queue_ends_when_the_last_units_fail_with_their_starts(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, arms=[DENSE, TUNED]))
    for unit in take(queue, 2):
        finish(queue, unit, failure="no")
    assert queue.next_unit() == "finished"
    assert len(queue.ledger.results) == 4


def test_queue_issues_again_what_is_put_back(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, arms=[DENSE]))
    first, second = take(queue, 2)
    assert queue.next_unit() is None
    queue.put_back(first)
    assert queue.next_unit() == first
    finish(queue, first)
    finish(queue, second)
    assert queue.next_unit() == "finished"


def test_queue_does_not_count_a_death_with_its_node(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, seeds=1, arms=[DENSE]))
    for _ in range(5):
        unit = queue.next_unit()
        queue.note_begin(unit)
        queue.note_death(unit, "gone")
        queue.forgive_death(unit)
    for _ in range(2):
        queue.note_begin(queue.next_unit())
        queue.note_death(unit, "killed")
    assert queue.ledger.results == {}
    queue.note_begin(queue.next_unit())
    queue.note_death(unit, "killed")
    assert queue.ledger.results[0, 0].failure == "its worker died 3 times without progress: killed"


def test_queue_gives_up_a_unit_whose_worker_dies_three_times_without_progress(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, seeds=1, arms=[DENSE]))
    unit = queue.next_unit()
    queue.note_begin(unit)
    queue.note_progress(unit, 0, 2)
    for _ in range(2):
        queue.note_death(unit, "killed")
        assert queue.next_unit() == unit
        queue.note_begin(unit)
        queue.note_progress(unit, 0, 0)
        queue.note_progress(unit, 0, 2)  # as far as before, and no further
    queue.note_death(unit, "killed")
    assert queue.ledger.results[0, 0].failure == "its worker died 3 times without progress: killed"
    assert queue.next_unit() == "finished"


def test_queue_forgets_deaths_where_there_is_progress(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, seeds=1, arms=[DENSE]))
    unit = queue.next_unit()
    for step in range(10):
        queue.note_begin(unit)
        queue.note_progress(unit, 0, step)
        for _ in range(2):
            queue.note_death(unit, "killed")
            assert queue.next_unit() == unit
            queue.note_begin(unit)
    assert queue.ledger.results == {}


def test_queue_leaves_a_unit_that_no_worker_begins_for_the_next_run(tmp_path, open_queue):
    file = write_study(tmp_path, seeds=1, arms=[MPO])
    queue = open_queue(file)
    first, second = take(queue, 2)
    for _ in range(3):
        queue.note_begin(second)  # so that these deaths are none in a row
        queue.note_death(first, "no module named study")
        if queue._given_up:
            break
        assert queue.next_unit() == first
    assert queue.next_unit() is None
    finish(queue, second)
    assert queue.next_unit() == "finished"
    assert queue.aborted == "1 run given up after 3 workers for each died before they began: no module named study"
    assert list(queue.ledger.results) == [(1, 0)]
    queue.ledger.close()
    assert open_queue(file).next_unit() == first


def test_queue_stops_where_no_worker_comes_up_and_fails_nothing(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, seeds=5, arms=[MPO]))
    for _ in range(9):
        queue.note_death(queue.next_unit(), "no module named study")
    assert queue.aborted is None
    queue.note_death(queue.next_unit(), "no module named study")
    assert queue.aborted == "10 workers in a row died before they began a run: no module named study"
    assert queue.next_unit() == "finished"
    assert queue.ledger.results == {}


def test_queue_asks_for_what_waits_for_a_start_only_when_it_has_one(tmp_path, open_queue):
    tuned = [TUNED | {"name": f"tuned{chi}", "chi": chi} for chi in (1, 2, 3)]
    queue = open_queue(write_study(tmp_path, arms=[*tuned, DENSE]))
    unit, _ = take(queue, 2)
    assert queue.next_unit() is None
    assert [trial.spec.arm for trial in queue.ledger.trials.values()] == ["dense"]
    finish(queue, unit)
    assert names(take(queue, 3)) == [(f"tuned{chi}", chi, (0,)) for chi in (1, 2, 3)]


def test_queue_asks_no_more_of_the_sampler_while_its_last_trial_waits_for_a_start(tmp_path, open_queue):
    found = SEARCHED | {"start": "dense", "chi": {"low": 1, "high": 9}}
    queue = open_queue(write_search(tmp_path, arms=[DENSE, TUNED, found], trials=4, seeds=1))
    unit = queue.next_unit()
    assert queue.next_unit() is None
    assert [trial.spec.arm for trial in queue.ledger.trials.values()] == ["dense"]
    finish(queue, unit)
    second, third = take(queue, 2)
    assert [second.spec.arm, third.spec.arm] == ["tuned", "found"]
    assert len(queue.ledger.trials) == 3


def test_queue_stops_where_the_ledger_cannot_be_written_and_goes_on_later(tmp_path, open_queue):
    file = write_study(tmp_path, seeds=1, arms=[MPO])
    queue = open_queue(file)
    first, second = take(queue, 2)
    with sqlite3.connect(tmp_path / "study" / "ledger.db") as other:
        other.execute("ALTER TABLE mpo_result RENAME TO away")
    finish(queue, first)
    assert "the ledger cannot be written: (sqlite3.OperationalError) no such table: mpo_result" in str(queue.aborted)
    assert queue.next_unit() == "finished"
    with other:
        other.execute("ALTER TABLE away RENAME TO mpo_result")
    other.close()
    queue.ledger.close()
    again = open_queue(file)
    assert take(again, 2) == [first, second]


def test_queue_issues_what_was_asked_last_as_the_connection_was_lost(tmp_path, open_queue, monkeypatch):
    """The trial is written, and its answer never comes: nothing else is left to be asked."""
    monkeypatch.setattr("study.ledger.outage._PAUSE_SECONDS", 0)
    monkeypatch.setattr(Hold, "may_be_lost", True)
    queue = open_queue(write_study(tmp_path, seeds=1, arms=[DENSE]))
    remember = queue.ledger._remember

    def lose_the_answer(trial):
        monkeypatch.setattr(queue.ledger, "_remember", remember)
        raise OperationalError("", {}, Exception("the connection was lost"))

    monkeypatch.setattr(queue.ledger, "_remember", lose_the_answer)
    assert names(take(queue, 1)) == [("dense", None, (0,))]
    assert queue.next_unit() is None
    assert list(queue.ledger.trials) == [0]


def test_queue_issues_no_more_once_aborted(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path))
    queue.next_unit()
    queue.aborted = "storage is full"
    assert queue.next_unit() == "finished"


def test_queue_begun_again_issues_only_what_is_missing(tmp_path, open_queue):
    file = write_study(tmp_path, arms=[DENSE, MPO])
    queue = open_queue(file)
    first, _in_flight, third = take(queue, 3)
    finish(queue, first)
    finish(queue, third)
    queue.ledger.close()
    again = open_queue(file)
    units = []
    while isinstance(unit := again.next_unit(), Unit):
        units.append(unit)
    assert names(units) == [("dense", None, (1,)), ("mpo", 2, (1,)), ("mpo", 4, (0,)), ("mpo", 4, (1,))]


def test_queue_removes_the_checkpoints_of_a_finished_run(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, seeds=2, arms=[DENSE]))
    first, second = take(queue, 2)
    for unit in (first, second):
        checkpoints_of(queue.storage, unit.study_uuid, unit.trial, unit.seeds[0]).save(3, {"x": torch.ones(1)}, {})
    finish(queue, first)
    assert checkpoints_of(queue.storage, first.study_uuid, 0, 0).load() is None
    assert checkpoints_of(queue.storage, first.study_uuid, 0, 1).load() is not None


def test_queue_keeps_a_result_and_stops_where_storage_is_away(tmp_path, open_queue):
    told = []
    queue = open_queue(write_study(tmp_path, arms=[DENSE]), on_result=told.append)
    unit = queue.next_unit()
    (tmp_path / "storage").write_text("a file where a folder was")
    finish(queue, unit)
    assert queue.ledger.results[0, 0].state == "complete"
    assert told == [queue.ledger.results[0, 0]]
    assert "Not a directory" in str(queue.aborted)


def test_queue_never_issues_a_duplicate(tmp_path, open_queue):
    queue = open_queue(write_study(tmp_path, seeds=1, arms=[MPO | {"chi": [500, 1000]}]))
    unit = queue.next_unit()
    assert unit.spec.chi == 500
    assert queue.next_unit() is None
    finish(queue, unit)
    assert queue.next_unit() == "finished"
    assert [trial.duplicate_of for trial in queue.ledger.trials.values()] == [None, 0]


def test_study_chis_are_the_listed_ones_and_powers_of_two_in_a_range(tmp_path):
    arms = [DENSE, SEARCHED | {"chi": {"low": 3, "high": 20}}, {"name": "few", "family": "mpo", "chi": 5}]
    assert study_chis(load_config(write_search(tmp_path, arms=arms))) == (3, 4, 5, 8, 16, 20)
    more = load_config(write_search(tmp_path, arms=arms, rel_error_chi=[2, 5]))
    assert study_chis(more) == (2, 3, 4, 5, 8, 16, 20)
