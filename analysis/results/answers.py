"""The report's first screen in sentences: what was run, what is on the frontier, what beats what, and how certain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.results.comparisons import (
    BETTER,
    FAILED,
    LEVEL,
    NOT_INFERIOR,
    STOPPED,
    TOO_FEW,
    UNDECIDED,
    UNFINISHED,
    WORSE,
    declared_against_reference,
    reference_trial,
)
from analysis.results.numbers import counted, decimals_for, difference_shown, percent, range_shown
from analysis.results.pairs import EQUAL_PARAMETERS, REFERENCE
from analysis.results.retained import retained_points
from analysis.results.selection import seed_table
from analysis.results.summary import (
    DENSE,
    DENSE_TUNED,
    MEASURES,
    NO_FRONTIER,
    VAL_LOSS,
    Measure,
    frontier_key,
    n_statement,
    sole_reference,
)
from analysis.results.uncertainty import FrontierUncertainty
from analysis.runs.study_runs import Growth, StudyRuns
from analysis.statistics.power import TARGET, resolved_gap, seeds_needed
from analysis.statistics.seed_blocks import MIN_SEEDS, is_complete, two_way, uneven_two_way


class Answer(NamedTuple):
    """A reader's question, and this study's answer. name: a word for it."""

    name: str
    question: str
    sentences: list[str]


def answers(
    runs: StudyRuns,
    summary: pd.DataFrame,
    compared: pd.DataFrame,
    uncertainties: dict[str, FrontierUncertainty],
) -> list[Answer]:
    """Answers on the first screen.

    Args:
        compared: `comparisons.compare`.
        uncertainties: uncertainty of each frontier, by the name of the measure.
    """
    return [
        Answer("run", "What was run?", _what_was_run(runs, summary)),
        Answer(
            "frontier",
            "What is on the frontier?",
            [_on_frontier(runs, summary, uncertainties, measure) for measure in MEASURES],
        ),
        Answer("controls", "Does MPO beat its controls of equal parameters?", _against_controls(summary, compared)),
        Answer(
            "dense",
            "Does it keep up with dense?",
            [*_against_dense(summary, compared), *retained_shares(runs, summary, compared)],
        ),
        Answer("certainty", "How sure is that?", _how_sure(runs, summary, compared)),
    ]


def _what_was_run(runs: StudyRuns, summary: pd.DataFrame) -> list[str]:
    done = summary[summary["n_seeds"] > 0]
    counts = done["group"].value_counts(sort=False)
    kinds = "; ".join(f"{n} {group}" for group, n in counts.items())
    tokens = done["train_tokens"].dropna()
    trained = f", {range_shown(tokens)} training tokens a run" if len(tokens) else ""
    sizes = f"{range_shown(done['n_params'])} parameters"
    one = done["n_seeds"].max() == 1
    each = f"{n_statement(done['n_seeds'])} {'seed' if one else 'seeds'} each"
    return [f"{counted(len(done), 'configuration')} ({kinds}) of {sizes}, {each}{trained}."]


def _on_frontier(
    runs: StudyRuns, summary: pd.DataFrame, uncertainties: dict[str, FrontierUncertainty], measure: Measure
) -> str:
    by = f"{'So far, by' if runs.n_lacking else 'By'} {measure.title.lower()}"
    on = summary.loc[summary[frontier_key(measure)], ["label", "group", "trial", "n_params"]].sort_values("n_params")
    if on.empty:
        return f"{by}: none, since {NO_FRONTIER}."
    support = uncertainties[measure.name].support.set_index("trial")["support"]
    named = [f"{row['label']} ({row['group']}{_supported(support, row['trial'])})" for row in on.to_dict("records")]
    shown = named if len(named) <= _MOST_NAMED else [*named[: _MOST_NAMED - 1], f"{len(named) - _MOST_NAMED + 1} more"]
    return f"{by}: {_listed(shown)}."


_MOST_NAMED = 8


def _supported(support: pd.Series, trial: int) -> str:
    return f", support {percent(support[trial])}" if trial in support.index else ""


def _against_controls(summary: pd.DataFrame, compared: pd.DataFrame) -> list[str]:
    equal = compared[compared["relation"] == EQUAL_PARAMETERS]
    if equal.empty:
        if not (summary["family"] == "mpo").any():
            return ["There is no MPO in this study."]
        return [
            "No MPO and control of equal parameters, start and budget have complete seeds, so this study cannot say."
        ]
    said = []
    for measure in MEASURES:
        own = equal[equal["measure"] == measure.name]
        for (start, rival), rows in own.groupby(["group", "against_group"], sort=False):
            said.append(f"{start} against {rival}, {measure.title.lower()}: {_tally(rows, measure)}.")
    return said


def _tally(rows: pd.DataFrame, measure: Measure) -> str:
    verdicts = rows["verdict"].replace(_TALLIED)
    n = len(rows)
    words = (BETTER, WORSE, UNDECIDED, *_TALLIED.values())
    parts = [f"{word} at {(verdicts == word).sum()}" for word in dict.fromkeys(words) if (verdicts == word).any()]
    several = bool(rows["trial"].duplicated().any())  # rivals of one trial
    kind = "comparison" if several else "size" if rows["n_params"].nunique() == n else "configuration"
    known = rows.dropna(subset=["difference"])
    n_shown = len(known) if len(known) <= _MOST_NAMED else _MOST_NAMED - 1
    shown = [
        f"{row['label']}{' against ' + row['against_label'] if several else ''} {difference_shown(row)}"
        for row in known.head(n_shown).to_dict("records")
    ]
    shown += ["…"] * (len(known) > n_shown)
    differences = f" ({'; '.join(shown)} {measure.difference_unit})" if shown else ""
    return f"{_listed(parts)} of {counted(n, kind)}{differences}"


_TALLIED = {
    NOT_INFERIOR: UNDECIDED,
    **{verdict: f"not tested ({verdict})" for verdict in (TOO_FEW, FAILED, STOPPED)},
    UNFINISHED: "not decided yet",
}


def _against_dense(summary: pd.DataFrame, compared: pd.DataFrame) -> list[str]:
    reference = reference_trial(summary)
    if reference is None:
        if (summary["group"] == DENSE).any():
            return ["No seed of a dense model is complete, so this study cannot say."]
        return ["There is no dense model in this study."]
    mpo = set(summary.loc[summary["family"] == "mpo", "trial"])
    tested = compared[(compared["relation"] == REFERENCE) & compared["trial"].isin(mpo)]
    if tested.empty:
        with_seeds = summary[summary["trial"].isin(mpo) & (summary["n_seeds"] > 0) & summary["stopped"].isna()]
        if not mpo:
            return ["There is no MPO in this study."]
        if with_seeds.empty:
            return ["No MPO has a complete seed and was not given up, so this study cannot say."]
        return ["No MPO has the budget of the dense model, and the study file declares no contrast across budgets."]
    said = []
    several = sole_reference(summary).empty
    for measure in MEASURES:
        unit = measure.difference_unit
        own = tested[tested["measure"] == measure.name]
        margin = own["margin"].iloc[0]
        for (group, rival), rows in own.groupby(["group", "against_group"], sort=False):
            against = f" against {rival}" if DENSE_TUNED in set(own["against_group"]) else ""
            words = f"{group}{against}, {measure.title.lower()}: {_tally(rows, measure)}"
            if math.isfinite(margin) and rows["p_adjusted"].notna().any():
                holds = rows[rows.groupby("trial")["non_inferior"].transform("all")].drop_duplicates("trial")
                holds = holds.sort_values("n_params", kind="stable")
                words += f"; not inferior by the margin of {margin:g} {unit}, tested from the largest downwards: " + (
                    _listed(list(holds["label"])) if len(holds) else "none"
                )
            if not rows["same_budget"].all():
                tokens, dense_tokens = (range_shown(rows[key]) for key in ("total_tokens", "against_total_tokens"))
                words += f"; their budget is another, {tokens} tokens in all against {dense_tokens}"
            said.append(f"{words}.")
        said.append("" if several else _smallest(compared, measure))
    if several:
        said.append(
            "Several dense models were tried, and each MPO is set against the one of each arm that was trained most "
            "like it; so no smallest configuration is named: what is chosen among several is to be measured on fresh "
            "seeds first."
        )
    return [sentence for sentence in said if sentence]


def retained_shares(runs: StudyRuns, summary: pd.DataFrame, compared: pd.DataFrame) -> list[str]:
    """A sentence on each small group of MPO configurations: the share of the dense model's accuracy."""
    trials = summary[(summary["family"] == "mpo") & (summary["n_seeds"] >= MIN_SEEDS)]
    few = trials.groupby("group")["trial"].transform("size") <= _MOST_NAMED
    chosen = pd.concat([sole_reference(summary), trials[few]])
    points = retained_points(runs, chosen, declared_against_reference(compared)).dropna(subset=["low", "high"])
    return [
        f"{group}, share of the dense model's accuracy: "
        + "; ".join(f"{row['label']} {_share(row)}" for row in rows.to_dict("records"))
        + " (Fieller's 95 % intervals)."
        for group, rows in points.groupby("group", sort=False)
    ]


