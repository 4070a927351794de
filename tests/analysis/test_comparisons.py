from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from simulated_study import N_PARAMS_DENSE, N_PARAMS_MPO, Configuration, simulated_runs

from analysis.errors import AnalysisError
from analysis.results.comparisons import (
    BETTER,
    COLUMNS,
    FAILED,
    NOT_INFERIOR,
    OF_ARMS,
    STOPPED,
    TOO_FEW,
    UNDECIDED,
    UNFINISHED,
    WORSE,
    compare,
    declared_against_reference,
    reference_trial,
)
from analysis.results.pairs import DECLARED, EQUAL_PARAMETERS, REFERENCE
from analysis.results.selection import seed_table
from analysis.results.summary import summarise
from analysis.runs.studies import join_studies
from analysis.runs.study_runs import Claims, Contrast, Growth
from analysis.statistics.multiplicity import family, graphical

DENSE = Configuration("dense", N_PARAMS_DENSE, 1.60, "dense", seeds=range(5))
MARGINS = {"val_loss": 0.02, "val_acc": 0.005}


def mpo(chi, loss, arm="mpo", **settings):
    return Configuration(arm, N_PARAMS_MPO[chi], loss, chi=chi, seeds=settings.pop("seeds", range(5)), **settings)


def control(chi, loss, family="low_rank", n_params=None, **settings):
    size = N_PARAMS_MPO[chi] if n_params is None else n_params
    seeds = settings.pop("seeds", range(5))
    return Configuration(family, size, loss, family, seeds=seeds, extra={"as_chi": chi}, **settings)


def compared(configurations, contrasts=(), margins=MARGINS, **settings):
    runs, _ = simulated_runs(configurations, **settings)
    runs = replace(runs, claims=Claims(dict(margins), tuple(Contrast("tiny", *pair) for pair in contrasts)))
    return compare(runs, summarise(runs)).pairs, runs


def row_of(frame, trial, against, measure="val_loss"):
    [row] = frame[(frame["trial"] == trial) & (frame["against"] == against) & (frame["measure"] == measure)].to_dict(
        "records"
    )
    return row


def values_of(runs, trial, key="final/val_loss"):
    return runs.seeds[runs.seeds["trial"] == trial].set_index("seed")[key]


# Which pairs ----------------------------------------------------------------------------------------------------------


def test_control_of_the_same_chi_is_none_for_an_mpo_with_other_sites():
    """χ = 16 on four sites has the parameters of another χ on three."""
    larger = replace(mpo(16, 1.7, extra={"n_sites": 4}), n_params=N_PARAMS_MPO[32])
    frame, _ = compared([DENSE, larger, control(16, 1.8), control(32, 1.75)], [("mpo", "low_rank")])
    assert set(frame.loc[frame["declared"], "against"]) == {3}


def test_each_trial_of_the_budget_meets_the_reference_and_its_controls():
    frame, _ = compared([DENSE, mpo(4, 2.0), mpo(16, 1.7), control(4, 1.9), control(16, 1.8)])
    pairs = set(frame[["trial", "against", "relation"]].itertuples(index=False, name=None))
    assert pairs == {
        *((trial, 0, REFERENCE) for trial in (1, 2, 3, 4)),
        (1, 3, EQUAL_PARAMETERS),
        (2, 4, EQUAL_PARAMETERS),
    }
    assert not frame["declared"].any()
    assert list(frame.columns) == list(COLUMNS)
    assert len(frame) == 2 * len(pairs)


@pytest.mark.parametrize(
    ("size", "is_control"), [(1.0, True), (1.049, True), (1 / 1.049, True), (1.06, False), (1 / 1.06, False)]
)
def test_narrow_dense_model_is_a_control_where_its_size_is_within_five_per_cent(size, is_control):
    narrow = Configuration("narrow", round(N_PARAMS_MPO[16] * size), 1.9, "dense", d_model=64, seeds=range(5))
    frame, _ = compared([DENSE, mpo(16, 1.7), narrow])
    assert (((frame["trial"] == 1) & (frame["against"] == 2)).any()) == is_control


def test_every_arm_of_controls_gives_a_rival_so_that_none_is_spared_the_stronger():
    better = control(16, 1.5, "low_rank")
    better = replace(better, arm="low-rank-svd", extra=better.extra | {"init": "svd_fresh"})
    for contrasts in ((), [("mpo", "low_rank")]):
        frame, _ = compared([DENSE, mpo(16, 1.7), control(16, 1.8), better], contrasts, noise=0.002)
        equal = frame[(frame["relation"] == EQUAL_PARAMETERS) & (frame["measure"] == "val_loss")]
        assert dict(zip(equal["against"], equal["verdict"], strict=True)) == {2: BETTER, 3: WORSE}
        assert list(equal["declared"]) == [bool(contrasts), False]


