"""What a study will cost: every listed trial, with counts that are exact and a time that was measured."""

from __future__ import annotations

import math

import pytest
import torch

from study.corpus import load_corpus
from study.errors import StudyError
from study.plan import plan
from study.search_space import listed_specs
from study.study_file import validate
from study.trial import trial_shape


@pytest.fixture
def planned(small_study, small_text):
    def make(**changes):
        config, corpus = validate(small_study(**changes), "here"), load_corpus(small_text)
        return config, corpus, plan(config, corpus)

    return make


def test_every_listed_trial_is_planned_with_its_shape(planned):
    config, corpus, made = planned(seeds=[3, 5, 8])
    assert [trial.spec for trial in made.trials] == listed_specs(config)
    for trial in made.trials:
        expected = trial_shape(trial.spec, len(corpus.vocabulary), len(corpus.validation), config.model)
        assert trial.shape == expected
    assert (made.n_searched, made.n_seeds) == (0, 3)


def test_times_follow_from_measured_rates(planned):
    _, _, made = planned()
    assert all(1e3 < rate < 1e14 for rate in made.rates)
    for trial in made.trials:
        assert any(math.isclose(trial.seconds, trial.shape.flops / rate) for rate in made.rates)
    assert made.unit_seconds == pytest.approx(2 * sum(trial.seconds for trial in made.trials))
    # Twice the steps and evaluations of one model take twice the time on one machine, whatever its rate.
    short, long = (
        planned(protocol={"steps": steps, "eval_every": steps}, arms=[{"name": "d", "family": "dense"}])[2].trials[0]
        for steps in (1000, 2000)
    )
    assert long.shape.flops == pytest.approx(2 * short.shape.flops, rel=0.01)


def test_searched_trials_are_known_in_number_alone(planned):
    arms = [{"name": "mpo", "family": "mpo", "chi": {"choices": [2, 4]}}]
    _, _, made = planned(arms=arms, sampler={"name": "random"}, budget={"trials": 7})
    assert (made.trials, made.n_searched, made.rates, made.unit_seconds) == ([], 7, [], 0)


@pytest.mark.parametrize(
    "protocol", [{"steps": 1, "warmup_steps": 0}, {"learning_rate": 1e30}, {"embedding_learning_rate": 1e30}]
)
def test_trials_of_few_steps_or_of_no_future_can_be_planned(planned, protocol):
    _, _, made = planned(protocol=protocol, arms=[{"name": "dense", "family": "dense"}])
    assert made.trials[0].seconds > 0


def test_planning_leaves_threads_and_global_random_state_alone(planned):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    planned(execution={"cpus": 2})
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_text_shorter_than_the_context_is_refused(planned):
    with pytest.raises(StudyError, match="the corpus is too short: its validation split has"):
        planned(model={"context": 2000})
