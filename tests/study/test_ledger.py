from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, replace

import optuna
import pytest
from optuna.trial import TrialState
from study_fixtures import (
    DENSE,
    MPO,
    SEARCHED,
    ledger_at,
    made_up,
    optuna_states,
    sign_results,
    write_search,
    write_study,
)

from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.ledger.snapshot import read_ledger
from study.spec.search_space import listed_specs
from study.spec.study_file import load_config

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # TPE's group, constant_liar


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "study"


def ask_all(ledger):
    while ledger.ask() is not None:
        pass


def raw_optuna(folder, ledger):
    """Optuna's own view of the study, past our ledger."""
    storage = optuna.storages.RDBStorage(StudyDirectory(folder).ledger_url)
    [name] = optuna.get_all_study_names(storage)
    assert ledger.uuid in name
    return optuna.load_study(study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler(seed=0))


def specs_of(ledger):
    return [trial.spec for trial in ledger.trials.values()]


# Listed trials --------------------------------------------------------------------------------------------------------


def test_ledger_asks_each_listed_trial_once_across_reopenings(tmp_path, folder):
    file = write_study(tmp_path)
    for n_asked in (0, 1, 1, 2):
        ledger = ledger_at(file, folder)
        for _ in range(n_asked):
            ledger.ask()
        ledger.close()
    ledger = ledger_at(file, folder)
    ask_all(ledger)
    assert specs_of(ledger) == listed_specs(load_config(file))
    assert len(optuna_states(StudyDirectory(folder).ledger_url)) == 4


def test_ledger_replaces_a_listed_trial_whose_spec_was_not_written(tmp_path, folder):
    file = write_study(tmp_path)
    ledger = ledger_at(file, folder)
    ledger.ask()
    raw_optuna(folder, ledger).ask()  # the second listed trial; the driver dies here
    ledger.close()

    for _ in range(2):
        ledger = ledger_at(file, folder)
        ledger.close()
    ledger = ledger_at(file, folder)
    ask_all(ledger)
    assert sorted(specs_of(ledger), key=str) == sorted(listed_specs(load_config(file)), key=str)
    assert 1 not in ledger.trials
    states = [state for state, _ in optuna_states(StudyDirectory(folder).ledger_url)]
    assert states == ["RUNNING", "FAIL", "RUNNING", "RUNNING", "RUNNING"]


def test_ledger_replaces_a_listed_trial_whose_attributes_were_half_written(tmp_path, folder):
    file = write_study(tmp_path)
    ledger = ledger_at(file, folder)
    asked = raw_optuna(folder, ledger).ask()
    asked.set_user_attr("arm", "dense")
    asked.set_user_attr("shape", {"n_params": 1})
    ledger.close()

    ledger = ledger_at(file, folder)
    ask_all(ledger)
    assert sorted(specs_of(ledger), key=str) == sorted(listed_specs(load_config(file)), key=str)


def test_ledger_replaces_a_searched_trial_whose_spec_was_not_written(tmp_path, folder):
    file = write_search(tmp_path, trials=3)
    ledger = ledger_at(file, folder)
    ledger.ask()
    ledger.ask()
    raw_optuna(folder, ledger).ask().suggest_int("found.chi", 1, 40)  # the driver dies before the learning rate
    ledger.close()

    ledger = ledger_at(file, folder)
    ask_all(ledger)
    assert sorted(ledger.trials) == [0, 1, 3, 4]
    assert [trial.spec.arm for trial in ledger.trials.values()] == ["dense", "found", "found", "found"]


def test_ledger_resumes_a_running_trial_under_its_number(tmp_path, folder):
    file = write_search(tmp_path, trials=2)
    ledger = ledger_at(file, folder)
    ask_all(ledger)
    before = dict(ledger.trials)
    ledger.record(made_up(1, 0))
    ledger.close()

    ledger = ledger_at(file, folder)
    assert ledger.trials == before
    assert ledger.tally.missing_seeds(ledger.trials[1]) == [1]
    assert ledger.tally.missing_seeds(ledger.trials[2]) == [0, 1]
    assert ledger.ask() is None


# Results --------------------------------------------------------------------------------------------------------------


def test_ledger_tells_optuna_the_means_of_its_objectives(tmp_path, folder):
    file = write_study(tmp_path, arms=[DENSE], objectives=["val_loss", "n_params", "val_acc"])
    ledger = ledger_at(file, folder)
    trial = ledger.ask()
    ledger.record(made_up(0, 0, loss=1.0))
    assert optuna_states(StudyDirectory(folder).ledger_url) == [("RUNNING", None)]
    ledger.record(made_up(0, 1, loss=3.0))
    assert optuna_states(StudyDirectory(folder).ledger_url) == [
        ("COMPLETE", [2.0, float(trial.shape.n_params), pytest.approx((1 / 2 + 1 / 4) / 2)])
    ]


