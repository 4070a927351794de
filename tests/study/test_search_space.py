"""From the study file to trials: what is enumerated, and what the samplers may and do choose."""

from __future__ import annotations

import json

import jsonschema
import optuna
import pytest

from study.errors import StudyError
from study.search.samplers import make_sampler
from study.spec.schema import json_schema
from study.spec.search_space import check_trials, directions, listed_specs, suggest
from study.spec.study_file import dump_config, load_config, parse_yaml, validate

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SEARCHED = {
    "name": "mpo",
    "family": "mpo",
    "factorisation": "balanced",
    "n_sites": {"choices": [1, 2, 3]},
    "chi": {"low": 2, "high": 64, "log": True},
    "init": {"choices": ["paper", "variance", "tt_svd"]},
    "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
}


@pytest.fixture
def search(small_study):
    """Makes the configuration of a search; a listed arm stands beside what is searched."""

    def make(sampler, arms=(SEARCHED,), trials=30, **settings):
        content = small_study(
            arms=[{"name": "dense", "family": "dense"}, *arms],
            search={"sampler": sampler, "population_size": 6, "trials": trials} | settings,
        )
        return validate(content, "here")

    return make


def run_study(config, n_trials, objective):
    """Ask and tell as the ledger does: the listed trial first, which has no parameters, then what samplers choose."""
    study = optuna.create_study(directions=directions(config))
    study.enqueue_trial({}, user_attrs={"listed": 0})
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    listed = study.ask()
    study.tell(listed, objective(listed_specs(config)[0]))
    specs = []
    for number in range(1, n_trials + 1):
        study.sampler = make_sampler(config, number)
        trial = study.ask()
        assert trial.number == number
        specs.append(suggest(config, trial))
        study.tell(trial, objective(specs[-1]))
    return study, specs


def distance(spec):
    """Two objectives with one best point: chi = 8 at a small learning rate."""
    return (abs((spec.chi or 64) - 8), spec.protocol.learning_rate)


# Listed trials --------------------------------------------------------------------------------------------------------


def test_listed_trials_come_in_the_order_of_the_file(small_study):
    arms = [
        {"name": "b", "family": "mpo", "chi": [8, 2], "init": ["paper", "tt_svd"], "learning_rate": [0.1, 0.01]},
        {"name": "a", "family": "dense", "d_model": [8, 4]},
        {"name": "c", "family": "mpo", "chi": 4, "start": "d"},
        {"name": "d", "family": "dense", "steps": 20, "warmup_steps": 2},
    ]
    specs = listed_specs(validate(small_study(arms=arms), "here"))
    assert [spec.arm for spec in specs] == ["b"] * 8 + ["a", "a", "c", "d"]
    # Values vary in the order of the model's fields, the last fastest.
    assert [(spec.protocol.learning_rate, spec.chi, spec.init) for spec in specs[:5]] == [
        (0.1, 8, "paper"),
        (0.1, 8, "tt_svd"),
        (0.1, 2, "paper"),
        (0.1, 2, "tt_svd"),
        (0.01, 8, "paper"),
    ]
    assert [spec.model.d_model for spec in specs[8:10]] == [8, 4]
    assert (specs[10].start, specs[10].init) == ("d", None)
    assert (specs[11].protocol.steps, specs[11].protocol.warmup_steps, specs[11].start) == (20, 2, None)


def test_arm_overrides_the_protocol_and_inherits_the_rest(small_study):
    arm = {"name": "a", "family": "dense", "steps": 50, "warmup_steps": 5, "eval_every": 10, "learning_rate": 0.5}
    config = validate(small_study(arms=[arm]), "here")
    (spec,) = listed_specs(config)
    changes = {"steps": 50, "warmup_steps": 5, "eval_every": 10, "learning_rate": 0.5}
    assert spec.protocol == config.protocol.model_copy(update=changes)
    assert spec.model == config.model