def _share(row: dict[Any, Any]) -> str:
    decimals = decimals_for(pd.Series([(row["high"] - row["low"]) / 2]))
    return f"{row['ratio']:.{decimals}f} % ({row['low']:.{decimals}f} to {row['high']:.{decimals}f})"


def _smallest(compared: pd.DataFrame, measure: Measure) -> str:
    """The smallest configuration of any family, by the paired tests, because redraws assume one noise for all."""
    own = compared[(compared["relation"] == REFERENCE) & (compared["measure"] == measure.name)]
    if own["margin"].isna().all():
        return ""
    margin = f"the margin of {own['margin'].max():g} {measure.difference_unit}"
    against_all = own.groupby("trial")["non_inferior"].transform("all")  # dense from scratch, dense trained on
    holds = own[against_all].sort_values(["n_params", "trial"])
    if holds.empty:
        return f"No configuration of any family is shown to lose less {measure.short} than {margin}."
    row = holds.iloc[0]
    share = 100 * row["n_params"] / row["against_n_params"]
    return (
        f"The smallest configuration that is shown to lose less {measure.short} than {margin}, each family tested by "
        f"itself, is {row['label']} ({row['group']}): {row['n_params']:,} parameters, {share:.0f} % of dense."
    )


def _how_sure(runs: StudyRuns, summary: pd.DataFrame, compared: pd.DataFrame) -> list[str]:
    said = []
    lacking = runs.n_lacking
    if lacking:
        said.append(
            f"The study is not finished: {counted(lacking, 'run')} to come. Until then nothing that was declared is "
            "decided."
        )
    is_declared = compared["declared"].astype(bool)
    n_declared, n_explored = (
        len(part.drop_duplicates(["trial", "against"])) for part in (compared[is_declared], compared[~is_declared])
    )
    if n_declared and not lacking:
        were = "was" if n_declared == 1 else "were"
        when = "by the study file" if runs.growths else "before the study ran"
        said.append(
            f"{counted(n_declared, 'comparison')} {were} declared {when}, a family for each measure (Holm, {LEVEL:g})."
        )
    said += [_grew(growth, is_one=len(runs.parts) < 2) for growth in runs.growths]
    if n_explored:
        are = "is" if n_explored == 1 else "are"
        said.append(
            f"{counted(n_explored, 'comparison')} {are} exploration, adjusted by Benjamini and Hochberg; confirm on "
            "fresh seeds what they find."
        )
    if compared["p"].notna().any():
        said.append("Each rests on the paired differences of its own seeds (t interval, 95 %).")
    else:
        said.append(f"Nothing was compared on {MIN_SEEDS} seeds or more.")
    noise = seed_noise(runs, summary, VAL_LOSS)
    if noise is not None:
        gap = runs.claims.margins.get(VAL_LOSS.name, VAL_LOSS.margin)
        found = resolved_gap(noise.n, noise.sd, noise.correlation)
        said.append(
            f"With {noise.n} seeds a single paired test finds a true gap of {found:.2g} nats in {100 * TARGET:.0f} % "
            f"of studies, by the noise of all configurations; one of {gap:g} would need {_needed(gap, noise)} seeds."
        )
    return said


