"""The report's first screen as rows: what was run, what is on the frontier, what beats what, and how sure that is."""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd

from analysis.report.tables import arms_compared_table, comparisons_table, frontier_table
from analysis.results.comparisons import declared_against_reference, reference_trial
from analysis.results.findings import Findings
from analysis.results.numbers import count_shown, counted, decimals_for, digits, range_shown
from analysis.results.pairs import EQUAL_PARAMETERS, REFERENCE
from analysis.results.retained import retained_points
from analysis.results.summary import DENSE, MEASURES, NO_FRONTIER, Measure, sole_reference
from analysis.run_schema import LEVEL, MIN_SEEDS
from analysis.statistics.power import TARGET, Contrast, family_gaps

_MOST = 8
"""Largest number of like comparisons that have a row each; more are counted in one row."""
_LIKE = ["measure", "group", "against_group"]
_FRONTIER = ("configuration", "family", "parameters", "val loss (nats)", "val accuracy (%)")
_VERDICT = (
    *("compared", "against", "measure", "difference", "verdict", "not inferior", "margin", "p adjusted", "seeds"),
    "tokens",
)
_OF_ARMS = ("compared", "against", "measure", "difference", "verdict", "p adjusted", "seeds")


class Answer(NamedTuple):
    """A reader's question, and this study's answer as a table of text. name: a word for it."""

    name: str
    question: str
    rows: pd.DataFrame


def answers(findings: Findings) -> list[Answer]:
    """The questions of the first screen with their answers."""
    compared = findings.compared
    is_shown = (compared["relation"] == EQUAL_PARAMETERS) | _of_mpo(findings, REFERENCE)
    others = compared[compared["declared"].astype(bool) & ~is_shown]
    declared = [Answer("declared", "What else does the study file declare?", _verdicts(others))] if len(others) else []
    if len(findings.arms):
        arms = arms_compared_table(findings.arms).shown[list(_OF_ARMS)]
        declared = [Answer("arms", "Which arm is better, over all its sizes?", arms), *declared]
    return [
        Answer("run", "What was run?", _what_was_run(findings)),
        Answer("frontier", "What is on the frontier?", _on_frontier(findings)),
        Answer("controls", "Does MPO beat its controls of equal parameters?", _against_controls(findings)),
        Answer("dense", "Does it keep up with dense?", _against_dense(findings)),
        Answer("smallest", "What is the smallest that is not inferior to dense?", _smallest(findings)),
        Answer("share", "Which share of dense's accuracy does it keep?", _shares(findings)),
        *declared,
        Answer("certainty", "How sure is that?", _how_sure(findings)),
    ]


def _what_was_run(findings: Findings) -> pd.DataFrame:
    done = findings.summary[findings.summary["n_seeds"] > 0]
    return pd.DataFrame(
        [
            {
                "family": group,
                "configurations": str(len(own)),
                "parameters": range_shown(own["n_params"]),
                "seeds each": range_shown(own["n_seeds"]),
                "training tokens of a run": range_shown(own["train_tokens"]),
            }
            for group, own in done.groupby("group", sort=False)
        ]
    )


def _on_frontier(findings: Findings) -> pd.DataFrame:
    shown = frontier_table(findings.summary, findings.uncertainties).shown
    if shown.empty:
        return _only(f"none, because {NO_FRONTIER}")
    return shown[[*_FRONTIER, *(column for column in shown.columns[shown.columns.str.startswith("P(")])]]


def _against_controls(findings: Findings) -> pd.DataFrame:
    equal = findings.compared[findings.compared["relation"] == EQUAL_PARAMETERS]
    if len(equal):
        return _verdicts(equal)
    if not _mpo(findings):
        return _only("there is no MPO")
    return _only("cannot be told: no MPO and control of equal parameters, start and budget have complete seeds")


def _against_dense(findings: Findings) -> pd.DataFrame:
    summary, compared, mpo = findings.summary, findings.compared, _mpo(findings)
    tested = compared[_of_mpo(findings, REFERENCE)]
    if reference_trial(summary) is None:
        has_dense = (summary["group"] == DENSE).any()
        return _only("cannot be told: no seed of a dense model is complete" if has_dense else "there is no dense model")
    if len(tested):
        return _verdicts(tested)
    if not mpo:
        return _only("there is no MPO")
    is_complete = summary["trial"].isin(mpo) & (summary["n_seeds"] > 0) & summary["stopped"].isna()
    if not is_complete.any():
        return _only("cannot be told: no MPO has a complete seed and was not stopped early")
    return _only("no MPO has the budget of the dense model, and no contrast across budgets is declared")