def test_learning_rate_by_size_is_that_of_the_trials_chi_or_width(small_study, tmp_path):
    arms = [
        {"name": "dense", "family": "dense", "learning_rate": {8: 0.3}},
        {"name": "narrow", "family": "dense", "d_model": [4, 2], "learning_rate": {2: 0.2, 4: 0.1}},
        {
            "name": "mpo",
            "family": "mpo",
            "chi": [2, 4],
            "decay": ["parameter", "matrix"],
            "learning_rate": {2: 1, 4: 2},
        },
        {"name": "monarch", "family": "monarch", "as_chi": 4, "learning_rate": {4: 0.5}, "start": "dense"},
    ]
    config = validate(small_study(arms=arms), "here")
    rates = [(spec.arm, spec.protocol.learning_rate) for spec in listed_specs(config)]
    assert rates[:3] == [("dense", 0.3), ("narrow", 0.1), ("narrow", 0.2)]
    assert rates[3:] == [("mpo", 1), ("mpo", 2), ("mpo", 1), ("mpo", 2), ("monarch", 0.5)]
    (tmp_path / "kept.yaml").write_text(dump_config(config), encoding="utf-8")  # as a study's folder has it
    assert load_config(tmp_path / "kept.yaml").arms == config.arms
    text = "arms: [{name: a, family: mpo, chi: [4, 8], learning_rate: {4: 1e-3, 8: 2e-3}}]"
    jsonschema.validate({"name": "by-size", **parse_yaml(text, "here")}, json.loads(json_schema()))


def test_feed_forward_size_of_an_arm_is_its_own_or_that_of_the_width(small_study):
    arms = [
        {"name": "dense", "family": "dense", "d_ff": 12},
        {"name": "narrow", "family": "dense", "d_model": [4, 2], "d_ff": {2: 6, 4: 15}},
    ]
    specs = listed_specs(validate(small_study(arms=arms, model={"d_ff": 20}), "here"))
    assert [(spec.model.d_model, spec.model.d_ff) for spec in specs] == [(8, 12), (4, 15), (2, 6)]


def test_narrow_arm_drops_the_models_own_feed_forward_size(small_study):
    arms = [{"name": "dense", "family": "dense"}, {"name": "narrow", "family": "dense", "d_model": 4}]
    wide, narrow = listed_specs(validate(small_study(arms=arms, model={"d_ff": 20}), "here"))
    assert (wide.model.d_ff, narrow.model.d_ff, narrow.model.d_model) == (20, None, 4)


def test_searched_arms_list_nothing(search):
    assert [spec.arm for spec in listed_specs(search("random"))] == ["dense"]


def test_equal_listed_trials_are_refused(small_study):
    arms = [
        {"name": "a", "family": "mpo", "chi": [2, 4]},
        {"name": "b", "family": "mpo", "chi": [4, 8], "init": "variance", "learning_rate": 0.01},
    ]
    with pytest.raises(StudyError, match=r"^arms\[b\]: repeats a trial of arm a; every trial must differ$"):
        listed_specs(validate(small_study(arms=arms), "here"))


# Searched trials ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"d_model": {"choices": [8, 9]}}, "`n_heads` must divide `d_model`, but got d_model=9, n_heads=2"),
        ({"d_model": {"low": 8, "high": 16}}, "`n_heads` must divide `d_model`, but got d_model=9, n_heads=2"),
        ({"d_model": {"choices": [8, 4]}, "steps": 2}, "`warmup_steps < steps` must hold"),
    ],
)
def test_choice_that_could_not_be_trained_is_refused_before_the_start(search, arm, message):
    config = search("random", arms=[{"name": "narrow", "family": "dense"} | arm])
    with pytest.raises(StudyError) as caught:
        check_trials(config)
    assert str(caught.value).startswith(f"arms[narrow]: {message}")


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "nsga3", pytest.param("gp", marks=pytest.mark.slow)])
def test_suggestions_lie_within_the_space(search, sampler):
    _, specs = run_study(search(sampler), 30, distance)
    for spec in specs:
        assert 2 <= spec.chi <= 64
        assert 1e-4 <= spec.protocol.learning_rate <= 1e-1
        assert spec.n_sites in (1, 2, 3)
        assert spec.init in ("paper", "variance", "tt_svd")
        assert (spec.family, spec.factorisation, spec.protocol.steps) == ("mpo", "balanced", 12)
    assert len({spec.init for spec in specs}) == 3
    assert len({spec.chi for spec in specs}) > 5


