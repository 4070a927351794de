from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import optuna
import pytest
import simulated_study
from drawn import check_texts
from simulated_study import Configuration

from analysis.figures import style
from analysis.figures.importance import importance_figure
from analysis.results import importance
from analysis.results.importance import ANOVA, COLUMNS, FACTORS, FANOVA, INTERACTIONS, MIN_TRIALS, factor_importance
from analysis.results.summary import VAL_ACC, VAL_LOSS, summarise

CHI, SITES, INIT = (4, 8, 16, 32), (2, 3, 4), ("paper", "variance")


def grid(effects, rng, **changes):
    """A full grid whose losses have main effects of χ, L, init and an interaction of χ and L of these sd."""
    chi, sites, init, both = effects
    own = {
        "chi": _contrast(len(CHI), chi, rng),
        "sites": _contrast(len(SITES), sites, rng),
        "init": _contrast(len(INIT), init, rng),
    }
    crossed = rng.normal(size=(len(CHI), len(SITES)))
    crossed -= crossed.mean(axis=0)
    crossed -= crossed.mean(axis=1, keepdims=True)
    crossed *= both / crossed.std()
    return [
        Configuration(
            "mpo", 4000 + 100 * CHI[c] * SITES[s], 2 + own["chi"][c] + own["sites"][s] + own["init"][i] + crossed[c, s],
            chi=CHI[c], extra={"n_sites": SITES[s], "init": INIT[i]}, **changes,
        )
        for c, s, i in itertools.product(range(len(CHI)), range(len(SITES)), range(len(INIT)))
    ]  # fmt: skip


def _contrast(n, sd, rng):
    values = rng.normal(size=n)
    values -= values.mean()
    return sd * values / values.std()


def search(n, rng, noise_of_learning_rate=0.1):
    """Trials at random places, of which the loss is linear in log χ and log learning rate, and in nothing else."""
    found = []
    for _ in range(n):
        chi, learning_rate = round(2 ** rng.uniform(1, 7)), float(10 ** rng.uniform(-4, -2))
        loss = 2 - 0.3 * (np.log2(chi) - 4) / (6 / np.sqrt(12))
        loss += noise_of_learning_rate * (np.log10(learning_rate) + 3) / (2 / np.sqrt(12))
        extra = {"n_sites": int(rng.integers(2, 5)), "init": str(rng.choice(INIT))}
        found.append(Configuration("mpo", 4000 + chi**2, loss, chi=chi, learning_rate=learning_rate, extra=extra))
    return found


def shares_of(found, measure=VAL_LOSS, noise=0.006):
    runs, _ = simulated_study.simulated_runs(found, n_evaluations=1, noise=noise)
    return factor_importance(summarise(runs), runs.seeds, measure, np.random.default_rng(0))


@pytest.fixture(scope="module")
def searched():
    return shares_of(search(60, np.random.default_rng(2)), noise=0.03)


