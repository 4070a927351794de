"""The notebook's study: its frames, its figures at any width and size, and one clear line for what does not exist."""

from __future__ import annotations

from itertools import pairwise

import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis import AnalysisError, load_study
from analysis.commands.cli import app
from analysis.report.notebook import Study
from analysis.results.sizes import SIZES
from analysis.results.summary import summarise
from analysis.runs.load import resolve_study


@pytest.fixture(scope="module")
def study(study_dir) -> Study:
    return load_study(study_dir)


def test_frames_are_those_of_the_report(study, findings, runs):
    assert repr(study) == f"Study('tiny': {len(runs.trials)} trials, {len(runs.seeds)} complete seeds, 1 failed)"
    pd.testing.assert_frame_equal(study.trials, summarise(runs))
    pd.testing.assert_frame_equal(study.runs, runs.seeds)
    pd.testing.assert_frame_equal(study.compare(), findings.compared)
    assert study.compare(declared=True)["declared"].all()
    frontier = study.frontier()
    on = findings.summary[findings.summary["on_frontier/val_loss"]]
    assert frontier["trial"].tolist() == on.sort_values("n_params")["trial"].tolist()
    chances = findings.uncertainties["val_loss"].chances.set_index("trial")["probability"]
    assert frontier["probability"].tolist() == chances[frontier["trial"]].tolist()


def test_study_is_the_same_by_its_address(study, study_dir):
    by_address = load_study(resolve_study(study_dir).tracking_uri, experiment="tiny")
    pd.testing.assert_frame_equal(by_address.trials, study.trials)


def test_frontier_of_some_arms_is_that_of_a_study_of_these_arms(study):
    assert set(study.frontier(arms=["mpo"])["arm"]) == {"mpo"}
    alone = study.frontier(arms=["mpo"])
    everything = study.trials
    own = everything[(everything["arm"] == "mpo") & (everything["n_seeds"] >= 3) & (everything["n_failed"] == 0)]
    best = own.sort_values("n_params")["mean/final/val_loss"].cummin()
    assert len(alone) == best.nunique()


def test_frontier_by_another_size_ranks_by_that_size(study):
    """Prefill time rises with the loss here, so the fastest configuration is the best one."""
    runs = study._runs
    slow = runs.seeds.assign(prefill_ms=10 * runs.seeds["final/val_loss"])
    measured = Study(type(runs)(**{**runs.__dict__, "seeds": slow}))
    frontier = measured.frontier("loss", "prefill_ms")
    assert len(frontier) == 1
    best = measured.trials.loc[lambda trials: trials["n_failed"] == 0, "mean/final/val_loss"].min()
    assert frontier["mean"].item() == pytest.approx(best)
    assert frontier["prefill_ms"].item() == pytest.approx(10 * best)
    assert measured.plot_frontier(size="prefill_ms").axes[0].get_xlabel() == SIZES["prefill_ms"].axis_label


@pytest.mark.parametrize("width", [2.5, 3.3, 6.75])
@pytest.mark.parametrize("look", ["screen", "paper"])
def test_figures_have_the_width_asked_for_and_nothing_leaves_them(study, width, look):
    for figure in (study.plot_frontier("accuracy", width=width, look=look), study.plot_curves(width=width, look=look)):
        assert figure.get_figwidth() == width
        assert figure.get_label()
        axes = figure.axes[0]
        ticks = [text for axis in (axes.xaxis, axes.yaxis) for text in axis.get_ticklabels() if text.get_text()]
        for artist in (*axes.texts, *ticks, *figure.legends):
            extent = artist.get_window_extent()
            assert extent.x0 >= -1
            assert extent.x1 <= width * figure.dpi + 1
    axes = study.plot_frontier(width=width, look=look).axes[0]
    beside = [text.get_window_extent() for text in axes.get_xticklabels() if text.get_text()]
    assert all(left.x1 <= right.x0 for left, right in pairwise(beside))


def test_a_notebook_shows_what_was_run_and_the_frontier(study):
    shown = study._repr_html_()
    assert shown.startswith("<h3>Study tiny</h3>")
    assert "What is on the frontier?" in shown


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda study: study.plot_frontier("los"), "there is no measure los; choose among loss, accuracy, val_loss"),
        (lambda study: study.frontier(size="params"), "there is no size params; choose among parameters, bytes"),
        (lambda study: study.frontier(arms=["mop"]), "there is no arm mop; choose among dense"),
        (lambda study: study.frontier(size="decode_ms"), "no configuration has val_loss and decode_ms"),
        (lambda study: study.curves("val_los"), "there is no metric val_los; choose among"),
        (lambda study: study.plot_curves(width=1), "the width must be 2.5 to 20 inches, but is 1"),
        (lambda study: study.plot_curves(width=1e5), "the width must be 2.5 to 20 inches, but is 100000.0"),
        (lambda study: study.plot_curves(width="3in"), "the width must be 2.5 to 20 inches, but is '3in'"),
        (lambda study: study.plot_frontier(look="neat"), "there is no look neat; choose among screen, paper"),
        (lambda study: study.frontier(arms=[]), "no seed of these arms is complete"),
        (lambda study: load_study("sqlite:///x.db"), "is a tracking URI; name the study there"),
    ],
)
def test_what_does_not_exist_is_one_clear_line(study, act, message):
    with pytest.raises(AnalysisError, match=message):
        act(study)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["frontier", "--width", "84mm", "--style", "paper"], "frontier.pdf"),
        (["frontier", "--out", "mine.svg", "--arm", "mpo"], "mine.svg"),
        (["curves", "--format", "png", "--out", "drawn"], "drawn.png"),
        (["frontier", "--out", "Drawn.PDF"], "Drawn.pdf"),
        (["frontier", "--out", "."], "frontier.pdf"),
    ],
)
def test_figure_command_writes_the_figure_and_its_caption(study_dir, tmp_path, monkeypatch, arguments, name):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["figure", arguments[0], str(study_dir), *arguments[1:]])
    assert result.exit_code == 0, result.output
    assert (tmp_path / name).stat().st_size > 1000
    assert "Means over complete seeds" in (tmp_path / name).with_suffix(".txt").read_text(encoding="utf-8")


def test_configurations_without_a_value_are_counted_in_the_caption(study):
    runs = study._runs
    trials = runs.trials.copy()
    trials.loc[trials["arm"] == "dense", "bytes"] = pd.NA
    trials.loc[trials["arm"] != "dense", "bytes"] = 4 * trials.loc[trials["arm"] != "dense", "n_params"]
    figure = Study(type(runs)(**{**runs.__dict__, "trials": trials})).plot_frontier(size="bytes")
    n = ((trials["arm"] == "dense") & (trials["n_seeds"] > 0)).sum()
    assert f"Left out for lack of these values: {n} configuration" in figure.get_label()


def test_figure_that_a_notebook_saves_has_the_fonts_of_one_that_the_report_saves(study, tmp_path):
    study.plot_frontier(look="paper").savefig(tmp_path / "frontier.pdf")
    content = (tmp_path / "frontier.pdf").read_bytes()
    assert b"/Type3" not in content
    assert b"STIX" in content


@pytest.mark.parametrize("width", ["3.3", "wide", "3.3ft", "in"])
def test_figure_command_says_what_a_width_is(study_dir, width):
    result = CliRunner().invoke(app, ["figure", "frontier", str(study_dir), "--width", width])
    assert result.exit_code == 2
    assert "--width must be a number and in, cm, mm or pt, such as 3.3in" in result.output
