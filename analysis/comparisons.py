"""Which trial is compared with which, and what the seeds that both have say of the difference."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import partial
from operator import ne
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis import run_schema as schema
from analysis.runs import StudyRuns
from analysis.selection import seed_table
from analysis.statistics.contrasts import (
    ONE_SIDED,
    block_tests,
    contrasts,
    fixed_sequence,
    headline,
    non_inferiority,
)
from analysis.statistics.multiplicity import benjamini_hochberg, holm
from analysis.statistics.seed_blocks import MIN_SEEDS
from analysis.summary import DENSE, DENSE_TUNED, MEASURES, Measure

LEVEL = 0.05
"""Of a family of tests, two-sided."""
EQUAL_SIZE = 0.05
"""A control whose parameters differ from a trial's by at most this share has equal parameters."""

REFERENCE, EQUAL_PARAMETERS, DECLARED = "reference", "equal parameters", "declared"
BETTER, WORSE, NOT_INFERIOR, UNDECIDED = "better", "worse", "not inferior", "undecided"
TOO_FEW, FAILED, STOPPED, UNFINISHED = "too few seeds", "failed seeds", "stopped early", "study unfinished"

COLUMNS = (
    *("measure", "trial", "label", "group", "n_params", "total_tokens", "tuning_trials", "against", "against_label"),
    *("against_group", "against_n_params", "against_total_tokens", "against_tuning_trials", "relation", "declared"),
    *("same_budget", "n", "difference"),
    *("half_width", "p", "p_adjusted", "adjustment", "block_half_width", "block_p", "margin", "bound", "non_inferior"),
    "verdict",
)


class Pair(NamedTuple):
    """Two trials that are compared, and why."""

    trial: int
    against: int
    relation: str
    declared: bool


def compare(runs: StudyRuns, summary: pd.DataFrame) -> pd.DataFrame:
    """The differences that a study is about, tested on the seeds that both trials have.

    Compared are the pairs that the study file declares, of any budgets; and, of one budget, each trial with the
    dense models of the reference's kind (of each of their arms the one trained most alike) and each MPO trial with the
    controls of equal parameters: of each arm, one within `EQUAL_SIZE` of its parameters, from the same start.
    What starts from a teacher has, as a reference of its own, the first dense trial of its budget that was trained
    on from the same teacher. Trials that were stopped early are in no pair that is not declared.

    Claims rest on each pair's own t test (see `statistics.contrasts.headline`). Declared pairs are one family for
    each measure, adjusted by Holm; those of them that could not be tested, even for want of any complete seed, count in
    it all the same, as p = 1. The
    others are exploration, adjusted by Benjamini and Hochberg. While the study lacks runs nothing declared is
    decided: neither is the family complete, nor has the order of tests begun where it must. Non-inferiority to the
    reference, by the study file's margin, is tested at .025 one-sided within each group and against each reference,
    from its largest χ (or, without χ, its largest model) downwards, up to the first that fails; where two are
    equally large, by Holm.

    Returns:
        One row per measure and pair, with `COLUMNS`. difference (trial − against), half_width (95 %), margin and bound
        are in the measure's unit. bound: worst difference that is not excluded. block_half_width, block_p: of the block
        model over all trials of the trial's budget that have the seeds of most; NaN where either trial has not.
        verdict: on this difference alone; of a pair with fewer than 3 shared seeds, a failed seed or a trial that was
        stopped early, nothing is said.
    """
    rows = summary.set_index("trial")
    pairs = list(_pairs(runs, summary))
    frames = [_measured(runs, rows, pairs, measure) for measure in MEASURES] if pairs else []
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))


def reference_trial(summary: pd.DataFrame) -> int | None:
    """The dense trial that others are compared with; None if the study has none."""
    trials = summary.loc[summary["is_reference"], "trial"]
    return int(trials.iloc[0]) if len(trials) else None