def test_gauge_is_listed_or_searched(search, small_study):
    arms = [{"name": "a", "family": "low_rank", "as_chi": 4, "gauge": ["free", "fixed"]}]
    assert [spec.gauge for spec in listed_specs(validate(small_study(arms=arms), "here"))] == ["free", "fixed"]
    _, specs = run_study(search("random", arms=[SEARCHED | {"gauge": {"choices": ["free", "fixed"]}}]), 10, distance)
    assert {spec.gauge for spec in specs} == {"free", "fixed"}


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_several_arms_are_chosen_between(search, sampler):
    other = {"name": "narrow", "family": "dense", "d_model": {"choices": [2, 4, 6]}}
    study, specs = run_study(search(sampler, arms=[SEARCHED, other]), 30, distance)
    assert {spec.arm for spec in specs} == {"mpo", "narrow"}
    for spec, trial in zip(specs, study.trials[1:], strict=True):
        assert trial.params["arm"] == spec.arm
        assert {name.partition(".")[0] for name in trial.params} == {"arm", spec.arm}


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "nsga3", pytest.param("gp", marks=pytest.mark.slow)])
def test_search_repeats_itself(search, sampler):
    first, again = (run_study(search(sampler), 15, distance)[1] for _ in range(2))
    assert first == again


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2", "nsga3", "gp"])
def test_draws_differ_by_sampler_seed_and_by_trial(search, sampler):
    rates = [
        spec.protocol.learning_rate for seed in (0, 1) for spec in run_study(search(sampler, seed=seed), 6, distance)[1]
    ]
    assert len(set(rates)) == 12


def test_resumed_search_draws_what_an_undisturbed_one_does(search):
    config = search("random")
    _, undisturbed = run_study(config, 8, distance)
    study = optuna.create_study(directions=directions(config))
    for number in range(9):  # a driver that starts again for every trial
        study.sampler = make_sampler(config, number)
        trial = study.ask()
        if number:
            assert suggest(config, trial) == undisturbed[number - 1]
        study.tell(trial, (0.0, 0.0))


def test_nsga2_evolves_although_a_listed_trial_has_no_parameters(search):
    config = search("nsga2", trials=60)
    study, specs = run_study(config, 60, distance)
    names = {"mpo.chi", "mpo.n_sites", "mpo.init", "mpo.learning_rate"}
    assert all(set(trial.params) == names for trial in study.trials[1:])
    # Children take whole values from their parents; at random, learning rates would never meet.
    rates = [spec.protocol.learning_rate for spec in specs]
    assert len(set(rates[:6])) == 6
    assert len(set(rates[6:])) < 40
    first, last = ([abs(spec.chi - 8) for spec in part] for part in (specs[:6], specs[-12:]))
    assert sum(last) / 12 < sum(first) / 6


def test_tpe_does_better_than_chance(search):
    chance, guided = (
        [abs(spec.chi - 8) for spec in run_study(search(name), 40, distance)[1][20:]] for name in ("random", "tpe")
    )
    assert sum(guided) < sum(chance)


def test_directions_are_those_of_the_run_schema(small_study):
    config = validate(small_study(objectives=["val_acc", "n_params", "val_loss"]), "here")
    assert directions(config) == ["maximize", "minimize", "minimize"]
