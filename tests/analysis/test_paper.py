"""The paper's published numbers beside computed and measured ones."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from simulated_study import N_PARAMS_DENSE, N_PARAMS_MPO, Configuration, awkward_studies, simulated_runs

from analysis.paper import published
from analysis.paper.comparison import CURVES, comparison_table, paper_comparison
from analysis.paper.definitions import layer_params, model_params, mpo_params, quadratic_at
from analysis.paper.trials import missing, paper_trials, remarks
from analysis.paper.values import COLUMNS
from analysis.report.tables import to_latex
from analysis.statistics.intervals import ratio_interval

PAPER = {"factorisation": "paper", "init": "paper", "n_sites": None}
LOSSES = {4: 2.02, 8: 1.86, 16: 1.745, 32: 1.655}
TUNED = {"start": "dense", "steps": 500, "extra": {"factorisation": "paper", "n_sites": None}}


def paper_study(seeds=range(5), **changes):
    """Runs of the paper's five models under its protocol."""
    found = [Configuration("dense", N_PARAMS_DENSE, 1.575, family="dense", extra={"init": "paper"}, seeds=seeds)]
    found += [
        Configuration("mpo", N_PARAMS_MPO[chi], loss, chi=chi, extra=PAPER, seeds=seeds) for chi, loss in LOSSES.items()
    ]
    return [replace(one, **changes) for one in found]


def compared(found, change=lambda runs, curves: (runs, curves)):
    """The comparison of a study in memory; `change` may put other runs and curves in the place of the simulated."""
    runs, curves = change(*simulated_runs(found, keys=CURVES))
    trials = paper_trials(runs)
    curves = curves.reindex(columns=["trial", "seed", "step", *CURVES])  # a study without a seed has no column
    return paper_comparison(runs, trials, curves[curves["trial"].isin(trials.from_scratch)])


def cell(comparison, row, quantity):
    [found] = comparison[(comparison["row"] == row) & (comparison["quantity"] == quantity)].to_dict("records")
    return found


def of(comparison, quantity):
    """Rows of a quantity, by the name of the model or layer."""
    return comparison[comparison["quantity"] == quantity].set_index("row")


@pytest.fixture(scope="module")
def runs():
    return simulated_runs(paper_study())[0]


@pytest.fixture(scope="module")
def comparison():
    return compared(paper_study())


def tt_svd_error(weight, d_out, d_in, chi):
    """‖W − Ŵ‖ / ‖W‖ of TT-SVD: its steps are orthogonal projections, so what they cut adds up in squares."""
    n_sites = len(d_out)
    order = [axis for site in range(n_sites) for axis in (site, n_sites + site)]
    rest, bond, cut = weight.reshape(*d_out, *d_in).transpose(order), 1, 0.0
    for out, into in list(zip(d_out, d_in, strict=True))[:-1]:
        _, s, vt = np.linalg.svd(rest.reshape(bond * out * into, -1), full_matrices=False)
        bond = min(chi, s.size)
        cut += (s[bond:] ** 2).sum()
        rest = s[:bond, None] * vt[:bond]
    return math.sqrt(cut) / np.linalg.norm(weight)


def with_random_weights(runs, curves):
    """The errors that layers of independent normal weights really have, for each seed of the dense trial."""
    rng = np.random.default_rng(5)
    shapes = {
        f"blocks.{block}.{module}": layer
        for layer in published.LAYERS if layer.n_in_block for block in range(4) for module in layer.modules
    } | {"lm_head": published.LAYERS[-1]}  # fmt: skip
    rows = []
    for seed in range(3):
        for name, layer in shapes.items():
            weight = rng.normal(size=(math.prod(layer.d_out), math.prod(layer.d_in)))
            for chi in LOSSES:
                error = tt_svd_error(weight, layer.d_out, layer.d_in, chi)
                rows.append({"trial": 0, "seed": seed, "when": "init", "chi": chi, "layer": name, "rel_error": error})
    return replace(runs, rel_errors=pd.DataFrame(rows)), curves


@pytest.fixture(scope="module")
def of_random_weights():
    return compared(paper_study(seeds=range(3)), with_random_weights)


