"""The paper's Figures 2, 3 and 4 beside this study, and the folder that all of the comparison is written to."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from simulated_study import UUID, simulated_runs, write_study
from test_paper import paper_study
from typer.testing import CliRunner

from analysis.commands.cli import app
from analysis.errors import AnalysisError
from analysis.figures import style
from analysis.paper import published
from analysis.paper.comparison import CURVES, paper_comparison
from analysis.paper.published_curves_figure import published_curves, published_curves_figure
from analysis.paper.published_figure import published_figure, published_points
from analysis.paper.published_rel_errors_figure import published_rel_error_figure, published_rel_errors
from analysis.paper.trials import paper_trials
from analysis.paper.write import write_comparison
from analysis.runs.load import load_study
from analysis.runs.study_runs import StudyAddress

STUDIES = {
    "whole": paper_study(),
    "two seeds": paper_study(seeds=(0, 1)),
    "other protocol": paper_study(steps=400),
    "dense alone": paper_study()[:1],
    "no dense": paper_study()[1:],
    "mixed": [paper_study()[0], replace(paper_study()[2], seeds=(0,)), *paper_study()[3:]],
}
LONG_NOTE = "Of several trials of one definition the first is shown, and of its seeds those that are complete. " * 4


def frames(found):
    """The frame behind each figure: against parameters, of errors, of curves."""
    runs, curves = simulated_runs(found, keys=CURVES)
    trials = paper_trials(runs)
    curves = curves[curves["trial"].isin(trials.from_scratch)]
    points = published_points(paper_comparison(runs, trials, curves))
    return points, published_rel_errors(runs, trials), published_curves(curves, trials)


FIGURES = (published_figure, published_rel_error_figure, published_curves_figure)


@pytest.fixture(scope="module", params=STUDIES)
def drawn(request):
    """Frames of a study, and its figures with a note."""
    found = frames(STUDIES[request.param])
    return request.param, found, [make(frame, LONG_NOTE) for make, frame in zip(FIGURES, found, strict=True)]


def said(figure):
    return str(figure.get_label()).strip()


def test_no_text_leaves_a_figure_or_touches_another(drawn):
    for figure in drawn[2]:
        canvas = figure.canvas
        assert isinstance(canvas, FigureCanvasAgg)
        figure.draw_without_rendering()
        renderer = canvas.get_renderer()
        width, height = figure.get_size_inches() * figure.dpi
        boxes = []
        for axes in figure.axes:
            free = [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]
            ticks = [
                tick.label1
                for axis in (axes.xaxis, axes.yaxis)
                for tick in axis.get_major_ticks()
                if min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
            ]
            shown = [text for text in (*free, *ticks) if text.get_text() and text.get_visible()]
            boxes += [text.get_window_extent(renderer) for text in shown]
        boxes += [text.get_window_extent(renderer) for text in figure.texts]
        boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
        for index, box in enumerate(boxes):
            assert box.x0 >= -0.5
            assert box.y0 >= -0.5
            assert box.x1 <= width + 0.5
            assert box.y1 <= height + 0.5
            for other in boxes[index + 1 :]:
                apart = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
                assert min(apart) <= 1.0


def test_figures_say_what_is_published_and_over_how_many_seeds(drawn):
    name, found, figures = drawn
    for frame, figure in zip(found, figures, strict=True):
        text = said(figure)
        assert "uncertainty not reported" in text
        assert text.endswith(LONG_NOTE.strip())
        counts = frame.loc[frame["n_seeds"] > 0, "n_seeds"]
        if len(counts):
            assert f"n = {counts.min()}" in text
            assert ("fewer than three seeds" in text) == (counts.min() < 3)
        else:
            assert "measured" in text
            assert name in ("other protocol", "no dense")


def test_nothing_has_an_interval_below_three_seeds(drawn):
    points, errors, curves = drawn[1]
    for frame, column in ((points, "low"), (errors, "low"), (curves, "half_width")):
        assert (
            frame.loc[frame["n_seeds"] > 0, column].isna() == (frame.loc[frame["n_seeds"] > 0, "n_seeds"] < 3)
        ).all()


def test_figure_4_shows_every_published_and_every_measured_point():
    points = frames(STUDIES["whole"])[0]
    assert len(points) == 2 * 5
    assert points["measured"].notna().all()
    figure = published_figure(points)
    for axes, quantity in zip(figure.axes, ("validation loss", "validation accuracy"), strict=True):
        own = points[points["quantity"] == quantity]
        hollow, filled = axes.lines[0], axes.lines[1]
        assert hollow.get_markerfacecolor() == "white"
        assert sorted(hollow.get_xdata()) == sorted(own["n_params_published"])
        assert sorted(hollow.get_ydata()) == sorted(own["published"])
        assert sorted(filled.get_xdata()) == sorted(own["n_params"])
        assert sorted(filled.get_ydata()) == pytest.approx(sorted(own["measured"]))
        low, high = axes.get_ylim()
        assert own[["published", "low", "high"]].to_numpy().min() > low
        assert own[["published", "low", "high"]].to_numpy().max() < high


def test_figure_2_has_table_3_beside_the_errors_of_the_same_layers():
    errors = frames(STUDIES["whole"])[1]
    known = errors.dropna(subset="published")
    assert set(known["when"]) == {"init"}
    assert sorted(known["published"]) == sorted(
        number for model in published.MODELS[1:] for number in (model.max_rel_error, model.mean_rel_error)
    )
    assert set(known["n_layers"]) == {25}
    kinds = errors[(errors["when"] == "trained") & (errors["chi"] == 8)].set_index("layers")
    assert list(kinds["n_layers"]) == [25, 25, 16, 4, 4, 1]
    assert (kinds["measured"] < kinds.loc["largest of any layer", "measured"] + 1e-12).all()
    mean = np.average(kinds["measured"].iloc[2:], weights=kinds["n_layers"].iloc[2:])
    assert kinds.loc["mean over layers", "measured"] == pytest.approx(mean)
    overall = published_rel_error_figure(errors).axes[0]
    hollow = [line for line in overall.lines if line.get_markerfacecolor() == "white"]
    assert sorted(np.concatenate([line.get_ydata() for line in hollow])) == sorted(known["published"])


def test_figure_3_has_the_published_ends_right_of_the_curves():
    curves = frames(STUDIES["whole"])[2]
    ends = curves.dropna(subset="published")
    assert len(ends) == 2 * 5
    assert set(ends["step"]) == {2000}
    assert set(ends["quantity"]) == {"val_loss", "val_acc"}
    figure = published_curves_figure(curves)
    for axes, quantity in zip(figure.axes, ("train_loss", "val_loss", "val_acc"), strict=True):
        hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
        assert [line.get_ydata()[0] for line in hollow] == list(ends.loc[ends["quantity"] == quantity, "published"])
        assert all(line.get_xdata()[0] > 2000 for line in hollow)
        assert len({line.get_marker() for line in hollow}) == len(hollow)
        last = curves[(curves["quantity"] == quantity) & (curves["step"] == 2000) & (curves["n_seeds"] > 0)]
        drawn = [line.get_ydata()[-1] for line in axes.lines if len(line.get_xdata()) > 2]
        assert drawn == pytest.approx(list(last["mean"]))


@pytest.mark.slow
def test_figures_are_written_the_same_twice(tmp_path):
    found = frames(STUDIES["mixed"])
    for name in ("a", "b"):
        for index, (make, frame) in enumerate(zip(FIGURES, found, strict=True)):
            style.save(make(frame), tmp_path / f"{name}{index}")
    for index in range(len(found)):
        for form in style.FORMATS:
            assert (tmp_path / f"a{index}.{form}").read_bytes() == (tmp_path / f"b{index}.{form}").read_bytes()


# The folder and the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    models = [*paper_study(seeds=range(3)), replace(paper_study()[2], arm="again", seeds=(0,))]
    models[0] = replace(models[0], failed=(3,))
    uri = write_study(tmp_path_factory.mktemp("paper"), models, n_evaluations=4)
    return StudyAddress(uri, "tiny", UUID)


@pytest.fixture(scope="module")
def folder(address, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "new" / "paper"
    return out, write_comparison(load_study(address), out)


def test_folder_has_tables_figures_and_what_they_show(folder):
    out, written = folder
    tables = {f"{name}.{kind}" for name in ("comparison", "models") for kind in ("csv", "md", "tex")}
    figures = {
        f"{name}.{kind}"
        for name in ("published", "published_rel_error", "published_curves") for kind in ("csv", "txt", *style.FORMATS)
    }  # fmt: skip
    assert tables | figures == set(written.names)
    assert {path.name for path in out.iterdir()} == {*written.names, "paper.json"}
    read = pd.read_csv(out / "comparison.csv", keep_default_na=True)
    assert list(read["published"]) == pytest.approx(list(written.comparison.data["published"]), nan_ok=True)
    models = pd.read_csv(out / "models.csv")
    assert list(models["model"]) == [model.name for model in published.MODELS]
    assert models["others"].dropna().tolist() == ["trial 5 (again, lr 0.0003)"]
    assert list(models["n_failed"]) == [1, 0, 0, 0, 0]


def test_folder_written_again_is_the_same_and_keeps_other_files(folder, address, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        write_comparison(load_study(address), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    for path in folder[0].iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_folder_written_again_replaces_what_it_wrote_and_nothing_else(folder, address, tmp_path):
    runs = load_study(address)
    (tmp_path / "published.csv").write_text("mine")
    with pytest.raises(AnalysisError, match=r"published\.csv exists and was not written by a comparison"):
        write_comparison(runs, tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("published.csv", "mine")]
    (tmp_path / "published.csv").unlink()
    shutil.copytree(folder[0], tmp_path, dirs_exist_ok=True)
    listed = json.loads((tmp_path / "paper.json").read_text())["written"]
    assert listed == folder[1].names
    (tmp_path / "models.csv").write_text("changed")
    write_comparison(runs, tmp_path)
    assert (tmp_path / "models.csv").read_text() != "changed"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "taken name"])
def test_what_cannot_be_written_leaves_nothing_half_done(address, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("a file")
    else:
        (out / "comparison.csv").mkdir(parents=True)
    why = "cannot write the comparison to .*out: " if kind == "file" else "comparison.csv exists and was not written by"
    with pytest.raises(AnalysisError, match=why):
        write_comparison(load_study(address), out)
    left = [path.name for path in tmp_path.rglob("*")]
    assert left == (["out"] if kind == "file" else ["out", "comparison.csv"])


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_command_fits_the_terminal_and_says_which_trials(address, tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    arguments = ["paper", "--tracking-uri", address.tracking_uri, "--experiment", "tiny", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    tables = lines[: lines.index("follows: whether the published number can follow from its own definition")]
    assert max(map(len, tables)) <= columns
    for place in ("Table 2", "Table 3", "Table 4", "Figure 2", "Figure 4", "Text"):
        assert place in [line.strip() for line in tables]
    assert "MPO χ = 8 is trial 2 (mpo), the first of its definition; not shown: trial 5 (again, lr 0.0003)" in lines
    assert "dense is trial 0 (dense): its seeds are 3 complete, 1 failed; only the complete count" in lines
    [retained] = [line for line in tables if "retained accuracy (%)" in line]
    assert "97.7" in retained
    assert " to " in retained  # Fieller's, which is not symmetric
    assert not any("left open" in line for line in lines)