def test_ledger_tells_optuna_what_a_dead_driver_did_not(tmp_path, folder):
    file = write_study(tmp_path, arms=[MPO], objectives=["val_loss"])
    ledger = ledger_at(file, folder)
    ask_all(ledger)
    ledger.record(made_up(0, 0, loss=1.0))
    ledger.close()
    result = made_up(0, 1, loss=2.0)  # our insert, after which the driver dies
    with sqlite3.connect(folder / "ledger.db") as connection:
        connection.execute(
            "INSERT INTO mpo_result (study_uuid, trial, seed, state, content) VALUES (?, 0, 1, 'complete', ?)",
            (ledger.uuid, json.dumps(asdict(result))),
        )
    connection.close()
    sign_results(folder)
    assert optuna_states(StudyDirectory(folder).ledger_url) == [("RUNNING", None), ("RUNNING", None)]

    ledger = ledger_at(file, folder)
    assert optuna_states(StudyDirectory(folder).ledger_url) == [("COMPLETE", [1.5]), ("RUNNING", None)]
    assert ledger.tally.missing_seeds(ledger.trials[0]) == []
    ledger.close()
    ledger_at(file, folder).close()
    assert optuna_states(StudyDirectory(folder).ledger_url) == [("COMPLETE", [1.5]), ("RUNNING", None)]


def test_ledger_keeps_a_result_as_first_written(tmp_path, folder):
    file = write_study(tmp_path, arms=[DENSE])
    ledger = ledger_at(file, folder)
    ledger.ask()
    first = made_up(0, 0, loss=1.0)
    ledger.record(first)
    ledger.record(made_up(0, 0, loss=9.0))
    ledger.record(made_up(0, 0, failure="late"))
    assert ledger.results[0, 0] == first
    ledger.close()
    assert ledger_at(file, folder).results == {(0, 0): first}


def test_ledger_tells_a_trial_with_a_failed_seed_as_failed(tmp_path, folder):
    file = write_search(tmp_path, trials=2)
    ledger = ledger_at(file, folder)
    for _ in range(2):
        ledger.ask()
    ledger.record(made_up(1, 0, failure="diverged"))
    ledger.record(made_up(1, 1))
    assert optuna_states(StudyDirectory(folder).ledger_url)[1] == ("FAIL", None)
    assert ledger.ask() is not None  # a failure counts towards the budget
    assert ledger.ask() is None


# Duplicates -----------------------------------------------------------------------------------------------------------

CLIPPED = {"name": "mpo", "family": "mpo", "chi": [500, 2, 1000]}
"""At d_model 8 no bond reaches 500, so that 1000 is the same model again."""


def test_ledger_answers_a_duplicate_from_its_original(tmp_path, folder):
    file = write_study(tmp_path, arms=[CLIPPED], objectives=["val_loss"])
    ledger = ledger_at(file, folder)
    ask_all(ledger)
    assert [trial.duplicate_of for trial in ledger.trials.values()] == [None, None, 0]
    assert ledger.tally.missing_seeds(ledger.trials[2]) == []
    url = StudyDirectory(folder).ledger_url
    ledger.record(made_up(0, 0, loss=1.0))
    assert optuna_states(url)[2] == ("RUNNING", None)
    ledger.close()

    ledger = ledger_at(file, folder)
    assert [trial.duplicate_of for trial in ledger.trials.values()] == [None, None, 0]
    ledger.record(made_up(0, 1, loss=2.0))
    assert optuna_states(url) == [("COMPLETE", [1.5]), ("RUNNING", None), ("COMPLETE", [1.5])]


def test_ledger_answers_a_late_duplicate_at_once(tmp_path, folder):
    file = write_study(tmp_path, arms=[CLIPPED], objectives=["val_loss"])
    ledger = ledger_at(file, folder)
    ledger.ask()
    ledger.record(made_up(0, 0, loss=1.0))
    ledger.record(made_up(0, 1, loss=2.0))
    ask_all(ledger)
    assert optuna_states(StudyDirectory(folder).ledger_url)[2] == ("COMPLETE", [1.5])


