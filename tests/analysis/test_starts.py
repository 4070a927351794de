from __future__ import annotations

from dataclasses import replace

import pytest
import simulated_controls
from drawn import artists, check_same_bytes, check_texts, footer_of
from simulated_study import N_PARAMS_DENSE, N_PARAMS_MPO, Configuration, simulated_runs

from analysis.figures.starts import start_points, starts_figure
from analysis.results.summary import MEASURES, summarise

STUDIES = simulated_controls.studies()
DENSE = Configuration("dense", N_PARAMS_DENSE, 1.6, "dense")


def points_of(found):
    runs, _ = simulated_runs(found, n_evaluations=2)
    return start_points(summarise(runs))


def mpo(chi, start, loss=1.8, **settings):
    steps = 2000 if start == "scratch" else 500
    return Configuration(f"mpo-{start}", N_PARAMS_MPO[chi], loss, start=start, chi=chi, steps=steps, **settings)


@pytest.mark.parametrize("name", sorted(set(STUDIES) - {"one configuration", "all lost"}))
def test_starts_hold_all_their_text_apart(name):
    check_texts(starts_figure(points_of(STUDIES[name]), "A note."))


def test_starts_are_the_same_twice(tmp_path):
    points = points_of(STUDIES["usual"])
    check_same_bytes(lambda: starts_figure(points), tmp_path)


def test_only_shapes_of_both_starts_are_shown():
    points = points_of(
        [DENSE, mpo(4, "scratch"), mpo(4, "teacher"), mpo(8, "scratch"), mpo(16, "teacher"),
         mpo(32, "scratch"), mpo(32, "teacher", extra={"n_sites": 2})]
    )  # fmt: skip
    once = points[points["measure"] == "val_loss"]
    assert once[["family", "start", "trial"]].to_numpy().tolist() == [
        ["mpo", "scratch", 1],
        ["mpo", "teacher", 2],
        ["dense", "scratch", 0],
    ]
    assert points_of([DENSE, mpo(4, "scratch"), mpo(8, "teacher")]).empty
    assert points_of([DENSE]).empty


def test_controls_are_paired_by_the_chi_they_stand_for():
    control = Configuration("low_rank", 40_000, 1.9, "low_rank", extra={"as_chi": 4})
    tuned = replace(control, arm="low_rank-tuned", start="teacher", val_loss=1.7)
    points = points_of([DENSE, control, tuned, replace(tuned, extra={"as_chi": 8}, n_params=80_000)])
    compressed = points[(points["family"] == "low_rank") & (points["measure"] == "val_acc")]
    assert compressed["trial"].tolist() == [1, 2]
    assert compressed["chi"].tolist() == [4, 4]
    figure = starts_figure(points)
    assert [text.get_text() for text in figure.axes[0].texts] == ["as χ=4"]


def test_of_several_trials_of_one_shape_the_first_whole_one_is_shown_not_the_best():
    points = points_of(
        [
            DENSE,
            mpo(8, "scratch", seeds=(0, 1)),
            mpo(8, "scratch", 1.9, failed=(3,)),
            mpo(8, "scratch", 1.8, stopped="trial 0 is better"),
            mpo(8, "scratch", 1.8, learning_rate=1e-3),
            mpo(8, "scratch", 1.6, learning_rate=3e-3),
            mpo(8, "teacher"),
        ]
    )
    once = points[(points["measure"] == "val_loss") & (points["family"] == "mpo")]
    assert once["trial"].tolist() == [4, 6]
    assert once["n_others"].tolist() == [3, 0]
    assert "the first is shown, not the best; 3 are not" in footer_of(starts_figure(points))


def test_starts_figure_draws_its_frame_and_joins_each_shape():
    points = points_of(STUDIES["usual"])
    figure = starts_figure(points)
    for measure, axes in zip(MEASURES, figure.axes, strict=True):
        own = points[(points["measure"] == measure.name) & (points["family"] != "dense")]
        assert [line.get_ydata()[0] for line in artists(axes, "mean")] == own["mean"].tolist()
        bars = [list(line.get_ydata()) for line in artists(axes, "interval")]
        assert bars == [[mean - half, mean + half] for mean, half in zip(own["mean"], own["half_width"], strict=True)]
        joined = [sorted(line.get_ydata()) for line in artists(axes, "pair")]
        assert joined == [sorted(pair["mean"]) for _, pair in own.groupby("chi")]
        left, right = (line.get_xdata()[0] for line in artists(axes, "mean")[:2])
        assert left < own["n_params"].iloc[0] < right
        assert sorted(text.get_text() for text in axes.texts) == ["χ=16", "χ=32", "χ=4", "χ=8"]


def test_tokens_of_both_starts_are_stated_the_teachers_included():
    figure = starts_figure(points_of(STUDIES["usual"]))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "MPO from scratch: 16.4M tokens" in legend
    assert "MPO fine-tuned: 20.5M tokens, 16.4M of them the teacher's" in legend
    assert "dense: 16.4M tokens" in legend
    assert "different numbers of tokens" in footer_of(figure)


def test_a_dense_model_that_was_fine_tuned_is_a_line_of_its_own():
    tuned = Configuration("dense-tuned", N_PARAMS_DENSE, 1.55, "dense", start="teacher", steps=500)
    points = points_of([DENSE, tuned, mpo(8, "scratch"), mpo(8, "teacher")])
    dense = points[(points["family"] == "dense") & (points["measure"] == "val_loss")]
    assert dense["trial"].tolist() == [0, 1]
    figure = starts_figure(points)
    levels = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_gid() is None]
    assert levels == pytest.approx(dense["mean"].tolist())
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "dense fine-tuned: 20.5M tokens, 16.4M of them the teacher's" in legend
