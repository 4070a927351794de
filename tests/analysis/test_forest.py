from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import simulated_controls
from drawn import artists, caption_of, check_same_bytes, check_texts
from simulated_study import Configuration

from analysis.figures.forest import MAX_ROWS, forest_figure, forest_pairs
from analysis.results.pairs import DECLARED, EQUAL_PARAMETERS, REFERENCE
from analysis.results.summary import MEASURES

STUDIES = simulated_controls.studies()


def comparisons_of(name: str, contrasts=simulated_controls.CONTRASTS) -> pd.DataFrame:
    return simulated_controls.compared(STUDIES[name], contrasts=contrasts)[2]


def panel(figure, measure):
    return figure.axes[[one.name for one in MEASURES].index(measure)]


@pytest.mark.parametrize("name", sorted(set(STUDIES) - {"one configuration"}))
def test_forest_holds_all_its_text_apart(name):
    frame = comparisons_of(name)
    for relation in frame["relation"].unique():
        check_texts(forest_figure(forest_pairs(frame, relation), 99))


def test_one_configuration_has_nothing_to_be_compared_with():
    assert forest_pairs(comparisons_of("one configuration"), REFERENCE).empty


def test_forest_is_the_same_twice(tmp_path):
    pairs = forest_pairs(comparisons_of("controls"), EQUAL_PARAMETERS)
    check_same_bytes(lambda: forest_figure(pairs), tmp_path)


@pytest.mark.parametrize("relation", [REFERENCE, EQUAL_PARAMETERS, DECLARED])
def test_forest_draws_each_difference_with_both_intervals(relation):
    frame = comparisons_of("controls")
    pairs = forest_pairs(frame, relation)
    figure = forest_figure(pairs)
    for measure in MEASURES:
        own = pairs[pairs["measure"] == measure.name]
        axes = panel(figure, measure.name)
        assert [line.get_xdata()[0] for line in artists(axes, "mean")] == pytest.approx(own["difference"].tolist())
        half, declared = own["half_width"], own["low"].notna()
        assert declared.tolist() == own["declared"].tolist()
        for gid, low, high in (
            ("interval", own["difference"] - half, own["difference"] + half),
            ("simultaneous", own["low"][declared], own["high"][declared]),
        ):
            drawn = np.array([line.get_xdata() for line in artists(axes, gid)]).reshape(-1, 2)
            assert drawn == pytest.approx(np.column_stack((low, high))), (measure, gid)
        heights = [line.get_ydata()[0] for line in artists(axes, "mean")]
        assert heights == sorted(heights), "rows from the top"
    texts = [text.get_text() for text in figure.texts]
    for verdict, count in pairs["verdict"].value_counts().items():
        assert texts.count(verdict) == count


def test_margin_is_on_the_worse_side_of_each_measure():
    figure = forest_figure(forest_pairs(comparisons_of("controls"), REFERENCE))
    at = {one.name: {line.get_xdata()[0] for line in artists(panel(figure, one.name), "margin")} for one in MEASURES}
    assert at == {"val_loss": {0.02}, "val_acc": {-0.5}}
    header = [text.get_text() for text in figure.texts if "better" in text.get_text() and len(text.get_text()) == 8]
    assert header == ["← better", "better →"]
    without = forest_figure(forest_pairs(comparisons_of("controls"), EQUAL_PARAMETERS))
    assert not artists(without.axes[0], "margin")
    assert "inferior" not in caption_of(without)


def test_different_margins_are_drawn_row_by_row():
    pairs = forest_pairs(comparisons_of("controls"), REFERENCE)
    pairs.loc[(pairs["measure"] == "val_loss") & (pairs["trial"] == pairs["trial"].iloc[0]), "margin"] = 0.1
    lines = artists(panel(forest_figure(pairs), "val_loss"), "margin")
    assert sorted({line.get_xdata()[0] for line in lines}) == [0.02, 0.1]
    assert len(lines) == pairs["trial"].nunique()


def test_a_pair_without_interval_is_hollow():
    pairs = forest_pairs(comparisons_of("long"), REFERENCE)
    own = pairs[pairs["measure"] == "val_loss"].reset_index(drop=True)
    assert set(own["verdict"]) >= {"too few seeds", "failed seeds"}
    figure = forest_figure(pairs)
    axes = panel(figure, "val_loss")
    drawn = {line.get_xdata()[0]: line for line in artists(axes, "mean")}
    assert len(drawn) == len(own)
    for row in own.dropna(subset="difference").to_dict("records"):
        claimed = row["verdict"] not in ("too few seeds", "failed seeds")
        assert (drawn[row["difference"]].get_markerfacecolor() != "white") == claimed
        assert (drawn[row["difference"]].get_markeredgecolor() == "#8c8c8c") == (row["n"] < 3)
    assert len(artists(axes, "interval")) == own["half_width"].notna().sum() < len(own)
    assert "n = 2 to 3" in caption_of(figure)
    texts = [text.get_text() for text in figure.texts]
    assert "d_model=28, n=2" in texts


