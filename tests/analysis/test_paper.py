"""The paper's published numbers beside computed and measured ones."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from simulated_study import N_PARAMS_DENSE, N_PARAMS_MPO, Configuration, simulated_runs

from analysis import style
from analysis.figures.published import published_figure, published_points
from analysis.paper import published
from analysis.paper.comparison import COLUMNS, missing, model_params, mpo_params, paper_comparison, shown

PAPER = {"factorisation": "paper", "init": "paper", "n_sites": None}
LOSSES = {4: 2.02, 8: 1.86, 16: 1.745, 32: 1.655}


def paper_study(seeds=range(5), **changes):
    """Runs of the paper's five models under its protocol."""
    found = [Configuration("dense", N_PARAMS_DENSE, 1.575, family="dense", extra={"init": "paper"}, seeds=seeds)]
    found += [
        Configuration("mpo", N_PARAMS_MPO[chi], loss, chi=chi, extra=PAPER, seeds=seeds) for chi, loss in LOSSES.items()
    ]
    return [replace(one, **changes) for one in found]


def cell(comparison, row, quantity):
    [found] = comparison[(comparison["row"] == row) & (comparison["quantity"] == quantity)].to_dict("records")
    return found


@pytest.fixture(scope="module")
def runs():
    return simulated_runs(paper_study())[0]


@pytest.fixture(scope="module")
def comparison(runs):
    return paper_comparison(runs)


# Computed -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chi", [4, 8, 16, 32])
def test_parameters_of_the_papers_model_follow_from_its_definitions(chi):
    assert model_params(chi) == N_PARAMS_MPO[chi] == 13_696 + 6_136 * chi + 256 * chi**2
    assert model_params(None) == N_PARAMS_DENSE


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4), st.integers(1, 50))
def test_mpo_params_counts_cores_of_clipped_bonds(pairs, chi):
    d_out, d_in = zip(*pairs, strict=True)
    count = mpo_params(d_out, d_in, chi)
    sizes = [out * into for out, into in pairs]
    bonds = [1]
    for site in range(1, len(pairs)):
        bonds.append(min(chi, math.prod(sizes[:site]), math.prod(sizes[site:])))
    bonds.append(1)
    cores = [np.empty((bonds[i], d_out[i], d_in[i], bonds[i + 1])) for i in range(len(pairs))]
    assert count == sum(core.size for core in cores)


def test_table_2_has_one_row_that_cannot_be(comparison):
    rows = comparison[comparison["table"] == "2"].set_index(["row", "quantity"])
    assert (rows["kind"] == "computed").all()
    wrong = rows[rows["follows"] == "no"]
    assert list(wrong.index) == [
        ("W_1", "parameters at χ = 8"),
        ("a block", "parameters at χ = 8"),
        ("a block", "compression ratio"),
    ]
    assert list(wrong["ours"]) == [2_816, 15_872, pytest.approx(196_608 / 15_872)]


def test_ratios_follow_from_the_printed_parameters_alone(comparison):
    ratios = comparison[(comparison["table"] == "3") & (comparison["quantity"] == "compression ratio")]
    assert list(ratios["ours"].round(2)) == [19.10, 10.21, 4.56, 1.71]
    assert set(ratios["follows"]) == {"no"}
    assert ratios["why"].str.endswith("; it follows from the printed ones").all()


def test_printed_score_is_too_large_by_the_root_of_ten(comparison):
    scores = comparison[comparison["quantity"] == "accuracy / √parameters"]
    assert len(scores) == 5
    assert set(scores["follows"]) == {"no"}
    assert scores["why"].str.endswith("the printed value is 3.16 times that").all()


def test_printed_gaps_and_retained_accuracy_follow_from_the_printed_accuracies(comparison):
    own = comparison[comparison["quantity"].isin(["accuracy gap", "retained accuracy"])]
    assert len(own) == 4 + 1
    assert set(own["follows"]) == {"yes"}


# Measured -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "trial"), [("dense", 0), ("MPO χ = 4", 1), ("MPO χ = 16", 3)])
def test_measured_loss_has_its_own_t_interval(runs, comparison, row, trial):
    values = runs.seeds.loc[runs.seeds["trial"] == trial, "final/val_loss"].to_numpy()
    found = cell(comparison, row, "validation loss")
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert (found["ours"], found["n"], found["kind"]) == (pytest.approx(values.mean()), 5, "measured")
    assert found["half_width"] == pytest.approx((high - low) / 2)
    assert found["follows"] == "cannot be told"  # no definition says what a training ends at


def test_gap_is_paired_by_seed(runs, comparison):
    seeds = runs.seeds.pivot(index="seed", columns="trial", values="final/val_acc")
    gaps = 100 * (seeds[3] - seeds[0])
    found = cell(comparison, "MPO χ = 16", "accuracy gap")
    assert found["ours"] == pytest.approx(gaps.mean())
    assert found["half_width"] == pytest.approx(stats.sem(gaps) * stats.t.ppf(0.975, 4))


