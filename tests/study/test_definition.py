from __future__ import annotations

import pytest
from study_fixtures import DENSE, MPO, SEARCHED, TUNED, write_search, write_study

from study.spec.definition import definition, only_adds, settled
from study.spec.study_file import load_config


@pytest.mark.parametrize(
    ("changes", "adds"),
    [
        ({}, True),
        ({"seeds": 3}, True),
        ({"seeds": [0, 1, 7]}, True),
        ({"seeds": 1}, False),
        ({"seeds": [1, 0, 2]}, False),  # the sampler was told of the first ones
        ({"arms": [DENSE, MPO | {"chi": [4, 3, 2]}, TUNED]}, True),
        ({"arms": [DENSE, MPO | {"chi": [2, 3]}, TUNED]}, False),
        ({"arms": [{"name": "new", "family": "mpo", "chi": 3}, DENSE, TUNED, MPO]}, True),
        ({"arms": [DENSE, MPO | {"name": "renamed"}, TUNED]}, False),
        ({"arms": [DENSE, TUNED]}, False),
        ({"arms": [DENSE, MPO, MPO | {"name": "fixed", "gauge": "fixed"}, TUNED]}, True),
        ({"arms": [DENSE, MPO | {"gauge": "fixed"}, TUNED]}, False),
        ({"arms": [DENSE, MPO, TUNED | {"steps": 5}]}, False),
        ({"arms": [DENSE, MPO | {"decay": ["parameter", "matrix"]}, TUNED]}, True),
        ({"arms": [DENSE, MPO, TUNED, TUNED | {"name": "again", "start": "dense", "chi": 3}]}, True),
        ({"arms": [DENSE, MPO | {"learning_rate": {2: 0.01, 4: 0.01, 3: 0.1}, "chi": [2, 4, 3]}, TUNED]}, True),
        ({"arms": [DENSE, MPO | {"learning_rate": {2: 0.01, 4: 0.1}}, TUNED]}, False),
        ({"arms": [DENSE, MPO | {"tuned_among": 3}, TUNED]}, False),
        ({"protocol": {"steps": 7}}, False),
        ({"protocol": {"precision": "bfloat16"}}, False),
        ({"execution": {"capture": False}}, True),
        ({"objectives": ["val_loss"]}, False),
        ({"arms": [DENSE, MPO, TUNED, SEARCHED], "search": {"sampler": "tpe", "trials": 3}}, False),
    ],
)
def test_only_adds_is_true_of_seeds_and_listed_trials_more(tmp_path, changes, adds):
    old = load_config(write_study(tmp_path / "old"))
    assert only_adds(old, load_config(write_study(tmp_path / "new", **changes))) is adds


@pytest.mark.parametrize(
    ("changes", "adds"),
    [
        ({"trials": 6}, True),
        ({"trials": 4}, False),
        ({"arms": [DENSE, SEARCHED, MPO]}, True),
        ({"arms": [DENSE, SEARCHED, SEARCHED | {"name": "other"}]}, False),
        ({"arms": [DENSE, SEARCHED | {"chi": {"low": 1, "high": 50}}]}, False),
    ],
)
def test_only_adds_is_true_of_searched_trials_more(tmp_path, changes, adds):
    old = load_config(write_search(tmp_path / "old", trials=5))
    assert only_adds(old, load_config(write_search(tmp_path / "new", **({"trials": 5} | changes)))) is adds


def test_settled_takes_what_the_study_had_before_for_what_it_has_grown_to(tmp_path):
    def study(folder, **changes):
        return load_config(write_search(tmp_path / folder, **({"trials": 5} | changes)))

    history = [study("a"), study("b", trials=8), study("c", trials=8, seeds=4)]
    assert definition(settled(study("d"), history)) == definition(history[-1])
    assert definition(settled(history[-1], history)) == definition(history[-1])
    more = settled(study("e", arms=[DENSE, SEARCHED, MPO]), history)  # an edit of the file as it was at first
    assert (more.search.trials, more.seeds, len(more.arms)) == (8, 4, 3)
    assert only_adds(history[-1], more)
    other = settled(study("f", trials=6), history)
    assert other.search.trials == 6
    assert not only_adds(history[-1], other)
    words = settled(study("g", description="new words"), history)
    assert words.description == "new words"