def declared_against_reference(compared: pd.DataFrame) -> set[int]:
    """Trials that the study file compares with the dense reference, which is from scratch, of whatever budget."""
    from_scratch = (compared["relation"] == REFERENCE) & (compared["against_group"] == DENSE)
    return set(compared.loc[from_scratch & compared["declared"].astype(bool), "trial"])


# Pairs ----------------------------------------------------------------------------------------------------------------


def _pairs(runs: StudyRuns, summary: pd.DataFrame) -> Iterator[Pair]:
    layers = summary["learning_rate"]
    embeddings = summary["embedding_learning_rate"].fillna(layers)
    compared = summary.assign(
        cap=summary["chi"].fillna(summary["as_chi"]),
        embedding_learning_rate=embeddings,
        own_embedding_rate=embeddings.where(embeddings != layers),  # one that moves with the layers' is no second one
    )
    everything: list[dict[str, Any]] = compared[list(_KNOWN)].to_dict("records")  # type: ignore[assignment]
    for trial in everything:
        trial["trained"] = tuple(str(trial[key]) for key in _TRAINED)
    over = [trial for trial in everything if pd.isna(trial["stopped"]) and trial["n_seeds"] + trial["n_failed"] > 0]
    trials = [trial for trial in over if trial["n_seeds"] > 0]  # what others can be compared with
    reference = next((trial for trial in trials if trial["is_reference"]), None)
    declared = list(_declared_pairs(runs, everything))
    yield from declared
    known = {(pair.trial, pair.against) for pair in declared}
    # What its own study sets a trial against, of whatever budget, spares it those of other studies that are joined.
    group_of = {trial["trial"]: trial["group"] for trial in everything}
    settled = {(pair.trial, group_of[pair.against]) for pair in declared if pair.relation == REFERENCE}
    trained_on = _trained_on(trials)
    budget = None if reference is None else reference["budget_hash"]
    dense = [trial for trial in trials if trial["group"] == DENSE and trial["budget_hash"] == budget]
    others: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        if trial["family"] != "mpo":
            others.setdefault(trial["budget_hash"], []).append(trial)
    by_size = {budget: _BySize(alike) for budget, alike in others.items()}
    for trial in over:
        own = []
        if trial["budget_hash"] == budget and trial is not reference:
            # Of several, tuned in the study itself, the one trained most alike: the first may be the worst of them.
            is_dense = trial["group"] == DENSE
            near = dense if is_dense else _at_home(trial, dense, (trial["trial"], DENSE) not in settled)
            own += [(rival, REFERENCE) for rival in _of_each_arm(trial, near) if rival is not trial]
        further = trained_on.get(_start_of(trial))
        if further is not None and further is not trial and (trial["trial"], DENSE_TUNED) not in settled:
            own += [(further, REFERENCE)]
        if trial["budget_hash"] in by_size:
            alike = by_size[trial["budget_hash"]].near(trial["n_params"])
            own += [(control, EQUAL_PARAMETERS) for control in _controls(trial, alike)]
        for against, relation in own:
            pair = (trial["trial"], against["trial"])
            if pair not in known and pair[::-1] not in known:
                known.add(pair)
                yield Pair(*pair, relation, declared=False)


