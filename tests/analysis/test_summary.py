from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import simulated_study
from scipy import stats

from analysis.results.summary import (
    MEASURES,
    frontier_key,
    group_order,
    half_width_key,
    interval_statement,
    n_statement,
    summarise,
)

USUAL = simulated_study.awkward_studies()["usual"]
DENSE = USUAL[0]


def summary_of(found, **settings) -> pd.DataFrame:
    return summarise(simulated_study.simulated_runs(found, n_evaluations=1, **settings)[0])


def test_summarise_aggregates_the_seeds_of_each_trial(runs, summary):
    assert sorted(summary["trial"]) == list(range(11))
    for row in summary.to_dict("records"):
        values = runs.seeds.loc[runs.seeds["trial"] == row["trial"], "final/val_acc"]
        low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
        assert row["mean/final/val_acc"] == pytest.approx(values.mean())
        assert row["std/final/val_acc"] == pytest.approx(values.std())
        assert row[half_width_key("final/val_acc")] == pytest.approx((high - low) / 2)
        assert row["total_tokens"] == (20_480_000 if row["start"] != "scratch" else 16_384_000)


def test_summarise_tells_families_apart(summary):
    groups = summary.groupby("group")["arm"].unique().apply(sorted).to_dict()
    assert groups == {
        "dense": ["dense"],
        "dense, smaller": ["narrow-28", "narrow-44"],
        "MPO from scratch": ["mpo"],
        "MPO fine-tuned": ["mpo-tuned"],
    }
    assert summary.loc[summary["is_reference"], "arm"].tolist() == ["dense"]
    assert summary.set_index("arm").loc["narrow-28", "percent_of_dense"] == pytest.approx(100 * 43_904 / 808_448)


def test_summarise_takes_the_first_of_several_dense_models_as_reference_not_the_best():
    found = [replace(DENSE, val_loss=1.7), replace(DENSE, learning_rate=1e-3, val_loss=1.5), *USUAL[1:]]
    summary = summary_of(found)
    assert summary.loc[summary["is_reference"], "label"].tolist() == ["dense, lr 3e-4"]
    assert (summary["group"] == "dense").sum() == 2


def test_summarise_takes_no_reference_of_too_few_seeds_where_another_has_enough():
    found = [replace(DENSE, seeds=(0,)), replace(DENSE, learning_rate=1e-3), *USUAL[1:]]
    summary = summary_of(found)
    assert summary.loc[summary["is_reference"], "label"].tolist() == ["dense, lr 1e-3"]


def test_summarise_measures_sizes_by_the_studys_dense_model_not_the_largest():
    summary = summary_of([*USUAL, replace(DENSE, arm="wide", n_params=1_616_896, d_model=200)]).set_index("arm")
    assert summary.loc["wide", "group"] == "dense, larger"
    assert summary.loc["wide", "percent_of_dense"] == 200
    assert summary.loc["dense", ["group", "percent_of_dense", "is_reference"]].tolist() == ["dense", 100, True]


def test_trial_with_a_failed_seed_is_on_no_frontier():
    best = replace(USUAL[3], val_loss=0.5, seeds=(0, 1, 2, 3))
    assert summary_of([DENSE, best]).set_index("arm").loc["mpo", frontier_key(MEASURES[0])]
    broken = summary_of([DENSE, replace(best, failed=(4,))]).set_index("arm")
    assert not broken.loc["mpo", frontier_key(MEASURES[0])]
    assert broken.loc["mpo", "n_seeds"] == 4


def test_summarise_without_dense_model_has_no_reference():
    summary = summary_of(USUAL[3:])
    assert not summary["is_reference"].any()
    assert summary["percent_of_dense"].max() == pytest.approx(100 * 472_192 / 808_448)


def test_summarise_draws_frontiers_of_trials_with_enough_seeds_only():
    best = replace(USUAL[3], val_loss=1.0, seeds=(0, 1))
    summary = summary_of([*USUAL[:3], best, *USUAL[4:]]).set_index("trial")
    for measure in MEASURES:
        assert not summary.loc[3, frontier_key(measure)]
        assert summary[frontier_key(measure)].any()
    assert pd.isna(summary[half_width_key("final/val_loss")][3])
    assert summary.loc[3, "mean/final/val_loss"] == pytest.approx(1.0, abs=0.03)


def test_summarise_maximises_accuracy_and_minimises_loss():
    # With accuracy falling linearly in the mean loss and little noise, both frontiers are the same set.
    summary = summary_of(USUAL, noise=1e-6)
    assert summary["on_frontier/val_loss"].tolist() == summary["on_frontier/val_acc"].tolist()
    on = summary[summary["on_frontier/val_loss"]].sort_values("n_params")
    assert on["mean/final/val_loss"].is_monotonic_decreasing
    assert on["mean/final/val_acc"].is_monotonic_increasing


