"""What a search finds but does not train, or finds to diverge, and what its sampler learns of that."""

from __future__ import annotations

import math
from dataclasses import replace

import optuna
import pytest
from study_fixtures import DENSE, SEARCHED, ledger_at, made_up, optuna_states, write_search

from study.commands.opening import study_corpus
from study.ledger.directory import StudyDirectory
from study.ledger.snapshot import read_ledger
from study.search.samplers import make_sampler
from study.search.telling import DIVERGED, what_to_tell, why_skipped
from study.spec.search_space import directions, suggest
from study.spec.study_file import load_config
from study.spec.trial import Trial
from study.training.model import trial_shape

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

CHI = {"name": "found", "family": "mpo", "chi": {"choices": [1, 2, 4, 6, 300, 400]}}


def diverged(trial, seed):
    return replace(made_up(trial, seed, failure="diverged: the loss"), failure_step=3)


def frozen_trials(folder, ledger):
    storage = optuna.storages.RDBStorage(StudyDirectory(folder).ledger_url)
    [name] = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).get_trials()


def ask_all(ledger):
    asked = []
    while (trial := ledger.ask()) is not None:
        asked.append(trial)
    return asked


def limited(tmp_path, **search):
    return write_search(tmp_path, arms=[DENSE, CHI], search={"trials": 14} | search)


# Limits on parameters -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["number", "fraction"])
def test_trial_beyond_a_limit_is_skipped_and_lacks_nothing(tmp_path, kind):
    free = ledger_at(limited(tmp_path), tmp_path / "free")
    sizes = {trial.spec.chi: trial.shape.n_params for trial in ask_all(free) if trial.spec.chi is not None}
    n_dense = free.trials[0].shape.n_params_dense
    unit = n_dense if kind == "fraction" else 1
    limits = {"min_params": sizes[2] / unit, "max_params": sizes[4] / unit}

    ledger = ledger_at(limited(tmp_path, **limits), tmp_path / "limited")
    trials = ask_all(ledger)
    assert {trial.spec.chi for trial in trials} >= {None, 1, 2, 4, 6}
    own = [trial for trial in trials if trial.duplicate_of is None]
    assert {trial.spec.chi for trial in own if trial.skipped is None} == {None, 2, 4}  # the dense one is listed
    for trial in own:
        assert ledger.tally.missing_seeds(trial) == ([] if trial.skipped is not None else [0, 1])
    smallest = next(trial for trial in own if trial.spec.chi == 1)
    of_dense = f" × {n_dense:,}" if kind == "fraction" else ""
    limit = f"search.min_params={limits['min_params']:g}{of_dense}"
    assert smallest.skipped.reason == f"{sizes[1]:,} parameters, fewer than {limit}"
    largest = next(trial for trial in own if trial.spec.chi not in (None, 1, 2, 4))
    assert "more than search.max_params=" in largest.skipped.reason
    # What repeats a skipped trial is answered by it.
    for trial in trials:
        if trial.duplicate_of is not None:
            assert trial.skipped == ledger.trials[trial.duplicate_of].skipped


def test_skipped_trials_are_the_same_after_reopening(tmp_path):
    file = limited(tmp_path, max_params=0.2)
    ledger = ledger_at(file, tmp_path / "study")
    ask_all(ledger)
    before = dict(ledger.trials)
    ledger.close()
    assert any(trial.skipped for trial in before.values())
    ledger = ledger_at(file, tmp_path / "study")
    assert ledger.trials == before
    assert ledger.ask() is None
    assert read_ledger(StudyDirectory(tmp_path / "study").ledger_url, "search-random").trials == list(before.values())


def test_listed_trial_that_a_study_grows_by_has_no_limit(tmp_path):
    folder = tmp_path / "study"
    first = ledger_at(limited(tmp_path, max_params=0.6), folder)
    skipped = next(trial for trial in ask_all(first) if trial.skipped is not None and trial.duplicate_of is None)
    first.close()
    listed = {"name": "listed", "family": "mpo", "chi": skipped.spec.chi}
    file = write_search(tmp_path, arms=[DENSE, CHI, listed], search={"trials": 14, "max_params": 0.6})
    ledger = ledger_at(file, folder, extend=True)
    trial = ledger.ask()
    assert (trial.spec.arm, trial.duplicate_of, trial.skipped) == ("listed", None, None)
    assert ledger.tally.missing_seeds(trial) == list(load_config(file).seed_list)


def test_sampler_is_told_that_a_skipped_trial_is_infeasible(tmp_path):
    folder = tmp_path / "study"
    ledger = ledger_at(limited(tmp_path, max_params=0.2), folder)
    ledger.ask()
    ledger.record(made_up(0, 0, loss=9.0))  # worse than a guess among the text's few letters
    skipped = next(trial for trial in ask_all(ledger) if trial.skipped is not None)
    state, values = optuna_states(StudyDirectory(folder).ledger_url)[skipped.number]
    assert (state, values) == ("COMPLETE", [skipped.shape.n_params, 9.0])
    frozen = frozen_trials(folder, ledger)[skipped.number]
    excess = skipped.shape.n_params / (0.2 * skipped.shape.n_params_dense) - 1
    assert frozen.constraints == {"max_params": pytest.approx(excess), DIVERGED: -1.0}
    assert excess > 0


def test_loss_of_what_is_not_trained_is_that_of_a_guess(tmp_path):
    folder = tmp_path / "study"
    ledger = ledger_at(limited(tmp_path, max_params=0.2), folder)
    skipped = next(trial for trial in ask_all(ledger) if trial.skipped is not None)
    _, values = optuna_states(StudyDirectory(folder).ledger_url)[skipped.number]
    assert values == [skipped.shape.n_params, pytest.approx(math.log(skipped.shape.vocab_size))]
    assert 5 < skipped.shape.vocab_size < 30


