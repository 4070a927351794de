from __future__ import annotations

import math
from dataclasses import replace

import pytest
from simulated_study import N_PARAMS_DENSE, N_PARAMS_MPO, Configuration, simulated_runs

from analysis.figures.data import curve_trials, frontier_points
from analysis.report.answers import answers
from analysis.results.findings import Findings
from analysis.results.retained import retained_points
from analysis.results.summary import VAL_LOSS, summarise
from analysis.results.uncertainty import frontier_uncertainty
from analysis.runs.study_runs import Claims, Contrast, Growth
from analysis.statistics.intervals import ratio_interval
from analysis.statistics.power import Contrast as Planned
from analysis.statistics.power import family_gaps

DENSE = Configuration("dense", N_PARAMS_DENSE, 1.60, "dense", seeds=range(5))
MARGINS = {"val_loss": 0.02, "val_acc": 0.005}


def mpo(chi, loss, **settings):
    return Configuration("mpo", N_PARAMS_MPO[chi], loss, chi=chi, seeds=range(5), **settings)


def low_rank(chi, loss):
    return Configuration("low-rank", N_PARAMS_MPO[chi], loss, "low_rank", seeds=range(5), extra={"as_chi": chi})


def answered(found, contrasts=(), n_missing=0, growths=(), looks=None):
    """The tables of the first screen, by the names of their questions."""
    return {answer.name: answer.rows for answer in answers(findings_of(found, contrasts, n_missing, growths, looks))}


def findings_of(found, contrasts=(), n_missing=0, growths=(), looks=None):
    runs, _ = simulated_runs(found, noise=0.002)
    claims = Claims(dict(MARGINS), tuple(Contrast("tiny", *pair) for pair in contrasts), looks or {})
    return Findings.of(replace(runs, claims=claims, n_missing=n_missing, growths=growths))


def verdicts(rows, measure="loss (nats)"):
    """Compared, against and verdict of each row."""
    return rows.loc[rows["measure"] == measure, ["compared", "against", "verdict"]].to_numpy().tolist()


def facts(rows):
    return dict(rows.itertuples(index=False, name=None))


def test_first_screen_says_what_was_run_and_what_is_on_the_frontier():
    said = answered([DENSE, mpo(8, 1.8), low_rank(8, 1.9)])
    assert said["run"].to_dict("records")[1] == {
        "family": "MPO from scratch",
        "configurations": "1",
        "parameters": "79,168",
        "seeds each": "5",
        "training tokens of a run": "16,384,000",
    }
    on = said["frontier"][["configuration", "family", "P(on frontier), loss"]].to_numpy().tolist()
    assert on == [["χ=8", "MPO from scratch", "100 %"], ["dense", "dense", "100 %"]]


def test_first_screen_has_a_row_for_each_control():
    found = [DENSE, mpo(4, 2.0), low_rank(4, 2.1), mpo(8, 1.8), low_rank(8, 1.7), mpo(16, 1.7), low_rank(16, 1.7)]
    rows = answered(found)["controls"]
    expected = [
        [f"χ={chi} (MPO from scratch)", f"as χ={chi} (low rank from scratch)", verdict]
        for chi, verdict in ((4, "better"), (8, "worse"), (16, "undecided"))
    ]
    assert verdicts(rows) == expected
    assert verdicts(rows, "accuracy (points)") == expected
    assert rows["p adjusted"].str.endswith("(BH)").all()
    assert set(rows["seeds"]) == {"5"}


def test_first_screen_counts_the_verdicts_of_many_like_comparisons():
    found = [DENSE, low_rank(8, 1.9), *(mpo(8, 1.8, extra={"learning_rate": rate * 1e-3}) for rate in range(1, 10))]
    rows = answered(found)["controls"]
    many = ["9 × MPO from scratch", "low rank from scratch", "better at 9"]
    assert verdicts(rows) == [many]
    declared = answered(found, [("mpo", "low-rank")])["controls"]
    assert len(verdicts(declared)) == 9
    assert declared["p adjusted"].str.endswith("(family)").all()


def test_first_screen_names_the_rivals_where_one_mpo_has_several():
    better = replace(low_rank(8, 1.7), arm="low-rank-svd", extra={"as_chi": 8, "init": "svd_fresh"})
    rows = answered([DENSE, mpo(8, 1.8), replace(low_rank(8, 1.9), extra={"as_chi": 8, "init": "variance"}), better])
    assert [row[1:] for row in verdicts(rows["controls"])] == [
        ["as χ=8, variance (low rank from scratch)", "better"],
        ["as χ=8, svd_fresh (low rank from scratch)", "worse"],
    ]


