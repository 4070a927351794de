"""The report's first screen in sentences: what was run, what is on the frontier, what beats what, and how surely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.comparisons import (
    BETTER,
    EQUAL_PARAMETERS,
    FAILED,
    LEVEL,
    NOT_INFERIOR,
    REFERENCE,
    TOO_FEW,
    UNDECIDED,
    WORSE,
    reference_trial,
)
from analysis.runs import StudyRuns
from analysis.selection import seed_table
from analysis.statistics.intervals import LEVEL as COVERAGE
from analysis.statistics.power import TARGET, resolved_gap, seeds_needed
from analysis.statistics.seed_blocks import MIN_SEEDS, two_way
from analysis.summary import MEASURES, VAL_LOSS, Measure, frontier_key, n_statement
from analysis.tables import decimals_for, percent, signed
from analysis.uncertainty import FrontierUncertainty


class Answer(NamedTuple):
    """A question a reader brings, and what this study says to it."""

    question: str
    sentences: list[str]


def answers(
    runs: StudyRuns,
    summary: pd.DataFrame,
    compared: pd.DataFrame,
    uncertainties: dict[str, FrontierUncertainty],
) -> list[Answer]:
    """What the first screen says.

    Args:
        compared: `comparisons.compare`.
        uncertainties: by the name of the measure.
    """
    return [
        Answer("What was run?", _what_was_run(runs, summary)),
        Answer("What is on the frontier?", [_on_frontier(summary, uncertainties, measure) for measure in MEASURES]),
        Answer("Does MPO beat its controls of equal parameters?", _against_controls(summary, compared)),
        Answer("Does it keep up with dense?", _against_dense(runs, summary, compared, uncertainties)),
        Answer("How sure is that?", _how_sure(runs, summary, compared)),
    ]


def _what_was_run(runs: StudyRuns, summary: pd.DataFrame) -> list[str]:
    done = summary[summary["n_seeds"] > 0]
    counts = done["group"].value_counts(sort=False)
    kinds = "; ".join(f"{n} {group}" for group, n in counts.items())
    tokens = done["train_tokens"].dropna()
    trained = f", {_range(tokens)} training tokens a run" if len(tokens) else ""
    sizes = f"{_range(done['n_params'])} parameters"
    return [f"{len(done)} configurations ({kinds}) of {sizes}, {n_statement(done['n_seeds'])} seeds each{trained}."]


def _on_frontier(summary: pd.DataFrame, uncertainties: dict[str, FrontierUncertainty], measure: Measure) -> str:
    on = summary[summary[frontier_key(measure)]].sort_values("n_params")
    if on.empty:
        return f"By {measure.title.lower()}: none, since no configuration has {MIN_SEEDS} complete seeds."
    support = uncertainties[measure.name].support.set_index("trial")["support"]
    named = [f"{row['label']} ({row['group']}{_supported(support, row['trial'])})" for row in on.to_dict("records")]
    shown = named if len(named) <= _MOST_NAMED else [*named[: _MOST_NAMED - 1], f"{len(named) - _MOST_NAMED + 1} more"]
    return f"By {measure.title.lower()}: {_listed(shown)}."


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
    decimals = decimals_for(rows["half_width"])
    unit = "points" if measure.unit == "%" else measure.unit
    gaps = [
        f"{row['label']} {signed(row['difference'], row['half_width'], decimals)}" for row in rows.to_dict("records")
    ]
    shown = gaps if n <= _MOST_NAMED else [*gaps[: _MOST_NAMED - 1], "…"]
    return f"{_listed(parts)} of {n} {'size' if n == 1 else 'sizes'} ({'; '.join(shown)} {unit})"


_TALLIED = {NOT_INFERIOR: UNDECIDED, TOO_FEW: "not tested (too few seeds)", FAILED: "not tested (failed seeds)"}


def _against_dense(
    runs: StudyRuns,
    summary: pd.DataFrame,
    compared: pd.DataFrame,
    uncertainties: dict[str, FrontierUncertainty],
) -> list[str]:
    reference = reference_trial(summary)
    if reference is None:
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
    for measure in MEASURES:
        unit = "points" if measure.unit == "%" else measure.unit
        own = tested[tested["measure"] == measure.name]
        margin = own["margin"].iloc[0]
        for group, rows in own.groupby("group", sort=False):
            words = f"{group}, {measure.title.lower()}: {_tally(rows, measure)}"
            if math.isfinite(margin):
                holds = rows[rows["non_inferior"]].sort_values("n_params")
                words += f"; not inferior by the margin of {margin:g} {unit}: " + (
                    _listed(list(holds["label"])) if len(holds) else "none"
                )
            if not rows["same_budget"].all():
                tokens, dense_tokens = (_range(rows[key]) for key in ("total_tokens", "against_total_tokens"))
                words += f"; their budget is another, {tokens} tokens in all against {dense_tokens}"
            said.append(f"{words}.")
        needed = uncertainties[measure.name].size_needed
        if len(needed):
            sure = needed[needed["cumulative"] >= COVERAGE]["n_params"]
            observed = int(needed.loc[needed["observed"].astype(bool), "n_params"].iloc[0])
            percent_of_dense = 100 * observed / int(summary.loc[summary["is_reference"], "n_params"].iloc[0])
            said.append(
                f"The smallest configuration of any family within {uncertainties[measure.name].epsilon:g} {unit} of "
                f"dense has {observed:,} parameters ({percent_of_dense:.0f} %) by the means; "
                f"{int(sure.iloc[0]):,} suffice in 95 % of their redraws."
            )
    return said


def _how_sure(runs: StudyRuns, summary: pd.DataFrame, compared: pd.DataFrame) -> list[str]:
    said = []
    declared = compared[compared["declared"]]
    n_declared, n_explored = (
        len(part.drop_duplicates(["trial", "against"])) for part in (declared, compared[~compared["declared"]])
    )
    if n_declared:
        said.append(
            f"{n_declared} comparisons were declared before the study ran and are adjusted together (Holm, {LEVEL:g})."
        )
    if n_explored:
        said.append(
            f"{n_explored} {'others are' if n_declared else 'comparisons were not declared: they are'} exploration, "
            f"adjusted by Benjamini and Hochberg; confirm what they find on fresh seeds."
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
            f"With {noise.n} seeds a paired test finds a true gap of {found:.2g} nats in {100 * TARGET:.0f} % of "
            f"studies; one of {gap:g} would need {_needed(gap, noise)} seeds."
        )
    return said


class SeedNoise(NamedTuple):
    """Standard deviation of one result over seeds, in the measure's unit, and the correlation of two results of one
    seed, both pooled over n seeds of the configurations that share them."""

    sd: float
    correlation: float
    n: int


def seed_noise(runs: StudyRuns, summary: pd.DataFrame, measure: Measure) -> SeedNoise | None:
    """Of the trials of the reference's budget, in the two-way model (see `statistics.seed_blocks`); None where fewer
    than two share their seeds, or nothing varies."""
    reference = reference_trial(summary)
    if reference is None:
        return None
    budget = summary.loc[summary["trial"] == reference, "budget_hash"].item()
    table = measure.scale * seed_table(summary[summary["budget_hash"] == budget], runs.seeds, measure.key)
    if len(table) < 2:
        return None
    model = two_way(table)
    variance = float(np.var(table.to_numpy(), axis=1, ddof=1).mean())
    if not variance > 0:
        return None
    # The mean variance within rows has the expectation σ_b² + σ², of which σ_b² is shared.
    correlation = 1 - float(model.residual_variance) / variance
    return SeedNoise(math.sqrt(variance), min(max(correlation, 0.0), 0.99), model.n)


def _needed(gap: float, noise: SeedNoise) -> str:
    try:
        return str(seeds_needed(gap, noise.sd, noise.correlation))
    except ValueError:
        return "over 100,000"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}"


def _range(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
