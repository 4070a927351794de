from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import simulated_study
from drawn import check_texts
from scipy import stats
from simulated_study import Configuration

from analysis.figures import style
from analysis.figures.rank_intervals import COLUMNS, MAX_ROWS, rank_figure, rank_rows
from analysis.results.selection import common_seeds, select
from analysis.results.summary import VAL_ACC, VAL_LOSS, summarise

STUDIES = simulated_study.awkward_studies()
STUDIES["long labels"] = [
    Configuration("mpo", 40_000 + i, 1.7, chi=8, learning_rate=1.23456e-4 * (1 + i), extra={"init": init, "n_sites": L})
    for i, (init, L) in enumerate([("an init of a very long name", 2), ("another init of a long name", 3)] * 3)
]


def rows_of(found, measure=VAL_LOSS, **settings):
    runs, _ = simulated_study.simulated_runs(found, n_evaluations=1, **settings)
    return rank_rows(summarise(runs), runs.seeds, measure, np.random.default_rng(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in STUDIES if name not in ("one seed", "one configuration")])
def test_rank_figure_keeps_all_its_text_apart_and_inside(name):
    for measure in (VAL_LOSS, VAL_ACC):
        figure = rank_figure(rows_of(STUDIES[name], measure), measure)
        check_texts(figure)
        assert figure.get_figwidth() == style.WIDTH


@pytest.mark.slow
def test_rank_figure_writes_the_same_bytes_twice(tmp_path):
    for when in ("once", "again"):
        style.save(rank_figure(rows_of(STUDIES["crowded"]), VAL_LOSS), tmp_path / when)
    for form in style.FORMATS:
        assert (tmp_path / f"once.{form}").read_bytes() == (tmp_path / f"again.{form}").read_bytes()


@pytest.mark.parametrize("measure", [VAL_LOSS, VAL_ACC], ids=lambda measure: measure.name)
def test_ranks_are_those_of_the_means_and_intervals_hold_them(measure):
    runs, _ = simulated_study.simulated_runs(STUDIES["usual"], n_evaluations=1)
    rows = rank_rows(summarise(runs), runs.seeds, measure, np.random.default_rng(0))
    means = runs.seeds.groupby("trial")[measure.key].mean()[rows["trial"]]
    better = means.is_monotonic_increasing if measure is VAL_LOSS else means.is_monotonic_decreasing
    assert better
    assert rows["rank"].tolist() == list(range(1, 8))
    assert (rows["low"] <= rows["rank"]).all()
    assert (rows["rank"] <= rows["high"]).all()


def test_agreement_of_two_seeds_is_scipys_kendall_tau():
    runs, _ = simulated_study.simulated_runs(STUDIES["close"], n_evaluations=1)
    rows = rank_rows(summarise(runs), runs.seeds, VAL_LOSS, np.random.default_rng(0))
    table = runs.seeds.pivot(index="trial", columns="seed", values=VAL_LOSS.key).loc[rows["trial"]]
    pairs = [stats.kendalltau(table[a], table[b]).statistic for a, b in ((0, 1), (0, 2), (1, 2))]
    assert rows["kendall_tau"].to_numpy() == pytest.approx(np.mean(pairs))
    text = rank_figure(rows, VAL_LOSS).get_label()
    assert f"Kendall's τ between two seeds: {np.mean(pairs):.2f} on average".replace("-", "−") in text


def test_noise_widens_the_intervals_and_lowers_the_reliability():
    quiet, noisy = rows_of(STUDIES["usual"], noise=1e-4), rows_of(STUDIES["usual"], noise=0.3)
    assert (quiet["low"] == quiet["high"]).all()
    assert quiet["reliability"].iloc[0] > 0.999 > noisy["reliability"].iloc[0] + 0.1
    assert (noisy["high"] - noisy["low"]).mean() > 2