def test_every_arm_of_dense_models_is_a_reference_so_that_none_is_spared_the_stronger():
    weaker = replace(DENSE, val_loss=1.9, extra={"init": "paper", "learning_rate": 6e-3})
    stronger = replace(DENSE, arm="dense-variance", extra={"init": "variance", "learning_rate": 2e-2})
    for contrasts in ((), [("mpo", "dense")], [("mpo", "dense-variance")], [("dense", "dense-variance")]):
        frame, _ = compared([weaker, stronger, mpo(16, 1.7, extra={"learning_rate": 6e-3})], contrasts, noise=0.002)
        of_loss = frame[frame["measure"] == "val_loss"]
        own = of_loss[of_loss["trial"] == 2]
        assert dict(zip(own["against"], own["verdict"], strict=True)) == {0: BETTER, 1: WORSE}
        assert set(own["relation"]) == {REFERENCE}
        assert sum(of_loss["trial"] != 2) == 1  # the dense models with each other, once


def test_of_the_controls_of_an_arm_the_nearest_is_taken_and_another_start_is_none():
    tuned = control(16, 1.8, start="dense")
    frame, _ = compared([DENSE, mpo(16, 1.7), control(16, 1.8, n_params=170_000), control(16, 1.8), tuned])
    assert set(frame.loc[frame["relation"] == EQUAL_PARAMETERS, "against"]) == {3}


def test_control_of_the_nearest_learning_rate_is_taken_where_none_has_the_own():
    """A search's rate is on no grid, and the first rate that a grid lists may be its worst."""
    controls = [control(16, 1.8, learning_rate=rate) for rate in (6e-3, 2e-2, 6e-2)]
    frame, _ = compared([DENSE, mpo(16, 1.7, learning_rate=3e-2), *controls])
    assert set(frame.loc[frame["relation"] == EQUAL_PARAMETERS, "against"]) == {3}


def test_control_whose_embeddings_have_the_nearest_rate_is_taken():
    rates = [(3e-2, 1e-2), (3e-2, 3e-1), (1e-1, 3e-1)]
    controls = [
        replace(of, extra=of.extra | {"embedding_learning_rate": embeddings})
        for of, embeddings in ((control(16, 1.8, learning_rate=layers), rate) for layers, rate in rates)
    ]
    own = mpo(16, 1.7, learning_rate=3e-2, extra={"embedding_learning_rate": 2e-1})
    frame, _ = compared([DENSE, own, *controls])
    assert set(frame.loc[frame["relation"] == EQUAL_PARAMETERS, "against"]) == {3}


def test_control_of_the_own_gauge_is_taken():
    def of(gauge):
        return replace(control(16, 1.8), extra={"as_chi": 16, "gauge": gauge})

    fixed, free = mpo(16, 1.7, extra={"gauge": "fixed"}), mpo(16, 1.7, arm="free")  # the free gauge is the default
    frame, _ = compared([DENSE, fixed, free, of("free"), of("fixed")])
    alike = frame[frame["relation"] == EQUAL_PARAMETERS]
    assert set(zip(alike["trial"], alike["against"], strict=True)) == {(1, 4), (2, 3)}


def test_rate_of_the_embeddings_named_as_that_of_the_layers_is_no_difference():
    alike = replace(control(16, 1.8, learning_rate=3e-2), extra={"embedding_learning_rate": 3e-2})
    frame, _ = compared([DENSE, mpo(16, 1.7, learning_rate=3e-2), control(16, 1.8, learning_rate=2.9e-2), alike])
    assert set(frame.loc[frame["relation"] == EQUAL_PARAMETERS, "against"]) == {3}


def test_one_rate_of_layers_and_embeddings_counts_as_one_difference():
    """So that a control at a neighbouring rate is nearer than one of the own rate that differs in two settings."""
    nearby = control(16, 1.8, learning_rate=2.9e-2)
    other_rule = control(16, 1.8, learning_rate=3e-2)
    other_rule = replace(other_rule, extra=other_rule.extra | {"lr_rule": "mup", "decay": "matrix"})
    frame, _ = compared([DENSE, mpo(16, 1.7, learning_rate=3e-2), other_rule, nearby])
    assert set(frame.loc[frame["relation"] == EQUAL_PARAMETERS, "against"]) == {3}


def test_control_with_the_own_optimiser_is_taken():
    def with_muon(trial):
        return replace(trial, extra=trial.extra | {"optimiser": "muon"})

    found = [DENSE, mpo(16, 1.7), with_muon(mpo(16, 1.7)), with_muon(control(16, 1.8)), control(16, 1.9)]
    frame, _ = compared(found)
    equal = frame[frame["relation"] == EQUAL_PARAMETERS]
    assert set(equal[["trial", "against"]].itertuples(index=False, name=None)) == {(1, 4), (2, 3)}


def test_control_of_the_own_budget_and_learning_rate_is_taken_whatever_others_there_are():
    found = [
        DENSE,
        mpo(16, 1.7),
        mpo(16, 1.7, learning_rate=3e-3),
        control(16, 1.9, budget_hash="0ddba11e"),
        control(16, 1.9),
        control(16, 1.7, learning_rate=3e-3),
    ]
    for contrasts in ((), [("mpo", "low_rank")]):
        frame, _ = compared(found, contrasts)
        equal = frame[frame["relation"] == EQUAL_PARAMETERS]
        assert set(equal[["trial", "against"]].itertuples(index=False, name=None)) == {(1, 4), (2, 5)}


