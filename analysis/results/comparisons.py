"""Comparisons of trials: which pairs are compared, and the tests of their differences."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
from scipy import stats

from analysis.results.pairs import DENSE, KNOWN, REFERENCE, Known, Pair, pairs
from analysis.results.summary import MEASURES, Measure
from analysis.run_schema import LEVEL
from analysis.runs.study_runs import Claims, Growth
from analysis.statistics.differences import (
    TTest,
    compatible_intervals,
    group_test,
    not_inferior,
    pair_tests,
    rounding_step,
)
from analysis.statistics.moderated import moderated_tests
from analysis.statistics.multiplicity import Graph, family, graphical, sequential

BETTER, WORSE, NOT_INFERIOR, UNDECIDED = "better", "worse", "not inferior", "undecided"
TOO_FEW, FAILED, STOPPED, UNFINISHED = "too few seeds", "failed seeds", "stopped early", "study unfinished"

COLUMNS = (
    *("measure", "study", "arm", "against_arm", "trial", "label", "group", "n_params", "total_tokens"),
    *("tuning_trials", "against", "against_label"),
    *("against_group", "against_n_params", "against_total_tokens", "against_tuning_trials", "relation", "declared"),
    *("same_budget", "n", "difference", "standard_error"),
    *("half_width", "low", "high", "p", "p_adjusted", "adjustment", "p_moderated", "margin", "non_inferior"),
    *("verdict", "paired"),
)
OF_ARMS = (
    *("measure", "study", "arm", "against_arm", "n_sizes", "n_planned", "n", "difference", "half_width", "low", "high"),
    *("p", "p_adjusted", "verdict", "paired"),
)


class Compared(NamedTuple):
    """pairs: one row per measure and pair of trials, with `COLUMNS`. arms: one row per measure and declared contrast of
    arms with several sizes, with `OF_ARMS`."""

    pairs: pd.DataFrame
    arms: pd.DataFrame


class Results(Protocol):
    """The part of `analysis.runs.study_runs.StudyRuns` that comparisons need."""

    @property
    def claims(self) -> Claims: ...
    @property
    def growths(self) -> tuple[Growth, ...]: ...
    @property
    def n_lacking(self) -> int: ...
    @property
    def seeds(self) -> pd.DataFrame: ...
    @property
    def failures(self) -> pd.DataFrame: ...


def compare(runs: Results, summary: pd.DataFrame) -> Compared:
    """Test the differences that a study is about.

    Compared are the pairs that the study file declares, of any budgets. Within one budget, each trial is also compared
    with the dense models of the reference's kind: from each of their arms, the one trained most alike. Each MPO trial
    is compared with the controls of equal parameters: from each arm, one within `pairs.EQUAL_SIZE` of its parameters,
    from the same start. A trial that starts from an arm has a reference of its own: the first dense trial of its
    budget that was trained on from the same start. Trials that were stopped early are only in declared pairs.

    Two trials that share their start are tested by the differences on shared seeds, others by Welch's test
    (`statistics.differences.pair_tests`). All that the study file declares is one family over both
    measures, with a level of .05 for any false claim (`statistics.multiplicity.family`). A contrast of arms with
    several sizes is tested on the mean over its sizes, and at each size. If it is against a reference, non-inferiority
    is tested too, by the study file's margin, from the largest χ (or, without χ, the largest model) downwards, up to
    the first that fails. A trial that is better is not inferior. Declared tests without a result count as p = 1. The
    other pairs are exploration, adjusted by Benjamini and Hochberg. While the study lacks runs, nothing declared is
    decided: the family is incomplete.

    If the study file declares looks, the family is tested at each with its level, on the first seeds of each trial
    (`statistics.multiplicity.sequential`). A test is shown as of the look that decided it, else of the last that both
    of its trials have reached. Without looks, seeds that `refine` added are left out of declared tests: they were added
    because of results.

    Returns:
        difference (trial − against), half_width (of its own 95 % interval) and margin are in the measure's unit. low
        and high are the interval of a declared difference. It excludes zero exactly if the verdict is better or worse.
        All intervals of a family hold together in at least 95 % of simulated studies (`benchmarks.calibration`).
        p_moderated is the adjusted p value of a declared pair if variances are moderated (`statistics.moderated`); no
        verdict uses it. It is missing with fewer than 7 declared pairs, and if the study file declares looks. A
        verdict claims nothing for a pair with fewer than 3 seeds, a failed seed or a trial that was stopped early, nor
        for arms with such a pair. n: seeds of the trial that has fewest, of a paired test the shared ones.
    """
    rows = summary.set_index("trial")
    known: list[Known] = _known(summary).to_dict("records")  # type: ignore[assignment]
    found = list(pairs(known, runs.claims.contrasts, runs.n_lacking > 0))
    if not found:
        return Compared(pd.DataFrame(columns=list(COLUMNS)), pd.DataFrame(columns=list(OF_ARMS)))
    frame, arms = _tested(runs, rows, found)
    _explore(frame)
    if declared := [pair for pair in found if pair.declared]:
        looks = dict(runs.claims.looks) or {0: LEVEL}
        tested = frame[frame["declared"]].reset_index(drop=True), arms
        first_seeds = [_first_seeds(runs, rows, n) for n in looks]
        by_look = [tested if first is None else _tested(runs, rows, declared, first) for first in first_seeds]
        own, arms = _decide(by_look, list(looks.values()), is_unfinished=runs.n_lacking > 0)
        frame.loc[frame["declared"], own.columns] = own.set_axis(frame.index[frame["declared"]])
    return Compared(frame[list(COLUMNS)], arms[list(OF_ARMS)])


def _tested(
    runs: Results, rows: pd.DataFrame, found: list[Pair], first: _First | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The pairs, and the declared contrasts of arms, with their own tests; nothing is decided yet.

    Args:
        first: the seeds that are used. Default: all.
    """
    measured = [_measured(runs, rows, found, measure, first) for measure in MEASURES]
    frame = pd.concat([own for own, _ in measured], ignore_index=True)
    arms = pd.DataFrame(
        [row for _, of_arms in measured for row in of_arms],
        columns=[*OF_ARMS, "df", "standard_error", "gain", "unsound", "reached"],
    )
    for table in (frame, arms):
        table["p_adjusted"], table["low"], table["high"], table["verdict"] = math.nan, math.nan, math.nan, UNDECIDED
    frame["adjustment"], frame["non_inferior"] = np.where(frame["declared"], "family", "BH"), False
    return frame, arms