def test_a_pair_without_seeds_is_not_drawn():
    pairs = forest_pairs(comparisons_of("lost"), REFERENCE)
    own = pairs[pairs["measure"] == "val_loss"]
    assert own["difference"].isna().any()
    assert len(artists(panel(forest_figure(pairs), "val_loss"), "mean")) == own["difference"].notna().sum()


def test_tokens_are_shown_only_where_budgets_differ():
    pairs = forest_pairs(comparisons_of("controls"), REFERENCE)
    texts = [text.get_text() for text in forest_figure(pairs).texts]
    assert texts.count("20.5M vs 16.4M") == 4
    assert "total tokens" in texts
    same = pairs[pairs["same_budget"]]
    assert not any(
        "16.4M" in text.get_text() or text.get_text() == "total tokens" for text in forest_figure(same).texts
    )


def test_trials_that_tuning_chose_from_are_shown_where_they_differ():
    pairs = forest_pairs(comparisons_of("controls"), EQUAL_PARAMETERS)
    assert "tuning trials" not in [text.get_text() for text in forest_figure(pairs).texts]
    pairs.loc[pairs["trial"] == pairs["trial"].iloc[0], "tuning_trials"] = 51
    texts = [text.get_text() for text in forest_figure(pairs).texts]
    assert "tuning trials" in texts
    assert texts.count("51 vs 1") == pairs.loc[pairs["tuning_trials"] == 51, "against"].nunique()
    assert "total tokens" not in texts


def test_an_outlier_is_cut_off_and_named_and_the_rest_stays_readable():
    pairs = forest_pairs(comparisons_of("one outlier"), REFERENCE)
    figure = forest_figure(pairs)
    axes = panel(figure, "val_loss")
    outlier = pairs[(pairs["measure"] == "val_loss")]["difference"].max()
    assert outlier > 7
    assert axes.get_xlim()[1] < 2
    assert f"+{outlier:.3g}" in [text.get_text() for text in axes.texts]
    [arrow] = artists(axes, "beyond")
    assert arrow.get_marker() == ">"
    assert "Arrows" in caption_of(figure)
    assert "Arrows" not in caption_of(forest_figure(forest_pairs(comparisons_of("controls"), REFERENCE)))


def test_of_many_pairs_the_declared_ones_and_the_largest_are_shown():
    found = [Configuration("dense", 808_448, 1.5, family="dense")]
    found += [Configuration("mpo", 40_000 + 1000 * chi, 2 - 0.002 * chi, chi=chi) for chi in range(4, 44)]
    found[3] = replace(found[3], arm="small")
    frame = simulated_controls.compared(found, contrasts=(("small", "dense"),))[2]
    pairs = forest_pairs(frame, REFERENCE)
    shown = pairs.drop_duplicates("trial")
    assert len(frame) == 2 * 40
    assert len(shown) == MAX_ROWS
    assert set(shown["trial"]) == {3, *range(22, 41)}
    assert shown["n_params"].is_monotonic_increasing
    figure = forest_figure(pairs, 40)
    assert "Shown: 20 of 40 pairs" in caption_of(figure)
    assert "* Declared" in caption_of(figure)
    assert [text.get_text() for text in figure.texts if text.get_text().endswith(" *")] == ["χ=6 *"]
    check_texts(figure)


def test_legend_names_both_intervals():
    figure = forest_figure(forest_pairs(comparisons_of("controls"), DECLARED))
    named = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert {"95 % interval of each difference", "95 % for all declared together: without zero if decided"} <= named


def test_footer_names_the_adjustments_that_were_made():
    frame = comparisons_of("controls")
    family = "as one family over both measures"
    assert f"adjusted {family}." in caption_of(forest_figure(forest_pairs(frame, DECLARED)))
    mixed = caption_of(forest_figure(forest_pairs(frame, EQUAL_PARAMETERS)))
    assert f"declared pairs {family}, the others by Benjamini–Hochberg." in mixed
    plain = comparisons_of("controls", contrasts=())
    assert "adjusted by Benjamini–Hochberg." in caption_of(forest_figure(forest_pairs(plain, REFERENCE)))