def test_studies_that_are_joined_claim_what_each_of_them_would():
    def study(name, *chis):
        found = [DENSE, *(mpo(chi, 1.6 if chi in (8, 32) else 1.9) for chi in chis)]
        runs, _ = simulated_runs(found, experiment=name, uuid=name, noise=0.002)
        return replace(runs, claims=Claims(MARGINS, (Contrast(name, "mpo", "dense"),)))

    runs = join_studies([study("one", 4, 16), study("two", 8, 32)])
    frame = compare(runs, summarise(runs)).pairs
    for trial, against, holds in ((1, 0, False), (2, 0, False), (4, 3, True), (5, 3, True)):
        row = row_of(frame, trial, against)
        assert (row["relation"], row["declared"], row["non_inferior"]) == (REFERENCE, True, holds)
    assert set(frame.loc[~frame["declared"], "trial"]) == {3}  # the other dense model, with the first


def test_budgets_meet_only_where_it_is_declared():
    tuned = mpo(16, 1.6, "tuned", start="dense", budget_hash="0ddba11e")
    frame, _ = compared([DENSE, mpo(16, 1.7), tuned])
    assert set(frame["trial"]) == {1}
    frame, _ = compared([DENSE, mpo(16, 1.7), tuned], [("tuned", "dense")])
    row = row_of(frame, 2, 0)
    assert (row["declared"], row["same_budget"], row["relation"], row["adjustment"]) == (
        True,
        False,
        REFERENCE,
        "family",
    )
    assert row["total_tokens"] == 2 * row["against_total_tokens"]
    assert (row["tuning_trials"], row["against_tuning_trials"]) == (1, 1)
    assert row_of(frame, 1, 0)["adjustment"] == "BH"


def further(loss, arm="further", **settings):
    settings = {"start": "dense", "budget_hash": "0ddba11e", "seeds": range(5)} | settings
    return Configuration(arm, N_PARAMS_DENSE, loss, "dense", **settings)


def test_what_starts_from_an_arm_meets_the_dense_model_that_was_trained_on_from_it():
    def tuned(chi, **settings):
        return mpo(chi, 1.6, "tuned", start="dense", budget_hash=settings.pop("budget_hash", "0ddba11e"), **settings)

    found = [
        DENSE,
        further(1.5, "of another start", start="other"),
        further(1.55, "longer", budget_hash="facade"),
        further(1.55),
        further(1.50, "later and better"),
        tuned(8),
        tuned(16, budget_hash="decade"),
        mpo(8, 1.7),
    ]
    frame, runs = compared(found)
    pairs = set(frame.loc[frame["relation"] == REFERENCE, ["trial", "against"]].itertuples(index=False, name=None))
    assert pairs == {(4, 3), (5, 3), (7, 0)}
    assert row_of(frame, 5, 3)["margin"] == MARGINS["val_loss"]
    assert reference_trial(summarise(runs)) == 0

    frame, _ = compared(found, [("tuned", "dense"), ("further", "dense")])
    declared = frame[frame["declared"]]
    pairs = set(declared[["trial", "against"]].itertuples(index=False, name=None))
    assert pairs == {(5, 0), (6, 0), (3, 0)}
    assert set(declared["relation"]) == {REFERENCE}
    assert row_of(frame, 5, 3)["relation"] == REFERENCE  # beside the one that is declared, as exploration

    frame, _ = compared(found, [("tuned", "further")])
    assert (row_of(frame, 5, 3)["relation"], row_of(frame, 5, 3)["declared"]) == (REFERENCE, True)
    assert row_of(frame, 6, 3)["relation"] == DECLARED  # of another budget
    assert declared_against_reference(frame) == set()


def test_an_arm_is_tested_against_each_reference_in_an_order_of_its_own():
    losses = {32: 1.60, 16: 1.61, 8: 1.75}
    arm = [mpo(chi, loss, "tuned", start="dense", budget_hash="0ddba11e") for chi, loss in losses.items()]
    frame, _ = compared([DENSE, further(1.50), *arm], [("tuned", "dense"), ("tuned", "further")], noise=0.002)
    own = frame[frame["measure"] == "val_loss"].set_index(["against", "trial"])["non_inferior"]
    assert own[0].to_dict() == {2: True, 3: True, 4: False}
    assert not own[1].any()


def test_counterpart_has_the_same_chi_or_else_the_nearest_size():
    narrow = [
        Configuration("narrow", n, 1.9, "dense", d_model=d, seeds=range(5)) for d, n in ((20, 50_000), (40, 150_000))
    ]
    found = [
        DENSE,
        mpo(4, 2.0),
        mpo(16, 1.7),
        control(16, 1.8, n_params=40_000),
        control(4, 1.9, n_params=170_000),
        *narrow,
    ]
    frame, _ = compared(found, [("mpo", "low_rank"), ("mpo", "narrow")])
    declared = frame[frame["declared"]]
    pairs = set(declared[["trial", "against"]].itertuples(index=False, name=None))
    assert pairs == {(1, 4), (2, 3), (1, 5), (2, 6)}
    assert len(frame) == len(frame.drop_duplicates(["measure", "trial", "against"]))


