from __future__ import annotations

import pandas as pd
import pytest
import simulated_controls
from drawn import artists, caption_of, check_same_bytes, check_texts
from simulated_study import N_PARAMS_MPO, Configuration

from analysis.figures.families import MAX_ROWS, families_figure, family_points
from analysis.results.pairs import REFERENCE
from analysis.results.summary import MEASURES, VAL_ACC

STUDIES = simulated_controls.studies()


def points_of(found) -> pd.DataFrame:
    _, summary, comparisons = simulated_controls.compared(found, contrasts=simulated_controls.CONTRASTS)
    return family_points(comparisons, summary)


@pytest.mark.parametrize("name", ["controls", "long", "many controls", "usual", "one seed", "close", "equal", "lost"])
def test_families_hold_all_their_text_apart(name):
    check_texts(families_figure(points_of(STUDIES[name])))


def test_families_are_the_same_twice(tmp_path):
    points = points_of(STUDIES["controls"])
    check_same_bytes(lambda: families_figure(points), tmp_path)


def test_each_size_has_its_mpo_first_and_then_its_controls():
    points = points_of(STUDIES["controls"])
    once = points[points["measure"] == "val_loss"]
    assert once["size"].unique().tolist() == list(N_PARAMS_MPO.values())
    for size, block in once.groupby("size"):
        expected = ["MPO from scratch", "dense, smaller", "low rank from scratch", "Monarch from scratch"]
        assert block["group"].tolist() == expected
        assert block["n_params"].iloc[0] == size
        assert (block["n_params"].iloc[1:] < size).all()


def test_means_and_intervals_are_those_of_the_summary():
    runs, summary, comparisons = simulated_controls.compared(STUDIES["controls"])
    points = family_points(comparisons, summary)
    for row in points.to_dict("records"):
        scale = 100 if row["measure"] == VAL_ACC.name else 1
        values = scale * runs.seeds.loc[runs.seeds["trial"] == row["trial"], f"final/{row['measure']}"]
        assert row["mean"] == pytest.approx(values.mean())
        assert row["half_width"] == pytest.approx(4.3027 * values.std() / 3**0.5, rel=1e-4)
    figure = families_figure(points)
    for measure, axes in zip(MEASURES, figure.axes, strict=True):
        own = points[points["measure"] == measure.name]
        assert [line.get_xdata()[0] for line in artists(axes, "mean")] == own["mean"].tolist()
        bars = [list(line.get_xdata()) for line in artists(axes, "interval")]
        assert bars == [[mean - half, mean + half] for mean, half in zip(own["mean"], own["half_width"], strict=True)]
    texts = [text.get_text() for text in figure.texts]
    for size in points["n_params"]:
        assert f"{size:,}" in texts


def test_without_a_control_of_equal_parameters_there_is_nothing_to_draw():
    _, summary, comparisons = simulated_controls.compared(STUDIES["crowded"])
    assert set(comparisons["relation"]) == {REFERENCE}
    assert family_points(comparisons, summary).empty


def test_few_and_failed_seeds_are_hollow_and_said():
    points = points_of(STUDIES["long"])
    once = points[points["measure"] == "val_loss"].reset_index(drop=True)
    figure = families_figure(points)
    means = artists(figure.axes[0], "mean")
    for row, line in zip(once.to_dict("records"), means, strict=True):
        assert (line.get_markerfacecolor() == "white") == (row["n_seeds"] < 3 or row["n_failed"] > 0)
    assert len(artists(figure.axes[0], "interval")) == (once["n_seeds"] >= 3).sum() == len(once) - 1
    assert "d_model=28, n=2" in " ".join(text.get_text() for text in figure.texts)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["hollow: some seeds failed", "grey: fewer than 3 seeds"]


def test_tokens_are_written_where_those_of_a_size_differ():
    points = points_of(STUDIES["controls"])
    assert "total tokens" not in [text.get_text() for text in families_figure(points).texts]
    points.loc[points["trial"] == points["trial"].iloc[0], "total_tokens"] += 1000
    texts = [text.get_text() for text in families_figure(points).texts]
    assert "total tokens" in texts
    assert texts.count("16,385,000") == 1


def test_of_many_sizes_the_largest_are_shown():
    found = [Configuration("dense", 900_000, 1.5, family="dense")]
    for chi in range(4, 29):
        found.append(Configuration("mpo", 20_000 * chi, 2.0, chi=chi))
        found.append(Configuration("low_rank", 20_000 * chi - 9, 2.0, "low_rank", extra={"as_chi": chi}))
    points = points_of(found)
    figure = families_figure(points)
    assert points["size"].nunique() == 25
    assert len(artists(figure.axes[0], "mean")) == MAX_ROWS
    assert "Shown: the 20 largest of 25 sizes." in caption_of(figure)
    check_texts(figure)
