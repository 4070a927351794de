"""Selection of trials for one table of values: comparable budgets, sound trials, each with all of its seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.run_schema import MIN_SEEDS

INCOMPLETE = f"with a failed seed, stopped early or with fewer than {MIN_SEEDS} seeds"
OTHER_BUDGET = "of another budget"


@dataclass(frozen=True)
class Selection:
    """trials: rows of a summary. values: one row per trial (index) and one column per seed, in the recorded unit; NaN
    if a trial lacks the seed. left_out: a sentence on the trials that are left out; empty if none is."""

    trials: pd.DataFrame
    values: pd.DataFrame
    left_out: str


def select(trials: pd.DataFrame, seeds: pd.DataFrame, key: str) -> Selection:
    """The subset of `trials`, in their order, whose values of the seed metric `key` may be compared side by side.

    They are of the budget with the most trials; of several, the first.

    Args:
        trials: rows of `summary.summarise`.
        seeds: `StudyRuns.seeds`.
    """
    counts = trials["budget_hash"].value_counts(sort=False)
    most = counts.index[counts == counts.max()][:1]
    of_budget = trials[trials["budget_hash"].isin(most)]
    complete = of_budget[is_sound(of_budget) & (of_budget["n_seeds"] >= MIN_SEEDS)]
    table = seed_table(complete, seeds, key)
    said = left_out_statement(
        {
            OTHER_BUDGET: len(trials) - len(of_budget),
            INCOMPLETE: len(of_budget) - len(complete),
        }
    )
    return Selection(complete.reset_index(drop=True), table.loc[complete["trial"]], said)


def seeds_stated(values: pd.DataFrame) -> str:
    """Number of seeds of each trial (row) of a table, as text: `3`, or `3 to 5`."""
    counts = values.notna().sum(axis=1)
    return f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"


def is_sound(trials: pd.DataFrame) -> pd.Series:
    """Return whether a trial's mean is over all planned seeds: no seed failed, and the trial was not stopped early."""
    return (trials["n_failed"] == 0) & trials["stopped"].isna()


def seed_table(trials: pd.DataFrame, seeds: pd.DataFrame, key: str) -> pd.DataFrame:
    """A seed metric of trials (rows) by seeds (columns); NaN if a trial lacks the seed.

    The table has the sound trials with at least MIN_SEEDS seeds, each with all of its seeds.

    Args:
        trials: rows of `summary.summarise`.
        seeds: trial, seed and the metric, one row per complete seed.
    """
    chosen = trials.loc[is_sound(trials) & (trials["n_seeds"] >= MIN_SEEDS), "trial"]
    own = seeds[seeds["trial"].isin(chosen)]
    return own.pivot(index="trial", columns="seed", values=key)


def common_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """The part of a table with the seeds of most trials, and the trials that have all of these seeds.

    The table is trials × seeds, with NaN if a trial lacks a seed. The result is empty if fewer than MIN_SEEDS remain.
    Only trials that have no fewer seeds than half of all trials are searched, so that one trial with few seeds costs no
    other its own. The candidates are the seeds that all these trials share, and the seeds of each of them. The set that
    most trials have is taken; of equally many trials the larger set, then the first.
    """
    if table.empty:
        return table
    held = table.notna().to_numpy()
    counts = held.sum(axis=1)
    enough = held[counts >= np.sort(counts)[(len(counts) - 1) // 2]]
    _, first = np.unique(enough, axis=0, return_index=True)
    best = (0, 0), np.zeros(held.shape[0], dtype=np.bool_), np.zeros(held.shape[1], dtype=np.bool_)
    for own in (enough.all(axis=0), *enough[np.sort(first)]):
        members = held[:, own].all(axis=1)
        if own.sum() >= MIN_SEEDS and (members.sum(), own.sum()) > best[0]:
            best = (int(members.sum()), int(own.sum())), members, own
    return table.iloc[np.flatnonzero(best[1]), np.flatnonzero(best[2])]


def left_out_statement(counts: dict[str, int]) -> str:
    """`Left out: 2 trials with a failed seed, 1 of another budget.`, by the reason; empty if every count is 0."""
    parts = [(n, reason) for reason, n in counts.items() if n]
    if not parts:
        return ""
    (n, reason), *others = parts
    return "; ".join([f"Left out: {n} trial{'s' * (n > 1)} {reason}", *(f"{n} {reason}" for n, reason in others)]) + "."