def test_counterpart_of_bonds_that_grew_has_their_size_not_the_chi_they_began_with():
    grown = Configuration(
        "grown", N_PARAMS_MPO[16], 1.7, chi=4, seeds=range(5), extra={"bonds": "every 25 steps, at most 136,704"}
    )
    frame, _ = compared([DENSE, mpo(4, 2.0), mpo(16, 1.8), grown], [("grown", "mpo"), ("mpo", "grown")])
    declared = frame[frame["declared"] & (frame["measure"] == "val_loss")]
    pairs = set(declared[["trial", "against"]].itertuples(index=False, name=None))
    assert pairs == {(3, 2), (1, 3), (2, 3)}


def test_control_of_another_size_is_none_whatever_it_stands_for():
    frame, _ = compared([DENSE, mpo(16, 1.7), control(16, 1.8, n_params=150_000)])
    assert set(frame["relation"]) == {REFERENCE}


def test_an_unfinished_study_decides_nothing_that_it_declares():
    found = [DENSE, *(mpo(chi, 1.2) for chi in (4, 8)), control(8, 1.9)]
    runs, _ = simulated_runs(found)
    claims = Claims(MARGINS, (Contrast("tiny", "mpo", "dense"),))
    for lacking in (
        replace(runs, claims=claims, n_missing=1),
        simulated_runs([*found, mpo(16, 1.2, unfinished=(7,))])[0],
    ):
        frame = compare(replace(lacking, claims=claims), summarise(lacking)).pairs
        declared = frame[frame["declared"]]
        assert set(declared["verdict"]) == {UNFINISHED}
        assert declared["p_adjusted"].isna().all()
        assert declared["p"].notna().all()
        assert not frame["non_inferior"].any()
        assert BETTER in set(frame.loc[~frame["declared"], "verdict"])  # exploration goes on
    finished = compare(replace(runs, claims=claims), summarise(runs)).pairs
    assert set(finished.loc[finished["declared"], "verdict"]) == {BETTER}


def test_declared_pairs_without_a_result_count_in_their_family():
    why = "trial 0 is better"
    found = [DENSE, mpo(4, 1.62), mpo(8, 1.62, failed=(9,)), mpo(16, 1.62, seeds=(0, 1)), mpo(32, 1.62, stopped=why)]
    frame, _ = compared(found, [("mpo", "dense")], noise=0.01)
    one = frame[frame["measure"] == "val_loss"].set_index("trial")
    assert one["verdict"][[2, 3, 4]].tolist() == [FAILED, TOO_FEW, STOPPED]
    assert one["p_adjusted"][1] > 4 * one["p"][1]  # the gate, and four sizes behind it
    assert one["p_adjusted"][[2, 3, 4]].isna().all()


def test_a_trial_of_which_every_seed_failed_keeps_its_place_in_every_family():
    """An opponent is not exchanged for a weaker one, no family shrinks and no order of tests begins further down."""
    lost = {"seeds": (), "failed": range(5)}
    contrasts = [("mpo", "low_rank"), ("mpo", "dense")]
    found = [DENSE, mpo(16, 1.6), control(4, 1.9), control(16, 1.7, **lost), mpo(32, 1.6, **lost), mpo(4, 1.6)]
    for declared in (contrasts, []):
        frame, _ = compared(found, declared, noise=0.004)
        one = frame[frame["measure"] == "val_loss"].set_index(["trial", "against"])
        assert one["verdict"][4, 0] == FAILED
        assert not frame.loc[frame["declared"], "non_inferior"].any()  # the largest χ failed
    frame, _ = compared(found, contrasts, noise=0.004)
    one = frame[(frame["measure"] == "val_loss") & frame["declared"]].set_index(["trial", "against"])
    assert set(one.index) == {(1, 3), (5, 2), (4, 3), (1, 0), (4, 0), (5, 0)}
    assert one["n"].sort_index().to_dict() == {(1, 0): 5, (1, 3): 0, (4, 0): 0, (4, 3): 0, (5, 0): 5, (5, 2): 5}
    failed = one.loc[[(1, 3), (4, 3), (4, 0)]]
    assert set(failed["verdict"]) == {FAILED}
    assert failed[["difference", "p", "p_adjusted"]].isna().all(axis=None)
    assert one["verdict"][5, 2] == BETTER


def test_while_a_study_runs_no_counterpart_is_guessed():
    found = [DENSE, mpo(8, 1.7), mpo(16, 1.7), control(8, 1.8)]
    runs, _ = simulated_runs(found)
    claims = Claims(MARGINS, (Contrast("tiny", "mpo", "low_rank"),))
    for n_missing, pairs in ((5, {(1, 3)}), (0, {(1, 3), (2, 3)})):
        frame = compare(replace(runs, claims=claims, n_missing=n_missing), summarise(runs)).pairs
        controls = frame[frame["against"] != 0]  # nor does it come as exploration
        assert set(controls[["trial", "against"]].itertuples(index=False, name=None)) == pairs
        assert controls["declared"].all()


def test_reference_of_a_declared_pair_has_seeds_where_any_has():
    lost = replace(DENSE, seeds=(), failed=(0, 1))
    frame, _ = compared([lost, replace(DENSE, seeds=(0, 1), learning_rate=1e-3), mpo(8, 1.7)], [("mpo", "dense")])
    assert set(frame.loc[frame["against"] == 1, "relation"]) == {REFERENCE}