def searched(file, results_of):
    """Each searched trial of a search by loss alone, asked and told as the ledger does, on one worker."""
    config = load_config(file)
    corpus = study_corpus(config)
    study = optuna.create_study(directions=directions(config))
    trials = []
    for number in range(config.search.trials):
        study.sampler = make_sampler(config, number)
        asked = study.ask()
        spec = suggest(config, asked)
        shape = trial_shape(spec, corpus.vocab_size, len(corpus.validation), config.model)
        trial = Trial(number, spec, shape, "", 1)
        results = [] if why_skipped(config.search, shape) is not None else results_of(trial)
        told = what_to_tell(config, trial, trial, results, worst={"val_loss": 4.0, "val_acc": 0.0})
        for key, value in told.constraints.items():
            asked.set_constraint(key, value)
        study.tell(asked, told.values)
        trials.append(trial)
    return trials


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", pytest.param("gp", marks=pytest.mark.slow)])
def test_sampler_learns_to_keep_within_a_limit(tmp_path, sampler):
    def share_over(**search):
        file = write_search(
            tmp_path, sampler=sampler, seeds=1, objectives=["val_loss"], search={"trials": 30} | search, arms=[SEARCHED]
        )
        # The more bonds the better: only the limit speaks against them.
        trials = searched(file, lambda trial: [made_up(trial.number, 0, loss=3 / trial.spec.chi)])
        over = [trial.shape.n_params > 0.5 * trial.shape.n_params_dense for trial in trials]
        return sum(over[-10:]) / 10

    assert share_over(max_params=0.5) < share_over()


# Diverged trials ------------------------------------------------------------------------------------------------------


def test_sampler_is_told_that_a_diverged_trial_is_bad(tmp_path):
    folder = tmp_path / "study"
    file = write_search(tmp_path, trials=3, objectives=["n_params", "val_loss", "val_acc"])
    ledger = ledger_at(file, folder)
    trials = ask_all(ledger)
    ledger.record(made_up(1, 0, loss=7.0))
    ledger.record(made_up(1, 1, loss=1.0))
    ledger.record(diverged(2, 0))
    ledger.record(made_up(2, 1, loss=1.0))
    states = optuna_states(StudyDirectory(folder).ledger_url)
    assert states[2] == ("COMPLETE", [trials[2].shape.n_params, (7.0 + 1.0) / 2, (0.0 + 0.5) / 2])
    ledger.record(diverged(3, 0))
    ledger.record(made_up(3, 1, failure="the worker died"))
    assert optuna_states(StudyDirectory(folder).ledger_url)[3] == ("FAIL", None)  # a machine's trouble teaches nothing
    constraints = [trial.constraints for trial in frozen_trials(folder, ledger)]
    assert constraints == [{}, {DIVERGED: -1.0}, {DIVERGED: 0.5}, {DIVERGED: 0.5}]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", pytest.param("gp", marks=pytest.mark.slow)])
def test_sampler_learns_where_training_diverges(tmp_path, sampler):
    def result(trial):
        rate = trial.spec.protocol.learning_rate
        return [diverged(trial.number, 0) if rate > 3e-3 else made_up(trial.number, 0, loss=2 - 100 * rate)]

    file = write_search(tmp_path, sampler=sampler, trials=30, seeds=1, objectives=["val_loss"], arms=[SEARCHED])
    bad = [trial.spec.protocol.learning_rate > 3e-3 for trial in searched(file, result)]
    assert sum(bad[:10]) >= 3
    assert sum(bad[-10:]) < sum(bad[:10])


# Repeats --------------------------------------------------------------------------------------------------------------


def test_search_ends_when_it_has_repeated_itself_too_often(tmp_path):
    folder = tmp_path / "study"
    arm = {"name": "found", "family": "mpo", "chi": {"choices": [2, 300, 400, 500]}}
    search = {"trials": 30, "max_repeats": 4}
    file = write_search(tmp_path, arms=[DENSE, arm], seeds=1, search=search)
    for n_asked in (2, 3, 0, 30):  # a driver that starts again
        ledger = ledger_at(file, folder)
        for _ in range(n_asked):
            ledger.ask()
        ledger.close()
    ledger = ledger_at(file, folder)
    trials = list(ledger.trials.values())
    assert ledger.ask() is None
    assert sum(trial.duplicate_of is not None for trial in trials) == 4
    assert trials[-1].duplicate_of is not None
    n_searched = len(trials) - 1
    assert n_searched < 30
    assert ledger.tally.search_ended.startswith(
        f"the search ended after {n_searched} of 30 trials: 4 of them repeat another"
    )
    assert ledger.tally.n_trials == 1 + n_searched
    assert ledger.tally.n_missing == 3  # dense, χ = 2, and one that is clipped
    ledger.close()

    more = ledger_at(file, folder, "search.max_repeats=6")  # which may change, unlike the search itself
    assert more.tally.search_ended is None
    ask_all(more)
    assert sum(trial.duplicate_of is not None for trial in more.trials.values()) == 6
    assert more.tally.search_ended is not None


def test_search_that_has_all_its_trials_has_not_ended_early(tmp_path):
    ledger = ledger_at(limited(tmp_path, max_repeats=14), tmp_path / "study")
    trials = ask_all(ledger)
    assert len(trials) == 15
    assert ledger.tally.search_ended is None
    assert ledger.tally.n_trials == 15
