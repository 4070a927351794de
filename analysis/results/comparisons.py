"""Comparisons of trials: which pairs are compared, and the difference on the seeds that both have."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis import run_schema as schema
from analysis.results.pairs import DENSE, KNOWN, REFERENCE, Known, Pair, pairs
from analysis.results.selection import seed_table
from analysis.results.summary import MEASURES, Measure
from analysis.runs.study_runs import StudyRuns
from analysis.statistics.contrasts import (
    ONE_SIDED,
    block_tests,
    contrasts,
    fixed_sequence,
    non_inferiority,
)
from analysis.statistics.multiplicity import holm
from analysis.statistics.seed_blocks import MIN_SEEDS

LEVEL = 0.05
"""Level of a family of tests, two-sided."""

BETTER, WORSE, NOT_INFERIOR, UNDECIDED = "better", "worse", "not inferior", "undecided"
TOO_FEW, FAILED, STOPPED, UNFINISHED = "too few seeds", "failed seeds", "stopped early", "study unfinished"

COLUMNS = (
    *("measure", "trial", "label", "group", "n_params", "total_tokens", "tuning_trials", "against", "against_label"),
    *("against_group", "against_n_params", "against_total_tokens", "against_tuning_trials", "relation", "declared"),
    *("same_budget", "n", "difference"),
    *("half_width", "p", "p_adjusted", "adjustment", "block_half_width", "block_p", "margin", "bound", "non_inferior"),
    "verdict",
)


def compare(runs: StudyRuns, summary: pd.DataFrame) -> pd.DataFrame:
    """Test the differences that a study is about, on the seeds that both trials have.

    Compared are the pairs that the study file declares, of any budgets. Within one budget, each trial is also compared
    with the dense models of the reference's kind: from each of their arms, the one trained most alike. Each MPO trial
    is compared with the controls of equal parameters: from each arm, one within `pairs.EQUAL_SIZE` of its parameters,
    from the same start. A trial that starts from an arm has a reference of its own: the first dense trial of its
    budget that was trained on from the same start. Trials that were stopped early are only in declared pairs.

    Claims rest on each pair's own t test (see `statistics.contrasts.contrasts`). For each measure, the declared pairs
    are one family, adjusted by Holm. A declared pair that could not be tested, even because it has no complete seed,
    counts in the family as p = 1. The other pairs are exploration, adjusted by Benjamini and Hochberg. While the study
    lacks runs, nothing declared is decided: the family is incomplete, and the order of tests has not begun where it
    must. Non-inferiority to the reference, by the study file's margin, is tested at .025 one-sided, within each group
    and against each reference. The tests go from the largest χ (or, without χ, the largest model) downwards, up to the
    first that fails. If two are equally large, Holm is used.

    Returns:
        One row per measure and pair, with `COLUMNS`. difference (trial − against), half_width (95 %), margin and bound
        are in the measure's unit. bound: worst difference that is not excluded. block_half_width, block_p: from the
        block model over all trials of the trial's budget that have the seeds of most; NaN if either trial lacks them.
        verdict: on this difference alone; it claims nothing for a pair with fewer than 3 shared seeds, a failed seed or
        a trial that was stopped early.
    """
    rows = summary.set_index("trial")
    known: list[Known] = _known(summary).to_dict("records")  # type: ignore[assignment]
    found = list(pairs(known, runs.claims.contrasts, runs.n_lacking > 0))
    frames = [_measured(runs, rows, found, measure) for measure in MEASURES] if found else []
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))


def reference_trial(summary: pd.DataFrame) -> int | None:
    """The dense trial with which others are compared; None if the study has none."""
    trials = summary.loc[summary["is_reference"], "trial"]
    return int(trials.iloc[0]) if len(trials) else None


def declared_against_reference(compared: pd.DataFrame) -> set[int]:
    """Trials of any budget that the study file compares with the dense reference, which is from scratch."""
    from_scratch = (compared["relation"] == REFERENCE) & (compared["against_group"] == DENSE)
    return set(compared.loc[from_scratch & compared["declared"].astype(bool), "trial"])


def _known(summary: pd.DataFrame) -> pd.DataFrame:
    known = summary[list(KNOWN)].astype("object")
    return known.where(known.notna(), None)


# Tests ----------------------------------------------------------------------------------------------------------------


def _measured(runs: StudyRuns, rows: pd.DataFrame, paired: list[Pair], measure: Measure) -> pd.DataFrame:
    trial, against = rows.loc[[pair.trial for pair in paired]], rows.loc[[pair.against for pair in paired]]
    frame = pd.DataFrame(paired).assign(measure=measure.name)
    for name in ("label", "group", "n_params", "total_tokens", "tuning_trials"):
        frame[name] = trial[name].to_numpy()
        frame[f"against_{name}"] = against[name].to_numpy()
    frame["same_budget"] = trial["budget_hash"].to_numpy() == against["budget_hash"].to_numpy()
    values = (measure.scale * runs.seeds.pivot(index="trial", columns="seed", values=measure.key)).sort_index(axis=1)
    values = values.reindex(rows.index).astype("float64")
    stopped = trial["stopped"].notna().to_numpy()
    failed = stopped | (trial["n_failed"].to_numpy() + against["n_failed"].to_numpy() > 0)
    is_unfinished = runs.n_lacking > 0
    margin = measure.scale * runs.claims.margins.get(measure.name, math.nan)
    _add_pair_tests(frame, values, margin, measure.direction, failed)
    _add_block_tests(frame, rows, values, failed)
    _adjust(frame, is_unfinished)
    frame["study"], frame["arm"] = trial["study"].to_numpy(), trial["arm"].to_numpy()
    frame["order"] = trial["chi"].fillna(trial["as_chi"]).fillna(trial["n_params"]).to_numpy(dtype=np.float64)
    frame["non_inferior"] = np.zeros(len(frame), dtype=bool) if is_unfinished else _non_inferior(frame)
    frame["verdict"] = [
        STOPPED if is_stopped else FAILED if is_failed else _verdict(row, measure.direction)
        for row, is_failed, is_stopped in zip(frame[list(_JUDGED)].to_dict("records"), failed, stopped, strict=True)
    ]
    return frame[list(COLUMNS)]


def _add_pair_tests(
    frame: pd.DataFrame, values: pd.DataFrame, margin: float, direction: schema.Direction | None, failed: np.ndarray
) -> None:
    assert direction is not None
    for column in ("difference", "half_width", "p", "bound", "inferiority_p"):
        frame[column] = math.nan
    has = values.notna()
    shared = (has.loc[frame["trial"]].to_numpy() & has.loc[frame["against"]].to_numpy()).astype(bool)
    frame["n"] = shared.sum(axis=1)
    # Pairs with the same seeds are tested in one call, each as a table of one row: the result has the shape (pairs, 1).
    alike = pd.Series(list(map(bytes, np.packbits(shared, axis=1))), frame.index)
    for _, group in frame[frame["n"] > 0].groupby(alike):
        own = values.loc[:, shared[group.index[0]]]
        found = contrasts(own.loc[group["trial"]].to_numpy()[:, None], own.loc[group["against"]].to_numpy())
        frame.loc[group.index, "difference"] = found.difference[:, 0]
        if found.n < MIN_SEEDS:
            continue
        frame.loc[group.index, "half_width"], frame.loc[group.index, "p"] = (
            found.pair.half_width[:, 0],
            found.pair.p[:, 0],
        )
        if margin > 0:
            result = non_inferiority(found.difference, found.pair, margin, direction)
            frame.loc[group.index, "bound"] = result.bound[:, 0]
            frame.loc[group.index, "inferiority_p"] = result.p[:, 0]
    frame.loc[failed, ["half_width", "p", "bound", "inferiority_p"]] = math.nan
    # The margin applies to the reference only: it is another question if a control is not much better.
    frame["margin"] = np.where(frame["relation"] == REFERENCE, margin, math.nan)
    frame.loc[frame["relation"] != REFERENCE, ["bound", "inferiority_p"]] = math.nan


def _add_block_tests(frame: pd.DataFrame, rows: pd.DataFrame, values: pd.DataFrame, failed: np.ndarray) -> None:
    frame["block_half_width"] = frame["block_p"] = math.nan
    seeds = values.melt(var_name="seed", value_name="value", ignore_index=False).dropna().reset_index()
    reference = rows.index[rows["is_reference"]]
    budgets = rows["budget_hash"].reindex(frame["trial"]).to_numpy()
    for budget, group in frame[~failed].groupby(budgets[~failed]):
        inside = rows.index[rows["budget_hash"] == budget].union(reference).union(pd.Index(group["against"]))
        table = seed_table(rows.loc[inside].reset_index(), seeds, "value")
        group = group[group["trial"].isin(table.index) & group["against"].isin(table.index)]
        if group.empty:
            continue
        at, against = (table.index.get_indexer(pd.Index(group[name])) for name in ("trial", "against"))
        block = block_tests(table.to_numpy(), at, against)
        frame.loc[group.index, "block_half_width"], frame.loc[group.index, "block_p"] = block.half_width, block.p


def _adjust(frame: pd.DataFrame, is_unfinished: bool) -> None:
    declared = frame["declared"].to_numpy(dtype=bool)
    frame["adjustment"] = np.where(declared, "Holm", "BH")
    p = frame["p"].to_numpy(dtype=np.float64)
    adjusted = np.full(p.shape, math.nan)
    if not is_unfinished:
        planned = p[declared]  # pairs without a result count as planned tests
        adjusted[declared] = np.where(np.isnan(planned), math.nan, holm(np.nan_to_num(planned, nan=1.0)))
    explored = ~declared & ~np.isnan(p)
    if explored.any():
        adjusted[explored] = stats.false_discovery_control(p[explored])
    frame["p_adjusted"] = adjusted


def _non_inferior(frame: pd.DataFrame) -> np.ndarray:
    holds = np.zeros(len(frame), dtype=bool)
    tested = frame[frame["relation"] == REFERENCE]
    for _, arm in tested.groupby(["study", "group", "against"]):
        at, p, order = arm.index.to_numpy(), arm["inferiority_p"].to_numpy(), arm["order"].to_numpy()
        if np.unique(order).size == order.size:
            holds[at] = fixed_sequence(p, order)
        else:
            holds[at] = holm(np.nan_to_num(p, nan=1.0)) < ONE_SIDED
    return holds


_JUDGED = ("p", "p_adjusted", "difference", "non_inferior")


def _verdict(row: dict[Any, Any], direction: schema.Direction) -> str:
    if math.isnan(row["p"]):
        return TOO_FEW
    if math.isnan(row["p_adjusted"]):
        return UNFINISHED
    if row["p_adjusted"] < LEVEL:
        return BETTER if (row["difference"] > 0) == (direction == "maximize") else WORSE
    return NOT_INFERIOR if row["non_inferior"] else UNDECIDED
