"""Share of the dense model's accuracy that a configuration retains."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from analysis.results.summary import VAL_ACC, sole_reference
from analysis.runs.study_runs import StudyRuns
from analysis.statistics.intervals import ratio_interval

COLUMNS = ("trial", "label", "group", "n_params", "n_failed", "n", "ratio", "low", "high")


def retained_points(runs: StudyRuns, summary: pd.DataFrame, declared: Collection[int] = ()) -> pd.DataFrame:
    """Mean final accuracy relative to that of the dense reference, over the seeds that both have completed.

    The rows are trials of the reference's budget, and those of `declared`, which the study file compares with it across
    budgets. Trials that were stopped early or share no seed are left out. Without a sole reference there are no rows.

    Columns: trial, label, group, n_params, n_failed (of either), n (shared seeds), ratio, low, high (Fieller's 95 %
    interval) in per cent. Limits are NaN below MIN_SEEDS, if the seeds do not bound the ratio, and if a seed failed,
    because its loss would flatter the seeds that are left.
    """
    accuracy = runs.seeds.set_index(["trial", "seed"])[VAL_ACC.key]
    rows = []
    for reference in sole_reference(summary).to_dict("records"):
        for row in _comparable(summary, reference, declared).to_dict("records"):
            shared = pd.concat([accuracy[row["trial"]], accuracy[reference["trial"]]], axis=1, join="inner")
            if shared.empty:
                continue
            own, dense = shared.to_numpy(dtype=np.float64).T
            found = ratio_interval(own, dense)
            n_failed = row["n_failed"] + reference["n_failed"]
            low, high = (float("nan"), float("nan")) if n_failed else (100 * float(found.low), 100 * float(found.high))
            rows.append(
                {key: row[key] for key in COLUMNS[:4]}
                | {"n_failed": n_failed, "n": found.n, "ratio": 100 * float(found.ratio), "low": low, "high": high}
            )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _comparable(summary: pd.DataFrame, reference: dict, declared: Collection[int]) -> pd.DataFrame:
    same = (summary["budget_hash"] == reference["budget_hash"]) | summary["trial"].isin(list(declared))
    done = (summary["n_seeds"] > 0) & summary["stopped"].isna()
    return summary[same & done & ~summary["is_reference"]]