def test_rank_figure_draws_the_rows_it_is_given():
    rows = rows_of(STUDIES["close"], noise=0.01)
    axes = rank_figure(rows, VAL_LOSS).axes[0]
    bars = [line for line in axes.lines if line.get_marker() == "None"]
    dots = [line for line in axes.lines if line.get_marker() != "None"]
    assert [tuple(bar.get_xdata()) for bar in bars] == list(zip(rows["low"], rows["high"], strict=True))
    assert [dot.get_xdata()[0] for dot in dots] == rows["rank"].tolist()
    assert [label.get_text() for label in axes.get_yticklabels()] == rows["label"].tolist()
    top, bottom = (axes.transData.transform((1, y))[1] for y in (0, len(rows) - 1))
    assert top > bottom, "the best on top"
    styles = style.group_styles(rows["group"])
    assert [dot.get_marker() for dot in dots] == [styles[group].marker for group in rows["group"]]


def test_of_many_the_best_are_shown_with_their_rank_among_all():
    rows = rows_of(STUDIES["crowded"])
    assert len(rows) == MAX_ROWS
    assert set(rows["n_ranked"]) == {len(STUDIES["crowded"])}
    assert rows["high"].max() > MAX_ROWS
    assert "The best 40 of 49 configurations." in rank_figure(rows, VAL_LOSS).get_label()


def test_incomplete_trials_and_other_budgets_are_left_out_and_counted():
    usual = STUDIES["usual"]
    found = [*usual[:4], replace(usual[4], seeds=(0, 1)), replace(usual[5], failed=(3,)), *usual[6:]]
    rows = rows_of(found)
    assert sorted(rows["trial"]) == [0, 1, 2, 3, 6]
    said = "Left out: 4 trials of another budget; 2 with a failed seed, stopped early or with fewer than 3 seeds."
    assert set(rows["left_out"]) == {said}


@pytest.mark.parametrize("name", ["one seed", "one configuration"])
def test_nothing_to_rank_is_an_empty_frame(name):
    rows = rows_of(STUDIES[name])
    assert rows.empty
    assert rows.columns.tolist() == list(COLUMNS)


def table(*rows):
    return pd.DataFrame([[1.0 if seed in row else np.nan for seed in range(8)] for row in rows])


@pytest.mark.parametrize(
    ("rows", "trials", "seeds"),
    [
        ([{0, 1, 2}, {0, 1, 2, 3}], [0, 1], [0, 1, 2]),
        ([{0, 1, 2, 3}, {1, 2, 3, 4}], [0, 1], [1, 2, 3]),
        ([{0, 1, 2}, {5, 6, 7}, {0, 1, 2}], [0, 2], [0, 1, 2]),
        ([{0, 1, 2}, {4, 5, 6, 7}], [1], [4, 5, 6, 7]),
        ([{0, 1, 2, 3}, {0, 1, 4, 5}, {0, 1, 2, 3, 4, 5}], [0, 2], [0, 1, 2, 3]),
        ([{0, 1, 2}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}], [1, 2, 3], [0, 1, 2, 3, 4]),
        ([{0, 1, 2}, {0, 1, 2}, {0, 1, 2, 3, 4}], [0, 1, 2], [0, 1, 2]),
        ([{0, 1}, {0, 1}], [], []),
    ],
)
def test_common_seeds_are_the_largest_complete_table(rows, trials, seeds):
    found = common_seeds(table(*rows))
    assert found.index.tolist() == trials
    assert found.columns.tolist() == seeds
    assert found.notna().all(axis=None)


def test_selection_has_trials_with_all_of_their_seeds_and_ranks_them():
    usual = STUDIES["usual"]
    found = [*usual[:4], replace(usual[4], seeds=(100, 101, 102))]
    runs, _ = simulated_study.simulated_runs(found, n_evaluations=1)
    selected = select(summarise(runs), runs.seeds, VAL_LOSS.key)
    assert sorted(selected.values.index) == [0, 1, 2, 3, 4]
    assert selected.values.index.tolist() == selected.trials["trial"].tolist()
    assert selected.values.notna().sum(axis=1).to_dict() == {0: 3, 1: 3, 2: 3, 3: 3, 4: 3}
    assert selected.left_out == ""
    rows = rows_of(found)
    assert len(rows) == 5
    assert rows[["low", "high"]].notna().all(axis=None)
    refined = rows_of([*found[:4], replace(usual[4], seeds=range(5))])
    assert set(refined["n_seeds"]) == {"3 to 5"}
    check_texts(rank_figure(refined, VAL_LOSS))
