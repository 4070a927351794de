"""Learning curves, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import pandas as pd

from analysis import run_schema as schema
from analysis.errors import AnalysisError
from analysis.runs.load import PAGE, connect, experiment_id, history, search, stamp_of
from analysis.runs.study_runs import StudyRuns

_CURVES = "curves"


def load_curves(
    runs: StudyRuns, trials: Sequence[int] | None = None, keys: Sequence[str] = ("val_loss", "tokens")
) -> pd.DataFrame:
    """Learning curves of the complete seeds, one row per evaluation: trial, seed, step and one column per key (NaN if a
    seed was trained before the metric was recorded).

    It takes one request per seed and key that is not in the cache, so ask only for the trials that will be shown.
    Joined studies are each read at their own address.

    Args:
        trials: trial numbers. Default: None, for all.
        keys: curves of the schema.
    Raises:
        AnalysisError: MLflow cannot be read, or a seed has no curve of a metric on which claims rest.
    """
    seeds = runs.seeds if trials is None else runs.seeds[runs.seeds["trial"].isin(trials)]
    columns = ["trial", "seed", "step", *keys]
    if seeds.empty:
        return pd.DataFrame(columns=columns)
    histories = []
    for part in runs.parts or (runs,):
        own = seeds[seeds["run_id"].isin(part.seeds["run_id"])]
        wanted = [(run_id, key) for run_id in own["run_id"] for key in keys]
        histories.append(_histories(part, wanted))
    wide = pd.concat(histories).pivot(index=["run_id", "step"], columns="key", values="value")
    wide = wide.reindex(columns=list(keys)).reset_index()
    return seeds[["trial", "seed", "run_id"]].merge(wide, on="run_id")[columns]


def _histories(runs: StudyRuns, wanted: list[tuple[str, str]]) -> pd.DataFrame:
    """Columns run_id, key, step, value for these runs and keys, from the cache or else from MLflow."""
    empty = pd.DataFrame({"run_id": [], "key": [], "step": [], "value": []})
    empty = empty.astype({"run_id": "str", "key": "str", "step": "int64", "value": "float64"})
    kept = None if runs.cache is None else runs.cache.read([_CURVES])
    known = empty if kept is None else kept[_CURVES]
    there = set(known[["run_id", "key"]].drop_duplicates().itertuples(index=False, name=None))
    lacking = [pair for pair in wanted if pair not in there]
    if lacking:
        with connect(runs.address.tracking_uri) as client:
            new = [_history(runs, *pair, history(client, *pair)) for pair in lacking]
            known = pd.concat([known, *new], ignore_index=True).astype(empty.dtypes.to_dict())
            if runs.cache is not None:
                where, uuid = experiment_id(client, runs.address), runs.address.uuid
                stamp = stamp_of(client, where, uuid, search(client, where, schema.KIND_SUMMARY, uuid, PAGE))
                if stamp == runs.cache.stamp:
                    with suppress(OSError):
                        runs.cache.write({_CURVES: known})
    run_ids, keys = zip(*wanted, strict=True) if wanted else ((), ())
    return known[known["run_id"].isin(run_ids) & known["key"].isin(keys)]


def _history(runs: StudyRuns, run_id: str, key: str, values: dict[int, float]) -> pd.DataFrame:
    if not values and (key in schema.MARGINS or ("curve", key) not in schema.FIELDS):
        trial, seed = runs.seeds.loc[runs.seeds["run_id"] == run_id, ["trial", "seed"]].iloc[0]
        raise AnalysisError(f"run {run_id} (trial {trial}, seed {seed}) has no curve `{key}`")
    return pd.DataFrame({"run_id": run_id, "key": key, "step": list(values), "value": list(values.values())})
