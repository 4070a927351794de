"""Successive halving: who ends at a rung and by what evidence, that it is decided once, and that runs stay the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from study_fixtures import DENSE, ledger_at, made_up, optuna_states, results_at, run_at, write_search

from analysis.runs.load import load_study, resolve_study
from study.commands.exchange import export_study
from study.commands.opening import study_corpus
from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.search.halving import _Rung
from study.spec.search import rung_steps
from study.spec.search_space import example
from study.spec.study_file import load_config
from study.spec.trial import SeedResult, now
from study.training.checkpoints import Checkpoints
from study.training.seed_run import train_seed
from study.training.storage import Storage
from study.training.train import Training
from study.training.unit import checkpointed, checkpoints_of

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

FOUND = {"name": "found", "family": "mpo", "chi": {"choices": [2, 4]}, "learning_rate": {"low": 1e-4, "high": 1e-1}}
ONE_SIZE = FOUND | {"chi": {"choices": [2]}}
NAME = "search-random"
SHORT = {"objectives": ["val_loss"], "protocol": {"steps": 8}}
"""One objective, and evaluations at steps 0, 2, 4, 6 and 8."""


def write(folder, arms=(DENSE, FOUND), trials=6, halving=None, **changes):
    search = {"halving": {"rungs": [0.25, 0.5]} | (halving or {})}
    return write_search(folder, trials=trials, arms=list(arms), search=search, **{"seeds": 3} | SHORT | changes)


def paused(trial, seed, *losses):
    """A result at step 2, or at step 4 for two losses."""
    curve = [{"step": 2 * number, "val_loss": loss} for number, loss in enumerate(losses, 1)]
    final = made_up(trial, seed, loss=losses[-1]).final
    return SeedResult(trial, seed, "paused", started=now(), ended=now(), curve=curve, final=final)


@pytest.fixture
def ledger(tmp_path):
    ledger = ledger_at(write(tmp_path, arms=[DENSE, ONE_SIZE]), tmp_path / "study")
    while ledger.ask() is not None:
        pass
    assert len(ledger.trials) == 7
    return ledger


def reach(ledger, number, *losses):
    """Both deciding seeds of a trial reach its next rung with these losses of the first; returns the decision."""
    ledger.record(paused(number, 0, *losses))
    assert ledger.trials[number].stop is None  # one seed decides nothing
    ledger.record(paused(number, 1, *(loss + 0.2 for loss in losses)))
    return ledger.trials[number].stop


def test_deciding_seeds_train_up_to_each_rung_and_the_others_after_the_last(ledger):
    trial = ledger.trials[1]
    assert ledger.leg(trial) == ([0, 1], 2)
    ledger.record(paused(1, 0, 2.0))
    assert ledger.leg(trial) == ([1], 2)
    assert reach(ledger, 1, 2.0) is None
    assert ledger.leg(trial) == ([0, 1], 4)
    assert reach(ledger, 1, 2.0, 1.9) is None
    assert ledger.leg(trial) == ([0, 1, 2], None)
    assert ledger.leg(ledger.trials[0]) == ([0, 1, 2], None)  # a listed trial knows no rungs


def test_trial_outside_the_best_share_is_stopped_with_its_evidence(ledger, tmp_path):
    assert reach(ledger, 1, 2.0) is None  # the first of one
    assert reach(ledger, 2, 1.5) is None  # the better of two
    stop = reach(ledger, 3, 2.5)
    assert (stop.step, stop.place, stop.n_there, stop.seeds, stop.after) == (2, 3, 3, (0, 1), (3, 1))
    assert stop.means == {"val_loss": pytest.approx(2.6)}
    assert stop.reason == "number 3 of 3 trials at step 2, a rung (val_loss 2.6; mean of seeds 0, 1)"
    assert ledger.tally.missing_seeds(ledger.trials[3]) == []
    assert reach(ledger, 4, 1.7) is None  # second of four: the stopped trial counts
    assert reach(ledger, 2, 1.5, 1.2) is None
    assert reach(ledger, 1, 2.0, 1.9).step == 4
    state, values = optuna_states(StudyDirectory(tmp_path / "study").ledger_url)[3]
    assert (state, values) == ("COMPLETE", [pytest.approx(2.6)])  # what was measured


def test_decision_is_the_same_when_the_ledger_is_opened_again(ledger, tmp_path):
    reach(ledger, 1, 2.0)
    reach(ledger, 2, 1.5)
    stop = reach(ledger, 3, 2.5)
    ledger.close()
    again = ledger_at(write(tmp_path, arms=[DENSE, ONE_SIZE]), tmp_path / "study")
    assert again.trials[3].stop == stop
    assert again.trials[1].stop is None
    assert again.leg(again.trials[1]) == ([0, 1], 4)
    assert not again.results
    assert reach(again, 4, 1.8) is None  # second of four, known from the ledger
    assert reach(again, 5, 2.2).place == 4


def test_diverged_seed_stops_its_trial_and_a_failed_worker_does_not(ledger):
    lost = SeedResult(1, 0, "failed", started=now(), ended=now(), failure="its worker died")
    ledger.record(lost)
    ledger.record(paused(1, 1, 2.0))
    assert ledger.trials[1].stop is None
    ledger.record(SeedResult(2, 0, "failed", now(), now(), failure="diverged: the loss", failure_step=1))
    assert ledger.trials[2].stop.reason == "seed 0 diverged before step 2, a rung"
    assert reach(ledger, 3, 2.1) is None  # nobody else is there: trial 1 was not judged


def test_seed_that_diverges_after_a_rung_leaves_its_trial_there_when_the_ledger_is_opened_again(ledger, tmp_path):
    reach(ledger, 1, 2.0)
    reach(ledger, 1, 2.0, 1.9)
    late = paused(1, 0, 2.0, 1.9)
    ledger.record(replace(late, state="failed", final={}, failure="diverged: the loss", failure_step=6))
    assert ledger.trials[1].stop is None
    ledger.close()
    again = ledger_at(write(tmp_path, arms=[DENSE, ONE_SIZE]), tmp_path / "study")
    assert reach(again, 2, 2.5).place == 2


def test_paused_results_are_no_finished_runs_in_an_export(ledger, tmp_path):
    ledger.record(made_up(0, 0))
    ledger.record(paused(1, 0, 2.0))
    ledger.close()
    config = load_config(write(tmp_path, arms=[DENSE, ONE_SIZE]))
    directory = StudyDirectory(tmp_path / "study")
    directory.write(config, ledger.uuid, "off", str(tmp_path / "study" / "storage"))
    assert export_study(directory, tmp_path / "out.db.xz", print) == 1


def test_leftover_checkpoints_of_finished_and_stopped_runs_are_removed_at_the_next_start(tmp_path):
    run_at(write(tmp_path), tmp_path / "study")
    ledger = ledger_at(write(tmp_path), tmp_path / "study")
    stopped = next(trial.number for trial in ledger.trials.values() if trial.stop is not None)
    ledger.close()
    storage = Storage(str(tmp_path / "study" / "storage"))
    for number in (0, stopped):
        checkpoints_of(storage, ledger.uuid, number, 0).save(2, {"a": torch.zeros(1)}, {})
    run_at(write(tmp_path), tmp_path / "study")
    assert checkpointed(storage, ledger.uuid) == set()


@pytest.mark.parametrize("percent", range(1, 100))
def test_rung_is_the_first_evaluation_from_its_share_on(percent):
    for every in (1, 5):
        exact = -(-percent // every) * every
        assert rung_steps((percent / 100,), 100, every) == ([exact] if exact < 100 else [])


def test_checkpoint_ahead_of_the_rung_pauses_at_once(tmp_path):
    """As after a restored backup, whose ledger is older than the storage."""
    config = load_config(write(tmp_path))
    spec = example(config, config.arms[1])
    checkpoints = Checkpoints(Storage(str(tmp_path / "storage")), "run")
    corpus = study_corpus(config)
    train_seed(spec, 0, corpus, checkpoints=checkpoints, until=4)
    result, _ = train_seed(spec, 0, corpus, checkpoints=checkpoints, until=2)
    assert (result.state, result.curve[-1]["step"]) == ("paused", 4)


def test_place_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    points = rng.integers(0, 6, size=(60, 2)).astype(float)  # with ties
    rung = _Rung(2)
    for n, point in enumerate(points, 1):
        there = points[:n]
        dominating = [sum((a <= b).all() and (a < b).any() for a in there) for b in there]
        assert rung.add(n, point) == 1 + sum(number < dominating[-1] for number in dominating)


def test_study_with_halving_ends_with_the_results_of_one_without(tmp_path):
    """Whole runs are bit-identical. MLflow has the stopped trials, with the reasons."""
    whole = write_search(tmp_path / "whole", trials=6, arms=[DENSE, FOUND], **{"seeds": 3} | SHORT)
    run_at(whole, tmp_path / "without")
    outcome = run_at(write(tmp_path), tmp_path / "with", tracking=None)
    assert outcome.n_stopped > 0
    assert outcome.n_missing == 0
    without, having = results_at(tmp_path / "without", NAME), results_at(tmp_path / "with", NAME)
    assert set(having) < set(without)
    assert all(having[key].curve == without[key].curve for key in having)
    assert not list((tmp_path / "with" / "storage").rglob("checkpoints/*/*.safetensors"))
    runs = load_study(resolve_study(tmp_path / "with"))
    trials = runs.trials
    assert runs.unfinished.empty
    assert int(trials["stopped"].notna().sum()) == outcome.n_stopped
    assert set(trials.loc[trials["stopped"].notna(), "n_seeds"]) == {0}


def test_seed_whose_checkpoint_is_lost_at_a_rung_ends_with_the_same_result(tmp_path, monkeypatch):
    run_at(write(tmp_path), tmp_path / "study")
    monkeypatch.setattr(Checkpoints, "load", lambda *_: None)
    run_at(write(tmp_path), tmp_path / "lost")
    kept, lost = results_at(tmp_path / "study", NAME), results_at(tmp_path / "lost", NAME)
    assert {key: result.curve for key, result in kept.items()} == {key: result.curve for key, result in lost.items()}


def test_seeds_that_train_as_one_model_pause_and_go_on_as_they_do_without_a_rung(tmp_path, monkeypatch):
    evaluated = []
    row = Training.row

    def noted(self, *losses):
        evaluated.append((self.spec, self.sampled_windows.batch(0)[0].sum().item(), self.step))
        return row(self, *losses)

    monkeypatch.setattr(Training, "row", noted)
    stacked = {"execution": {"seeds_per_unit": 3}}
    whole = write_search(tmp_path / "whole", trials=4, arms=[DENSE, FOUND], **{"seeds": 3} | SHORT | stacked)
    run_at(whole, tmp_path / "without")
    evaluated.clear()
    run_at(write(tmp_path, trials=4, halving={"rungs": [0.5]}, **stacked), tmp_path / "with")
    without, having = results_at(tmp_path / "without", NAME), results_at(tmp_path / "with", NAME)
    searched = [key for key in having if key[0] > 0]
    assert searched
    assert len({(spec.model_dump_json(), batch, step) for spec, batch, step in evaluated}) == len(evaluated)
    for key in searched:  # their stacks have two seeds and one, which rounds differently
        losses = [[row["val_loss"] for row in of[key].curve] for of in (without, having)]
        np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize(
    ("halving", "changes", "message"),
    [
        ({"rungs": [0.5, 0.25]}, {}, "must be rising shares between 0 and 1, but got [0.5, 0.25]"),
        ({"rungs": [1.0]}, {}, "must be rising shares between 0 and 1, but got [1.0]"),
        ({"keep": 1}, {}, "search.halving.keep"),
        ({"seeds": 4}, {}, "`search.halving.seeds` must be at most the number of seeds, but got 4 and 3"),
        ({}, {"protocol": {"eval_every": 8}}, "no evaluation comes between a rung of `search.halving` and the last"),
        ({}, {"objectives": ["val_loss", "train_seconds"]}, "but train_seconds is not one"),
        ({}, {"search": {"early_stopping": {"margin": 0.1}}}, "are not allowed together"),
    ],
)
def test_bad_halving_is_one_clear_line(tmp_path, halving, changes, message):
    search = {"halving": {"rungs": [0.25, 0.5]} | halving} | changes.pop("search", {})
    changes["protocol"] = SHORT["protocol"] | changes.pop("protocol", {})
    file = write_search(
        tmp_path, trials=6, arms=[DENSE, FOUND], search=search, **{"seeds": 3, "objectives": ["val_loss"]} | changes
    )
    with pytest.raises(StudyError, match=message.replace("[", r"\[").replace(".", r"\.")):
        load_config(file)