def _smallest(findings: Findings) -> pd.DataFrame:
    """The smallest configuration of any family, by the tests of the pairs, which need no model of all means."""
    compared = findings.compared[findings.compared["relation"] == REFERENCE]
    if sole_reference(findings.summary).empty:
        return _only("not named: there is no dense model, or several, and the choice among them needs fresh seeds")
    rows = []
    for measure in MEASURES:
        own = compared[compared["measure"] == measure.name]
        # Not inferior to each dense model: from scratch, and trained on.
        holds = own[own.groupby("trial")["non_inferior"].transform("all").astype(bool)]
        row = {"measure": f"{measure.short} ({measure.difference_unit})", "margin": f"{own['margin'].max():g}"}
        row |= {"configuration": "none", "parameters": "–", "% of dense": "–"}
        for first in holds.sort_values(["n_params", "trial"]).head(1).to_dict("records"):
            share = digits(100 * first["n_params"] / first["against_n_params"], 0)
            row |= {"configuration": f"{first['label']} ({first['group']})"}
            row |= {"parameters": count_shown(first["n_params"]), "% of dense": share}
        if own["margin"].notna().any():
            rows.append(row)
    return pd.DataFrame(rows) if rows else _only("cannot be told: nothing was tested against a margin")


def _shares(findings: Findings) -> pd.DataFrame:
    """For each small group of MPO configurations: the share of the dense model's accuracy, with Fieller's interval."""
    summary = findings.summary
    trials = summary[(summary["family"] == "mpo") & (summary["n_seeds"] >= MIN_SEEDS)]
    few = trials.groupby("group")["trial"].transform("size") <= _MOST
    chosen = pd.concat([sole_reference(summary), trials[few]])
    points = retained_points(findings.runs, chosen, declared_against_reference(findings.compared))
    rows = []
    for row in points.dropna(subset=["low", "high"]).to_dict("records"):
        decimals = decimals_for(pd.Series([(row["high"] - row["low"]) / 2]))
        share, low, high = (digits(row[key], decimals) for key in ("ratio", "low", "high"))
        name, interval = f"{row['label']} ({row['group']})", f"{low} to {high}"
        rows.append({"configuration": name, "share (%)": share, "95 % interval": interval, "seeds": str(row["n"])})
    return pd.DataFrame(rows) if rows else _only("cannot be told, or there are too many: see the figure")


def _how_sure(findings: Findings) -> pd.DataFrame:
    runs, compared = findings.runs, findings.compared
    rows = [("runs to come", f"{runs.n_lacking}; until then nothing declared is decided")] if runs.n_lacking else []
    for growth in runs.growths:
        study = f"{growth.study}: " if runs.parts else ""
        seeds, were = "", "was" if growth.n_over == 1 else "were"
        if growth.seeds_after != growth.seeds_before:
            seeds = f", from {growth.seeds_before} to {counted(growth.seeds_after, 'seed')} a trial"
        rows.append(("grown", f"{study}when {counted(growth.n_over, 'run')} {were} over ({growth.by}{seeds})"))
    rows += _design(findings)
    pairs = compared.drop_duplicates(["trial", "against"])["declared"].astype(bool)
    when = "in the study file" if runs.growths else "before the study ran"
    n_declared, n_explored = (counted(int(own.sum()), "comparison") for own in (pairs, ~pairs))
    family = f"one family over both measures: any false claim in at most {100 * LEVEL:g} % of studies"
    declared = f"{n_declared}, {when}; {family}"
    explored = f"{n_explored} (Benjamini and Hochberg); confirm findings on fresh seeds"
    rows += [("declared", declared)] * bool(pairs.any()) + [("exploration", explored)] * bool((~pairs).any())
    is_paired = compared.loc[compared["p"].notna(), "paired"].astype(bool)
    kinds = ["paired, where both begin from the same weights"] * bool(is_paired.any())
    kinds += ["Welch's, for independent runs"] * bool((~is_paired).any())
    tested = f"95 % t intervals: {'; '.join(kinds)}"
    nothing = f"no pair has {MIN_SEEDS} seeds or more of each"
    rows.append(("intervals", tested if compared["p"].notna().any() else nothing))
    for measure in MEASURES:
        if found := _gap_found(findings, measure):
            rows.append((f"{measure.short}: gap that a contrast finds in {100 * TARGET:.0f} % of such studies", found))
    return pd.DataFrame(rows, columns=["what", "is"])


