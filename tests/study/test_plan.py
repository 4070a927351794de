"""What a study will cost: every listed trial, with counts that are exact and a time that was measured."""

from __future__ import annotations

import math
import statistics
from collections import Counter

import pytest
import torch

from analysis.statistics.power import Contrast, family_gaps
from study.commands.plan import _draws, _extremes, _quantile, plan
from study.errors import StudyError
from study.spec.arms import MPOArm
from study.spec.comparable import not_compared, planned_gaps
from study.spec.search_space import listed_specs, resolve
from study.spec.study_file import validate
from study.spec.values import Choices, Range
from study.training.loading import load_corpus
from study.training.model import trial_shape


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
        expected = trial_shape(trial.spec, corpus.vocab_size, len(corpus.validation), config.model)
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


def test_search_costs_what_its_space_does(planned):
    arms = [
        {"name": "dense", "family": "dense"},
        {"name": "mpo", "family": "mpo", "chi": {"low": 1, "high": 40}, "learning_rate": {"low": 0.1, "high": 0.2}},
    ]
    settings = {"search": {"sampler": "random", "trials": 7}, "model": {"d_model": 16}, "seeds": 3}
    config, corpus, made = planned(arms=arms, **settings)
    sizes = {}
    for chi in range(1, 41):
        spec = resolve(config, config.arm("mpo"), config.arm("mpo").values() | {"chi": chi, "learning_rate": 0.1})
        sizes[chi] = trial_shape(spec, corpus.vocab_size, len(corpus.validation), config.model)
    [search] = made.searches
    found = {name: row.spec.chi for name, row in search.rows.items()}
    n_params = {name: row.shape.n_params for name, row in search.rows.items()}
    everything = sorted(shape.n_params for shape in sizes.values())
    assert (found["least"], n_params["least"], n_params["largest"]) == (1, everything[0], everything[-1])
    assert n_params["median"] == sizes[found["median"]].n_params
    assert everything[17] <= n_params["median"] <= everything[21]
    larger = sum(shape.n_params > shape.n_params_dense for shape in sizes.values()) / 40
    assert 0 < larger < 1
    assert search.larger_than_dense == pytest.approx(larger, abs=1 / 64)
    assert search.beyond_limits == 0
    [rate] = {trial.shape.flops / trial.seconds for trial in [search.rows["least"]]}
    expected = statistics.fmean(shape.flops for shape in sizes.values()) / rate
    assert search.seconds == pytest.approx(expected, rel=0.02)
    assert made.searched_seconds == pytest.approx(7 * 3 * search.seconds)
    assert made.unit_seconds == pytest.approx(made.listed_seconds + made.searched_seconds)

    limit = sizes[2].n_params
    _, _, limited = planned(arms=arms, **settings | {"search": {"sampler": "random", "trials": 7, "max_params": limit}})
    assert limited.searches[0].beyond_limits == pytest.approx(38 / 40, abs=1 / 64)
    assert limited.searches[0].rows["largest"].shape.n_params == limit
    assert limited.searched_seconds < made.searched_seconds / 5


def test_draws_are_those_of_the_random_sampler_and_as_many_whatever_the_space():
    arm = MPOArm(
        name="a",
        family="mpo",
        chi=Range(1, 2**31 - 1, log=True),
        n_sites=Choices((1, 2, 3, 4)),
        factorisation="balanced",
        learning_rate=Range(0.0, 1.0),
    )
    drawn = list(_draws(arm))
    assert drawn == list(_draws(arm))
    assert len(drawn) == 64
    assert Counter(values["n_sites"] for values in drawn) == dict.fromkeys((1, 2, 3, 4), 16)
    assert sorted(values["learning_rate"] for values in drawn) == pytest.approx([(n + 0.5) / 64 for n in range(64)])
    halves = Counter(values["chi"] < 2**15 for values in drawn)
    assert abs(halves[True] - halves[False]) <= 6  # uniform in the logarithm
    assert len(list(_extremes(arm))) == 8


def test_space_smaller_than_the_budget_trains_each_configuration_once(planned):
    arms = [{"name": "mpo", "family": "mpo", "chi": {"choices": [2, 4]}}]
    _, _, made = planned(arms=arms, search={"sampler": "random", "trials": 7})
    assert (made.trials, made.n_searched, made.n_different) == ([], 7, 2)
    assert made.searched_seconds == pytest.approx(2 * 2 * made.searches[0].seconds)


def test_gauges_of_a_search_have_their_own_sizes(planned):
    arms = [{"name": "mpo", "family": "mpo", "chi": 4, "gauge": {"choices": ["free", "fixed"]}}]
    _, _, made = planned(arms=arms, search={"sampler": "random", "trials": 7})
    rows = made.searches[0].rows
    assert (rows["least"].spec.gauge, rows["largest"].spec.gauge) == ("fixed", "free")
    assert rows["least"].shape.n_params < rows["largest"].shape.n_params


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


# What will not be compared --------------------------------------------------------------------------------------------