def test_ledger_fails_a_duplicate_with_its_original(tmp_path, folder):
    file = write_study(tmp_path, arms=[CLIPPED], seeds=1)
    ledger = ledger_at(file, folder)
    ask_all(ledger)
    ledger.record(made_up(0, 0, failure="diverged"))
    assert [state for state, _ in optuna_states(StudyDirectory(folder).ledger_url)] == ["FAIL", "RUNNING", "FAIL"]


def test_ledger_tells_a_duplicate_that_a_dead_driver_did_not(tmp_path, folder):
    file = write_study(tmp_path, arms=[CLIPPED], objectives=["val_loss"], seeds=1)
    ledger = ledger_at(file, folder)
    ask_all(ledger)
    with sqlite3.connect(folder / "ledger.db") as connection:
        connection.execute(
            "INSERT INTO mpo_result (study_uuid, trial, seed, state, content) VALUES (?, 0, 0, 'complete', ?)",
            (ledger.uuid, json.dumps(asdict(made_up(0, 0, loss=1.0)))),
        )
    connection.close()
    sign_results(folder)
    ledger.close()
    ledger_at(file, folder).close()
    assert optuna_states(StudyDirectory(folder).ledger_url) == [
        ("COMPLETE", [1.0]),
        ("RUNNING", None),
        ("COMPLETE", [1.0]),
    ]


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("protocol.steps=7", "protocol.steps (was 6, now 7)"),
        ("seeds=3", "seeds (was [0, 1], now [0, 1, 2])"),
        ("arms.tuned.chi=3", "arms.tuned.chi (was 2, now 3)"),
        ("model.n_layers=2", "model.n_layers (was 1, now 2)"),
        ("objectives=[val_loss]", "objectives (was"),
    ],
)
def test_ledger_refuses_a_changed_study_and_names_the_key(tmp_path, folder, override, named):
    file = write_study(tmp_path)
    ledger_at(file, folder).close()
    with pytest.raises(StudyError) as error:
        ledger_at(file, folder, override)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    ledger_at(file, folder).close()


def test_ledger_accepts_other_words_and_another_execution(tmp_path, folder):
    file = write_study(tmp_path)
    uuid = ledger_at(file, folder).uuid
    other = ledger_at(file, folder, "description=New words", "execution.cpus=2", "execution.checkpoint_seconds=0")
    assert other.uuid == uuid


def test_ledger_refuses_another_corpus(tmp_path, folder):
    file = write_study(tmp_path)
    ledger_at(file, folder).close()
    with (tmp_path / "text.txt").open("a") as text:
        text.write(" more")
    with pytest.raises(
        StudyError, match=r"it differs in corpus or tokenizer \(SHA-256 was [0-9a-f]{12}…, now [0-9a-f]{12}…\)"
    ):
        ledger_at(file, folder)


def test_ledger_refuses_a_file_that_is_no_database(tmp_path, folder):
    file = write_study(tmp_path)
    folder.mkdir()
    (folder / "ledger.db").write_text("not a database at all, " * 10)
    with pytest.raises(StudyError, match=r"cannot open the ledger .*ledger\.db: .*file is not a database"):
        ledger_at(file, folder)


def test_ledger_refuses_another_schema_version(tmp_path, folder):
    file = write_study(tmp_path)
    ledger_at(file, folder).close()
    with sqlite3.connect(folder / "ledger.db") as connection:
        connection.execute("UPDATE mpo_study SET schema_version = 99")
    connection.close()
    with pytest.raises(StudyError, match="schema version 99, but this mpo-study reads 2"):
        ledger_at(file, folder)


# Searching ------------------------------------------------------------------------------------------------------------


def answer(trial, seed):
    """A loss that depends on what was chosen, so that a sampler has something to learn."""
    spec = trial.spec
    return made_up(trial.number, seed, loss=abs((spec.chi or 40) - 7) + abs(spec.protocol.learning_rate - 0.01) + seed)


def search(file, folder, stop_after=()):
    """Ask and answer to the end, on one worker; reopen the ledger after those numbers of recorded results."""
    ledger, n_recorded = ledger_at(file, folder), 0
    while True:
        missing = [(t, seed) for t in ledger.trials.values() for seed in ledger.tally.missing_seeds(t)]
        if not missing:
            if ledger.ask() is None:
                ledger.close()
                return ledger
            continue
        ledger.record(answer(*missing[0]))
        n_recorded += 1
        if n_recorded in stop_after:
            ledger.close()
            ledger = ledger_at(file, folder)