def with_noise(runs, curves):
    """Accuracies that scatter as those of 40,960 tokens do, and start at what predicting a space gives."""
    rng = np.random.default_rng(6)
    clean = curves["val_acc"].clip(lower=0.15)
    noisy = clean + rng.normal(0, np.sqrt(clean * (1 - clean) / math.prod(published.EVALUATED)))
    return runs, curves.assign(val_acc=clean, val_acc_sampled=noisy)


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


def test_own_counts_are_a_quadratic_in_chi():
    """What the test of the printed counts rests on: no bond of these layers is clipped up to χ = 32."""
    assert quadratic_at(32, {chi: model_params(chi) for chi in (4, 8, 16)}) == pytest.approx(model_params(32))
    for layer in published.LAYERS:
        assert quadratic_at(32, {chi: layer_params(layer, chi) for chi in (4, 8, 16)}) == layer_params(layer, 32)
    with pytest.raises(ValueError, match="`points` must be 3"):
        quadratic_at(32, {4: 1})


# What is wrong in the paper, found by the comparison ------------------------------------------------------------------


def test_a_model_of_another_kind_is_none_of_the_papers():
    other = {"n_heads": None, "n_layers": None, "d_ff": None, "model": "llama"}
    found = [replace(one, extra=one.extra | other) for one in paper_study()]
    assert paper_trials(simulated_runs(found)[0]).frame.empty


def test_printed_totals_are_not_those_of_the_architecture(comparison):
    totals = of(comparison, "parameters")
    assert list(totals["ours"]) == [808_448, 42_336, 79_168, 177_408, 472_192]
    assert set(totals["follows"]) == {"no"}
    ratios = of(comparison, "compression ratio")
    assert list(ratios["ours"].round(2)) == [19.10, 10.21, 4.56, 1.71]
    assert set(ratios["follows"]) == {"no"}
    assert ratios["why"].str.endswith("; it follows from the printed ones").all()


def test_printed_totals_fit_no_scheme_with_one_chi_for_all_layers(comparison):
    found = cell(comparison, "MPO, all χ", "parameters at χ = 32, from the others")
    assert (found["published"], found["ours"], found["follows"]) == (408_832, 421_504, "no")


def test_table_2_has_one_row_that_cannot_be_and_what_it_makes_wrong(comparison):
    rows = comparison[comparison["place"] == "Table 2"].set_index(["row", "quantity"])
    assert (rows["kind"] == "computed").all()
    wrong = rows[rows["follows"] == "no"]
    assert list(wrong.index) == [
        ("W_1", "parameters at χ = 8"),
        ("a block", "parameters at χ = 8"),
        ("a block", "compression ratio at χ = 8"),
    ]
    assert list(wrong["ours"]) == [2_816, 15_872, pytest.approx(196_608 / 15_872)]
    assert wrong["why"].iloc[1].endswith("it is the sum of the printed rows")


def test_thirteen_times_is_the_whole_models_ratio_not_a_blocks(comparison):
    found = cell(comparison, "a block", "compression ratio at χ = 4")
    assert (found["published"], found["follows"]) == (13, "no")
    assert found["ours"] == pytest.approx(196_608 / 6_912)
    assert found["why"].endswith("it is the printed ratio of whole models")


def test_printed_score_is_too_large_by_the_root_of_ten(comparison):
    scores = of(comparison, "accuracy / √N")
    assert len(scores) == 5
    assert set(scores["follows"]) == {"no"}
    assert scores["why"].str.endswith("the printed value is 3.16 times that").all()


def test_random_weights_barely_compress(of_random_weights):
    """Values of the paper's own definition, as its reference code gives them, too."""
    largest, mean = (of(of_random_weights, f"{name} rel_error, random") for name in ("largest", "mean"))
    assert list(largest["ours"]) == pytest.approx([0.988, 0.965, 0.891, 0.630], abs=0.003)
    assert list(mean["ours"]) == pytest.approx([0.950, 0.899, 0.795, 0.558], abs=0.003)
    assert set(largest["follows"]) == set(mean["follows"]) == {"no"}


