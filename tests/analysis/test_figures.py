from __future__ import annotations

import itertools
import re
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import simulated_study
from drawn import Drawn, apart
from matplotlib.collections import PolyCollection

from analysis.figures import data, labels, panels, style
from analysis.figures.curves import learning_curves_figure
from analysis.figures.frontier import frontier_figure
from analysis.figures.rel_errors import rel_error_figure
from analysis.results.numbers import percent
from analysis.results.summary import MEASURES, VAL_ACC, VAL_LOSS, summarise
from analysis.results.uncertainty import frontier_uncertainty

STUDIES = simulated_study.awkward_studies()


def drawn_frontier(runs, summary, measure, note=""):
    """The figure, and the points it shows."""
    uncertainty = frontier_uncertainty(runs, summary, measure)
    points = data.frontier_points(summary, measure, uncertainty.chances)
    return frontier_figure(points, data.seed_points(summary, runs.seeds, measure), uncertainty, measure, note), points


def runs_of(name: str):
    runs, _ = simulated_study.simulated_runs(STUDIES[name], n_evaluations=1)
    return runs, summarise(runs)


def draw(name: str) -> dict:
    """Every figure that the study has data for."""
    runs, curves = simulated_study.simulated_runs(STUDIES[name], n_evaluations=8)
    summary = summarise(runs)
    figures = {measure.name: drawn_frontier(runs, summary, measure, "A note.")[0] for measure in MEASURES}
    shown = data.curve_trials(summary)
    figures["curves"] = learning_curves_figure(data.curve_means(shown, curves), curves, "A note.")
    for trial in summary.loc[summary["is_reference"], "trial"]:
        figures["rel_error"] = rel_error_figure(data.rel_error_means(runs.rel_errors, trial))
    return figures


@pytest.fixture(scope="module", params=STUDIES)
def drawn(request) -> dict[str, Drawn]:
    return {name: Drawn(figure) for name, figure in draw(request.param).items()}


@pytest.mark.slow
def test_figures_write_the_same_bytes_twice(tmp_path):
    for when in ("once", "again"):
        (tmp_path / when).mkdir()
        for name, figure in draw("usual").items():
            style.save(figure, tmp_path / when / name)
    written = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert len(written) == 4 * (len(style.FORMATS) + 1)
    for name in written:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_figures_embed_editable_fonts_and_no_date(tmp_path):
    svg, pdf, png = style.save(draw("one configuration")["val_loss"], tmp_path / "figure")
    assert b"/Type3" not in pdf.read_bytes()
    assert b"CreationDate" not in pdf.read_bytes()
    assert b"<dc:date>" not in svg.read_bytes()
    assert png.read_bytes().startswith(b"\x89PNG")


def test_figures_leave_the_callers_settings_alone():
    before = dict(matplotlib.rcParams)
    draw("one configuration")
    assert dict(matplotlib.rcParams) == before


def test_figures_hold_all_their_text_at_7_points_or_more(drawn):
    for name, one in drawn.items():
        width, height = one.figure.get_size_inches() * 72
        assert width == pytest.approx(72 * style.WIDTH)
        for text, (left, bottom, right, top) in one.placed + one.others:
            assert text.get_fontsize() >= 7
            assert left >= 0, (name, text)
            assert bottom >= 0, (name, text)
            assert right <= width, (name, text)
            assert top <= height, (name, text)


def test_figures_overlap_no_text(drawn):
    for name, one in drawn.items():
        assert one.placed, name
        for (a, box_a), (b, box_b) in itertools.combinations(one.placed + one.others, 2):
            assert apart(box_a, box_b), (name, a, b)


