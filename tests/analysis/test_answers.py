from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from simulated_study import N_PARAMS_DENSE, N_PARAMS_MPO, Configuration, simulated_runs

from analysis.figures.data import curve_trials, frontier_points
from analysis.results.answers import seed_noise
from analysis.results.findings import Findings
from analysis.results.retained import retained_points
from analysis.results.summary import VAL_LOSS, summarise
from analysis.results.uncertainty import frontier_uncertainty
from analysis.runs.study_runs import Claims, Contrast, Growth
from analysis.statistics.intervals import ratio_interval
from analysis.statistics.power import resolved_gap

DENSE = Configuration("dense", N_PARAMS_DENSE, 1.60, "dense", seeds=range(5))
MARGINS = {"val_loss": 0.02, "val_acc": 0.005}


def mpo(chi, loss, **settings):
    return Configuration("mpo", N_PARAMS_MPO[chi], loss, chi=chi, seeds=range(5), **settings)


def low_rank(chi, loss):
    return Configuration("low-rank", N_PARAMS_MPO[chi], loss, "low_rank", seeds=range(5), extra={"as_chi": chi})


def answered(found, contrasts=(), **settings):
    """The first screen's questions, and what is said to each, as one text."""
    runs, _ = simulated_runs(found, **settings)
    findings = Findings.of(
        replace(runs, claims=Claims(dict(MARGINS), tuple(Contrast("tiny", *pair) for pair in contrasts)))
    )
    return {answer.question: " ".join(answer.sentences) for answer in findings.answers}


def test_first_screen_says_what_was_run_and_what_is_on_the_frontier():
    said = answered([DENSE, mpo(8, 1.8), low_rank(8, 1.9)], noise=0.002)
    assert said["What was run?"].startswith(
        "3 configurations (1 dense; 1 MPO from scratch; 1 low rank from scratch) of 79,168 to 808,448 parameters, n = 5"
    )
    assert (
        "By validation loss: χ=8 (MPO from scratch, support 100 %) and dense (dense, support 100 %)."
        in (said["What is on the frontier?"])
    )


def test_first_screen_counts_what_beats_its_controls():
    found = [DENSE, mpo(4, 2.0), low_rank(4, 2.1), mpo(8, 1.8), low_rank(8, 1.7), mpo(16, 1.7), low_rank(16, 1.7)]
    said = answered(found, noise=0.002)["Does MPO beat its controls of equal parameters?"]
    tally = "better at 1, worse at 1 and undecided at 1 of 3 sizes"
    assert f"MPO from scratch against low rank from scratch, validation loss: {tally} (χ=4 −0.1" in said
    assert re.search(r"χ=8 \+0\.(1|09)", said)
    assert f"validation token accuracy: {tally} (χ=4 +2" in said


def test_first_screen_names_the_rivals_where_one_mpo_has_several():
    better = replace(low_rank(8, 1.7), arm="low-rank-svd", extra={"as_chi": 8, "init": "svd_fresh"})
    said = answered([DENSE, mpo(8, 1.8), replace(low_rank(8, 1.9), extra={"as_chi": 8, "init": "variance"}), better])
    said = said["Does MPO beat its controls of equal parameters?"]
    assert "better at 1 and worse at 1 of 2 comparisons (χ=8 against as χ=8, variance −0." in said
    assert "; χ=8 against as χ=8, svd_fresh +0." in said


def test_first_screen_tells_dense_from_scratch_and_trained_on_apart():
    of_dense = {"start": "dense", "budget_hash": "0ddba11e"}
    further = Configuration("further", N_PARAMS_DENSE, 1.55, "dense", seeds=range(5), **of_dense)
    found = [DENSE, further, *(mpo(chi, loss, **of_dense) for chi, loss in ((8, 1.7), (16, 1.59), (32, 1.55)))]
    said = answered(found, [("mpo", "dense")], noise=0.002)["Does it keep up with dense?"]
    assert "MPO fine-tuned against dense, validation loss: better at 2 and worse at 1 of 3 sizes" in said
    assert "MPO fine-tuned against dense fine-tuned, validation loss: worse at 2 and undecided at 1 of 3 sizes" in said
    assert "margin of 0.02 nats, each family tested by itself, is χ=32 " in said  # χ=16 keeps up with one dense alone