def test_order_of_layers_is_the_reverse_of_the_published_one(of_random_weights):
    up = of(of_random_weights, "rel_error, W_1 over least other")
    sites = of(of_random_weights, "rel_error, L=3 over L=2")
    for ratios in (up, sites):
        assert len(ratios) == 4
        assert set(ratios["follows"]) == {"no"}
        assert (ratios["low"] > 1).all()
    assert up["why"].str.endswith("the lowest on average is W_LM").all()


def test_errors_as_published_would_be_believed():
    """The judgement is not a foregone one: numbers like the published ones follow."""

    def small(runs, curves):
        rng = np.random.default_rng(2)
        worst = {model.chi: model.max_rel_error for model in published.MODELS}
        errors = runs.rel_errors
        value = errors["chi"].map(worst) * (1 + 0.01 * rng.normal(size=len(errors)))
        kind = errors["layer"].str.rsplit(".", n=1).str[-1].map({"up": 0.5, "down": 0.55}).fillna(0.97)
        return replace(runs, rel_errors=errors.assign(rel_error=value * kind)), curves

    found = compared(paper_study(), small)
    assert set(of(found, "largest rel_error, random")["follows"]) == {"yes"}
    assert set(of(found, "rel_error, W_1 over least other")["follows"]) == {"yes"}
    assert set(of(found, "rel_error, L=3 over L=2")["follows"]) == {"yes"}


def test_init_is_too_small_for_three_sites_and_larger_than_dense(comparison):
    scale = of(comparison, "initial std × √N_in")
    assert list(scale["ours"].round(3)) == [1.0, 0.297, 0.210, 1.0]  # 128 and 512 to the power −1/4
    assert list(scale["follows"]) == ["yes", "no", "no", "yes"]
    over = cell(comparison, "W_Q, W_K, W_V, W_O", "initial std, MPO over dense")
    assert (round(over["ours"], 1), over["follows"]) == (4.4, "no")


def test_curves_without_a_fall_cannot_come_from_so_few_tokens():
    found = compared(paper_study(), with_noise)
    falls = cell(found, "all models", "falls between evaluations")
    assert (falls["said"], falls["published"], falls["follows"]) == ("read off a plot", 0, "no")
    assert falls["ours"] > 5
    lowest = cell(found, "all models", "lowest accuracy, loss ≤ 3.29")
    assert (lowest["published"], lowest["follows"]) == (7, "no")
    assert lowest["ours"] >= 15
    error = cell(found, "dense", "error of one evaluation")
    assert error["ours"] == pytest.approx(100 * stats.binom(40_960, 0.528).std() / 40_960)


def test_curves_that_never_fall_are_told_as_well(comparison):
    falls = cell(comparison, "all models", "falls between evaluations")  # simulated without noise
    assert (falls["ours"], falls["follows"]) == (0, "yes")
    assert cell(comparison, "all models", "lowest accuracy, loss ≤ 3.29")["follows"] == "yes"


STEPS_DIFFER = {
    "half as often": lambda curves: curves[curves["step"] % 200 == 0],
    "first left out": lambda curves: curves[curves["step"] > 0],
    "one more": lambda curves: pd.concat((curves, curves[curves["step"] == 100].assign(step=150))),
    "not sampled": lambda curves: curves.assign(val_acc_sampled=np.nan),
    "one seed otherwise": lambda curves: curves[(curves["seed"] > 0) | (curves["step"] != 700)],
}


@pytest.mark.parametrize("change", STEPS_DIFFER.values(), ids=STEPS_DIFFER)
def test_curves_of_other_evaluations_say_nothing_of_the_published_ones(change):
    found = compared(paper_study(), lambda runs, curves: (runs, change(with_noise(runs, curves)[1])))
    for quantity in ("falls between evaluations", "lowest accuracy, loss ≤ 3.29"):
        row = cell(found, "0 of 5 models", quantity)
        assert row["follows"] == "cannot be told"
        assert row["why"] == "no model of this study is evaluated as published, every 100 steps on a sample"
        assert math.isnan(row["ours"])