def test_frontier_labels_keep_off_every_marker(drawn):
    for measure in MEASURES:
        one = drawn[measure.name]
        axes = one.figure.axes[0]
        markers = [line for line in axes.lines if line.get_marker() in "Do^svPX" and line.get_linestyle() == "None"]
        boxes = np.vstack([labels.boxes_around(axes, line.get_xdata(), line.get_ydata(), 2.6) for line in markers])
        for text, extent in one.placed:
            assert all(apart(extent, box) for box in boxes), text


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_frontier_figure_shows_the_numbers_it_is_given(measure):
    runs, _ = simulated_study.simulated_runs(STUDIES["one to five seeds"])
    summary = summarise(runs)
    figure, points = drawn_frontier(runs, summary, measure)
    axes = figure.axes[0]
    markers = [line for line in axes.lines if line.get_linestyle() == "None" and str(line.get_marker()) in "Do^s"]
    drawn = {tuple(np.asarray(line.get_xydata())[0]): line for line in markers}
    assert len(drawn) == len(points)
    for row in points.to_dict("records"):
        line = drawn[row["n_params"], row["mean"]]
        assert (line.get_markerfacecolor() != "white") == row["on_frontier"]
        is_faint = not (row["on_frontier"] or row["is_reference"])  # since there are more than ten
        grey = style.tint(style.FEW, 0.5) if is_faint else style.FEW
        assert (line.get_markeredgecolor() == grey) == (row["n_seeds"] < 3)
    shown = (points["n_seeds"] >= 3) & (points["on_frontier"] | points["is_reference"])
    assert len(axes.containers) == shown.sum(), "an interval for three seeds or more, if the point is not faint"
    assert "n = 3 to 5" in figure.get_label()


def beside(points_apart, groups):
    """How many points each of configurations that are so many points apart is moved, and where it comes to stand."""
    _, (axes,) = panels.new_panels(1)
    panels.scale_sizes(axes, pd.Series([1e4, 1e6]))
    start = labels.points_of(axes, [1e5], [0])[0, 0]
    per_point = np.log(10) / (labels.points_of(axes, [1e6], [0])[0, 0] - start)
    sizes = pd.Series(1e5 * np.exp(per_point * np.array(points_apart, dtype=float)))
    at = labels.points_of(axes, panels.side_by_side(axes, sizes, pd.Series(groups)), np.zeros(len(sizes)))[:, 0] - start
    return at - points_apart, at


@pytest.mark.parametrize(
    ("points_apart", "groups"),
    [
        ([0, 0.1, 0.2, 0.3, 8.5], list("abcde")),
        ([0, 2, 4], list("aba")),
        ([4, 0, 0, 9, 0, 30], list("aabbcc")),
        ([0, 0, 0, 0], list("aaaa")),
    ],
)
def test_configurations_of_about_one_size_stand_side_by_side_in_their_order(points_apart, groups):
    moved, at = beside(points_apart, groups)
    order = np.argsort(points_apart, kind="stable")
    assert np.all(np.diff(at[order]) > 6.999)
    assert np.abs(moved).max() < 7 * len(at) / 2
    assert moved[np.array(points_apart) == 30] == pytest.approx(0)


def test_configurations_that_are_apart_stay_where_they_are():
    assert np.array_equal(beside([0, 7.1, 40], list("aab"))[0].round(9), np.zeros(3))


def test_of_many_configurations_those_of_a_group_and_size_stay_together():
    at = beside([0] * 20 + [1] * 20, list("ab") * 20)[1]
    assert len(np.unique(at.round(6))) == 4
    assert not beside(np.linspace(0, 50, 40), ["a"] * 40)[0].round(9).any(), "too many sizes"


def test_line_to_a_label_crosses_no_other_point_where_another_place_is_free():
    _, (axes,) = panels.new_panels(1)
    axes.set(xlim=(0, 100), ylim=(0, 100))
    around = [(x, y) for x in range(45, 56) for y in (44, 46, 48, 52, 54, 56)] + [(x, 50) for x in range(50, 56)]
    hard = labels.boxes_around(axes, *np.array(around, dtype=float).T, 1.5)
    assert labels.place_labels(axes, [labels.Label(50, 50, "one", "black")], hard, np.empty((0, 4))) == 0
    [text] = axes.texts
    assert text.xyann[0] < -20, "to the left, where the way is free, though it is nearer above"
    assert text.xyann[1] == pytest.approx(0, abs=1)


def test_labels_name_their_group_where_two_groups_have_the_same():
    own = {
        ("χ=8", "MPO from scratch"): "MPO, χ=8",
        ("χ=8", "MPO fine-tuned"): "MPO fine-tuned, χ=8",
        ("as χ=8", "low rank fine-tuned"): "low rank, as χ=8",
        ("as χ=8", "pruned fine-tuned"): "pruned, as χ=8",
        ("as χ=19", "Monarch fine-tuned"): "Monarch, as χ=19",
        ("d_model=60", "dense, smaller"): "d_model=60",
    }
    names, groups = map(pd.Series, zip(*own, strict=True))
    assert labels.told_apart(names, groups) == list(own.values())
    assert labels.told_apart(names[4:], groups[4:]) == ["Monarch, as χ=19", "d_model=60"], "a control is always named"