def _design(findings: Findings) -> list[tuple[str, str]]:
    """Rows on the seeds that declared tests use, if they are not simply all."""
    runs = findings.runs
    if not findings.compared["declared"].any():
        return []
    if runs.claims.looks:
        looks = "; ".join(f"after {n} seeds at level {level:g}" for n, level in runs.claims.looks.items())
        return [("looks", f"{looks}. A comparison is shown as of the look that decided it, or its last one")]
    rows = []
    if any(growth.is_of_some_trials for growth in runs.growths):
        left_out = "declared comparisons leave out the seeds that `refine` added because of results"
        rows.append(("seeds", f"{left_out}; the frontier and all means have them"))
    if any(growth.seeds_after > growth.seeds_before and growth.n_over for growth in runs.growths):
        rows.append(("caution", "seeds were added after results were known: see claims.looks in docs/study.md"))
    return rows


def _gap_found(findings: Findings, measure: Measure) -> str | None:
    """The least and the largest gap that the declared contrasts find, with these seeds and with more, or at each look.

    A contrast without a tested pair counts in the family, and has no gap.
    """
    compared = findings.compared
    declared = compared[(compared["measure"] == measure.name) & compared["declared"].astype(bool)]
    n_seeds_of = findings.summary.set_index("trial")["n_seeds"]
    contrasts, noise, n_chains = [], [], 0
    for _, own in declared.groupby(["study", "arm", "against_arm"], sort=False):
        contrasts.append(Contrast(len(own), own["against"].nunique() == 1, bool(own["paired"].all())))
        shared = 2 / own["n"]
        n, n_against = (own[name].map(n_seeds_of) for name in ("trial", "against"))
        # A pair's standard error as the standard deviation of one run, of which a difference has two.
        noise.append(
            math.sqrt((own["standard_error"] ** 2 / shared.where(own["paired"], 1 / n + 1 / n_against)).mean())
        )
        n_chains += bool(own["margin"].notna().any())
    tested = declared[declared["standard_error"].notna()]
    if not any(sd > 0 for sd in noise):
        return None
    unit = "points" if measure.unit == "%" else measure.unit

    def found(n: int, level: float) -> str:
        of_family = family_gaps(n, contrasts, n_chains, level=level)
        gaps = [(sd, gap) for sd, gap in zip(noise, of_family, strict=True) if sd > 0]
        at_size = [sd * gap.of_sizes for sd, gap in gaps]
        of_arms = [sd * gap.of_arms for sd, gap in gaps if gap.of_arms is not None]
        over = f", {_between(of_arms)} over the sizes of an arm" if of_arms else ""
        return f"with {n} seeds {_between(at_size)} {unit} at one size{over}"

    n_seeds = int(tested["n"].min())
    more = next((n for n in (5, 8, 12) if n > n_seeds), n_seeds)
    levels = findings.runs.claims.looks or {n_seeds: LEVEL, more: LEVEL}
    known = "; ".join(found(n, level) for n, level in levels.items())
    left_out = sum(not sd > 0 for sd in noise)
    return f"{known}; not known for {counted(left_out, 'contrast')}" if left_out else known


def _between(values: list[float]) -> str:
    least, largest = (f"{value:.2g}" for value in (min(values), max(values)))
    return least if least == largest else f"{least} to {largest}"


def _verdicts(compared: pd.DataFrame) -> pd.DataFrame:
    """A row for each comparison; more than `_MOST` alike that are not declared have one row with counts of verdicts."""
    table = comparisons_table(compared)
    undeclared = table.data[~table.data["declared"].astype(bool)]
    many = (undeclared.groupby(_LIKE)["trial"].transform("size") > _MOST).reindex(table.data.index, fill_value=False)
    rows = table.shown.loc[~many, list(_VERDICT)]
    counts = [
        {
            "compared": f"{len(own)} × {own['group'].iloc[0]}",
            "against": own["against_group"].iloc[0],
            "measure": table.shown.at[own.index[0], "measure"],
            "verdict": ", ".join(f"{verdict} at {n}" for verdict, n in own["verdict"].value_counts().items()),
            "not inferior": f"at {own['non_inferior'].sum()}" if own["margin"].notna().any() else "–",
        }
        for _, own in table.data[many].groupby(_LIKE, sort=False)
    ]
    rows = pd.concat([rows, pd.DataFrame(counts)], ignore_index=True).fillna("–")
    if compared["same_budget"].all():
        rows = rows.drop(columns="tokens")
    return rows.loc[:, ~(rows == "–").all()]


def _of_mpo(findings: Findings, relation: str) -> pd.Series:
    return (findings.compared["relation"] == relation) & findings.compared["trial"].isin(_mpo(findings))


def _mpo(findings: Findings) -> set[int]:
    return set(findings.summary.loc[findings.summary["family"] == "mpo", "trial"])


def _only(text: str) -> pd.DataFrame:
    return pd.DataFrame({"answer": [text]})