DENSE = {"name": "dense", "family": "dense"}
SEARCHED = {"name": "mpo", "family": "mpo", "chi": {"low": 2, "high": 4}}
LOW_RANK = {"name": "low-rank", "family": "low_rank", "as_chi": [2, 4]}
TUNED = {"name": "tuned", "family": "mpo", "chi": 2, "start": "dense", "steps": 6}
FURTHER = {"name": "further", "family": "dense", "start": "dense", "steps": 6}
SEARCH = {"search": {"sampler": "random", "trials": 7}}


def pairs(*named):
    return {"contrasts": [{"arm": arm, "against": against} for arm, against in named]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": [DENSE, LOW_RANK, SEARCHED | {"chi": 2}]}, []),
        ({"arms": [DENSE]}, []),
        (
            {"arms": [DENSE, LOW_RANK, SEARCHED], **SEARCH},
            [
                "arm mpo will not be compared with dense, low-rank: chosen among 7 trials, and not 1",
                "{arm: mpo, against: ",
            ],
        ),
        ({"arms": [DENSE, LOW_RANK, SEARCHED], "claims": pairs(("mpo", "dense"), ("mpo", "low-rank")), **SEARCH}, []),
        ({"arms": [DENSE | {"tuned_among": 7}, SEARCHED], **SEARCH}, []),
        (
            {"arms": [DENSE, SEARCHED | {"chi": 2, "steps": 6}, {**LOW_RANK, "steps": 6}]},
            ["arms mpo, low-rank will not be compared with dense: steps 6, and not 12", "declares it"],
        ),
        (
            {"arms": [DENSE, SEARCHED | {"chi": 2, "schedule": "wsd"}]},
            ["arm mpo will not be compared with dense: schedule wsd (decay_fraction 0.2), and not cosine", "declares"],
        ),
        (
            {"arms": [DENSE, TUNED]},
            ["arm tuned will not be compared with dense: no dense arm is trained further"],
        ),
        ({"arms": [DENSE, TUNED, FURTHER]}, []),
        ({"arms": [DENSE, TUNED], "claims": pairs(("tuned", "dense"))}, []),
        (
            {"arms": [DENSE, TUNED, FURTHER | {"steps": 8}]},
            ["arm tuned will not be compared with further: steps 6, and not 8", "declares it"],
        ),
        ({"arms": [DENSE | {"d_model": 4}, LOW_RANK]}, ["nothing will be compared with dense"]),
        (
            {"arms": [DENSE, LOW_RANK], "seeds": 2},
            ["no difference will be tested: that takes 3 seeds, but"],
        ),
    ],
)
def test_what_will_not_be_compared_is_told_with_the_reason(small_study, changes, said):
    lines = not_compared(validate(small_study(**{"seeds": 3} | changes), "here"))
    assert len(lines) == len(said)
    assert all(words in line for line, words in zip(lines, said, strict=True))


def test_gaps_that_the_declared_contrasts_find(small_study):
    arms = [DENSE, {"name": "mpo", "family": "mpo", "chi": [2, 3]}, LOW_RANK]
    given = {"arms": arms, "seeds": 5, "claims": pairs(("mpo", "dense"), ("mpo", LOW_RANK["name"]))}
    against_dense, against_low_rank = planned_gaps(validate(small_study(**given), "here"))
    # Two contrasts and a chain against dense, for each of two measures: six parts of the level.
    sizes = [Contrast(2, one_rival=True), Contrast(2)]
    for at, gap in enumerate((against_dense, against_low_rank)):
        assert gap.by_seeds == {n: family_gaps(n, sizes, 1)[at] for n in (5, 8)}
    assert (against_low_rank.arm, against_low_rank.against) == ("mpo", LOW_RANK["name"])
    assert planned_gaps(validate(small_study(**given | {"seeds": 2}), "here")) == []
    [gap] = planned_gaps(validate(small_study(arms=[DENSE, TUNED], seeds=5, claims=pairs(("tuned", "dense"))), "here"))
    assert gap.by_seeds[5] == family_gaps(5, [Contrast(1, one_rival=True, paired=True)], 1)[0]
    searched = {"arms": [DENSE, SEARCHED], "seeds": 5, "claims": pairs(("mpo", "dense"))} | SEARCH
    assert planned_gaps(validate(small_study(**searched), "here")) == []
    assert planned_gaps(validate(small_study(arms=arms, seeds=5), "here")) == []


def test_search_may_range_over_all_numbers_there_are():
    wide = Range(1e-300, 1e300, log=True)
    assert [_quantile(wide, share) for share in (0.25, 0.5, 0.75)] == pytest.approx([1e-150, 1, 1e150])


@pytest.mark.parametrize("arm", [{"family": "mpo", "chi": 2, "refinement": "als"}, {"family": "low_rank", "as_chi": 2}])
def test_arms_that_are_fitted_to_outputs_are_timed(planned, arm):
    arm = {"name": "tuned", "start": "dense", "refinement": "outputs"} | arm
    _, _, made = planned(arms=[{"name": "dense", "family": "dense"}, arm])
    assert all(trial.seconds > 0 for trial in made.trials)
