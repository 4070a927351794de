"""Giving up searched trials: by what evidence, which never, and that it is decided once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from study_fixtures import DENSE, SEARCHED, ledger_at, made_up, optuna_states, results_at, run_at, write_search

from study.ledger.directory import StudyDirectory
from study.ledger.snapshot import read_ledger
from study.scheduler.queue import Queue
from study.spec.study_file import load_config
from study.training.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

FOUND = {"name": "found", "family": "mpo", "chi": {"choices": [2, 4]}, "learning_rate": {"low": 1e-4, "high": 1e-1}}
LISTED = {"name": "listed", "family": "mpo", "chi": [2, 4]}
NARROW = {"name": "narrow", "family": "dense", "d_model": 4, "learning_rate": {"choices": [1e-3, 1e-2]}}


def write(folder, arms=(DENSE, FOUND), trials=6, margin=0.1, **changes):
    search = {"early_stopping": {"margin": margin} | changes.pop("early_stopping", {})}
    return write_search(folder, trials=trials, arms=list(arms), search=search, **{"seeds": 4} | changes)


def opened(file, folder):
    """The ledger with all its trials asked."""
    ledger = ledger_at(file, folder)
    while ledger.ask() is not None:
        pass
    return ledger


def of_chi(ledger, chi):
    return [t.number for t in ledger.trials.values() if t.spec.chi == chi and t.spec.arm == "found"]


def record(ledger, trial, losses, first_seed=0):
    for seed, loss in enumerate(losses, first_seed):
        ledger.record(made_up(trial, seed, loss=loss))


@pytest.fixture
def ledger(tmp_path):
    return opened(write(tmp_path), tmp_path / "study")


def test_trial_is_stopped_that_a_rival_beats_on_every_shared_seed(ledger, tmp_path):
    (small, *_), (large, *_) = of_chi(ledger, 2), of_chi(ledger, 4)
    record(ledger, small, [1.0, 1.0, 1.0])
    record(ledger, large, [1.2])
    assert ledger.trials[large].stop is None  # one seed is too few
    record(ledger, large, [1.1], first_seed=1)
    stop = ledger.trials[large].stop
    assert (stop.rival, stop.seeds, stop.own, stop.rivals) == (small, (0, 1), (1.2, 1.1), (1.0, 1.0))
    assert (stop.after, stop.margin, stop.metric) == ((large, 1), 0.1, "val_loss")
    assert stop.reason == (
        f"trial {small} is better in val_loss by 0.1 or more on every seed shared: "
        "seed 0: 1.0000 against 1.2000, seed 1: 1.0000 against 1.1000"
    )
    assert ledger.tally.missing_seeds(ledger.trials[large]) == []
    assert large not in [trial.number for trial in ledger.lacking()]
    state, values = optuna_states(StudyDirectory(tmp_path / "study").ledger_url)[large]
    assert (state, values) == ("COMPLETE", [ledger.trials[large].shape.n_params, pytest.approx(1.15)])


def test_trial_is_stopped_when_its_rival_comes_later(ledger):
    small, large = of_chi(ledger, 2)[0], of_chi(ledger, 4)[0]
    record(ledger, large, [1.5, 1.5])
    record(ledger, small, [1.0])
    assert ledger.trials[large].stop is None
    record(ledger, small, [1.0], first_seed=1)
    assert ledger.trials[large].stop.after == (small, 1)


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ([1.0, 1.0, 1.0], [1.5, 1.09]),  # not by the margin on every seed
        ([1.0, 1.0, 1.0], [1.5, 0.5]),
        ([1.5, 1.5, 1.5], [1.0, 1.0]),  # the rival with fewer parameters loses, and is itself safe
        ([1.0, 1.0, 1.0], [1.5]),
        ([1.0], [1.5, 1.5, 1.5]),
    ],
)
def test_trial_goes_on_where_the_evidence_is_less(ledger, small, large):
    record(ledger, of_chi(ledger, 2)[0], small)
    record(ledger, of_chi(ledger, 4)[0], large)
    assert all(trial.stop is None for trial in ledger.trials.values())


def test_rival_with_a_failed_seed_or_another_schedule_stops_nobody(tmp_path):
    long = LISTED | {"chi": 2, "steps": 12}
    ledger = opened(write(tmp_path, arms=[long, FOUND]), tmp_path / "study")
    large = of_chi(ledger, 4)[0]
    record(ledger, 0, [1.0, 1.0, 1.0])  # trained twice as long
    failing = of_chi(ledger, 2)[0]
    ledger.record(made_up(failing, 3, failure="diverged"))
    record(ledger, failing, [1.0, 1.0])
    record(ledger, large, [1.5, 1.5, 1.5])
    assert all(trial.stop is None for trial in ledger.trials.values())


def test_listed_and_dense_trials_are_never_stopped(tmp_path):
    ledger = opened(write(tmp_path, arms=[DENSE, LISTED, FOUND, NARROW], trials=12), tmp_path / "study")
    assert {trial.spec.arm for trial in ledger.trials.values()} == {"dense", "listed", "found", "narrow"}
    best = min(ledger.trials.values(), key=lambda trial: trial.shape.n_params).number
    record(ledger, best, [0.5] * 4)
    for trial in list(ledger.trials.values()):
        if trial.number != best and trial.duplicate_of is None:
            record(ledger, trial.number, [9.0, 9.0, 9.0])
    stopped = {trial.spec.arm for trial in ledger.trials.values() if trial.stop is not None}
    assert stopped == {"found"}


def test_finished_trial_is_not_stopped(ledger):
    small, large = of_chi(ledger, 2)[0], of_chi(ledger, 4)[0]
    record(ledger, large, [1.5] * 4)
    record(ledger, small, [1.0] * 4)
    assert ledger.trials[large].stop is None


def test_block_of_seeds_is_judged_as_a_whole(ledger):
    small, large = of_chi(ledger, 2)[0], of_chi(ledger, 4)[0]
    record(ledger, small, [1.0] * 3)
    ledger.record(*(made_up(large, seed, loss=loss) for seed, loss in enumerate([1.5, 1.5, 0.5])))
    assert ledger.trials[large].stop is None  # its third seed says otherwise, and came with the others
    other = of_chi(ledger, 4)[1]
    ledger.record(*(made_up(other, seed, loss=1.5) for seed in range(4)))
    assert ledger.trials[other].stop is None  # nothing of it is left to be spared


def test_listed_trial_that_a_study_grows_by_does_not_share_the_fate_of_a_searched_one(tmp_path):
    ledger = opened(write(tmp_path), tmp_path / "study")
    small, large = of_chi(ledger, 2)[0], of_chi(ledger, 4)[0]
    record(ledger, small, [1.0, 1.0])
    record(ledger, large, [1.5, 1.5])
    spec = ledger.trials[large].spec
    assert ledger.trials[large].stop is not None
    ledger.close()
    arm = {"name": "listed", "family": "mpo", "chi": 4, "learning_rate": spec.protocol.learning_rate}
    grown = ledger_at(write(tmp_path, arms=[DENSE, FOUND, arm]), tmp_path / "study", extend=True)
    trial = grown.ask()
    assert trial.spec.arm == "listed"
    assert (trial.duplicate_of, trial.stop) == (None, None)
    assert trial.shape.identity == grown.trials[large].shape.identity
    assert grown.tally.missing_seeds(trial) == [0, 1, 2, 3]


def test_accuracy_may_decide(tmp_path):
    file = write(tmp_path, early_stopping={"metric": "val_acc"}, margin=0.05, objectives=["n_params", "val_acc"])
    ledger = opened(file, tmp_path / "study")
    small, large = of_chi(ledger, 2)[0], of_chi(ledger, 4)[0]
    record(ledger, small, [1.0, 1.0])  # accuracy 1 / (1 + loss)
    record(ledger, large, [1.5, 1.5])
    assert ledger.trials[large].stop.own == (0.4, 0.4)


def test_decision_is_replayed_not_made_again(ledger, tmp_path):
    small, large = of_chi(ledger, 2)[0], of_chi(ledger, 4)[0]
    record(ledger, small, [1.0, 1.0])
    record(ledger, large, [1.5, 1.5])
    record(ledger, small, [9.0], first_seed=2)
    ledger.record(made_up(large, 2, loss=0.1))  # was in flight: kept, and the decision stands
    before = dict(ledger.trials)
    ledger.close()
    again = ledger_at(write(tmp_path), tmp_path / "study")
    assert again.trials == before
    assert again.trials[large].stop.seeds == (0, 1)
    assert again.tally.missing_seeds(again.trials[large]) == []
    snapshot = read_ledger(StudyDirectory(tmp_path / "study").ledger_url, "search-random")
    assert snapshot.trials == list(before.values())


def test_reopening_leaves_a_stopped_trial_as_it_is(ledger):
    small, large = of_chi(ledger, 2)[0], of_chi(ledger, 4)[0]
    record(ledger, small, [1.0] * 4)
    ledger.record(made_up(large, 3, failure="the worker died"))
    record(ledger, large, [1.5, 1.5])
    assert ledger.trials[large].stop is not None
    ledger.reopen([ledger.results[large, 3]])
    assert (large, 3) in ledger.results


def test_queue_issues_no_more_seeds_and_knows_what_to_cancel(tmp_path):
    file = write(tmp_path)
    ledger = opened(file, tmp_path / "study")
    queue = Queue(load_config(file), ledger, Storage(str(tmp_path / "storage")), "0" * 64)
    small, large = of_chi(ledger, 2)[0], of_chi(ledger, 4)[0]
    units = {}
    while (unit := queue.next_unit()) is not None:
        units[unit.trial, unit.seeds[0]] = unit
    for trial, loss in ((small, 1.0), (large, 1.5)):
        for seed in (0, 1):
            queue.complete([replace(made_up(trial, seed, loss=loss))])
    assert queue.is_cancelled(units[large, 2])
    assert not queue.is_cancelled(units[small, 2])
    queue.put_back(units[large, 2])
    assert queue.next_unit() is None  # all else is in flight


def test_study_with_early_stopping_runs_and_resumes(tmp_path):
    file = write(tmp_path, arms=[DENSE, SEARCHED], trials=5, margin=1e-6, seeds=3)
    outcome = run_at(file, tmp_path / "study")
    assert outcome.n_stopped > 0
    assert outcome.n_missing == 0
    results = results_at(tmp_path / "study", "search-random")
    assert outcome.n_complete == len(results) < 3 * outcome.n_trials
    again = run_at(file, tmp_path / "study")
    assert again == outcome
    assert results_at(tmp_path / "study", "search-random") == results


def test_a_seed_without_the_metric_decides_nothing(ledger):
    (small, *_), (large, *_) = of_chi(ledger, 2), of_chi(ledger, 4)
    record(ledger, small, [1.0, 1.0, 1.0])
    for key in ledger.results:
        del ledger.results[key].final["final/val_loss"]
    record(ledger, large, [1.2, 1.2])
    assert ledger.trials[large].stop is None