def test_first_screen_says_from_which_chi_on_dense_is_matched():
    said = answered([DENSE, mpo(8, 1.8), mpo(16, 1.605), mpo(32, 1.6)], [("mpo", "dense")], noise=0.002)
    dense = said["Does it keep up with dense?"]
    assert "not inferior by the margin of 0.02 nats, tested from the largest downwards: χ=16 and χ=32" in dense
    smallest = (
        "lose less loss than the margin of 0.02 nats, each family tested by itself, is χ=16 (MPO from scratch): "
        f"{N_PARAMS_MPO[16]:,} parameters"
    )
    assert f"{smallest}, 22 % of dense." in dense
    declared = "3 comparisons were declared before the study ran, a family for each measure (Holm, 0.05)."
    assert declared in said["How sure is that?"]
    assert "exploration" not in said["How sure is that?"]


def test_of_several_dense_models_each_meets_what_was_trained_like_it_and_none_is_the_measure():
    """The first one listed may be the worst: here its learning rate is too low."""
    losses = {3e-4: 2.0, 3e-3: 1.5}
    slow, fast = (replace(DENSE, val_loss=loss, extra={"learning_rate": rate}) for rate, loss in losses.items())
    found = [slow, fast, mpo(16, 1.7, extra={"learning_rate": 3e-3})]
    said = answered(found, noise=0.002)["Does it keep up with dense?"]
    assert "MPO from scratch, validation loss: worse at 1 of 1 size" in said
    assert "against the one of each arm that was trained most like it; so no smallest configuration is named" in said
    assert "share of the dense" not in said


def test_of_several_dense_models_none_stands_for_dense_in_figures_and_tables():
    """The first may be the worst of them, and a flattering measure."""
    slow, fast = (
        replace(DENSE, val_loss=loss, extra={"learning_rate": rate}) for loss, rate in ((2.0, 3e-4), (1.5, 3e-3))
    )
    found = [mpo(chi, 1.5, extra={"n_sites": n_sites}) for chi in (8, 16) for n_sites in (2, 3)]

    def stand_for_dense(dense):
        runs, _ = simulated_runs([*dense, *found], noise=0.002)
        summary = summarise(runs)
        uncertainty = frontier_uncertainty(runs, summary, VAL_LOSS)
        return [
            frontier_points(summary, VAL_LOSS, uncertainty.support)["is_reference"].any(),
            curve_trials(summary)["is_reference"].any(),
            len(uncertainty.size_needed) > 0,
            len(retained_points(runs, summary)) > 0,
        ]

    assert stand_for_dense([fast]) == [True] * 4
    assert stand_for_dense([slow, fast]) == [False] * 4


def test_what_is_not_inferior_is_so_to_every_arm_of_dense_models():
    weaker = replace(DENSE, val_loss=1.9, extra={"init": "paper"})
    stronger = replace(DENSE, arm="dense-variance", extra={"init": "variance"})
    said = answered([weaker, stronger, mpo(8, 1.8), mpo(16, 1.6)], noise=0.002)["Does it keep up with dense?"]
    assert "better at 2, worse at 1 and undecided at 1 of 4 comparisons (χ=8 against dense, paper −0.1" in said
    assert "not inferior by the margin of 0.02 nats, tested from the largest downwards: χ=16. " in said


def test_first_screen_gives_the_share_of_dense_accuracy_with_its_interval():
    found = [DENSE, mpo(8, 1.8), replace(mpo(16, 1.6), seeds=range(2))]
    runs, _ = simulated_runs(found, noise=0.01)
    accuracy = runs.seeds.pivot(index="trial", columns="seed", values="final/val_acc").to_numpy()
    expected = ratio_interval(accuracy[1], accuracy[0])
    said = " ".join(Findings.of(runs).answers[3].sentences)
    numbers = re.search(
        r"MPO from scratch, share of the dense model's accuracy: χ=8 ([\d.]+) % \(([\d.]+) to ([\d.]+)\) \(F", said
    )
    assert numbers is not None  # and nothing of χ=16, which has two seeds
    shown = [float(number) for number in numbers.groups()]
    assert shown == pytest.approx(
        [100 * float(value) for value in (expected.ratio, expected.low, expected.high)], abs=0.06
    )


def test_first_screen_names_the_tokens_where_budgets_differ():
    tuned = mpo(16, 1.6, start="dense", budget_hash="0ddba11e")
    said = answered([DENSE, tuned], [("mpo", "dense")])["Does it keep up with dense?"]
    assert "their budget is another, 32,768,000 tokens in all against 16,384,000." in said
    assert "budget" not in answered([DENSE, mpo(16, 1.6)])["Does it keep up with dense?"]


