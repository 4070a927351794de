from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.report import tables
from analysis.results import numbers


def test_trials_table_shows_every_trial_with_its_interval(summary):
    table = tables.trials_table(summary)
    assert len(table.shown) == len(table.data) == 11
    row = summary[summary["trial"] == 8].iloc[0]
    shown = table.shown.loc[summary["trial"] == 8].iloc[0]
    assert shown["parameters"] == "79,168"
    assert shown["% of dense"] == "9.8"
    assert shown["val accuracy (%)"] == (
        f"{100 * row['mean/final/val_acc']:.2f} ± {100 * row['half_width/final/val_acc']:.2f}"
    )
    assert shown["tokens"] == "20,480,000"


def test_trials_table_has_the_units_of_the_tokenizer(summary):
    known = summary.assign(**{"mean/final/bits_per_byte": 1.5})
    assert "bits per byte" not in tables.trials_table(known.assign(tokenizer="characters")).shown
    of_bytes = tables.trials_table(known.assign(tokenizer="bytes")).shown
    assert set(of_bytes["bits per byte"]) == {"1.500"}
    assert "perplexity of a token" not in of_bytes
    shown = tables.trials_table(known.assign(tokenizer="folder 1a2b")).shown
    assert shown["perplexity of a token"].tolist() == [f"{np.exp(loss):.1f}" for loss in summary["mean/final/val_loss"]]


def test_frontier_table_holds_the_frontier_from_the_smallest_up(summary, uncertainties):
    table = tables.frontier_table(summary, uncertainties)
    assert table.data["n_params"].is_monotonic_increasing
    on = summary["on_frontier/val_loss"] | summary["on_frontier/val_acc"]
    assert sorted(table.data["trial"]) == sorted(summary.loc[on, "trial"])
    assert set(table.shown["on frontier of"]) <= {"loss", "accuracy", "loss, accuracy"}


def test_frontier_table_says_the_probabilities(summary, uncertainties):
    table = tables.frontier_table(summary, uncertainties)
    support = uncertainties["val_loss"].chances.set_index("trial")["probability"]
    for shown, trial in zip(table.shown["P(on frontier), loss"], table.data["trial"], strict=True):
        assert shown == numbers.percent(support[trial])


def test_comparisons_table_shows_declared_ones_first_with_their_tests(findings):
    compared = findings.compared.assign(declared=findings.compared["trial"] == 6)
    shown = tables.comparisons_table(compared).shown
    assert shown["declared"].tolist() == sorted(shown["declared"], reverse=True)
    [row] = shown[(shown["declared"] == "yes") & (shown["measure"] == "loss (nats)")].to_dict("records")
    [data] = compared[(compared["trial"] == 6) & (compared["measure"] == "val_loss")].to_dict("records")
    assert (row["against"], row["seeds"], row["verdict"]) == ("dense (dense)", "3", data["verdict"])
    assert row["difference"].startswith(f"+{data['difference']:.3f}")
    assert row["margin"] == "–"  # this study declares none


def test_size_needed_table_adds_up_and_marks_both_choices(uncertainties):
    table = tables.size_needed_table(uncertainties)
    own = table.shown[table.shown["measure"] == "loss (nats)"]
    assert own["this size or smaller"].iloc[-1] == "100 %"
    marks = own["smallest within the margin"]
    assert marks.str.contains("by the means").sum() == 1
    [cautious] = own.index[marks.str.contains("with 95 %")]
    data = table.data.loc[table.data["measure"] == "val_loss"]
    assert data.loc[cautious, "cumulative"] >= 0.95
    assert (data.loc[data.index < cautious, "cumulative"] < 0.95).all()


def test_hypervolume_table_says_what_it_is_measured_against(uncertainties):
    shown = tables.hypervolume_table(uncertainties).shown
    assert shown["measured against"].tolist() == ["4.174, 808,448 parameters", "0, 808,448 parameters"]


def test_arms_table_lists_what_trials_of_an_arm_differ_in(summary):
    shown = tables.arms_table(summary).shown.set_index("arm")
    assert shown.loc["mpo-tuned", "steps"] == "500"
    assert shown.loc["mpo-tuned", "start"] == "dense"
    assert shown.loc["dense", "learning rate"] == "0.0003"
    assert "refinement" not in shown.columns


def test_arms_table_names_the_optimiser_and_schedule_if_one_is_not_the_usual(summary):
    usual = tables.arms_table(summary)
    assert not {"optimiser", "schedule"} & set(usual.shown.columns)
    assert set(usual.data["optimiser"]) == {"adamw"}
    changed = summary.assign(optimiser=summary["optimiser"].where(summary["arm"] != "mpo", "muon"))
    shown = tables.arms_table(changed).shown.set_index("arm")
    assert shown.loc[["dense", "mpo"], "optimiser"].tolist() == ["adamw", "muon"]
    assert "schedule" not in shown.columns


@pytest.mark.parametrize(
    ("share", "shown"), [(0, "0 %"), (0.001, "<1 %"), (0.5, "50 %"), (0.999, ">99 %"), (1, "100 %"), (0.004999, "<1 %")]
)
def test_percent_is_certain_only_where_the_share_is(share, shown):
    assert numbers.percent(share) == shown


def test_budgets_table_shows_both_totals_of_tokens(summary):
    shown = tables.budgets_table(summary).shown.set_index("budget")
    assert list(shown.loc["0ddba11e"]) == ["mpo-tuned", "4", "4,096,000", "20,480,000"]
    assert shown.loc["b7d1f00d", "arms"] == "dense, mpo, narrow-28, narrow-44"