class _First(NamedTuple):
    """The first seeds of each trial, by the trials' numbers: which of its complete seeds they are (trials × seeds),
    how many of them failed, and whether it has that many."""

    used: pd.DataFrame
    n_failed: pd.Series
    reached: pd.Series


def _first_seeds(runs: Results, rows: pd.DataFrame, n: int) -> _First | None:
    """The seeds that declared tests use at a look, or without looks (n = 0); None for all.

    Without looks those are the seeds that were planned for every trial, if `refine` added others.
    """
    planned = {growth.study: growth.seeds_after for growth in runs.growths}
    refined = {growth.study for growth in runs.growths if growth.is_of_some_trials}
    if not (n or refined):
        return None
    wanted = pd.Series([n or (planned[study] if study in refined else math.inf) for study in rows["study"]], rows.index)
    over = pd.concat([runs.seeds[["trial", "seed"]], runs.failures[["trial", "seed"]]], ignore_index=True)
    over["failed"] = np.arange(len(over)) >= len(runs.seeds)
    over["rank"] = over.groupby("trial")["seed"].rank().fillna(0)  # a whole trial that failed has no seed
    first = over[over["rank"] <= over["trial"].map(wanted)]
    complete = first[~first["failed"]]
    used = pd.crosstab(complete["trial"], complete["seed"]).astype(bool)
    n_failed = first.groupby("trial")["failed"].sum().reindex(rows.index, fill_value=0)
    n_over = over.groupby("trial").size().reindex(rows.index, fill_value=0)
    return _First(used, n_failed, (n_over >= wanted) | ~np.isfinite(wanted))


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


