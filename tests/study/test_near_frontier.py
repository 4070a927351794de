from __future__ import annotations

import numpy as np
from study_fixtures import MPO, ledger_at, made_up, write_study

from study.ledger.frontier import Point, frontier, near_frontier, points


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


def test_near_is_what_is_on_the_frontier_or_within_two_standard_errors_of_it():
    sure, wide = (2.0, 2.001, 1.999), (1.5, 2.0, 2.8)
    among = [
        Point(0, 10, (9.0, 9.01, 8.99)),  # the smallest is always on the frontier
        Point(1, 20, sure),
        Point(2, 30, wide),  # mean 2.1, a little above the frontier
        Point(3, 40, tuple(loss + 50 for loss in wide)),  # far off
        Point(4, 50, (1.0, 1.0, 1.0)),  # on it, far ahead
        Point(5, 60, (1.5, 1.6, 1.4)),  # above it by 1.2 of the standard errors that all share
        Point(6, 70, (7.0,)),  # a single seed
        Point(7, 80, (3.0, 2.0, 4.0)),  # above it by 4.7
    ]
    assert trials_of(near_frontier(among)) == [0, 1, 2, 4, 5, 6]
    assert trials_of(near_frontier(among[:1])) == [0]
    assert near_frontier([]) == []


def test_near_counts_equal_parameters_as_rivals():
    among = [Point(0, 10, (1.0, 1.2)), Point(1, 10, (1.1, 1.1)), Point(2, 10, (9.0, 9.1))]
    assert trials_of(near_frontier(among)) == [0, 1]


def test_near_is_as_defined_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(200):
        among = [
            Point(number, int(rng.integers(1, 6)), tuple(rng.normal(rng.integers(0, 3), 1, rng.integers(1, 5))))
            for number in range(rng.integers(1, 12))
        ]
        df = sum(len(point.losses) - 1 for point in among)
        pooled = sum((len(p.losses) - 1) * np.var(p.losses, ddof=1) for p in among if len(p.losses) > 1)
        near = []
        for point in among:
            rivals = [other for other in among if other is not point and other.n_params <= point.n_params]
            if rivals and len(point.losses) > 1:
                rival = min(rivals, key=lambda other: other.mean)
                error = np.sqrt(pooled / df * (1 / len(point.losses) + 1 / len(rival.losses)))
                if point.mean > rival.mean + 2 * error:
                    continue
            near.append(point.trial)
        assert trials_of(near_frontier(among)) == near


def test_points_are_trials_of_which_no_seed_failed(tmp_path):
    ledger = ledger_at(write_study(tmp_path, arms=[MPO | {"chi": [1, 2, 3, 500, 1000]}]), tmp_path / "study")
    while ledger.ask() is not None:
        pass
    results = [made_up(0, 0, loss=2.0), made_up(0, 1, loss=4.0), made_up(1, 0), made_up(1, 1, failure="diverged")]
    results.append(made_up(3, 0, loss=1.0))
    found = points(ledger.trials.values(), results)
    assert [(point.trial, point.losses) for point in found] == [(0, (2.0, 4.0)), (3, (1.0,))]
    assert found[0].n_params == ledger.trials[0].shape.n_params