def _declared_pairs(runs: StudyRuns, trials: list[dict[str, Any]]) -> Iterator[Pair]:
    for study, arm, rival in runs.claims.contrasts:
        own = [trial for trial in trials if trial["study"] == study]
        rivals = [trial for trial in own if trial["arm"] == rival and pd.isna(trial["stopped"])]
        reference, trained_on = _reference_of(own), _trained_on(own)
        of_cap: dict[Any, list[dict[str, Any]]] = {}
        for trial in rivals:
            if pd.notna(trial["cap"]):
                of_cap.setdefault(trial["cap"], []).append(trial)
        for trial in (trial for trial in own if trial["arm"] == arm and rivals):
            same = of_cap.get(trial["cap"], [])
            # The χ of a control is that of an MPO with the control's sites: beside one with others it says nothing.
            meant = [other for other in same if other["family"] == "mpo" or _sites(other) == _sites(trial)]
            against = _counterpart(trial, meant, rivals)
            is_equal = against["family"] != "mpo" and bool(_controls(trial, [against]))
            is_other_dense = (
                DENSE == against["group"] != trial["group"] and against["budget_hash"] == trial["budget_hash"]
            )
            is_reference = against is reference or is_other_dense or against is trained_on.get(_start_of(trial))
            if runs.n_lacking and not (same or is_equal or is_reference):
                continue  # its counterpart may be one that has not begun
            relation = REFERENCE if is_reference else EQUAL_PARAMETERS if is_equal else DECLARED
            yield Pair(trial["trial"], against["trial"], relation, declared=True)