def test_trials_that_were_stopped_are_left_out_and_a_study_without_dense_has_its_controls():
    frame, _ = compared([DENSE, mpo(16, 1.7, stopped="trial 0 is better", seeds=(0, 1))])
    assert frame.empty
    assert list(frame.columns) == list(COLUMNS)
    frame, _ = compared([mpo(16, 1.7), control(16, 1.8)])
    assert set(frame["relation"]) == {EQUAL_PARAMETERS}


# What is said of them -------------------------------------------------------------------------------------------------


def test_independent_runs_are_compared_by_welchs_test_on_all_their_seeds():
    frame, runs = compared([DENSE, mpo(8, 1.8), mpo(16, 1.61, seeds=(2, 4, 7)), mpo(32, 1.6)], noise=0.02)
    for trial in (1, 2, 3):
        for measure, key, scale in (("val_loss", "final/val_loss", 1), ("val_acc", "final/val_acc", 100)):
            row = row_of(frame, trial, 0, measure)
            own, reference = values_of(runs, trial, key) * scale, values_of(runs, 0, key) * scale
            oracle = stats.ttest_ind(own, reference, equal_var=False)
            interval = oracle.confidence_interval()
            assert row["n"] == len(own)
            assert not row["paired"]
            assert row["difference"] == pytest.approx(own.mean() - reference.mean())
            assert row["half_width"] == pytest.approx((interval.high - interval.low) / 2)
            assert row["p"] == pytest.approx(oracle.pvalue)
            assert row["margin"] == pytest.approx({"val_loss": 0.02, "val_acc": 0.5}[measure])
    one = frame[frame["measure"] == "val_loss"]
    np.testing.assert_allclose(one["p_adjusted"], stats.false_discovery_control(one["p"]))


def test_runs_that_share_their_start_are_paired_on_the_seeds_that_both_have():
    def tuned(chi, loss, **settings):
        return mpo(chi, loss, "tuned", start="dense", budget_hash="0ddba11e", **settings)

    found = [DENSE, tuned(8, 1.6), tuned(16, 1.5, seeds=(1, 2, 4, 7)), mpo(16, 1.7), further(1.5)]
    frame, runs = compared(found, [("tuned", "further"), ("tuned", "dense"), ("tuned", "mpo")])
    for trial, against, paired in ((2, 4, True), (1, 4, True), (2, 0, True), (2, 3, False)):
        row = row_of(frame, trial, against)
        own, other = values_of(runs, trial), values_of(runs, against)
        both = sorted({*own.index} & {*other.index})
        paired_test = stats.ttest_rel(own[both], other[both])
        oracle = paired_test if paired else stats.ttest_ind(own, other, equal_var=False)
        assert (row["paired"], row["n"]) == (paired, len(both) if paired else min(len(own), len(other)))
        assert row["p"] == pytest.approx(oracle.pvalue)


def test_sizes_that_begin_from_the_same_weights_are_no_independent_sizes():
    def tuned(chi, loss):
        return mpo(chi, loss, "tuned", start="dense", budget_hash="0ddba11e")

    found = [DENSE, tuned(8, 1.6), tuned(16, 1.5), mpo(8, 1.7), mpo(16, 1.7)]
    contrasts = (Contrast("tiny", "tuned", "mpo"), Contrast("tiny", "tuned", "dense"))
    runs = replace(simulated_runs(found)[0], claims=Claims(dict(MARGINS), contrasts))
    arms = compare(runs, summarise(runs)).arms.set_index(["measure", "against_arm"])
    own = (values_of(runs, 1) + values_of(runs, 2)) / 2
    row = arms.loc[("val_loss", "mpo")]
    rivals = [values_of(runs, trial) / 2 for trial in (3, 4)]
    parts = [each.var(ddof=1) / 5 for each in (own, *rivals)]
    df = sum(parts) ** 2 / sum(part**2 / 4 for part in parts)
    assert row["half_width"] == pytest.approx(stats.t.ppf(0.975, df) * np.sqrt(sum(parts)))
    assert not row["paired"]
    row = arms.loc[("val_loss", "dense")]
    assert row["p"] == pytest.approx(stats.ttest_rel(own, values_of(runs, 0)).pvalue)
    assert row["paired"]


@pytest.mark.parametrize(("settings", "verdict"), [({"failed": (9,)}, FAILED), ({"seeds": range(2)}, TOO_FEW)])
def test_an_arm_with_a_size_that_cannot_be_tested_has_no_verdict(settings, verdict):
    found = [DENSE, mpo(4, 1.2), mpo(8, 1.2), mpo(16, 5.0, **settings)]
    runs = replace(
        simulated_runs(found, noise=0.002)[0], claims=Claims(dict(MARGINS), (Contrast("tiny", "mpo", "dense"),))
    )
    for row in compare(runs, summarise(runs)).arms.to_dict("records"):
        assert row["verdict"] == verdict
        assert math.isnan(row["p"])
        assert (row["n_sizes"], row["n_planned"]) == (2, 3)