def _grew(growth: Growth, is_one: bool) -> str:
    """One sentence on the results that were there before more runs were added."""
    seeds = ""
    if growth.seeds_after != growth.seeds_before:
        seeds = f", from {growth.seeds_before} to {counted(growth.seeds_after, 'seed')} a trial"
    return (
        f"{'The study' if is_one else f'Study {growth.study}'} grew when {counted(growth.n_over, 'run')} of it "
        f"{'was' if growth.n_over == 1 else 'were'} over ({growth.by}{seeds})."
    )


class SeedNoise(NamedTuple):
    """Standard deviation of one result over seeds, in the measure's unit, and correlation of two results of one seed.
    Both are pooled over configurations, each of which has at least n seeds."""

    sd: float
    correlation: float
    n: int


def seed_noise(runs: StudyRuns, summary: pd.DataFrame, measure: Measure) -> SeedNoise | None:
    """Noise of the trials of the reference's budget, in the two-way model (see `statistics.seed_blocks`). None if fewer
    than two have enough seeds, or nothing varies."""
    reference = reference_trial(summary)
    if reference is None:
        return None
    budget = summary.loc[summary["trial"] == reference, "budget_hash"].item()
    table = measure.scale * seed_table(summary[summary["budget_hash"] == budget], runs.seeds, measure.key)
    if len(table) < 2:
        return None
    if is_complete(table):
        residual = float(two_way(table).residual_variance)
        variance = float(np.var(table.to_numpy(), axis=1, ddof=1).mean())
    else:
        model = uneven_two_way(table)
        residual, variance = model.residual_variance, model.variance
    if not variance > 0:
        return None
    # The mean variance within rows has the expectation σ_b² + σ²; the part σ_b² is shared.
    correlation = 1 - residual / variance
    n = int(table.notna().sum(axis=1).min())
    return SeedNoise(math.sqrt(variance), min(max(correlation, 0.0), 0.99), n)


def _needed(gap: float, noise: SeedNoise) -> str:
    try:
        return str(seeds_needed(gap, noise.sd, noise.correlation))
    except ValueError:
        return "over 100,000"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}"