def test_curves_of_models_evaluated_as_published_count_without_the_others():
    def change(runs, curves):
        runs, curves = with_noise(runs, curves)
        return runs, curves[(curves["trial"] > 1) | (curves["step"] % 200 == 0)]

    all_models, some = compared(paper_study(), with_noise), compared(paper_study(), change)
    for quantity in ("falls between evaluations", "lowest accuracy, loss ≤ 3.29"):
        whole, row = cell(all_models, "all models", quantity), cell(some, "3 of 5 models", quantity)
        assert (row["follows"], row["n"]) == ("no", 5)
        assert row["ours"] < whole["ours"] if quantity.startswith("falls") else row["ours"] >= whole["ours"]


def test_lower_loss_with_lower_accuracy_is_pointed_out(comparison):
    gaps = of(comparison, "loss gap")
    said = gaps["why"].str.startswith("the loss is better than dense's and the accuracy is worse")
    assert list(gaps.index[said]) == ["MPO χ = 16", "MPO χ = 32"]
    assert gaps["why"].str.endswith("both of one seed").all()


def test_fine_tuned_models_are_described_without_a_number():
    tuned = [Configuration("mpo-tuned", N_PARAMS_MPO[chi], 1.7, chi=chi, **TUNED) for chi in (8, 16)]
    found = compared([*paper_study(), *tuned])
    rows = found[found["row"].str.endswith(", fine-tuned")]
    assert list(rows["row"].unique()) == ["MPO χ = 8, fine-tuned", "MPO χ = 16, fine-tuned"]
    assert set(rows["follows"]) == {"nothing published"}
    assert rows["published"].isna().all()
    assert list(rows["ours"][rows["quantity"] == "validation loss"]) == pytest.approx([1.7, 1.7], abs=0.02)


def test_what_does_follow_is_said_too(comparison):
    gaps = of(comparison, "accuracy gap")
    assert len(gaps) == 4
    assert set(gaps["follows"]) == {"yes"}
    assert cell(comparison, "MPO χ = 16", "retained accuracy")["follows"] == "yes"


# Measured -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "trial"), [("dense", 0), ("MPO χ = 4", 1), ("MPO χ = 16", 3)])
def test_measured_loss_has_its_own_t_interval(runs, comparison, row, trial):
    values = runs.seeds.loc[runs.seeds["trial"] == trial, "final/val_loss"].to_numpy()
    found = cell(comparison, row, "validation loss")
    limits = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert (found["ours"], found["n"], found["kind"]) == (pytest.approx(values.mean()), 5, "measured")
    assert (found["low"], found["high"]) == pytest.approx(limits)
    assert found["difference"] == pytest.approx(values.mean() - found["published"])
    assert found["follows"] == "cannot be told"  # no definition says what a training ends at


def test_gaps_are_paired_by_seed(runs, comparison):
    for key, quantity, scale in (("final/val_acc", "accuracy gap", 100), ("final/val_loss", "loss gap", 1)):
        seeds = runs.seeds.pivot(index="seed", columns="trial", values=key)
        gaps = scale * (seeds[3] - seeds[0])
        found = cell(comparison, "MPO χ = 16", quantity)
        assert found["ours"] == pytest.approx(gaps.mean())
        assert (found["high"] - found["low"]) / 2 == pytest.approx(stats.sem(gaps) * stats.t.ppf(0.975, 4))


def test_retained_accuracy_has_fiellers_interval(runs, comparison):
    seeds = runs.seeds.pivot(index="seed", columns="trial", values="final/val_acc")
    ratio, low, high, n = ratio_interval(seeds[3].to_numpy(), seeds[0].to_numpy())
    found = cell(comparison, "MPO χ = 16", "retained accuracy")
    assert (found["ours"], found["low"], found["high"]) == pytest.approx((100 * ratio, 100 * low, 100 * high))
    assert found["n"] == n == 5
    assert low < ratio < high


def test_retained_accuracy_takes_the_seeds_that_both_have():
    found = paper_study()
    found[3] = replace(found[3], seeds=(1, 2, 3, 7))
    assert cell(compared(found), "MPO χ = 16", "retained accuracy")["n"] == 3