def test_verdicts():
    found = [
        DENSE,
        mpo(4, 2.0),
        mpo(8, 1.601),
        mpo(16, 1.2),
        mpo(32, 1.63, seeds=range(2)),
        control(4, 1.5, failed=(9,)),
    ]
    frame, _ = compared(found, noise=0.002)
    verdicts = {trial: row_of(frame, trial, 0)["verdict"] for trial in (1, 3, 4, 5)}
    assert verdicts == {1: WORSE, 3: BETTER, 4: TOO_FEW, 5: FAILED}
    assert {trial: row_of(frame, trial, 0, "val_acc")["verdict"] for trial in (1, 3)} == {1: WORSE, 3: BETTER}
    for trial in (4, 5):
        row = row_of(frame, trial, 0)
        assert all(math.isnan(row[key]) for key in ("p", "p_adjusted", "half_width", "low", "high"))
        assert not row["non_inferior"]
        assert math.isfinite(row["difference"])


def test_non_inferiority_goes_from_the_largest_chi_to_the_first_that_fails():
    losses = {4: 1.601, 8: 1.8, 16: 1.602, 32: 1.601}
    found = [DENSE, *(mpo(chi, loss) for chi, loss in losses.items())]
    for contrasts, holds in (([("mpo", "dense")], {16, 32}), ([], {4, 16, 32})):  # in exploration there is no order
        frame, _ = compared(found, contrasts, noise=0.002)
        rows = {chi: row_of(frame, trial, 0) for trial, chi in enumerate(losses, start=1)}
        assert {chi for chi, row in rows.items() if row["non_inferior"]} == holds
        assert rows[32]["verdict"] == NOT_INFERIOR


def test_better_is_not_inferior():
    frame, _ = compared([DENSE, *(mpo(chi, 1.4) for chi in (8, 16)), mpo(32, 1.9)], [("mpo", "dense")], noise=0.004)
    rows = {trial: row_of(frame, trial, 0) for trial in (1, 2, 3)}
    assert {trial: row["verdict"] for trial, row in rows.items()} == {1: BETTER, 2: BETTER, 3: WORSE}
    # The largest fails, so that no test of the margin comes to the others.
    assert {trial: row["non_inferior"] for trial, row in rows.items()} == {1: True, 2: True, 3: False}


def test_without_a_margin_nothing_is_not_inferior():
    frame, _ = compared([DENSE, mpo(32, 1.6)], margins={})
    row = row_of(frame, 1, 0)
    assert math.isnan(row["margin"])
    assert row["verdict"] in (UNDECIDED, BETTER, WORSE)
    assert not row["non_inferior"]


def test_a_margin_is_one_against_the_reference_alone():
    frame, _ = compared([DENSE, mpo(16, 1.7), control(16, 1.7)])
    row = row_of(frame, 1, 2)
    assert math.isnan(row["margin"])
    assert not row["non_inferior"]


def declared_study(noise=0.02, **settings):
    """Two contrasts of three sizes each, one of them with a reference, as runs and their comparisons."""
    found = [DENSE, *(mpo(chi, 1.58) for chi in (4, 8, 16)), *(control(chi, 1.65) for chi in (4, 8, 16))]
    runs, _ = simulated_runs(found, noise=noise, **settings)
    contrasts = (Contrast("tiny", "mpo", "dense"), Contrast("tiny", "mpo", "low_rank"))
    runs = replace(runs, claims=Claims(dict(MARGINS), contrasts))
    return runs, compare(runs, summarise(runs))


def test_all_that_is_declared_is_one_family_over_both_measures():
    runs, found = declared_study()
    declared = found.pairs[found.pairs["declared"]]
    assert len(declared) == 2 * 6
    assert set(found.pairs.loc[~found.pairs["declared"], "trial"]) == {4, 5, 6}
    graph = family([3] * 4, [3] * 2).graph  # measures × contrasts; the reference's margin, in each measure
    p, at = np.ones(len(graph.shares_of_tests())), 0
    for measure in ("val_loss", "val_acc"):
        for against, rivals in (("dense", [0, 0, 0]), ("low_rank", [4, 5, 6])):
            [arm] = found.arms[(found.arms["measure"] == measure) & (found.arms["against_arm"] == against)].to_dict(
                "records"
            )
            rows = [row_of(declared, trial, rival, measure) for trial, rival in zip((1, 2, 3), rivals, strict=True)]
            p[at : at + 4] = [arm["p"], *(row["p"] for row in rows)]
            at += 4
    for measure, margin, sign in (("val_loss", 0.02, 1), ("val_acc", 0.5, -1)):
        for trial in (3, 2, 1):  # from the largest
            key, scale = f"final/{measure}", 1 if measure == "val_loss" else 100
            own, dense = (sign * scale * values_of(runs, each, key) for each in (trial, 0))
            p[at] = min(1, 2 * stats.ttest_ind(own, dense + margin, equal_var=False, alternative="less").pvalue)
            at += 1
    expected = graphical(p, graph, 0.05).adjusted
    rows = declared.set_index(["measure", "against", "trial"])["p_adjusted"]
    assert rows["val_loss"][0].tolist() == pytest.approx(expected[1:4])
    assert rows["val_acc"].drop(0).tolist() == pytest.approx(expected[13:16])
    holds = found.pairs[found.pairs["against"] == 0].set_index(["measure", "trial"])["non_inferior"]
    for at, measure in ((16, "val_loss"), (19, "val_acc")):
        by_margin = dict(zip((3, 2, 1), expected[at : at + 3] <= 0.05, strict=True))
        better = rows[measure][0] <= 0.05
        assert {trial: holds[measure][trial] for trial in (1, 2, 3)} == {
            trial: bool(by_margin[trial] or better[trial]) for trial in (1, 2, 3)
        }