def test_frontier_figure_tells_configurations_of_one_size_apart():
    size, configuration = simulated_study.N_PARAMS_MPO[16], simulated_study.Configuration
    runs, _ = simulated_study.simulated_runs(
        [
            configuration("dense", simulated_study.N_PARAMS_DENSE, 1.6, "dense"),
            configuration("mpo", size, 1.8, chi=16),
            *(configuration(family, size, 1.8, family, extra={"as_chi": 16}) for family in ("low_rank", "pruned")),
        ]
    )
    figure, _ = drawn_frontier(runs, summarise(runs), VAL_LOSS)
    axes = figure.axes[0]
    markers = [line for line in axes.lines if line.get_linestyle() == "None" and str(line.get_marker()) in "o<X"]
    assert [np.asarray(line.get_xdata())[0] for line in markers] == [size] * 3
    texts = {text.get_text().split(" (")[0] for text in axes.texts}
    assert texts == {"dense", "χ=16", "low rank, as χ=16", "pruned, as χ=16"}


def test_frontier_figure_of_many_configurations_labels_the_frontier_and_the_reference_and_fades_the_others():
    figure, points = drawn_frontier(*runs_of("crowded"), VAL_LOSS)
    axes = figure.axes[0]
    few = points[points["on_frontier"] | points["is_reference"]]
    assert len(few) < len(points) > 10
    assert len(axes.texts) <= len(few)
    full = {(look.color, look.marker) for look in style.group_styles(points["group"]).values()}
    strong = [line for line in axes.lines if (line.get_markeredgecolor(), line.get_marker()) in full]
    assert len(strong) == len(few)
    assert "the others are faint" in figure.get_label()


def test_no_line_runs_through_a_label_of_the_frontier_figure():
    figure, _ = drawn_frontier(*runs_of("usual"), VAL_LOSS)
    axes = figure.axes[0]
    [steps] = [line for line in axes.lines if line.get_color() == style.GREY and len(line.get_xdata()) > 2]
    corners = np.column_stack(steps.get_data())
    segments = labels.boxes_along(axes, corners[:-1], corners[1:], 0.1)
    renderer = figure.canvas.get_renderer()
    assert axes.texts
    for text in axes.texts:
        box = text.get_window_extent(renderer).extents * 72 / figure.dpi
        assert ((box[2:] <= segments[:, :2]) | (segments[:, 2:] <= box[:2])).any(axis=1).all(), text.get_text()


def test_frontier_figure_shares_its_axis_with_the_percentage(summary, runs):
    figure, _ = drawn_frontier(runs, summary, VAL_LOSS)
    bottom, top = figure.axes
    assert np.array(top.get_xlim()) == pytest.approx(100 * np.array(bottom.get_xlim()) / 808_448)


def test_frontier_figure_says_when_there_is_no_frontier():
    runs, _ = simulated_study.simulated_runs(STUDIES["one seed"])
    summary = summarise(runs)
    figure, _ = drawn_frontier(runs, summary, VAL_ACC)
    assert figure.get_label().startswith("No configuration has 3 complete seeds: no intervals and no frontier.")
    assert "steps" not in figure.get_label()


def test_frontier_figure_says_why_what_nothing_dominates_is_hollow():
    found = [replace(c, failed=()) for c in STUDIES["usual"][:4]]
    best = replace(found[0], n_params=found[0].n_params - 1, val_loss=1.0)
    for failed, stated in (((), "hollow: dominated"), ((9,), "hollow: dominated, with a failed seed or stopped early")):
        runs, _ = simulated_study.simulated_runs([*found, replace(best, failed=failed)])
        figure, _ = drawn_frontier(runs, summarise(runs), VAL_LOSS)
        said = [text.get_text() for text in figure.legends[0].get_texts() if text.get_text().startswith("hollow")]
        assert said == [stated]


def test_frontier_figure_says_when_every_configuration_has_a_failed_seed():
    runs, _ = simulated_study.simulated_runs([replace(c, failed=(9,)) for c in STUDIES["usual"][:4]])
    figure, _ = drawn_frontier(runs, summarise(runs), VAL_LOSS)
    said = figure.get_label()
    assert "No frontier: no configuration has 3 complete seeds without a failed one." in said