def _reference_of(own: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The dense trial that those of one study are compared with, as `summary.summarise` chooses it."""
    return _first([trial for trial in own if trial["group"] == DENSE])


def _trained_on(trials: list[dict[str, Any]]) -> dict[tuple[Any, Any], dict[str, Any]]:
    """By where they start and their budget, the dense trials that were trained on from a teacher: of several the first,
    as a reference is chosen."""
    found: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for trial in trials:
        if trial["group"] == DENSE_TUNED and pd.isna(trial["stopped"]):
            found.setdefault(_start_of(trial), []).append(trial)
    return {start: first for start, alike in found.items() if (first := _first(alike)) is not None}


def _start_of(trial: dict[str, Any]) -> tuple[Any, Any]:
    return _teacher_of(trial), trial["budget_hash"]


def _teacher_of(trial: dict[str, Any]) -> tuple[Any, Any] | None:
    """Study and arm of the teacher; None from scratch."""
    return (trial["study"], trial["teacher"]) if trial["start"] == "teacher" else None


def _first(dense: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first with seeds enough, or else with any."""
    enough = [trial for trial in dense if trial["n_seeds"] >= MIN_SEEDS]
    some = [trial for trial in dense if trial["n_seeds"] > 0]
    return min(enough or some or dense, key=lambda trial: trial["trial"], default=None)


def _counterpart(trial: dict[str, Any], same: list[dict[str, Any]], rivals: list[dict[str, Any]]) -> dict[str, Any]:
    """That of the same χ, or else the nearest in parameters; of several the one trained most alike, then the first."""
    if same:
        return min(same, key=lambda rival: (_unlike(trial, rival), _distance(trial, rival), rival["trial"]))
    return min(rivals, key=lambda rival: (_distance(trial, rival), _unlike(trial, rival), rival["trial"]))


def _controls(trial: dict[str, Any], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each arm among trials that are no MPO, one of equal parameters from an MPO trial's start."""
    if trial["family"] != "mpo":
        return []
    families: dict[str, list[dict[str, Any]]] = {}
    for other in others:
        if _teacher_of(other) == _teacher_of(trial) and _distance(trial, other) <= math.log1p(EQUAL_SIZE):
            families.setdefault(other["family"], []).append(other)
    return [rival for family in families.values() for rival in _of_each_arm(trial, _at_home(trial, family))]


def _at_home(trial: dict[str, Any], rivals: list[dict[str, Any]], or_abroad: bool = True) -> list[dict[str, Any]]:
    """Where studies are joined, those of the trial's own; all, if it has none and others' may stand for them."""
    own = [rival for rival in rivals if rival["study"] == trial["study"]]
    return own if own or not or_abroad else rivals


def _of_each_arm(trial: dict[str, Any], rivals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each arm the one trained most like a trial, and of several the nearest to it. (Of arms and not families: what
    a study sets apart, say another init, may be the harder rival.)"""
    arms: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for rival in rivals:
        arms.setdefault((rival["study"], rival["arm"]), []).append(rival)
    return [min(arm, key=partial(_nearness, trial)) for arm in arms.values()]


class _BySize:
    """Trials in their own order, of which those near a size are found without a look at all of them."""

    def __init__(self, trials: list[dict[str, Any]]) -> None:
        self._trials = trials
        self._ascending = sorted(range(len(trials)), key=lambda at: trials[at]["n_params"])
        self._sizes = [trials[at]["n_params"] for at in self._ascending]

    def near(self, size: float) -> list[dict[str, Any]]:
        """Those within `EQUAL_SIZE` of it, and maybe some a little further away."""
        reach = 1 + 1.01 * EQUAL_SIZE
        within = slice(bisect_left(self._sizes, size / reach), bisect_right(self._sizes, size * reach))
        return [self._trials[at] for at in sorted(self._ascending[within])]


def _nearness(trial: dict[str, Any], other: dict[str, Any]) -> tuple[tuple[int, float], float]:
    return _unlike(trial, other), _distance(trial, other)


def _unlike(trial: dict[str, Any], other: dict[str, Any]) -> tuple[int, float]:
    """In how much of how they were trained, and of what an arm may list, two differ; and by how much in rates."""
    layers = trial["learning_rate"] / other["learning_rate"]
    embeddings = trial["embedding_learning_rate"] / other["embedding_learning_rate"]
    return sum(map(ne, trial["trained"], other["trained"])), abs(math.log(layers)) + abs(math.log(embeddings))


_TRAINED = (*("budget_hash", "learning_rate", "own_embedding_rate", "lr_rule", "decay", "factorisation", "n_sites"),)
_KNOWN = (
    *("trial", "study", "arm", "group", "family", "start", "teacher", "cap", "n_params", "n_seeds", "stopped"),
    *("n_failed", "is_reference", "embedding_learning_rate"),
    *_TRAINED,
)
"""What of a trial tells which pairs it is in."""


def _sites(trial: dict[str, Any]) -> tuple[str, str]:
    return str(trial["factorisation"]), str(trial["n_sites"])


def _distance(trial: dict[str, Any], other: dict[str, Any]) -> float:
    return abs(math.log(other["n_params"] / trial["n_params"]))


# Tests ----------------------------------------------------------------------------------------------------------------


def _measured(runs: StudyRuns, rows: pd.DataFrame, pairs: list[Pair], measure: Measure) -> pd.DataFrame:
    trial, against = rows.loc[[pair.trial for pair in pairs]], rows.loc[[pair.against for pair in pairs]]
    frame = pd.DataFrame(pairs).assign(measure=measure.name)
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
    # Pairs with the same seeds are one call, each a table of one row: what is found has the shape (pairs, 1).
    alike = pd.Series(list(map(bytes, np.packbits(shared, axis=1))), frame.index)
    for _, group in frame[frame["n"] > 0].groupby(alike):
        own = values.loc[:, shared[group.index[0]]]
        found = contrasts(own.loc[group["trial"]].to_numpy()[:, None], own.loc[group["against"]].to_numpy())
        test = headline(found)
        frame.loc[group.index, "difference"] = found.difference[:, 0]
        if found.n < MIN_SEEDS:
            continue
        frame.loc[group.index, "half_width"], frame.loc[group.index, "p"] = test.half_width[:, 0], test.p[:, 0]
        if margin > 0:
            result = non_inferiority(found.difference, test, margin, direction)
            frame.loc[group.index, "bound"] = result.bound[:, 0]
            frame.loc[group.index, "inferiority_p"] = result.p[:, 0]
    frame.loc[failed, ["half_width", "p", "bound", "inferiority_p"]] = math.nan
    # A margin is one against the reference: that a control is not much better is another question.
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
        planned = p[declared]  # those without a result count as planned
        adjusted[declared] = np.where(np.isnan(planned), math.nan, holm(np.nan_to_num(planned, nan=1.0)))
    adjusted[~declared] = benjamini_hochberg(p[~declared])
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