def test_first_screen_tells_dense_from_scratch_and_trained_on_apart():
    of_start = {"start": "dense", "budget_hash": "0ddba11e"}
    further = Configuration("further", N_PARAMS_DENSE, 1.55, "dense", seeds=range(5), **of_start)
    found = [DENSE, further, *(mpo(chi, loss, **of_start) for chi, loss in ((8, 1.7), (16, 1.59), (32, 1.55)))]
    said = answered(found, [("mpo", "dense")])
    by_rival = {rival: [] for rival in ("dense (dense)", "further (dense fine-tuned)")}
    for _, rival, verdict in verdicts(said["dense"]):
        by_rival[rival].append(verdict)
    assert list(by_rival.values()) == [["worse", "better", "better"], ["worse", "worse", "not inferior"]]
    # χ=16 keeps up with one dense alone.
    assert said["smallest"]["configuration"].iloc[0] == "χ=32 (MPO fine-tuned)"


def test_first_screen_says_from_which_chi_on_dense_is_matched():
    said = answered([DENSE, mpo(8, 1.8), mpo(16, 1.605), mpo(32, 1.6)], [("mpo", "dense")])
    loss = said["dense"][said["dense"]["measure"] == "loss (nats)"]
    assert loss["not inferior"].tolist() == ["no", "yes", "yes"]
    assert set(loss["margin"]) == {"0.02"}
    assert said["smallest"].to_dict("records")[0] == {
        "measure": "loss (nats)",
        "margin": "0.02",
        "configuration": "χ=16 (MPO from scratch)",
        "parameters": f"{N_PARAMS_MPO[16]:,}",
        "% of dense": "22",
    }
    certainty = facts(said["certainty"])
    assert certainty["declared"].startswith("3 comparisons, before the study ran")
    assert "exploration" not in certainty


def test_first_screen_shows_what_else_is_declared():
    said = answered([DENSE, mpo(8, 1.8), low_rank(16, 1.7)], [("low-rank", "dense"), ("mpo", "dense")])
    assert verdicts(said["declared"]) == [["as χ=16 (low rank from scratch)", "dense (dense)", "worse"]]
    assert "declared" not in answered([DENSE, mpo(8, 1.8)], [("mpo", "dense")])


def test_of_several_dense_models_each_meets_what_was_trained_like_it_and_none_is_the_measure():
    """The first one listed may be the worst: here its learning rate is too low."""
    losses = {3e-4: 2.0, 3e-3: 1.5}
    slow, fast = (replace(DENSE, val_loss=loss, extra={"learning_rate": rate}) for rate, loss in losses.items())
    said = answered([slow, fast, mpo(16, 1.7, extra={"learning_rate": 3e-3})])
    assert verdicts(said["dense"]) == [["χ=16 (MPO from scratch)", "dense, lr 3e-3 (dense)", "worse"]]
    assert list(said["smallest"]) == list(said["share"]) == ["answer"]


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
            frontier_points(summary, VAL_LOSS, uncertainty.chances)["is_reference"].any(),
            curve_trials(summary)["is_reference"].any(),
            len(uncertainty.size_needed) > 0,
            len(retained_points(runs, summary)) > 0,
        ]

    assert stand_for_dense([fast]) == [True] * 4
    assert stand_for_dense([slow, fast]) == [False] * 4


def test_what_is_not_inferior_is_so_to_every_arm_of_dense_models():
    weaker = replace(DENSE, val_loss=1.9, extra={"init": "paper"})
    stronger = replace(DENSE, arm="dense-variance", extra={"init": "variance"})
    rows = answered([weaker, stronger, mpo(8, 1.8), mpo(16, 1.6)])["dense"]
    loss = rows[rows["measure"] == "loss (nats)"]
    assert loss[["compared", "against", "verdict", "not inferior"]].to_numpy().tolist() == [
        ["χ=8 (MPO from scratch)", "dense, paper (dense)", "better", "yes"],
        ["χ=8 (MPO from scratch)", "dense, variance (dense)", "worse", "no"],
        ["χ=16 (MPO from scratch)", "dense, paper (dense)", "better", "yes"],
        ["χ=16 (MPO from scratch)", "dense, variance (dense)", "not inferior", "yes"],
    ]


def test_first_screen_gives_the_share_of_dense_accuracy_with_its_interval():
    found = [DENSE, mpo(8, 1.8), replace(mpo(16, 1.6), seeds=range(2))]
    runs, _ = simulated_runs(found, noise=0.002)
    accuracy = runs.seeds.pivot(index="trial", columns="seed", values="final/val_acc").to_numpy()
    expected = ratio_interval(accuracy[1], accuracy[0])
    [row] = answered(found)["share"].to_dict("records")  # and nothing of χ=16, which has two seeds
    assert row["configuration"] == "χ=8 (MPO from scratch)"
    shown = [float(row["share (%)"]), *map(float, row["95 % interval"].split(" to "))]
    assert shown == pytest.approx([100 * float(value) for value in expected[:3]], abs=0.06)


def test_first_screen_names_the_tokens_where_budgets_differ():
    tuned = mpo(16, 1.6, start="dense", budget_hash="0ddba11e")
    said = answered([DENSE, tuned], [("mpo", "dense")])["dense"]
    assert set(said["tokens"]) == {"32,768,000 against 16,384,000"}
    assert "tokens" not in answered([DENSE, mpo(16, 1.6)])["dense"]


