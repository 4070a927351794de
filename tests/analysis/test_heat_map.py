from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import simulated_study
from drawn import check_texts
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from scipy import stats
from simulated_study import Configuration

from analysis.figures import style
from analysis.figures.heat_map import COLUMNS, heat_map_cells, heat_map_figure
from analysis.results.summary import VAL_ACC, VAL_LOSS, summarise

DENSE = Configuration("dense", 808_448, 1.575, family="dense")


def mpo(chi, n_sites, loss=None, start="scratch", init="variance", **changes):
    loss = 1.56 + 0.5 * (4 / chi) ** 0.6 + 0.02 * n_sites if loss is None else loss
    extra = {"n_sites": n_sites, "init": init}
    return Configuration("mpo", 4000 + 100 * chi * n_sites, loss, chi=chi, start=start, extra=extra, **changes)


def grid(chis, sites, **changes):
    return [mpo(chi, n_sites, **changes) for chi in chis for n_sites in sites]


def cells_of(found, measure=VAL_LOSS, budgets=()):
    runs, _ = simulated_study.simulated_runs(found, n_evaluations=1)
    return heat_map_cells(summarise(runs), runs.seeds, measure, budgets)


STUDIES = {
    "two by two": [DENSE, *grid((4, 8), (2, 3))],
    "both starts": [DENSE, *grid((4, 8, 16, 32), (2, 3, 4)), *grid((4, 8, 16, 32), (2, 3), start="teacher")],
    "many": [DENSE, *grid(range(2, 30, 2), (2, 3)), *grid((4, 8, 100, 200), (2, 3), start="teacher")],
    "gaps and few seeds": [DENSE, mpo(4, 2), mpo(4, 3, seeds=(0, 1)), mpo(8, 2), mpo(1024, 3, seeds=(7,)), mpo(8, 4)],
    "one seed": [replace(c, seeds=(0,)) for c in (DENSE, *grid((4, 8), (2, 3)))],
    "large losses": [DENSE, *grid((4, 8, 16, 32, 64, 128), (2, 3), loss=123.4)],
    "settings": [DENSE, *grid((4, 8), (2, 3)), *grid((4, 8, 16), (2, 3), init="a name of an init mode that is long")],
}


@pytest.mark.parametrize("measure", [VAL_LOSS, VAL_ACC], ids=lambda measure: measure.name)
@pytest.mark.parametrize("name", STUDIES)
def test_heat_map_keeps_all_its_text_apart_and_inside(name, measure):
    figure = heat_map_figure(cells_of(STUDIES[name], measure), measure, "A note.")
    check_texts(figure)
    assert figure.get_figwidth() == style.WIDTH


def test_heat_map_writes_the_same_bytes_twice(tmp_path):
    for when in ("once", "again"):
        style.save(heat_map_figure(cells_of(STUDIES["both starts"]), VAL_LOSS), tmp_path / when)
    for form in style.FORMATS:
        assert (tmp_path / f"once.{form}").read_bytes() == (tmp_path / f"again.{form}").read_bytes()


@pytest.mark.parametrize(("measure", "scale"), [(VAL_LOSS, 1), (VAL_ACC, 100)], ids=["loss", "accuracy"])
def test_cell_is_the_paired_difference_on_shared_seeds(measure, scale):
    found = [replace(DENSE, seeds=(0, 1, 2, 3, 4)), *grid((4, 8), (2, 3), seeds=(1, 2, 3, 4, 9))]
    runs, _ = simulated_study.simulated_runs(found, n_evaluations=1)
    cells = heat_map_cells(summarise(runs), runs.seeds, measure)
    values = runs.seeds.pivot(index="seed", columns="trial", values=measure.key).loc[[1, 2, 3, 4]]
    for row in cells.to_dict("records"):
        test = stats.ttest_rel(values[row["trial"]], values[0])
        low, high = test.confidence_interval(0.95)
        assert row["n_seeds"] == 4
        assert row["difference"] == pytest.approx(scale * (low + high) / 2)
        assert row["half_width"] == pytest.approx(scale * (high - low) / 2)


def test_the_setting_that_fills_most_cells_is_shown_and_not_the_best():
    worse = grid((4, 8, 16), (2, 3), loss=2.5, init="paper")
    cells = cells_of([DENSE, *grid((4, 8), (2, 3), loss=1.6), *worse])
    assert cells["trial"].tolist() == [5, 7, 9, 6, 8, 10]
    assert set(cells["setting"]) == {"init paper"}
    assert set(cells["left_out"]) == {"Left out: 4 trials of other settings."}
    text = heat_map_figure(cells, VAL_LOSS).texts[0].get_text().replace("\n", " ")
    assert "Of several settings of MPO from scratch the one that fills most cells: init paper." in text


def test_of_settings_that_fill_as_many_cells_the_first_is_shown():
    for first, second in (("paper", "variance"), ("variance", "paper")):
        losses = {"paper": 2.5, "variance": 1.6}
        found = [c for init in (first, second) for c in grid((4, 8), (2, 3), loss=losses[init], init=init)]
        assert set(cells_of([DENSE, *found])["setting"]) == {f"init {first}"}


