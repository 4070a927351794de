from __future__ import annotations

import numpy as np
import pytest
import simulated_controls
from drawn import artists, caption_of, check_same_bytes, check_texts
from simulated_study import N_PARAMS_DENSE, Configuration, simulated_runs

from analysis.figures.retained import retained_figure
from analysis.results.retained import retained_points
from analysis.results.summary import summarise
from analysis.statistics.intervals import ratio_interval

STUDIES = simulated_controls.studies()
WITHOUT = ["one configuration", "no dense model", "equal", "all lost"]
"""Studies that have no dense reference, or nothing to set beside it."""


def points_of(found, every=True, **settings):
    runs, _ = simulated_runs(found, n_evaluations=2, **settings)
    summary = summarise(runs)
    return runs, retained_points(runs, summary, summary["trial"] if every else ())


@pytest.mark.parametrize("name", sorted(set(STUDIES) - set(WITHOUT)))
def test_retained_holds_all_its_text_apart(name):
    check_texts(retained_figure(points_of(STUDIES[name])[1], N_PARAMS_DENSE, "A note."))


@pytest.mark.parametrize("name", WITHOUT)
def test_nothing_is_retained_without_a_reference(name):
    assert points_of(STUDIES[name])[1].empty


def test_retained_is_the_same_twice(tmp_path):
    _, points = points_of(STUDIES["controls"])
    check_same_bytes(lambda: retained_figure(points, N_PARAMS_DENSE), tmp_path)


def test_ratio_is_of_the_seeds_both_have():
    runs, points = points_of(
        [
            Configuration("dense", N_PARAMS_DENSE, 1.6, "dense", seeds=(0, 1, 2, 3, 4)),
            Configuration("mpo", 40_000, 1.9, chi=4, seeds=(1, 2, 3, 9)),
        ]
    )
    accuracy = runs.seeds.set_index(["trial", "seed"])["final/val_acc"]
    found = ratio_interval(accuracy[1].loc[[1, 2, 3]], accuracy[0].loc[[1, 2, 3]])
    [row] = points.to_dict("records")
    assert (row["trial"], row["n"], row["n_params"], row["label"]) == (1, 3, 40_000, "χ=4")
    assert row["ratio"] == pytest.approx(100 * accuracy[1].loc[[1, 2, 3]].mean() / accuracy[0].loc[[1, 2, 3]].mean())
    assert [row["low"], row["high"]] == pytest.approx([100 * found.low, 100 * found.high])
    assert row["low"] < row["ratio"] < row["high"]


def test_other_budgets_take_part_only_where_they_are_declared():
    runs, _ = simulated_runs(STUDIES["usual"], n_evaluations=2)
    summary = summarise(runs)
    reference = summary.loc[summary["is_reference"]].iloc[0]
    tuned = summary.loc[summary["start"] != "scratch", "trial"].tolist()
    same = retained_points(runs, summary)
    assert set(same["trial"]) == set(summary["trial"]) - {reference["trial"], *tuned}
    assert set(retained_points(runs, summary, tuned[:1])["trial"]) == {*same["trial"], tuned[0]}


def test_stopped_trials_and_those_without_shared_seeds_are_left_out():
    _, points = points_of(
        [
            Configuration("dense", N_PARAMS_DENSE, 1.6, "dense"),
            Configuration("mpo", 40_000, 1.9, chi=4, seeds=(7, 8, 9)),
            Configuration("mpo", 80_000, 1.8, chi=8, stopped="trial 0 is better"),
            Configuration("mpo", 90_000, 1.8, chi=16),
        ]
    )
    assert points["trial"].tolist() == [3]


def test_no_interval_below_three_seeds_or_where_a_seed_failed():
    found = [
        Configuration("dense", N_PARAMS_DENSE, 1.6, "dense"),
        Configuration("mpo", 40_000, 1.9, chi=4, seeds=(0, 1)),
        Configuration("mpo", 80_000, 1.8, chi=8, failed=(3,)),
        Configuration("mpo", 90_000, 1.7, chi=16),
    ]
    _, points = points_of(found)
    assert points["low"].isna().tolist() == points["high"].isna().tolist() == [True, True, False]
    figure = retained_figure(points, N_PARAMS_DENSE)
    [axes] = figure.axes
    few, failed, whole = artists(axes, "mean")
    assert len(artists(axes, "interval")) == 1
    assert (few.get_markeredgecolor(), few.get_markerfacecolor()) == ("#8c8c8c", "white")
    assert (failed.get_markeredgecolor(), failed.get_markerfacecolor()) == ("#0072b2", "white")
    assert whole.get_markerfacecolor() == "#0072b2"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"hollow: some seeds failed", "grey: fewer than 3 seeds"} <= set(legend)
    check_texts(figure)


def test_a_ratio_that_the_seeds_do_not_bound_is_drawn_without_bar_and_counted():
    _, points = points_of([Configuration("dense", 808_448, 1.6, "dense"), Configuration("mpo", 40_000, 1.9, chi=4)])
    open_ended = points.assign(low=np.nan, high=np.nan)
    figure = retained_figure(open_ended, N_PARAMS_DENSE)
    assert not artists(figure.axes[0], "interval")
    assert "1 without bar: the seeds do not bound the ratio." in caption_of(figure)
    check_texts(figure)


def test_retained_figure_draws_its_frame_and_the_line_of_dense():
    _, points = points_of(STUDIES["usual"])
    [axes] = retained_figure(points, N_PARAMS_DENSE).axes
    means = artists(axes, "mean")
    assert [line.get_ydata()[0] for line in means] == points["ratio"].tolist()
    # Groups of one size stand side by side, no further than 10 % of their size.
    assert [line.get_xdata()[0] for line in means] == pytest.approx(points["n_params"].tolist(), rel=0.1)
    places = {(round(line.get_xdata()[0]), round(line.get_ydata()[0], 6)) for line in means}
    assert len({x for x, _ in places}) == len(points)
    bars = np.array([line.get_ydata() for line in artists(axes, "interval")])
    assert bars == pytest.approx(points[["low", "high"]].to_numpy())
    assert any(set(line.get_ydata()) == {100} for line in axes.lines)
    assert axes.get_xlim()[1] > N_PARAMS_DENSE