def test_summarise_keeps_trials_without_complete_seed():
    summary = summary_of([*USUAL[:2], replace(USUAL[3], seeds=(), failed=(0, 1, 2))]).set_index("trial")
    assert list(summary.loc[2, ["n_seeds", "n_failed"]]) == [0, 3]
    assert pd.isna(summary["mean/final/val_loss"][2])
    assert not summary.loc[2, "on_frontier/val_loss"]


def test_labels_are_unique_in_their_group_and_no_longer_than_needed():
    found = [
        replace(USUAL[3], chi=4),
        replace(USUAL[3], chi=8),
        replace(USUAL[3], chi=8, learning_rate=2.5e-3),
        replace(USUAL[3], chi=16),
        replace(USUAL[3], chi=16, extra={"n_sites": 2}),
        replace(USUAL[3], chi=16, extra={"n_sites": 2, "init": "core"}),
        replace(USUAL[3], chi=32),
        replace(USUAL[3], chi=32, budget_hash="other"),
    ]
    labels = summary_of(found).sort_values("trial")["label"].tolist()
    assert labels == [
        "χ=4", "χ=8, lr 3e-4", "χ=8, lr 2.5e-3", "χ=16, L=3", "χ=16, L=2, variance", "χ=16, L=2, core", "χ=32, #6",
        "χ=32, #7",
    ]  # fmt: skip


def test_labels_tell_rates_of_the_embeddings_apart():
    found = [replace(USUAL[3], chi=8, extra={"embedding_learning_rate": rate}) for rate in (None, 3e-2)]
    assert summary_of([DENSE, *found])["label"].tolist()[1:] == ["χ=8", "χ=8, embeddings 3e-2"]


def test_labels_tell_changes_of_bonds_apart_by_the_arm():
    shown = "every 50 steps until 0.75, grow 0.1, prune 0.1"
    mpo = simulated_study.Configuration("mpo", 40_000, 1.7, chi=8)
    found = [DENSE, mpo, replace(mpo, arm="adaptive", extra={"bonds": shown})]
    assert summary_of(found).sort_values("trial")["label"].tolist()[1:] == ["χ=8", "χ=8, adaptive"]


def test_labels_tell_gauges_apart():
    found = [replace(USUAL[3], chi=8, extra={"gauge": gauge}) for gauge in ("free", "fixed")]
    labels = summary_of(found).sort_values("trial")["label"].tolist()
    assert labels == ["χ=8, free gauge", "χ=8, fixed gauge"]


def test_labels_tell_precisions_apart():
    found = [
        replace(USUAL[3], chi=8, extra={"precision": precision} if precision else {}) for precision in (None, "tf32")
    ]
    labels = summary_of(found).sort_values("trial")["label"].tolist()
    assert labels == ["χ=8, in float32", "χ=8, in tf32"]


def test_group_order_puts_known_families_first():
    assert group_order(["lowrank from scratch", "MPO fine-tuned", "dense", "MPO fine-tuned"]) == [
        "dense", "MPO fine-tuned", "lowrank from scratch",
    ]  # fmt: skip


@pytest.mark.parametrize(("counts", "stated"), [([3, 3], "n = 3"), ([5, 1, 3], "n = 1 to 5")])
def test_n_statement_says_what_holds_for_all(counts, stated):
    assert n_statement(pd.Series(counts)) == stated


@pytest.mark.parametrize(
    ("counts", "stated"),
    [
        ([1, 2], "no intervals below n = 3"),
        ([2, 3], "bars: 95 % t intervals where n ≥ 3"),
        ([3, 5], "bars: 95 % t intervals"),
    ],
)
def test_interval_statement_promises_no_interval_that_is_not_drawn(counts, stated):
    assert interval_statement("bars", pd.Series(counts)) == stated


def test_stopped_trial_is_on_no_frontier_however_good():
    best = replace(USUAL[3], val_loss=0.5, n_params=10_000)
    assert summary_of([*USUAL, best]).set_index("trial").loc[len(USUAL), frontier_key(MEASURES[0])]
    summary = summary_of([*USUAL, replace(best, stopped="trial 3 is better")]).set_index("trial")
    for measure in MEASURES:
        assert not summary.loc[len(USUAL), frontier_key(measure)]
        # Nor does it push others off.
        assert (
            summary[frontier_key(measure)]
            .drop(len(USUAL))
            .equals(summary_of(USUAL).set_index("trial").loc[summary.index.drop(len(USUAL)), frontier_key(measure)])
        )


def test_skipped_trial_is_left_out_and_counted():
    skipped = replace(USUAL[3], seeds=(), skipped="1,000 parameters, more than search.max_params=900")
    runs, _ = simulated_study.simulated_runs([*USUAL, skipped], n_evaluations=1)
    assert len(runs.skipped) == 1
    assert len(runs.trials) == len(USUAL)
    assert runs.unfinished.empty