@pytest.mark.parametrize(
    ("found", "name", "text"),
    [
        ([DENSE, mpo(8, 1.8)], "controls", "cannot be told"),
        ([DENSE, low_rank(8, 1.8)], "controls", "there is no MPO"),
        ([mpo(8, 1.8), low_rank(8, 1.8)], "dense", "there is no dense model"),
        ([DENSE, mpo(8, 1.8, budget_hash="0ddba11e")], "dense", "no MPO has the budget of the dense model"),
        ([DENSE], "dense", "there is no MPO"),
        ([replace(DENSE, seeds=(), failed=(1,)), mpo(8, 1.8)], "dense", "no seed of a dense model"),
        ([DENSE, mpo(8, 1.8, stopped="trial 0 is better")], "dense", "no MPO has a complete seed"),
        ([DENSE, mpo(8, 1.8, failed=(9,))], "dense", "failed seeds"),
        ([replace(DENSE, seeds=(7, 8)), mpo(8, 1.8)], "dense", "too few seeds"),
        ([DENSE], "certainty", "no pair has 3 seeds or more of each"),
        ([replace(DENSE, failed=(9,)), mpo(8, 1.8, failed=(9,))], "frontier", "none, because"),
        ([replace(DENSE, seeds=(0,))], "frontier", "none, because"),
    ],
)
def test_first_screen_says_what_it_cannot_say(found, name, text):
    assert text in answered(found)[name].to_string()


def test_first_screen_says_of_an_unfinished_study_how_many_runs_are_to_come():
    found = [DENSE, mpo(8, 1.8)]
    assert facts(answered(found, n_missing=3)["certainty"])["runs to come"].startswith("3;")
    assert "runs to come" not in facts(answered(found)["certainty"])


def test_first_screen_says_how_much_was_seen_before_a_study_grew():
    growths = (Growth("tiny", "--extend", 3, 5, 24), Growth("tiny", "refine --seeds +2", 5, 5, 1))
    rows = answered([DENSE, mpo(8, 1.8)], growths=growths)["certainty"]
    assert rows.loc[rows["what"] == "grown", "is"].tolist() == [
        "when 24 runs were over (--extend, from 3 to 5 seeds a trial)",
        "when 1 run was over (refine --seeds +2)",
    ]


def test_first_screen_says_which_seeds_declared_tests_use():
    found, contrast = [DENSE, mpo(8, 1.8)], [("mpo", "dense")]
    said = facts(answered(found, contrast)["certainty"])
    assert not {"looks", "seeds", "caution"} & said.keys()
    refined = facts(answered(found, contrast, growths=(Growth("tiny", "refine --seeds +2", 5, 5, 9),))["certainty"])
    assert refined["seeds"].startswith("declared comparisons leave out the seeds that `refine` added")
    assert "caution" not in refined
    grown = facts(answered(found, contrast, growths=(Growth("tiny", "--seeds +2", 3, 5, 9),))["certainty"])
    assert grown["caution"].startswith("seeds were added after results were known")
    looked = facts(answered(found, contrast, looks={3: 0.01, 5: 0.04})["certainty"])
    assert looked["looks"].startswith("after 3 seeds at level 0.01; after 5 seeds at level 0.04.")
    gap = looked["loss: gap that a contrast finds in 80 % of such studies"]
    assert "with 3 seeds" in gap
    assert "with 5 seeds" in gap


def test_gap_that_the_seeds_find_is_said_for_each_measure():
    found = [DENSE, mpo(8, 1.8), mpo(16, 1.7)]
    said = facts(answered(found, [("mpo", "dense")])["certainty"])
    [loss, accuracy] = [text for name, text in said.items() if "gap that a contrast finds in 80 %" in name]
    compared = findings_of(found, [("mpo", "dense")]).compared
    for measure, text, unit in (("val_loss", loss, "nats"), ("val_acc", accuracy, "points")):
        own = compared[compared["measure"] == measure]
        noise = math.sqrt((own["standard_error"] ** 2 * 5 / 2).mean())
        shown = []
        for n in (5, 8):
            [gap] = family_gaps(n, [Planned(2, one_rival=True)], 1)
            at_size, over = f"{noise * gap.of_sizes:.2g}", f"{noise * gap.of_arms:.2g}"
            shown.append(f"with {n} seeds {at_size} {unit} at one size, {over} over the sizes of an arm")
        assert text == "; ".join(shown)
    assert not any("gap that" in name for name in facts(answered(found)["certainty"]))


def test_a_failed_seed_leaves_the_gaps_of_the_other_contrasts():
    found = [DENSE, mpo(8, 1.8), replace(low_rank(8, 1.9), failed=(9,))]
    said = facts(answered(found, [("mpo", "dense"), ("mpo", "low-rank")])["certainty"])
    [loss, accuracy] = [text for name, text in said.items() if "gap that a contrast finds in 80 %" in name]
    assert loss.startswith("with 5 seeds ")
    assert loss.endswith("; not known for 1 contrast")
    assert accuracy.endswith("; not known for 1 contrast")