@pytest.mark.parametrize(
    ("found", "question", "sentence"),
    [
        ([DENSE, mpo(8, 1.8)], "Does MPO beat its controls of equal parameters?", "this study cannot say"),
        ([DENSE, low_rank(8, 1.8)], "Does MPO beat its controls of equal parameters?", "There is no MPO"),
        ([mpo(8, 1.8), low_rank(8, 1.8)], "Does it keep up with dense?", "There is no dense model"),
        (
            [DENSE, mpo(8, 1.8, budget_hash="0ddba11e")],
            "Does it keep up with dense?",
            "No MPO has the budget of the dense model",
        ),
        ([DENSE], "Does it keep up with dense?", "There is no MPO in this study."),
        (
            [replace(DENSE, seeds=(), failed=(1,)), mpo(8, 1.8)],
            "Does it keep up with dense?",
            "No seed of a dense model",
        ),
        (
            [DENSE, mpo(8, 1.8, stopped="trial 0 is better")],
            "Does it keep up with dense?",
            "No MPO has a complete seed",
        ),
        ([DENSE, mpo(8, 1.8, failed=(9,))], "Does it keep up with dense?", "not tested (failed seeds) at 1 of 1"),
        ([replace(DENSE, seeds=(7, 8)), mpo(8, 1.8)], "Does it keep up with dense?", "not tested (too few seeds)"),
        ([DENSE], "How sure is that?", "Nothing was compared"),
        (
            [replace(DENSE, failed=(9,)), mpo(8, 1.8, failed=(9,))],
            "What is on the frontier?",
            "none, since no configuration has 3 complete seeds without a failed one",
        ),
        ([replace(DENSE, seeds=(0,))], "What is on the frontier?", "none, since no configuration has 3 complete seeds"),
    ],
)
def test_first_screen_says_what_it_cannot_say(found, question, sentence):
    assert sentence in answered(found)[question]


def test_first_screen_says_of_an_unfinished_study_that_its_frontier_is_of_what_there_is():
    runs, _ = simulated_runs([DENSE, mpo(8, 1.8)])
    for n_missing, begin in ((0, "By validation loss: "), (3, "So far, by validation loss: ")):
        said = {answer.name: answer.sentences for answer in Findings.of(replace(runs, n_missing=n_missing)).answers}
        assert said["frontier"][0].startswith(begin)
        assert ("3 runs to come" in said["certainty"][0]) == bool(n_missing)


def test_first_screen_says_how_much_was_seen_before_a_study_grew():
    runs, _ = simulated_runs([DENSE, mpo(8, 1.8)])
    growths = (Growth("tiny", "--extend", 3, 5, 24), Growth("tiny", "refine --seeds +2", 5, 5, 1))
    said = " ".join(Findings.of(replace(runs, growths=growths)).answers[-1].sentences)
    assert "The study grew when 24 runs of it were over (--extend, from 3 to 5 seeds a trial)." in said
    assert "The study grew when 1 run of it was over (refine --seeds +2)." in said


def test_seed_noise_finds_the_standard_deviation_and_what_seeds_share():
    rng = np.random.default_rng(5)
    found = [DENSE, *(mpo(chi, 1.7) for chi in (4, 8, 16, 32))]
    found = [replace(one, seeds=range(400)) for one in found]
    runs, _ = simulated_runs(found, n_evaluations=1, noise=0.0)
    shared = 0.3 * rng.normal(size=400)
    seeds = runs.seeds.assign(
        **{VAL_LOSS.key: shared[runs.seeds["seed"]] + 0.4 * rng.normal(size=len(runs.seeds)) + runs.seeds["trial"]}
    )
    runs = replace(runs, seeds=seeds)
    noise = seed_noise(runs, summarise(runs), VAL_LOSS)
    assert noise is not None
    assert noise.sd == pytest.approx(0.5, rel=0.05)
    assert noise.correlation == pytest.approx(0.36, abs=0.04)
    assert noise.n == 400


def test_gap_that_the_seeds_resolve_is_said():
    found = [DENSE, mpo(8, 1.8), mpo(16, 1.7)]
    runs, _ = simulated_runs(found)
    noise = seed_noise(runs, summarise(runs), VAL_LOSS)
    assert noise is not None
    gap = resolved_gap(5, noise.sd, noise.correlation)
    assert math.isfinite(gap)
    assert (
        f"With 5 seeds a single paired test finds a true gap of {gap:.2g} nats in 80 % of studies"
        in answered(found)["How sure is that?"]
    )