def test_score_scales_the_interval_of_the_accuracy(comparison):
    for model in published.MODELS:
        acc, score = cell(comparison, model.name, "validation accuracy"), cell(comparison, model.name, "accuracy / √N")
        for key in ("ours", "low", "high"):
            assert score[key] == pytest.approx(acc[key] / 100 / math.sqrt(model_params(model.chi)) / 1e-3)


def test_published_number_is_set_against_one_more_run(runs, comparison):
    found = cell(comparison, "dense", "validation loss")
    sampled = runs.seeds.loc[runs.seeds["trial"] == 0, "final/val_loss_sampled"]
    spread = stats.t.ppf(0.975, 4) * sampled.std() * math.sqrt(1 + 1 / 5)
    assert found["why"] == (
        f"outside the 95 % prediction interval of one more run, {sampled.mean():.3f} ± {spread:.2g} evaluated as "
        "published; published of one seed"
    )


def test_errors_are_the_layers_of_each_seed(runs, comparison):
    errors = runs.rel_errors
    errors = errors[(errors["trial"] == 0) & (errors["when"] == "init") & (errors["chi"] == 8)]
    for quantity, of_seeds in (("largest", errors.groupby("seed")["rel_error"].max()),
                               ("mean", errors.groupby("seed")["rel_error"].mean())):  # fmt: skip
        found = cell(comparison, "MPO χ = 8", f"{quantity} rel_error, random")
        assert (found["ours"], found["n"]) == (pytest.approx(of_seeds.mean()), 5)
    trained = cell(comparison, "MPO χ = 8", "largest rel_error, trained")
    assert math.isnan(trained["published"])
    assert trained["follows"] == "nothing published"


def test_two_seeds_have_no_interval_and_decide_nothing():
    two = compared(paper_study(seeds=(0, 1)))
    measured = two[two["kind"] == "measured"]
    assert len(measured)
    assert measured[["low", "high"]].isna().all().all()
    assert set(measured.loc[measured["place"].isin(["Figure 2", "Figure 4"]), "follows"]) == {"cannot be told"}
    assert set(two.loc[two["quantity"].str.endswith(", random"), "follows"]) == {"cannot be told"}


# The right trials -----------------------------------------------------------------------------------------------------


def test_embeddings_at_the_rate_of_the_layers_are_the_papers():
    runs = simulated_runs(paper_study(extra=PAPER | {"embedding_learning_rate": 3e-4}))[0]
    assert set(paper_trials(runs).scratch) == set(paper_trials(simulated_runs(paper_study())[0]).scratch) != set()


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 400},
        {"learning_rate": 1e-3},
        {"d_model": 64},
        {"start": "dense"},
        {"extra": {"factorisation": "balanced", "init": "paper"}},
        {"extra": {"factorisation": "paper", "init": "variance"}},
        {"extra": PAPER | {"lr_rule": "mup"}},
        {"extra": PAPER | {"decay": "matrix"}},
        {"extra": PAPER | {"gauge": "fixed"}},
        {"extra": PAPER | {"precision": "bfloat16"}},
        {"extra": PAPER | {"optimiser": "muon"}},
        {"extra": PAPER | {"schedule": "wsd"}},
        {"extra": PAPER | {"embedding_learning_rate": 0.3}},
        {"extra": PAPER | {"corpus_sha256": "0" * 64}},
    ],
)
def test_other_models_and_budgets_are_not_taken_for_the_papers(changes):
    runs = simulated_runs(paper_study(**changes))[0]
    lacking = missing(paper_trials(runs))
    assert lacking is not None
    assert "MPO χ = 4, MPO χ = 8, MPO χ = 16, MPO χ = 32" in lacking
    measured = compared(paper_study(**changes))
    assert measured.loc[measured["quantity"] == "validation loss", "ours"].iloc[1:].isna().all()