@pytest.mark.parametrize(
    ("sampler", "trials"),
    [
        ("random", 6),
        ("nsga2", 9),
        ("nsga3", 9),
        ("tpe", 12),
        pytest.param("gp", 12, marks=pytest.mark.slow),
    ],  # the first ten or four are random
)
def test_search_resumed_is_the_search_undisturbed(tmp_path, sampler, trials):
    file = write_search(tmp_path, sampler=sampler, trials=trials, objectives=["n_params", "val_loss"])
    whole = search(file, tmp_path / "whole")
    resumed = search(file, tmp_path / "resumed", stop_after=(1, 2, 9, 12, 22, 23))
    assert resumed.trials == whole.trials
    assert len({trial.spec.protocol.learning_rate for trial in whole.trials.values()}) > 5  # nsga2 may repeat some
    urls = [StudyDirectory(tmp_path / name).ledger_url for name in ("whole", "resumed")]
    assert optuna_states(urls[0]) == optuna_states(urls[1])


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", pytest.param("gp", marks=pytest.mark.slow)])
def test_search_within_limits_resumed_is_the_search_undisturbed(tmp_path, sampler):
    limits = {"trials": 14, "max_params": 0.3, "max_repeats": 9}
    file = write_search(tmp_path, sampler=sampler, objectives=["n_params", "val_loss"], search=limits)
    whole, resumed = search(file, tmp_path / "whole"), search(file, tmp_path / "resumed", stop_after=range(30))
    trials = [
        [replace(t, skipped=t.skipped and t.skipped.reason) for t in one.trials.values()] for one in (whole, resumed)
    ]
    assert trials[0] == trials[1]
    assert any(trial.skipped for trial in trials[0])
    urls = [StudyDirectory(tmp_path / name).ledger_url for name in ("whole", "resumed")]
    assert optuna_states(urls[0]) == optuna_states(urls[1])


def test_search_meets_its_budget_exactly(tmp_path, folder):
    arm = {"name": "found", "family": "mpo", "chi": {"choices": [2, 300, 400, 500]}}
    file = write_search(tmp_path, trials=9, arms=[DENSE, arm], seeds=1)
    for n_asked in (1, 3, 0, 2, 4, 7):
        ledger = ledger_at(file, folder)
        for _ in range(n_asked):
            ledger.ask()
        ledger.close()
    ledger = ledger_at(file, folder)
    assert ledger.ask() is None
    assert [trial.spec.arm for trial in ledger.trials.values()] == ["dense"] + ["found"] * 9
    originals = [trial for trial in ledger.trials.values() if trial.duplicate_of is None]
    assert len(originals) == 3  # dense, χ = 2, and one that is clipped
    assert len({trial.shape.identity for trial in originals}) == 3


def test_search_over_two_arms_keeps_their_ranges_apart(tmp_path, folder):
    other = SEARCHED | {"name": "other", "chi": {"low": 50, "high": 60}, "factorisation": "balanced"}
    file = write_search(tmp_path, sampler="tpe", trials=12, arms=[SEARCHED, other], seeds=1)
    ledger = search(file, folder)
    chis = {name: {t.spec.chi for t in ledger.trials.values() if t.spec.arm == name} for name in ("found", "other")}
    assert chis["found"]
    assert chis["other"]
    assert chis["found"] <= set(range(1, 41))
    assert chis["other"] <= set(range(50, 61))


# Reading --------------------------------------------------------------------------------------------------------------


def test_read_ledger_while_it_is_open_changes_nothing(tmp_path, folder):
    file = write_study(tmp_path)
    ledger = ledger_at(file, folder)
    ask_all(ledger)
    ledger.record(made_up(0, 0))
    before = (folder / "ledger.db").read_bytes()
    snapshot = read_ledger(StudyDirectory(folder).ledger_url, "tiny")
    assert snapshot.trials == list(ledger.trials.values())
    assert snapshot.results == [ledger.results[0, 0]]
    assert (folder / "ledger.db").read_bytes() == before
    ledger.record(made_up(0, 1))


def test_read_ledger_refuses_an_unknown_study(tmp_path, folder):
    ledger_at(write_study(tmp_path), folder).close()
    with pytest.raises(StudyError, match="contains no study other"):
        read_ledger(StudyDirectory(folder).ledger_url, "other")


def test_optuna_numbers_are_ours(tmp_path, folder):
    file = write_search(tmp_path, trials=2)
    ledger = ledger_at(file, folder)
    ask_all(ledger)
    frozen = raw_optuna(folder, ledger).get_trials()
    assert [trial.number for trial in frozen] == list(ledger.trials)
    assert [trial.state for trial in frozen] == [TrialState.RUNNING] * 3
    assert [trial.params.get("found.chi") for trial in frozen] == [None, *(ledger.trials[n].spec.chi for n in (1, 2))]