def test_published_number_is_set_against_one_more_run(comparison):
    found = cell(comparison, "dense", "validation loss")
    assert found["why"].startswith("outside the 95 % prediction interval of one more run, ± ")
    assert found["why"].endswith("; published of one seed")


def test_errors_of_random_weights_are_the_layers_of_each_seed(runs, comparison):
    errors = runs.rel_errors
    errors = errors[(errors["trial"] == 0) & (errors["when"] == "init") & (errors["chi"] == 8)]
    for quantity, of_seeds in (("largest", errors.groupby("seed")["rel_error"].max()),
                               ("mean", errors.groupby("seed")["rel_error"].mean())):  # fmt: skip
        found = cell(comparison, "MPO χ = 8", f"{quantity} rel_error, random weights")
        assert found["ours"] == pytest.approx(of_seeds.mean())
        assert found["n"] == 5
        beyond = abs(found["published"] - found["ours"]) > found["half_width"] * math.sqrt(6) + 5e-4
        assert found["follows"] == ("no" if beyond else "yes")
    trained = cell(comparison, "MPO χ = 8", "largest rel_error, trained")
    assert math.isnan(trained["published"])
    assert trained["follows"] == "nothing published"


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 400},
        {"learning_rate": 1e-3},
        {"d_model": 64},
        {"start": "teacher"},
        {"extra": {"factorisation": "balanced", "init": "paper"}},
        {"extra": {"factorisation": "paper", "init": "variance"}},
    ],
)
def test_other_models_and_budgets_are_not_taken_for_the_papers(changes):
    runs = simulated_runs(paper_study(**changes))[0]
    lacking = missing(runs)
    assert lacking is not None
    assert "MPO χ = 4, MPO χ = 8, MPO χ = 16, MPO χ = 32" in lacking
    measured = paper_comparison(runs)
    assert (
        not (measured.loc[measured["row"].str.startswith("MPO"), "kind"] == "measured").any() or "dense" not in lacking
    )
    assert measured.loc[measured["quantity"] == "validation loss", "ours"].iloc[1:].isna().all()


def test_two_seeds_have_no_interval_and_decide_nothing():
    two = paper_comparison(simulated_runs(paper_study(seeds=(0, 1)))[0])
    measured = two[two["kind"] == "measured"]
    assert len(measured)
    assert measured["half_width"].isna().all()
    assert set(two.loc[two["quantity"].str.endswith("random weights"), "follows"]) == {"cannot be told"}


def test_whole_study_lacks_nothing(runs, comparison):
    assert missing(runs) is None
    assert list(comparison.columns) == list(COLUMNS)
    assert not (comparison["kind"] == "not measured").any()
    assert len(comparison[comparison["table"] == "4"]) == 5 * 3 + 4 + 1


def test_every_published_number_is_shown(comparison):
    text = shown(comparison)
    said = set(text["published"])
    for model in published.MODELS:
        assert {f"{model.n_params:,}", f"{model.val_loss:.3f}", f"{model.val_acc:.1f}"} <= said
    assert not text.isin(["nan", "NaN"]).any().any()
    dense = text[text["what"] == "dense: parameters"].iloc[0]
    assert (dense["published"], dense["here"], dense["difference"]) == ("1,020,224", "808,448", "−211,776")


# The figure -----------------------------------------------------------------------------------------------------------


def test_figure_shows_every_published_and_every_measured_point(comparison):
    points = published_points(comparison)
    assert len(points) == 2 * 5
    assert points["measured"].notna().all()
    figure = published_figure(points)
    for axes, quantity in zip(figure.axes, ("validation loss", "validation accuracy"), strict=True):
        own = points[points["quantity"] == quantity]
        hollow, filled = axes.lines[0], axes.lines[1]
        assert sorted(hollow.get_xdata()) == sorted(own["n_params_published"])
        assert sorted(hollow.get_ydata()) == sorted(own["published"])
        assert sorted(filled.get_xdata()) == sorted(own["n_params"])
        assert sorted(filled.get_ydata()) == pytest.approx(sorted(own["measured"]))
        low, high = axes.get_ylim()
        assert own[["published", "measured"]].to_numpy().min() > low
        assert own[["published", "measured"]].to_numpy().max() < high
    said = "".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "uncertainty not reported" in said
    assert "n = 5, bars: 95 % t intervals" in said


def test_figure_of_a_study_without_such_runs_says_so():
    points = published_points(paper_comparison(simulated_runs(paper_study(steps=400))[0]))
    assert points["measured"].isna().all()
    said = "".join(text.get_text() for text in published_figure(points).texts).replace("\n", " ")
    assert "Nothing of this study is measured under the paper's protocol." in said


def test_figure_is_written_the_same_twice(comparison, tmp_path):
    for name in ("a", "b"):
        style.save(published_figure(published_points(comparison)), tmp_path / name)
    for form in style.FORMATS:
        assert (tmp_path / f"a.{form}").read_bytes() == (tmp_path / f"b.{form}").read_bytes()