@pytest.fixture(scope="module")
def quick():
    """As `searched`, with few draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "_FOREST_DRAWS", 5)
        return shares_of(search(60, np.random.default_rng(2)), noise=0.03)


def test_shares_of_a_grid_are_those_it_was_made_of():
    found = grid((0.3, 0.2, 0.1, 0.15), np.random.default_rng(0))
    shares = shares_of(found, noise=1e-6).set_index("factor")
    true = np.array([0.3, 0.2, 0.1, 0.15]) ** 2
    assert shares.index.tolist() == ["χ", "number of sites L", "init", INTERACTIONS]
    assert shares["share"].to_numpy() == pytest.approx(100 * true / true.sum(), abs=1e-2)
    assert shares["share"].sum() == pytest.approx(100)
    assert set(shares["evaluator"]) == {ANOVA}
    assert shares.loc["χ", ["levels", "n_levels"]].tolist() == ["4, 8, 16, 32", 4]
    assert set(shares["n_trials"]) == {24}


def test_ranges_of_a_grid_hold_the_true_shares_and_noise_is_no_interaction():
    """Noise gives the means as much variance as everything else does; untouched, it would pass for interactions."""
    rng = np.random.default_rng(1)
    hits, estimates = [], []
    runs, _ = simulated_study.simulated_runs(grid((0.3, 0.1, 0.0, 0.0), rng), n_evaluations=1)
    summary, noise = summarise(runs), np.sqrt(3) * 0.3
    for _ in range(60):
        values = np.array([c.val_loss for c in grid((0.3, 0.1, 0.0, 0.0), rng)])
        seeds = runs.seeds.assign(
            **{VAL_LOSS.key: values[runs.seeds["trial"]] + noise * rng.normal(size=len(runs.seeds))}
        )
        shares = factor_importance(summary, seeds, VAL_LOSS, rng).set_index("factor")
        true = {"χ": 90, "number of sites L": 10, "init": 0, INTERACTIONS: 0}
        assert ((shares["low"] <= shares["share"]) & (shares["share"] <= shares["high"])).all()
        hits.append([shares["low"][name] <= share <= shares["high"][name] for name, share in true.items()])
        estimates.append([shares["share"][name] for name in true])
    assert np.mean(hits, axis=0).min() >= 0.9
    mean = np.mean(estimates, axis=0)
    assert mean[0] > 65
    assert mean[3] < 20, "about 50 where the noise is left in"


def test_seed_shifts_have_no_part_in_the_shares():
    found = grid((0.3, 0.2, 0.1, 0.0), np.random.default_rng(0))
    runs, _ = simulated_study.simulated_runs(found, n_evaluations=1)
    before = factor_importance(summarise(runs), runs.seeds, VAL_LOSS, np.random.default_rng(0))
    runs.seeds[VAL_LOSS.key] += 5.0 * runs.seeds["seed"]
    after = factor_importance(summarise(runs), runs.seeds, VAL_LOSS, np.random.default_rng(0))
    columns = ["share", "low", "high"]
    assert after[columns].to_numpy() == pytest.approx(before[columns].to_numpy(), abs=1e-6)


@pytest.mark.slow
def test_forest_finds_what_a_search_was_made_of(searched):
    shares = searched.set_index("factor")
    assert set(shares["evaluator"]) == {FANOVA}
    assert shares.index.tolist()[:2] == ["χ", "learning rate"]
    assert shares.index.tolist()[-1] == INTERACTIONS
    assert shares.loc["χ", "share"] == pytest.approx(90, abs=8), "PED-ANOVA would name the learning rate here"
    assert 2 < shares.loc["learning rate", "share"] < 14
    assert shares.loc[["number of sites L", "init"], "share"].max() < 3
    assert ((shares["low"] <= shares["share"]) & (shares["share"] <= shares["high"])).all()
    assert (shares["low"] >= 0).all()


@pytest.mark.slow
def test_forest_is_the_same_each_time_and_leaves_optunas_logging_alone():
    before = optuna.logging.get_verbosity()
    once, again = (shares_of(search(MIN_TRIALS, np.random.default_rng(2))) for _ in range(2))
    assert optuna.logging.get_verbosity() == before
    assert len(once) > 1
    assert again.equals(once)


def test_forest_of_a_large_search_is_one_of_some_of_its_trials(monkeypatch):
    monkeypatch.setattr(importance, "MAX_TRIALS", 40)
    monkeypatch.setattr(importance, "_FOREST_DRAWS", 10)
    shares = shares_of(search(90, np.random.default_rng(2)))
    assert set(shares["n_trials"]) == {40}
    assert set(shares["left_out"]) == {"A random 40 of 90 trials stand for all."}
    assert shares.set_index("factor").loc["χ", "share"] == pytest.approx(90, abs=10)


def test_a_grid_with_a_hole_goes_to_the_forest(monkeypatch):
    monkeypatch.setattr(importance, "_FOREST_DRAWS", 5)
    found = grid((0.3, 0.1, 0.0, 0.0), np.random.default_rng(0))
    shares = shares_of([*found[:5], replace(found[5], seeds=(0,)), *found[6:]])
    assert set(shares["evaluator"]) == {FANOVA}
    assert set(shares["n_trials"]) == {23}
    assert set(shares["left_out"]) == {
        "Left out: 1 trial with a failed seed, stopped early or with fewer than 3 seeds."
    }


def test_factors_that_go_together_are_one_and_those_that_do_not_vary_are_none():
    found = grid((0.3, 0.2, 0.1, 0.0), np.random.default_rng(0))
    together = {"paper": 1e-3, "variance": 3e-4}
    found = [replace(c, learning_rate=together[c.extra["init"]]) for c in found]
    shares = shares_of(found)
    assert shares["factor"].tolist() == ["χ", "number of sites L", "init (with learning rate)", INTERACTIONS]


def test_being_without_a_factor_is_a_level_of_it():
    found = [
        Configuration("mpo", 40_000 + 100 * chi, 2 - 0.1 * np.log2(chi), chi=chi, extra={"refinement": refinement})
        for chi in CHI
        for refinement in (None, "als")
    ]
    levels = shares_of(found).set_index("factor")["levels"]
    assert levels["refinement"] == "als, none"


def test_dense_models_and_controls_have_no_part_in_it():
    rng = np.random.default_rng(0)
    others = [
        Configuration("dense", 808_448, 1.5, family="dense"),
        Configuration("lowrank", 80_000, 5.0, family="low_rank", chi=None, extra={"as_chi": 8}),
    ]
    found = grid((0.3, 0.2, 0.1, 0.0), rng)
    with_others = shares_of([*found, *others])
    assert with_others["share"].tolist() == pytest.approx(shares_of(found)["share"].tolist())


def test_factors_are_what_is_set_and_not_what_follows():
    assert {"chi", "n_sites", "factorisation", "init", "refinement", "learning_rate", "start"} < set(FACTORS)
    assert not {"trial", "seed", "arm", "sites", "largest_bond", "budget_hash", "as_chi"} & set(FACTORS)


@pytest.mark.parametrize(
    "found",
    [
        [Configuration("dense", 808_448, 1.5, family="dense")],
        [Configuration("mpo", 1000 * chi, 2 - 0.1 * chi, chi=chi) for chi in CHI],
        search(MIN_TRIALS - 1, np.random.default_rng(0)),
        [replace(c, seeds=(0, 1)) for c in grid((0.3, 0.1, 0.0, 0.0), np.random.default_rng(0))],
    ],
    ids=["no MPO", "one factor", "too few for a forest", "too few seeds"],
)
def test_nothing_to_say_is_an_empty_frame(found):
    shares = shares_of(found)
    assert shares.empty
    assert shares.columns.tolist() == list(COLUMNS)


@pytest.mark.slow
def test_importance_figure_keeps_all_its_text_apart_and_inside(searched):
    rng = np.random.default_rng(0)
    quiet, noisy = (shares_of(grid((0.3, 0.2, 0.1, 0.1), rng), VAL_ACC, noise) for noise in (1e-3, 0.3))
    long = grid((0.3, 0.2, 0.1, 0.1), rng)
    rates = {"paper": 1e-3, "variance": 3e-4}
    for name in ("paper", "variance"):
        changes = {"init": f"{name} with more words to it", "refinement": name, "lr_rule": name, "decay": name}
        long = [
            replace(c, learning_rate=rates[name], steps=len(name), d_model=len(name), extra=c.extra | changes)
            if c.extra["init"] == name
            else c
            for c in long
        ]
    for shares, measure in ((searched, VAL_LOSS), (quiet, VAL_ACC), (noisy, VAL_ACC), (shares_of(long), VAL_LOSS)):
        figure = importance_figure(shares, measure)
        check_texts(figure)
        assert figure.get_figwidth() == style.WIDTH
        assert figure.axes[0].get_position().width * style.WIDTH > 2


def test_importance_figure_draws_the_rows_it_is_given(quick):
    figure = importance_figure(quick, VAL_LOSS)
    axes = figure.axes[0]
    bars = [line for line in axes.lines if line.get_marker() == "None"]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [tuple(bar.get_xdata()) for bar in bars] == list(zip(quick["low"], quick["high"], strict=True))
    assert [dot.get_xdata()[0] for dot in dots] == quick["share"].tolist()
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [*[False] * (len(dots) - 1), True]
    assert "fANOVA" in axes.get_xlabel()
    text = figure.get_label()
    assert "Means of 60 MPO trials over n = 3 shared seeds" in text


def test_importance_figure_writes_the_same_bytes_twice(tmp_path, quick):
    for when in ("once", "again"):
        style.save(importance_figure(quick, VAL_LOSS), tmp_path / when)
    for form in style.FORMATS:
        assert (tmp_path / f"once.{form}").read_bytes() == (tmp_path / f"again.{form}").read_bytes()