def test_rates_table_has_the_best_rate_of_each_arm_and_size():
    rows = [
        ("mpo", 1000, 0.01, 2.5), ("mpo", 1000, 0.02, 2.25), ("mpo", 1000, 0.02, 2.75),  # two rates of the embeddings
        ("mpo", 2000, 0.01, 2.0), ("mpo", 2000, 0.02, 1.0), ("mpo", 2000, 0.04, 2.125),
        ("dense", 9000, 0.01, 1.5),
    ]  # fmt: skip
    summary = pd.DataFrame(rows, columns=["arm", "n_params", "learning_rate", "mean/final/val_loss"])
    summary = summary.assign(n_failed=[0, 0, 0, 0, 1, 0, 0], stopped=None)
    shown = tables.rates_table(summary.assign(family=summary["arm"])).shown
    assert shown.columns.tolist() == [
        "arm", "parameters", "best rate", "loss at 0.01", "loss at 0.02", "loss at 0.04"
    ]  # fmt: skip
    assert shown.to_numpy().tolist() == [
        ["mpo", "1,000", "0.02", "2.500", "2.250", "–"],
        ["mpo", "2,000", "0.01", "2.000", "–", "2.125"],
    ]


def test_failures_and_unfinished_tables_list_each(runs):
    failures, unfinished, *_ = tables.run_tables(runs)
    assert failures.shown.to_numpy().tolist() == [["3", "mpo", "3", "120", "validation loss is not finite"]]
    assert unfinished.shown.to_numpy().tolist() == [["4", "mpo", "3", "RUNNING"]]


def test_write_keeps_every_digit_in_csv(summary, tmp_path):
    table = tables.trials_table(summary)
    csv, markdown, latex = tables.write(table, tmp_path)
    read = pd.read_csv(csv)
    assert read["mean/final/val_loss"].tolist() == summary["mean/final/val_loss"].tolist()
    lines = markdown.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + len(summary)
    assert {line.count("|") for line in lines} == {len(table.shown.columns) + 1}
    assert latex.read_text(encoding="utf-8").count(r" \\") == 1 + len(summary)


def test_to_markdown_keeps_awkward_text_in_its_cell():
    frame = pd.DataFrame({"reason": ["a | b\nc"]})
    assert tables.to_markdown(frame) == "| reason |\n| --- |\n| a \\| b c |\n"


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ("<script>alert(1)</script>", r"\<script>alert(1)\</script>"),
        ("<!-- -->, <?x>, <0.0001, <1 %, a < b", r"\<!-- -->, \<?x>, <0.0001, <1 %, a < b"),
        (r"\<script>", r"\\\<script>"),  # a backslash of the text's own does not undo ours
        (r"\| C:\new", r"\\\| C:\new"),
        ("![x](http://host) [a](javascript:b)", r"!\[x\](http://host) \[a\](javascript:b)"),
        ("&lt;script&gt; & co", r"\&lt;script\&gt; & co"),
        ("a\r\nb\u2028c\x0bd", "a b c d"),
    ],
)
def test_to_markdown_shows_text_as_it_is(cell, shown):
    assert tables.to_markdown(pd.DataFrame({"reason": [cell]})).splitlines()[2] == f"| {shown} |"


def test_to_latex_begins_no_row_with_what_the_row_before_would_take_for_its_own():
    body = tables.to_latex(pd.DataFrame({"what": ["[2em] x", "* y\r\x00z"]})).splitlines()[4:6]
    assert body == [r"{[}2em] x \\", r"{*} y  z \\"]


def test_to_latex_sets_numbers_right_and_escapes_what_latex_reads():
    frame = pd.DataFrame({"what": ["MPO χ = 4_x & 50 %\\", "a"], "loss": ["1.60 ± 0.02", "–"], "n": ["808,448", "−3"]})
    assert tables.to_latex(frame).splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"what & loss & n \\",
        r"\midrule",
        r"MPO $\chi$ = 4\_x \& 50 \%\textbackslash  & 1.60 $\pm$ 0.02 & 808,448 \\",
        r"a & -- & $-$3 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_to_latex_does_not_print_less_than_as_an_inverted_exclamation_mark():
    assert r"$<$0.0001 & $>$99 \% \\" in tables.to_latex(pd.DataFrame({"p": ["<0.0001"], "support": [">99 %"]}))


def test_to_latex_leaves_nothing_that_plain_latex_cannot_set(summary, runs, findings, uncertainties):
    for table in (
        tables.trials_table(summary),
        tables.frontier_table(summary, uncertainties),
        tables.comparisons_table(findings.compared),
        tables.size_needed_table(uncertainties),
        tables.hypervolume_table(uncertainties),
        tables.arms_table(summary),
        *tables.run_tables(runs),
    ):
        assert tables.to_latex(table.shown).isascii()


@pytest.mark.parametrize(
    ("mean", "half_width", "decimals", "shown"),
    [
        (1.65432, 0.00831, 4, "1.6543 ± 0.0083"),
        (52.123, 12.3, 0, "52 ± 12"),
        (-0.5, 0.25, 2, "−0.50 ± 0.25"),
        (1.65432, np.nan, 3, "1.654"),
        (np.nan, np.nan, 3, "–"),
    ],
)
def test_with_interval_shows_what_there_is(mean, half_width, decimals, shown):
    assert numbers.with_interval(mean, half_width, decimals) == shown


@pytest.mark.parametrize(
    ("half_widths", "decimals"),
    [([0.0083], 4), ([0.012, 0.013, 5.0], 3), ([1.2], 1), ([25.0], 0), ([1e-9], 6), ([np.nan], 3), ([], 3), ([0.0], 3)],
)
def test_decimals_for_gives_the_typical_interval_two_digits(half_widths, decimals):
    assert numbers.decimals_for(pd.Series(half_widths, dtype=float)) == decimals