def _measured(
    runs: Results,
    rows: pd.DataFrame,
    found: list[Pair],
    measure: Measure,
    first: _First | None,
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """The pairs with their own tests, and those of declared contrasts of arms over their sizes."""
    trial, against = rows.loc[[pair.trial for pair in found]], rows.loc[[pair.against for pair in found]]
    frame = pd.DataFrame(found).assign(measure=measure.name)
    for name in ("label", "group", "n_params", "total_tokens", "tuning_trials"):
        frame[name] = trial[name].to_numpy()
        frame[f"against_{name}"] = against[name].to_numpy()
    for name in ("study", "arm"):
        frame[name], frame[f"against_{name}"] = trial[name].to_numpy(), against[name].to_numpy()
    frame["same_budget"] = trial["budget_hash"].to_numpy() == against["budget_hash"].to_numpy()
    frame["paired"] = _share_a_start(trial, against)
    frame["order"] = trial["chi"].fillna(trial["as_chi"]).fillna(trial["n_params"]).to_numpy(dtype=np.float64)
    stopped = trial["stopped"].notna().to_numpy()
    frame["unsound"] = pd.Series(None, frame.index, dtype="object").mask(stopped, STOPPED)
    n_failed = rows["n_failed"] if first is None else first.n_failed
    failed = n_failed.loc[trial.index].to_numpy() + n_failed.loc[against.index].to_numpy() > 0
    frame.loc[failed & ~stopped, "unsound"] = FAILED
    frame["reached"] = first is None or (
        first.reached.loc[trial.index].to_numpy() & first.reached.loc[against.index].to_numpy()
    )

    values = (measure.scale * runs.seeds.pivot(index="trial", columns="seed", values=measure.key)).sort_index(axis=1)
    values = values.reindex(rows.index).astype("float64")
    step = rounding_step(values)
    if first is not None:
        values = values.where(first.used.reindex(index=values.index, columns=values.columns, fill_value=False))
    at, other = (values.index.get_indexer(pd.Index(frame[name])) for name in ("trial", "against"))
    test = pair_tests(values, at, other, frame["paired"], step=step)
    sound = (frame["unsound"].isna() & frame["reached"]).to_numpy()
    frame["n"], frame["difference"] = test.n, test.difference
    frame["half_width"] = np.where(sound, test.half_width(), math.nan)
    for name in ("standard_error", "df", "p"):
        frame[name] = np.where(sound, getattr(test, name), math.nan)
    counts = values.notna().sum(axis=1).to_numpy()
    with np.errstate(divide="ignore"):
        units = np.where(frame["paired"], 2 / test.n, 1 / counts[at] + 1 / counts[other])
    declared, frame["p_moderated"] = sound & frame["declared"].to_numpy(), math.nan
    moderated = moderated_tests(test.at(declared), units[declared])
    frame.loc[declared, "p_moderated"] = moderated.p
    # The margin applies to the reference only: it is another question if a control is not much better.
    margin = measure.scale * runs.claims.margins.get(measure.name, math.nan)
    frame["margin"] = np.where(frame["relation"] == REFERENCE, margin, math.nan)
    assert measure.direction is not None
    inferior = not_inferior(test, margin, measure.direction) if margin > 0 else np.full(len(frame), math.nan)
    frame["inferiority_p"] = np.where(sound & frame["margin"].notna(), inferior, math.nan)
    frame["gain"] = frame["difference"] * (1 if measure.direction == "maximize" else -1)

    of_arms = []
    for keys, own in frame[frame["declared"]].groupby(list(_CONTRAST), sort=False):
        if len(own) == 1:
            continue
        tested = own[own["p"].notna()]
        row = dict(zip(_CONTRAST, keys, strict=True)) | {"measure": measure.name, "n_planned": len(own)}
        row["reached"] = bool(own["reached"].all())
        whole = _of_sizes(values, rows, tested, step)
        if len(tested) < len(own):  # which sizes are left may depend on their results
            whole |= {"p": math.nan, "unsound": next(iter(own["unsound"].dropna()), None)}
        gain = whole["difference"] * (1 if measure.direction == "maximize" else -1)
        of_arms.append(row | whole | {"gain": gain})
    return frame, of_arms


_CONTRAST = ("study", "arm", "against_arm")


def _of_sizes(values: pd.DataFrame, rows: pd.DataFrame, pairs: pd.DataFrame, step: float) -> dict[str, Any]:
    """The test of the mean difference over the sizes of a contrast of arms."""
    weights = pd.concat([pairs["trial"], pairs["against"]]).to_frame("trial")
    weights["weight"] = np.repeat([1.0, -1.0], len(pairs)) / max(len(pairs), 1)
    weight = weights.groupby("trial")["weight"].sum()
    blocks = _blocks(rows.loc[weight.index])
    found: dict[str, Any] = {"n_sizes": len(pairs), "paired": len(set(blocks)) == 1}
    if pairs.empty:
        return found | {"n": 0} | dict.fromkeys(("difference", "half_width", "standard_error", "df", "p"), math.nan)
    test = group_test(values.loc[weight.index], weight, blocks, step=step)
    own = {name: getattr(test, name)[0] for name in ("n", "difference", "standard_error", "df", "p")}
    return found | own | {"half_width": test.half_width()[0]}


def _blocks(trials: pd.DataFrame) -> list[int]:
    """A number for each trial, equal for those whose runs of one seed begin with the same weights, or one with
    another's result."""
    keys = list(zip(trials["study"], trials["arm"], trials["start"], strict=True))
    starts = {(study, arm): start for study, arm, start in keys}
    roots = []
    for study, arm, start in keys:
        root = arm
        while start != "scratch":
            root, start = start, starts.get((study, start), "scratch")
        roots.append((study, root) if root != arm else None)
    known = set(roots)
    names = [
        root or ((study, arm) if (study, arm) in known else trial)
        for trial, root, (study, arm, _) in zip(trials.index, roots, keys, strict=True)
    ]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]