def test_the_papers_models_are_found_among_others():
    models = paper_study()
    more = [
        *awkward_studies()["crowded"],
        *(replace(one, learning_rate=1e-3) for one in models),
        Configuration("low-rank", 79_168, 1.9, family="low_rank", extra={"as_chi": 8, "init": "paper"}),
        replace(models[2], start="dense", steps=500, val_loss=1.6),
    ]
    trials = paper_trials(simulated_runs([*more, *models])[0])
    first = len(more)
    assert trials.dense == first
    assert trials.scratch == {4: first + 1, 8: first + 2, 16: first + 3, 32: first + 4}
    assert trials.tuned == {8: first - 1}
    assert missing(trials) is None
    assert remarks(trials) == []
    whole, alone = compared([*more, *models]), compared(models)
    computed = alone["kind"] == "computed"
    assert whole[whole["row"].isin(alone["row"])]["published"].tolist() == pytest.approx(
        alone["published"].tolist(), nan_ok=True
    )
    assert alone.loc[computed, "ours"].tolist() == whole.loc[whole["kind"] == "computed", "ours"].tolist()


def test_first_of_equals_is_taken_and_said_so():
    models = paper_study()
    again = replace(models[2], arm="again", val_loss=1.2)
    trials = paper_trials(simulated_runs([*models, again])[0])
    assert trials.scratch[8] == 2
    assert remarks(trials) == [
        "MPO χ = 8 is trial 2 (mpo), the first of its definition; not shown: trial 5 (again, lr 0.0003)"
    ]


def test_failed_unfinished_and_stopped_seeds_are_said():
    models = paper_study(seeds=(0, 1, 2))
    models[0] = replace(models[0], failed=(3, 4))
    models[3] = replace(models[3], unfinished=(3,))
    models[4] = replace(models[4], stopped="trial 2 is better")
    said = remarks(paper_trials(simulated_runs(models)[0]))
    assert said == [
        "dense is trial 0 (dense): its seeds are 3 complete, 2 failed; only the complete count",
        "MPO χ = 16 is trial 3 (mpo): its seeds are 3 complete, 1 unfinished; only the complete count",
        "MPO χ = 32 is trial 4 (mpo): stopped early, trial 2 is better",
    ]


def test_fine_tuned_models_of_another_start_are_left_out():
    other = {**TUNED, "start": "narrow"}
    found = [*paper_study(), Configuration("mpo-tuned", N_PARAMS_MPO[8], 1.7, chi=8, **other)]
    assert paper_trials(simulated_runs(found)[0]).tuned == {}


@pytest.mark.parametrize(
    "found", [paper_study()[:1], paper_study()[1:], paper_study()[3:4], [paper_study(seeds=())[0]]]
)
def test_part_of_the_models_fills_part_of_the_comparison(found):
    lines, whole = compared(found), compared(paper_study())
    assert list(lines["published"]) == pytest.approx(list(whole["published"]), nan_ok=True)
    assert (lines["kind"] == "not measured").any()
    assert (lines.loc[lines["kind"] == "not measured", "n"] == 0).all()


# As text --------------------------------------------------------------------------------------------------------------


def test_whole_study_lacks_nothing(runs, comparison):
    assert missing(paper_trials(runs)) is None
    assert list(comparison.columns) == list(COLUMNS)
    assert not (comparison["kind"] == "not measured").any()
    assert (comparison["said"] == "").equals(comparison["published"].isna())


def test_every_published_number_is_shown(comparison):
    text = comparison_table(comparison).shown
    said = set(text["published"])
    for model in published.MODELS:
        assert {f"{model.n_params:,}", f"{model.val_loss:.3f}", f"{model.val_acc:.1f}"} <= said
        assert f"{1e3 * model.acc_per_root_n:.2f}" in said
    assert {"about 7.0", "below 1"} <= said
    assert not text.isin(["nan", "NaN"]).any().any()
    dense = text[text["what"] == "dense: parameters"].iloc[0]
    assert (dense["published"], dense["here"], dense["difference"]) == ("1,020,224", "808,448", "−211,776")


def test_intervals_that_are_not_symmetric_show_both_limits(comparison):
    row = comparison[comparison["quantity"] == "retained accuracy"].assign(ours=91.0, low=85.0, high=99.0)
    assert comparison_table(row).shown["here"].item() == "91.0 (85.0 to 99.0)"
    assert comparison_table(row.assign(low=86.0, high=96.0)).shown["here"].item() == "91.0 ± 5.0"


def test_latex_needs_no_special_engine(comparison):
    assert to_latex(comparison_table(comparison).shown).isascii()