def test_labels_say_what_differs_between_the_labelled_configurations_alone():
    runs, _ = simulated_study.simulated_runs(STUDIES["crowded"])
    summary = summarise(runs)
    _, points = drawn_frontier(runs, summary, VAL_LOSS)
    labelled = points["on_frontier"] | points["is_reference"]
    assert points["short"].notna().tolist() == labelled.tolist()
    assert all(long.startswith(short) for short, long in points.loc[labelled, ["short", "label"]].to_numpy())
    assert points.loc[labelled, "short"].str.len().sum() < points.loc[labelled, "label"].str.len().sum()


def test_letters_take_the_place_of_labels_without_room_and_the_caption_says_what_they_are():
    runs, _ = simulated_study.simulated_runs(STUDIES["crowded"])
    summary = summarise(runs)
    points = data.frontier_points(summary, VAL_LOSS, frontier_uncertainty(runs, summary, VAL_LOSS).chances)
    points["short"] = points["short"].where(points["short"].isna(), points["short"] + ", and a name of some length")
    seeds = data.seed_points(summary, runs.seeds, VAL_LOSS)
    figure = frontier_figure(points, seeds, frontier_uncertainty(runs, summary, VAL_LOSS), VAL_LOSS, width=2.5)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert set(texts) <= set("ABCDEFGHIJKLMNOP")
    for letter in texts:
        assert re.search(rf"(^|[ ;]){letter}: .*, and a name of some length", figure.get_label())


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_far_outliers_are_outside_the_axis_and_counted(measure):
    runs, _ = simulated_study.simulated_runs(STUDIES["usual"])
    far = runs.seeds["trial"] == runs.trials.loc[runs.trials["arm"] == "mpo", "trial"].max()
    runs.seeds.loc[far, "final/val_loss"] += 5.0
    runs.seeds.loc[far, "final/val_acc"] /= 100
    figure, points = drawn_frontier(runs, summarise(runs), measure)
    low, high = figure.axes[0].get_ylim()
    outside = ~points["mean"].between(low, high)
    assert outside.sum() == 1
    where = "above" if measure.direction == "minimize" else "below"
    assert f"1 configuration far {where} the axis is not shown." in figure.get_label()


def test_frontier_figure_draws_its_band_and_names_the_probabilities(summary, runs):
    figure, points = drawn_frontier(runs, summary, VAL_LOSS)
    uncertainty = frontier_uncertainty(runs, summary, VAL_LOSS)
    [band] = [part for part in figure.axes[0].collections if isinstance(part, PolyCollection) and part.get_zorder() < 1]
    drawn = np.unique(np.round(band.get_paths()[0].vertices[:, 1], 9))
    expected = np.unique(np.round(uncertainty.band[["low", "high"]].to_numpy(dtype=float), 9))
    assert np.array_equal(drawn, expected)
    texts = {text.get_text() for text in figure.axes[0].texts}
    named = points.assign(label=labels.told_apart(points["short"].fillna(""), points["group"]))
    for row in named[named["on_frontier"]].to_dict("records"):
        assert f"{row['label']} ({percent(row['probability'])})" in texts
    assert f"from {uncertainty.rests_on}" in figure.get_label()


def test_curve_means_average_over_seeds():
    runs, curves = simulated_study.simulated_runs(STUDIES["usual"], n_evaluations=4)
    means = data.curve_means(data.curve_trials(summarise(runs)), curves)
    one = means[(means["trial"] == 8) & (means["step"] == 500)]
    values = curves[(curves["trial"] == 8) & (curves["step"] == 500)]["val_loss"]
    assert one["mean"].item() == pytest.approx(values.mean())
    assert one["half_width"].item() == pytest.approx(4.303 * values.std() / np.sqrt(3), rel=1e-3)
    assert one["tokens"].item() == 500 * simulated_study.TOKENS_PER_STEP


def test_curve_means_leave_out_evaluations_that_a_seed_lacks():
    runs, curves = simulated_study.simulated_runs(STUDIES["one configuration"], n_evaluations=4)
    curves = curves[~((curves["seed"] == 1) & (curves["step"] == 1000))]
    means = data.curve_means(data.curve_trials(summarise(runs)), curves)
    assert means["step"].tolist() == [0, 500, 1500, 2000]