def test_a_contrast_of_arms_is_tested_on_the_mean_over_its_sizes():
    runs, found = declared_study()
    assert list(found.arms.columns) == list(OF_ARMS)
    [arm] = found.arms[(found.arms["measure"] == "val_loss") & (found.arms["against_arm"] == "low_rank")].to_dict(
        "records"
    )
    own = [values_of(runs, trial) for trial in range(1, 7)]
    parts = [row.var(ddof=1) / 9 / len(row) for row in own]
    df = sum(parts) ** 2 / sum(part**2 / 4 for part in parts)
    difference = np.mean([row.mean() for row in own[:3]]) - np.mean([row.mean() for row in own[3:]])
    assert (arm["n_sizes"], arm["n_planned"], arm["n"], arm["paired"]) == (3, 3, 5, False)
    assert arm["difference"] == pytest.approx(difference)
    assert arm["half_width"] == pytest.approx(stats.t.ppf(0.975, df) * np.sqrt(sum(parts)))
    assert arm["verdict"] == BETTER
    # Against one reference at all sizes, its seeds count once.
    [arm] = found.arms[(found.arms["measure"] == "val_loss") & (found.arms["against_arm"] == "dense")].to_dict(
        "records"
    )
    parts = [*parts[:3], values_of(runs, 0).var(ddof=1) / 5]
    df = sum(parts) ** 2 / sum(part**2 / 4 for part in parts)
    assert arm["half_width"] == pytest.approx(stats.t.ppf(0.975, df) * np.sqrt(sum(parts)))


@pytest.mark.parametrize("noise", [0.002, 0.02, 0.1])
def test_intervals_exclude_zero_exactly_where_the_verdict_does(noise):
    _, found = declared_study(noise)
    for frame in (found.pairs[found.pairs["declared"]], found.arms):
        decided = frame["verdict"].isin([BETTER, WORSE])
        # An end at zero belongs to the side that is excluded.
        assert (decided == ((frame["low"] >= 0) | (frame["high"] <= 0))).all()
        assert (frame["low"] <= frame["difference"]).all()
        assert (frame["high"] >= frame["difference"]).all()
    assert found.pairs.loc[~found.pairs["declared"], ["low", "high"]].isna().all(axis=None)


# The table of seeds ---------------------------------------------------------------------------------------------------


def test_seed_table_has_sound_trials_of_enough_seeds_with_all_of_theirs():
    found = [
        DENSE,
        mpo(4, 2.0, seeds=range(8)),
        mpo(8, 1.8, seeds=range(4)),
        mpo(16, 1.7, failed=(9,)),
        mpo(32, 1.7),
        control(4, 1.9, seeds=(100, 101, 102)),
        control(8, 1.9, seeds=range(2)),
    ]
    runs, _ = simulated_runs(found)
    table = seed_table(summarise(runs), runs.seeds, "final/val_loss")
    assert table.notna().sum(axis=1).to_dict() == {0: 5, 1: 8, 2: 4, 4: 5, 5: 3}
    assert table.loc[5].dropna().index.tolist() == [100, 101, 102]
    assert table.loc[1, 3] == values_of(runs, 1)[3]


def test_seed_table_of_too_few_seeds_is_empty():
    runs, _ = simulated_runs([replace(DENSE, seeds=range(2)), mpo(4, 2.0, seeds=(0,))])
    assert seed_table(summarise(runs), runs.seeds, "final/val_loss").empty


def test_reference_trial_is_the_summary_s():
    runs, _ = simulated_runs([mpo(4, 2.0), DENSE])
    assert reference_trial(summarise(runs)) == 1
    assert reference_trial(pd.DataFrame({"trial": [1], "is_reference": [False]})) is None


# Looks ----------------------------------------------------------------------------------------------------------------

LOOKS = {3: 0.01, 5: 0.04}


def at_looks(found, looks, contrasts=(("mpo", "low_rank"),), growths=(), noise=0.02):
    runs = simulated_runs(found, noise=noise)[0]
    claims = Claims(dict(MARGINS), tuple(Contrast("tiny", *pair) for pair in contrasts), looks)
    runs = replace(runs, claims=claims, growths=growths)
    return compare(runs, summarise(runs)), runs


def test_each_declared_test_is_shown_as_of_the_look_that_decided_it():
    # χ = 8 is decided on three seeds; χ = 16 is not, and only its trials have five.
    found = [mpo(8, 1.2, seeds=range(3)), mpo(16, 1.61), control(8, 1.8, seeds=range(3)), control(16, 1.6)]
    (frame, arms), runs = at_looks(found, LOOKS)
    one = frame[frame["measure"] == "val_loss"].set_index("trial")
    assert one.loc[0, ["n", "verdict"]].tolist() == [3, BETTER]
    assert one.loc[1, ["n", "verdict"]].tolist() == [5, UNDECIDED]
    oracle = stats.ttest_ind(values_of(runs, 1), values_of(runs, 3), equal_var=False)
    assert one.at[1, "p"] == pytest.approx(oracle.pvalue)
    assert one.at[1, "low"] < 0 < one.at[1, "high"]
    of_three, _ = at_looks(found, {3: 0.01})
    alone = of_three.pairs[of_three.pairs["measure"] == "val_loss"].set_index("trial")
    for name in ("difference", "low", "high"):
        assert one.at[0, name] == pytest.approx(alone.at[0, name])
    assert one.at[0, "p_adjusted"] == pytest.approx(alone.at[0, "p_adjusted"])
    assert arms.set_index("measure").at["val_loss", "n"] == 3