def _share_a_start(trial: pd.DataFrame, against: pd.DataFrame) -> np.ndarray:
    """Whether the runs of one seed of two trials begin with the same weights, or one with the result of the other."""
    same = trial["start"].to_numpy() == against["start"].to_numpy()
    from_it = trial["start"].to_numpy() == against["arm"].to_numpy()
    to_it = against["start"].to_numpy() == trial["arm"].to_numpy()
    one_study = trial["study"].to_numpy() == against["study"].to_numpy()
    return one_study & ((same & (trial["start"].to_numpy() != "scratch")) | from_it | to_it)


def _explore(frame: pd.DataFrame) -> None:
    """The adjusted p values and non-inferiority of the pairs that are not declared, for each measure."""
    for _, own in frame[~frame["declared"].astype(bool)].groupby("measure"):
        for name in ("p", "inferiority_p"):
            known = own[name].dropna()
            if known.empty:
                continue
            adjusted = stats.false_discovery_control(known)
            if name == "p":
                frame.loc[known.index, "p_adjusted"] = adjusted
            else:
                frame.loc[known.index, "non_inferior"] = adjusted <= LEVEL / 2
    _judge(frame, ~frame["declared"].astype(bool))


def _decide(
    by_look: list[tuple[pd.DataFrame, pd.DataFrame]], levels: list[float], *, is_unfinished: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The declared pairs and contrasts of arms with their adjusted p values, intervals and verdicts, as one family.

    Args:
        by_look: the tests at each look; the rows are the same at all.
        levels: the level of each look.
    """
    frame, arms = by_look[0]
    contrasts = list(frame.groupby(["measure", *_CONTRAST], sort=False))
    row_of = {tuple(keys): at for at, keys in enumerate(arms[["measure", *_CONTRAST]].to_numpy().tolist())}
    chains = []
    for _, own in contrasts:
        tested = own[own["margin"].notna()]
        if len(tested):
            chains.append(tested.sort_values(["order", "n_params"], ascending=False, kind="stable").index)
    tests = family([len(own) for _, own in contrasts], [len(chain) for chain in chains])
    at_first = tests.graph.shares_of_tests()
    of_pairs, of_arms = np.zeros(len(frame), dtype=np.intp), np.zeros(len(arms), dtype=np.intp)
    for (keys, own), whole, sizes in zip(contrasts, tests.overall, tests.sizes, strict=True):
        of_pairs[own.index] = sizes
        if sizes != [whole]:
            of_arms[row_of[keys]] = whole
    p = np.full((len(by_look), len(at_first)), math.nan)
    reached = np.zeros(p.shape, dtype=np.bool_)
    for values, has, (pairs_then, arms_then) in zip(p, reached, by_look, strict=True):
        values[of_pairs], values[of_arms] = pairs_then["p"], arms_then["p"]
        has[of_pairs], has[of_arms] = pairs_then["reached"], arms_then["reached"]
        for chain, numbers in zip(chains, tests.chains, strict=True):
            values[numbers] = np.minimum(2 * pairs_then.loc[chain, "inferiority_p"], 1)
    found = sequential(np.nan_to_num(p, nan=1.0), tests.graph, levels)
    every = np.arange(len(at_first))
    level = np.array(levels)[found.look]
    is_rejected = np.array([each.adjusted for each in found.decisions])[found.look, every] <= level
    last = np.where(reached.any(axis=0), len(p) - 1 - reached[::-1].argmax(axis=0), 0)
    look = np.where(is_rejected, found.look, last)
    frame, arms = (
        _at_looks([pairs_then for pairs_then, _ in by_look], look[of_pairs]),
        _at_looks([arms_then for _, arms_then in by_look], look[of_arms]),
    )
    if is_unfinished:
        frame["verdict"] = arms["verdict"] = UNFINISHED
        return frame, arms
    for table, numbers in ((frame, of_pairs), (arms, of_arms)):
        decisions = [found.decisions[at] for at in look[numbers]]
        adjusted = np.array([each.adjusted[number] for each, number in zip(decisions, numbers, strict=True)])
        left = np.array([each.shares[number] for each, number in zip(decisions, numbers, strict=True)])
        _note(table, adjusted, np.where(left > 0, left, at_first[numbers]), np.array(levels)[look[numbers]])
    frame["p_moderated"] = _moderated(frame["p_moderated"], np.nan_to_num(p[0], nan=1.0), of_pairs, tests.graph, levels)
    for chain, numbers in zip(chains, tests.chains, strict=True):
        frame.loc[chain, "non_inferior"] = is_rejected[numbers]
    _judge(frame, np.ones(len(frame), dtype=bool))
    _judge(arms, np.ones(len(arms), dtype=bool))
    return frame, arms


def _moderated(
    p_moderated: pd.Series, p: np.ndarray, of_pairs: np.ndarray, graph: Graph, levels: list[float]
) -> np.ndarray:
    """p values of pairs with moderated variances, adjusted in the same family; all NaN if it is tested at looks."""
    known = p_moderated.notna().to_numpy()
    if len(levels) > 1 or not known.any():
        return np.full(len(known), math.nan)
    p[of_pairs[known]] = p_moderated[known]
    return np.where(known, graphical(p, graph, LEVEL).adjusted[of_pairs], math.nan)


def _at_looks(tables: list[pd.DataFrame], look: np.ndarray) -> pd.DataFrame:
    """Each row as of its look."""
    stacked = pd.concat(tables, ignore_index=True)
    return stacked.iloc[look * len(look) + np.arange(len(look))].reset_index(drop=True)


def _note(table: pd.DataFrame, adjusted: np.ndarray, shares: np.ndarray, level: np.ndarray) -> None:
    """Write adjusted p values, which are compared with `LEVEL`, and the intervals that agree with them."""
    is_known, is_rejected = table["p"].notna().to_numpy(), adjusted <= level
    scaled = adjusted * LEVEL / level
    scaled = np.where(is_rejected, np.minimum(scaled, LEVEL), np.clip(scaled, np.nextafter(LEVEL, 1), 1))
    table["p_adjusted"] = np.where(is_known, scaled, math.nan)
    difference, error, df, p = table[["difference", "standard_error", "df", "p"]].to_numpy(dtype=np.float64).T
    test = TTest(difference, error, df, p, table["n"].to_numpy())
    table["low"], table["high"] = compatible_intervals(test, adjusted, shares, level)


def _judge(frame: pd.DataFrame, which: Any) -> None:
    """Write the verdicts of some rows; better implies not inferior."""
    rows = frame[which]
    verdicts = [_verdict(row) for row in rows.to_dict("records")]
    frame.loc[rows.index, "verdict"] = verdicts
    if "non_inferior" in frame:
        better = rows.index[[verdict == BETTER for verdict in verdicts]]
        frame.loc[better[frame.loc[better, "margin"] > 0], "non_inferior"] = True


def _verdict(row: dict[Any, Any]) -> str:
    if isinstance(row.get("unsound"), str):
        return row["unsound"]
    if math.isnan(row["p"]):
        return TOO_FEW
    if row["p_adjusted"] <= LEVEL:
        return BETTER if row["gain"] > 0 else WORSE
    return NOT_INFERIOR if row.get("non_inferior") else UNDECIDED
