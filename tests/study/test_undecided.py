from __future__ import annotations

import math

import pytest
from scipy import stats
from study_fixtures import MPO, ledger_at, made_up, write_study

from study.ledger.frontier import Point, frontier, half_width, points, undecided


def trials_of(found):
    return [point.trial for point in found]


def test_frontier_is_what_no_other_point_beats():
    among = [
        Point(0, 100, (1.0, 1.0, 1.0)),
        Point(1, 50, (2.0, 4.0, 3.0, 3.0)),
        Point(2, 60, (3.5, 3.5, 3.5)),  # more parameters and a higher loss than 1
        Point(3, 50, (3.0, 3.0, 3.0)),  # as good as 1
        Point(4, 20, (9.0, 9.0, 9.0)),
        Point(5, 100, (1.5, 1.5, 1.5)),
        Point(6, 30, (0.1, 0.2)),  # the best of all, on two seeds
    ]
    assert trials_of(frontier(among)) == [4, 1, 3, 0]
    assert trials_of(frontier(among, fewest=2)) == [4, 6]
    assert frontier([]) == []


@pytest.mark.parametrize("losses", [(1.0, 2.0), (1.0, 1.5, 4.0), (0.3, 0.1, 0.25, 0.2, 0.21)])
def test_half_width_is_that_of_the_t_interval(losses):
    low, high = stats.t.interval(0.95, len(losses) - 1, loc=sum(losses) / len(losses), scale=stats.sem(losses))
    assert half_width(losses) == pytest.approx((high - low) / 2, rel=1e-9)


def test_half_width_of_one_seed_is_infinite():
    assert half_width((1.0,)) == math.inf


def test_undecided_are_the_points_whose_interval_reaches_the_frontier():
    sure, wide = (2.0, 2.001, 1.999), (1.5, 2.0, 2.8)
    among = [
        Point(0, 10, (9.0, 9.01, 8.99)),  # the smallest: nothing else can take its place
        Point(1, 20, sure),
        Point(2, 30, wide),  # mean 2.1, above the frontier, which its interval reaches
        Point(3, 40, tuple(loss + 50 for loss in wide)),  # as wide, and far off
        Point(4, 50, (1.0, 1.0, 1.0)),  # far below
        Point(5, 60, (0.999, 1.0, 0.9985)),  # below, by less than its interval
        Point(6, 70, (7.0,)),  # no interval
    ]
    assert trials_of(undecided(among)) == [2, 5, 6]
    assert trials_of(undecided(among[:1])) == []


def test_undecided_counts_equal_parameters_as_rivals_and_a_tie_as_undecided():
    among = [Point(0, 10, (1.0, 1.2)), Point(1, 10, (1.1, 1.1))]
    assert trials_of(undecided(among)) == [0, 1]


def test_undecided_is_what_would_be_on_the_frontier_with_seeds_enough():
    sure, few = (9.0, 9.01, 8.99), (8.0, 8.001)
    among = [Point(0, 10, (9.5, 9.501)), Point(1, 20, sure), Point(2, 30, few), Point(3, 40, (20.0, 20.001))]
    assert trials_of(frontier(among)) == [1]
    assert trials_of(undecided(among)) == [0, 2]


def test_points_are_trials_of_which_no_seed_failed(tmp_path):
    ledger = ledger_at(write_study(tmp_path, arms=[MPO | {"chi": [1, 2, 3, 500, 1000]}]), tmp_path / "study")
    while ledger.ask() is not None:
        pass
    results = [made_up(0, 0, loss=2.0), made_up(0, 1, loss=4.0), made_up(1, 0), made_up(1, 1, failure="diverged")]
    results.append(made_up(3, 0, loss=1.0))
    found = points(ledger.trials.values(), results)
    assert [(point.trial, point.losses) for point in found] == [(0, (2.0, 4.0)), (3, (1.0,))]
    assert found[0].n_params == ledger.trials[0].shape.n_params