def test_curve_trials_thins_crowded_panels_to_their_own_frontier():
    runs, _ = simulated_study.simulated_runs(STUDIES["crowded"], n_evaluations=1)
    shown = data.curve_trials(summarise(runs))
    assert shown["is_reference"].sum() == 1
    counts = shown["panel"].value_counts()
    assert counts["dense"] == 1
    assert (counts <= data.MAX_CURVES).all()
    for _, panel in shown.groupby("panel"):
        ordered = panel.sort_values("n_params")["mean/final/val_loss"]
        assert ordered.is_monotonic_decreasing


def sizes(n, family="mpo"):
    """So many configurations of one family, each larger and better than the last: all are on the frontier."""
    return [
        simulated_study.Configuration(
            f"{family}-{i}", 50_000 + 20_000 * i, 2 - 0.05 * i, family, **({"chi": 4 + i} if family == "mpo" else {})
        )
        for i in range(n)
    ]


def test_what_is_said_of_curves_left_out_is_so():
    def shown_and_said(found):
        summary = summarise(simulated_study.simulated_runs(found, n_evaluations=1, noise=0.001)[0])
        return data.curve_trials(summary), data.curves_left_out(summary)

    dense = STUDIES["usual"][0]
    assert shown_and_said([dense, *sizes(data.MAX_CURVES)])[1] == ""
    # Nine of one panel are on its frontier, and fewer are shown: not "those on the frontier".
    shown, said = shown_and_said([dense, *sizes(9)])
    assert len(shown) == 7
    assert said == (
        "7 of 10 configurations: a panel with more than 6 shows at most 6, picked evenly along its own frontier."
    )
    shown, said = shown_and_said([dense, *sizes(9, "dense")])
    assert len(shown) == 6
    assert shown["is_reference"].sum() == 1
    assert said == (
        "6 of 10 configurations: a panel with more than 6 shows at most 6, picked evenly along its own frontier, "
        "the dense reference among them."
    )


def test_rel_error_means_average_over_blocks_then_seeds(runs):
    means = data.rel_error_means(runs.rel_errors, 0)
    own = runs.rel_errors.query("trial == 0 and when == 'trained' and chi == 8")
    query = own[own["layer"].str.endswith("query")]
    row = means.query("when == 'trained' and chi == 8 and kind == 'query'").iloc[0]
    assert row["mean"] == pytest.approx(query["rel_error"].mean())
    assert row[["n_layers", "n_seeds"]].tolist() == [4, 3]
    per_seed = query.groupby("seed")["rel_error"].mean()
    assert row["half_width"] == pytest.approx(4.303 * per_seed.std() / np.sqrt(3), rel=1e-3)


def test_layer_kinds_merge_blocks_and_keep_kinds_apart():
    names = ["blocks.0.attn.w_q", "blocks.11.attn.w_q", "blocks.0.mlp.0", "blocks.0.mlp.2", "lm_head", "a.out", "b.out"]
    assert list(data.layer_kinds(names).values()) == ["w_q", "w_q", "0", "2", "lm_head", "a.out", "b.out"]


@pytest.mark.parametrize(
    ("low", "high", "major"),
    [
        (40_000, 900_000, [50_000, 100_000, 200_000, 500_000]),
        (40_000, 99_000, [40_000, 50_000, 60_000, 70_000, 80_000, 90_000]),
        (0.15, 1.1, [0.2, 0.5, 1.0]),
        (1, 1000, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]),
    ],
)
def test_log_ticks_are_round_and_three_or_more(low, high, major):
    found, minor = style.log_ticks(low, high)
    assert found == major
    assert set(found) <= set(minor)


def test_spread_moves_apart_in_order_and_stays_inside():
    rng = np.random.default_rng(1)
    for n in (1, 2, 5, 9):
        positions = rng.uniform(-5, 105, n)
        moved = labels.spread(positions, 10, 0, 100)
        order = np.argsort(positions)
        assert (np.diff(moved[order]) >= 10 - 1e-9).all()
        assert moved.min() >= -1e-9
        assert moved.max() <= 100 + 1e-9
    assert labels.spread(np.array([80.0, 20.0]), 10, 0, 100).tolist() == [80.0, 20.0]
    assert labels.spread(np.array([50.0, 52.0]), 10, 0, 100).tolist() == [46.0, 56.0]


def test_groups_of_one_figure_differ_in_colour_or_marker():
    usual = [*style._KNOWN, *(f"kind {number} from scratch" for number in range(12))]
    styles = style.group_styles(usual)
    assert len({(look.color, look.marker) for look in styles.values()}) == len(usual)