def test_a_setting_of_one_number_of_sites_is_no_heat_map():
    found = [*grid((4, 8, 16, 32, 64), (3,), init="paper"), *grid((4, 8), (2, 3))]
    assert set(cells_of([DENSE, *found])["setting"]) == {"init variance"}


def test_starts_are_panels_of_their_own_with_their_own_setting():
    found = [DENSE, *grid((4, 8), (2, 3)), *grid((4, 8, 16), (2, 4), start="teacher", learning_rate=1e-3)]
    cells = cells_of(found)
    assert cells.groupby("start", sort=False).size().to_dict() == {"scratch": 4, "teacher": 6}
    assert set(cells["setting"]) == {""}, "the learning rate does not vary within a start"
    titles = [axes.get_title(loc="left") for axes in heat_map_figure(cells, VAL_LOSS).axes]
    assert titles[:2] == ["MPO from scratch", "MPO fine-tuned"]


def test_other_budgets_are_left_out_unless_declared():
    found = [DENSE, *grid((4, 8), (2, 3)), *grid((4, 8), (2, 3), start="teacher", budget_hash="0ddba11e")]
    cells = cells_of(found)
    assert set(cells["start"]) == {"scratch"}
    assert set(cells["left_out"]) == {"Left out: 4 trials of another budget."}
    declared = cells_of(found, budgets=["0ddba11e"])
    assert set(declared["start"]) == {"scratch", "teacher"}
    assert set(declared["left_out"]) == {""}


def test_failed_and_stopped_trials_are_left_out_and_counted():
    found = [DENSE, *grid((4, 8, 16), (2, 3)), mpo(32, 2, failed=(3,)), mpo(32, 3, stopped="#1 is better")]
    found += [mpo(64, 2, seeds=(8, 9))]
    cells = cells_of(found)
    assert set(cells["chi"]) == {4, 8, 16}
    said = "Left out: 2 trials with a failed seed or given up; 1 without a seed of the reference."
    assert set(cells["left_out"]) == {said}


@pytest.mark.parametrize(
    "found",
    [
        grid((4, 8), (2, 3)),
        [DENSE, *grid((4, 8, 16), (3,))],
        [DENSE, *grid((4,), (2, 3, 4))],
        [DENSE],
        [replace(DENSE, failed=(3,)), *grid((4, 8), (2, 3))],
    ],
    ids=["no dense", "one L", "one chi", "no MPO", "dense failed"],
)
def test_nothing_to_draw_is_an_empty_frame(found):
    cells = cells_of(found)
    assert cells.empty
    assert cells.columns.tolist() == list(COLUMNS)


def test_cells_of_few_seeds_have_neither_colour_nor_interval():
    cells = cells_of(STUDIES["gaps and few seeds"])
    assert cells.groupby("n_seeds")["half_width"].apply(lambda half: half.notna().all()).to_dict() == {
        2: False,
        3: True,
    }
    axes = heat_map_figure(cells, VAL_LOSS).axes[0]
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(patches) == len(cells)
    for patch, row in zip(_by_place(patches), _by_chi(cells), strict=True):
        assert (to_hex(patch.get_facecolor()) == "#ffffff") == (row["n_seeds"] < 3)
        assert (patch.get_linestyle() == "--") == (row["n_seeds"] < 3)
    written = {text.get_text() for text in axes.texts}
    assert sum("±" in text for text in written) == (cells["n_seeds"] >= 3).sum()
    assert "–" in written


def test_colours_are_centred_on_dense_and_worse_is_the_same_colour_in_both_measures():
    losses = {4: 1.575 + 0.3, 8: 1.575 - 0.3}
    found = [DENSE, *[mpo(chi, n_sites, loss) for chi, loss in losses.items() for n_sites in (2, 3)]]
    colors = {}
    for measure in (VAL_LOSS, VAL_ACC):
        figure = heat_map_figure(cells_of(found, measure), measure)
        colors[measure.name] = [np.array(patch.get_facecolor()) for patch in _by_place(figure.axes[0].patches)]
        low, high = figure.axes[-1].get_ylim()
        assert low == pytest.approx(-high)
        ends = (figure.axes[-1].get_xlabel(), figure.axes[-1].get_title())
        assert ends == (("better", "worse") if measure is VAL_LOSS else ("worse", "better"))
    worse, better = colors["val_loss"][0], colors["val_loss"][-1]
    assert worse[0] > worse[2], "orange"
    assert better[2] > better[0], "blue"
    for one, other in zip(*colors.values(), strict=True):
        assert one == pytest.approx(other, abs=0.1)


def test_many_chi_continue_in_another_row():
    figure = heat_map_figure(cells_of(STUDIES["many"]), VAL_LOSS)
    panels = [axes for axes in figure.axes if axes.get_ylabel() == "Sites L"]
    chis = [int(label.get_text()) for axes in panels for label in axes.get_xticklabels()]
    assert chis == [*range(2, 30, 2), 4, 8, 100, 200]
    assert [axes.get_title(loc="left") for axes in panels][:2] == ["MPO from scratch", "MPO from scratch, continued"]


def _by_place(patches):
    return sorted(patches, key=lambda patch: patch.get_xy())


def _by_chi(cells: pd.DataFrame) -> list[dict]:
    return cells.sort_values(["chi", "n_sites"]).to_dict("records")
