from __future__ import annotations

from dataclasses import replace

import moocore
import numpy as np
import pytest
from simulated_study import N_PARAMS_DENSE, N_PARAMS_MPO, Configuration, simulated_runs

from analysis.results.summary import MEASURES, VAL_ACC, VAL_LOSS, frontier_key, summarise
from analysis.results.uncertainty import N_DRAWS, frontier_uncertainty
from analysis.runs.study_runs import Claims

LOSSES = {4: 2.0, 8: 1.8, 16: 1.605, 32: 1.60}
FOUND = [
    Configuration("dense", N_PARAMS_DENSE, 1.6, "dense", seeds=range(5)),
    *(Configuration("mpo", N_PARAMS_MPO[chi], loss, chi=chi, seeds=range(5)) for chi, loss in LOSSES.items()),
]


def uncertainty_of(found, measure=VAL_LOSS, margins=None, **settings):
    runs, _ = simulated_runs(found, **settings)
    runs = replace(runs, claims=Claims(margins or {}))
    summary = summarise(runs)
    return frontier_uncertainty(runs, summary, measure), runs, summary


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_clear_points_are_surely_on_the_frontier_and_close_ones_perhaps(measure):
    found, _, summary = uncertainty_of(FOUND, measure)
    chances = found.chances.set_index("trial")["probability"]
    assert chances[[1, 2]].tolist() == [1, 1]
    assert all(0.02 < share < 0.98 for share in chances[[0, 4]])
    assert (found.chances["near_probability"] >= found.chances["probability"]).all()
    on = summary.set_index("trial")[frontier_key(measure)]
    assert chances[on].min() > 0.05
    assert found.rests_on == "5 seeds that 5 configurations share"


def test_band_holds_a_frontier_without_noise_and_is_in_the_measure_s_unit():
    found, _, _ = uncertainty_of(FOUND, noise=0.0)
    np.testing.assert_allclose(found.band["low"], found.band["observed"])
    np.testing.assert_allclose(found.band["observed"], [2.0, 1.8, 1.605, 1.6, 1.6])
    assert found.band["n_params"].tolist() == [*N_PARAMS_MPO.values(), N_PARAMS_DENSE]
    accuracy, _, _ = uncertainty_of(FOUND, VAL_ACC)
    assert (accuracy.band["observed"] > 30).all()
    assert (accuracy.band["high"] > accuracy.band["low"]).all()


def test_same_runs_give_the_same_numbers():
    first, second = (uncertainty_of(FOUND)[0] for _ in range(2))
    for name in ("chances", "band", "hypervolume", "size_needed"):
        assert getattr(first, name).equals(getattr(second, name))


def test_size_needed_goes_by_the_margin_of_the_study():
    found, _, _ = uncertainty_of(FOUND, noise=0.001, margins={"val_loss": 0.25})
    assert found.epsilon == 0.25
    needed = found.size_needed.set_index("n_params")
    assert needed.index[needed["observed"].astype(bool)].tolist() == [N_PARAMS_MPO[8]]
    assert needed["probability"][N_PARAMS_MPO[8]] == 1
    assert needed["cumulative"].iloc[-1] == pytest.approx(1, abs=1 / N_DRAWS)
    default, _, _ = uncertainty_of(FOUND, noise=0.001)
    assert default.epsilon == VAL_LOSS.margin
    sizes = default.size_needed
    assert sizes.loc[sizes["observed"].astype(bool), "n_params"].tolist() == [N_PARAMS_MPO[16]]


def test_hypervolume_is_measured_against_guessing_and_the_dense_size():
    found, runs, _ = uncertainty_of(FOUND)
    [row] = found.hypervolume.to_dict("records")
    assert row["worst_value"] == pytest.approx(np.log(65))
    assert row["largest_size"] == N_PARAMS_DENSE
    means = runs.seeds.groupby("trial")["final/val_loss"].mean()
    sizes = runs.trials.set_index("trial")["n_params"].astype(float)
    area = moocore.hypervolume(np.column_stack((np.log10(sizes), means)), ref=[np.log10(N_PARAMS_DENSE), np.log(65)])
    assert row["observed"] == pytest.approx(area)
    assert row["low"] < row["observed"] < row["high"]


def test_trials_of_other_or_more_seeds_count_with_all_of_theirs():
    other = Configuration("mpo", 60_000, 2.5, chi=6, seeds=(7, 8, 9))
    few = Configuration("mpo", 61_000, 1.0, chi=7, seeds=(0, 1))
    refined = replace(FOUND[3], seeds=range(9))
    runs, _ = simulated_runs([*FOUND[:3], refined, FOUND[4], other, few])
    summary = summarise(runs)
    found = frontier_uncertainty(runs, summary, VAL_LOSS)
    assert found.rests_on == "3 to 9 seeds of each of 6 configurations"
    assert set(found.chances["trial"]) == {0, 1, 2, 3, 4, 5}
    means = summary[summary["n_seeds"] >= 3].sort_values("n_params")
    assert found.band["observed"].tolist() == pytest.approx(means["mean/final/val_loss"].cummin().tolist(), abs=1e-12)
    # A seed that one trial alone has counts, too.
    is_last = (runs.seeds["trial"] == 3) & (runs.seeds["seed"] == 8)
    changed = replace(runs, seeds=runs.seeds.assign(**{"final/val_loss": runs.seeds["final/val_loss"] - 5 * is_last}))
    again = frontier_uncertainty(changed, summarise(changed), VAL_LOSS)
    assert again.hypervolume["observed"].item() > found.hypervolume["observed"].item()
    assert not again.chances.equals(found.chances)


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_too_few_seeds_give_empty_frames(seeds):
    found, _, _ = uncertainty_of([replace(one, seeds=seeds) for one in FOUND])
    assert all(getattr(found, name).empty for name in ("chances", "band", "hypervolume", "size_needed"))
    assert list(found.chances.columns) == ["trial", "probability", "near_probability"]


def test_study_without_dense_needs_no_size():
    found, _, _ = uncertainty_of(FOUND[1:])
    assert found.size_needed.empty
    assert len(found.chances) == 4
