"""Schedules of the learning rate, against values computed by hand, and where a study file may choose them."""

from __future__ import annotations

from typing import get_args

import pytest

from study.errors import StudyError
from study.spec.protocol import Protocol
from study.spec.search_space import listed_specs
from study.spec.study_file import validate
from study.spec.trial import budget_hash
from study.spec.values import ScheduleName
from study.training.model import trial_shape
from study.training.schedules import SCHEDULES, learning_rate_at
from study.training.seed_run import train_seed

WSD = {"schedule": "wsd"}
DENSE = {"name": "dense", "family": "dense"}


def rates(**protocol):
    """Rates at all steps, as shares of the peak."""
    made = Protocol(**{"warmup_steps": 0, "learning_rate": 0.5, **protocol})
    return [learning_rate_at(step, made) / 0.5 for step in range(made.steps + 1)]


def test_names_of_a_study_file_are_those_of_the_schedules():
    assert get_args(ScheduleName) == tuple(SCHEDULES)


def test_wsd_warms_up_stays_and_falls():
    expected = [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4, 0]
    assert rates(steps=20, warmup_steps=4, **WSD) == pytest.approx(expected)


def test_decay_fraction_is_the_share_that_falls():
    assert rates(steps=8, decay_fraction=0.5, **WSD) == pytest.approx([1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4, 0])
    assert rates(steps=4, decay_fraction=1.0, **WSD) == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4, 0])
    assert rates(steps=3, decay_fraction=1e-300, **WSD) == [1, 1, 1, 0]


def test_a_fall_over_a_broken_number_of_steps_begins_between_two_of_them():
    # 10 steps · 0.25 = 2.5 steps of decay.
    assert rates(steps=10, decay_fraction=0.25, **WSD)[7:] == pytest.approx([1, 2 / 2.5, 1 / 2.5, 0])


def test_wsd_with_a_warm_up_longer_than_the_constant_part():
    assert rates(steps=8, warmup_steps=4, decay_fraction=0.4, **WSD) == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 1, 1, 3 / 3.2, 2 / 3.2, 1 / 3.2, 0]
    )


def test_wsd_falls_only_when_the_warm_up_is_over():
    assert rates(steps=8, warmup_steps=6, decay_fraction=0.5, **WSD) == pytest.approx(
        [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 1 / 2, 0]
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_is_at_the_peak(schedule):
    assert rates(steps=1, schedule=schedule) == pytest.approx([1, 0])


# In a study file ------------------------------------------------------------------------------------------------------


def test_training_follows_the_schedule(spec_of, corpus):
    spec = spec_of(WSD | {"decay_fraction": 0.5, "eval_every": 1})
    result, _ = train_seed(spec, 0, corpus)
    assert [row["learning_rate"] for row in result.curve] == [learning_rate_at(s, spec.protocol) for s in range(13)]
    assert result.curve[5]["learning_rate"] == 0.01
    assert result.curve != train_seed(spec_of({"eval_every": 1}), 0, corpus)[0].curve


def test_arms_override_the_schedule(small_study):
    arms = [
        DENSE,
        DENSE | {"name": "cosine", "schedule": "cosine"},
        DENSE | {"name": "longer", "decay_fraction": 0.5},
    ]
    config = validate(small_study(arms=arms, protocol=WSD | {"decay_fraction": 0.3}), "here")
    protocols = [spec.protocol for spec in listed_specs(config)]
    assert [(protocol.schedule, protocol.decay_share) for protocol in protocols] == [
        ("wsd", 0.3),
        ("cosine", None),
        ("wsd", 0.5),
    ]
    [spec] = listed_specs(validate(small_study(arms=[DENSE | WSD]), "here"))
    assert (spec.protocol.schedule, spec.protocol.decay_share) == ("wsd", 0.2)


@pytest.mark.parametrize("arm", [{"decay_fraction": 0.5}, {"schedule": "cosine", "decay_fraction": 0.5}])
def test_an_arm_with_cosine_has_no_decay_fraction(small_study, arm):
    config = validate(small_study(arms=[DENSE | arm]), "here")
    with pytest.raises(StudyError, match=r"arms\[dense\]: `decay_fraction` is not allowed with `schedule: cosine`"):
        listed_specs(config)


def test_schedule_is_budget_and_identity(small_study):
    def hashes(**protocol):
        config = validate(small_study(arms=[DENSE], protocol=protocol), "here")
        [spec] = listed_specs(config)
        shape = trial_shape(spec, 11, 50, config.model)
        return budget_hash(spec, config, "a" * 64, None), budget_hash(spec, config, "a" * 64, spec), shape.identity

    cosine, wsd, half = hashes(), hashes(**WSD), hashes(**WSD, decay_fraction=0.5)
    assert all(len(set(each)) == 3 for each in zip(cosine, wsd, half, strict=True))
    assert hashes(schedule="cosine") == cosine
    assert hashes(**WSD, decay_fraction=0.2) == wsd  # the default, under its own words