def test_levels_of_looks_are_spent_on_their_look_alone():
    found = [mpo(16, 1.50), control(16, 1.6)]
    wide, _ = at_looks(found, {5: 0.05}, noise=0.05)
    narrow, _ = at_looks(found, {3: 0.049, 5: 0.001}, noise=0.05)
    for frame in (wide.pairs, narrow.pairs):
        one = frame[frame["measure"] == "val_loss"].iloc[0]
        assert (one["verdict"] == BETTER) == (one["p_adjusted"] <= 0.05) == (one["high"] <= 0)
    both = [frame.pairs.set_index("measure").at["val_loss", "p_adjusted"] for frame in (wide, narrow)]
    assert both[0] < both[1]


def test_seeds_of_a_refinement_are_no_part_of_declared_tests_without_looks():
    found = [mpo(16, 1.50), control(16, 1.6, seeds=range(3)), mpo(8, 1.9, seeds=range(3))]
    refined = (Growth("tiny", "refine --seeds +2", 3, 3, 9),)
    (frame, _), runs = at_looks(found, {}, growths=refined)
    row = row_of(frame, 0, 1)
    own = values_of(runs, 0)[:3]
    assert row["n"] == 3
    assert row["p"] == pytest.approx(stats.ttest_ind(own, values_of(runs, 1), equal_var=False).pvalue)
    (frame, _), _ = at_looks(found, {}, growths=(Growth("tiny", "--seeds +2", 3, 5, 9),))
    own = values_of(runs, 0)
    assert row_of(frame, 0, 1)["p"] == pytest.approx(stats.ttest_ind(own, values_of(runs, 1), equal_var=False).pvalue)


def test_a_seed_that_fails_at_a_later_look_leaves_what_was_decided():
    found = [DENSE, mpo(8, 1.2), mpo(16, 1.61)]
    found[0] = replace(DENSE, seeds=range(4), failed=(4,))
    (frame, arms), _ = at_looks(found, LOOKS, [("mpo", "dense")])
    one = frame[frame["measure"] == "val_loss"].set_index("trial")
    assert one.loc[1, ["n", "verdict"]].tolist() == [3, BETTER]
    assert one.loc[2, "verdict"] == FAILED
    assert arms.set_index("measure").at["val_loss", "verdict"] == BETTER
    lost = replace(DENSE, seeds=(0, 1, 3, 4), failed=(2,))
    (frame, _), _ = at_looks([lost, *found[1:]], LOOKS, [("mpo", "dense")])
    assert set(frame["verdict"]) == {FAILED}


def test_a_failed_seed_of_a_refinement_is_no_part_of_declared_tests_without_looks():
    found = [replace(mpo(16, 1.2), seeds=range(3), failed=(3,)), control(16, 1.6, seeds=range(3))]
    (frame, _), _ = at_looks(found, {}, growths=(Growth("tiny", "refine --on frontier --seeds +1", 3, 3, 6),))
    assert row_of(frame, 0, 1)["verdict"] == BETTER
    (frame, _), _ = at_looks(found, {})
    assert row_of(frame, 0, 1)["verdict"] == FAILED


def test_studies_with_different_looks_are_no_family():
    def study(name, looks):
        runs = simulated_runs([mpo(16, 1.5), control(16, 1.6)], experiment=name, uuid=name)[0]
        return replace(runs, claims=Claims(dict(MARGINS), (Contrast(name, "mpo", "low_rank"),), looks))

    joined = join_studies([study("a", LOOKS), study("b", LOOKS)])
    assert joined.claims.looks == LOOKS
    with pytest.raises(AnalysisError, match=r"studies with different claims.looks .* \(a: .*b: none\)"):
        join_studies([study("a", LOOKS), study("b", {})])


def test_moderated_p_values_are_given_for_seven_declared_pairs_and_decide_nothing():
    chis = (4, 8, 16, 32)
    found = [DENSE, *(mpo(chi, 1.6) for chi in chis), *(control(chi, 1.62) for chi in chis)]
    (frame, _), _ = at_looks(found, {}, (("mpo", "dense"), ("mpo", "low_rank")))
    declared = frame["declared"].astype(bool)
    assert frame.loc[declared, "p_moderated"].between(0, 1).all()
    assert frame.loc[~declared, "p_moderated"].isna().all()
    assert (frame.loc[declared, "p_moderated"] != frame.loc[declared, "p_adjusted"]).any()
    for contrasts, looks in ((("mpo", "dense"),), {}), ((("mpo", "dense"), ("mpo", "low_rank")), LOOKS):
        (frame, _), _ = at_looks(found, looks, contrasts)
        assert frame["p_moderated"].isna().all()
