"""Runs as the tracking server holds them, and the frames made from them: each value typed by the schema."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis import run_schema as schema
from analysis.errors import AnalysisError

OPTIONAL_PARAMS = (
    *("seed", "chi", "as_chi", "n_sites", "factorisation", "init", "refinement", "lr_rule", "decay"),
    *("gauge", "forward", "sites", "largest_bond", "tuned_among", "embedding_learning_rate"),
    *("model_sha256", "d_model", "n_heads", "n_layers", "d_ff", "keep", "metric", "spread", "narrow", "layers"),
    *("resized", "heal", "options", "bonds", "sweep", "ema", "rate_width"),
)
"""Params without meaning for some family, model or kind of run; every run must have every other param of the schema."""
MEND = "`mpo-study sync DIR` writes it again from the study's ledger"
"""Advice for messages: how to repair a run that is not as a study writes it."""
OVER = ("FINISHED", "FAILED")
_DTYPES = {int: "Int64", float: "float64", str: "str"}


@dataclass(frozen=True)
class RunRecord:
    """One run as the tracking server holds it: params and tags are strings, metrics the last logged values."""

    run_id: str
    status: str
    end_time: int | None
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]

    def __str__(self) -> str:
        if self.tags.get(schema.KIND) == schema.KIND_SUMMARY:
            return f"run {self.run_id} (the study's summary)"
        seed = f", seed {self.params['seed']}" if "seed" in self.params else ""
        return f"run {self.run_id} (trial {self.params.get('trial', 'unknown')}{seed})"


def tag_of(run: RunRecord, key: str) -> str:
    if key not in run.tags:
        raise AnalysisError(f"{run} has no tag `{key}`; {MEND}")
    return run.tags[key]


def param_of(run: RunRecord, key: str) -> Any:
    """The param with the schema's type, or what its absence stands for; None if it has no meaning."""
    dtype = schema.FIELDS["param", key].dtype
    text = run.params.get(key)
    if text is None:
        if key in schema.ABSENT:
            return schema.ABSENT[key]
        if key in OPTIONAL_PARAMS:
            return None
        raise AnalysisError(f"{run} has no param `{key}`; {MEND}")
    try:
        return dtype(text)
    except ValueError as error:
        raise AnalysisError(f"{run}: param `{key}` must be {dtype.__name__}, but is {text!r}; {MEND}") from error


def metric_of(run: RunRecord, kind: str, key: str, required: bool) -> float | int | None:
    dtype = schema.FIELDS[kind, key].dtype
    value = run.metrics.get(key)
    if value is None:
        if required:
            raise AnalysisError(f"{run} is complete but has no metric `{key}`; {MEND}")
        return None
    # MLflow stores an infinity as the largest float.
    if required and not abs(value) < 1e308:
        raise AnalysisError(f"{run} is complete but its metric `{key}` is {value:.3g}; {MEND}")
    if dtype is int:
        if not math.isfinite(value) or value != int(value):
            raise AnalysisError(f"{run}: metric `{key}` must be a whole number, but is {value}; {MEND}")
        return int(value)
    return value


def _frame(rows: list[dict[str, Any]], dtypes: dict[str, str]) -> pd.DataFrame:
    """Rows sorted by their first columns; the dtypes hold for an empty frame too."""
    frame = pd.DataFrame(rows, columns=list(dtypes)).astype(dtypes)
    keys = [key for key in ("trial", "seed", "when", "chi", "layer") if key in dtypes]
    return frame.sort_values(keys, kind="stable", ignore_index=True)


def _names(run: RunRecord) -> dict[str, Any]:
    return {key: param_of(run, key) for key in ("trial", "arm", "seed")}


def trials_frame(trial_runs: list[RunRecord], seed_runs: dict[str, list[RunRecord]]) -> pd.DataFrame:
    """The frame of trials. `seed_runs`: seed runs by the name of the column that counts them."""
    fields = [field for field in schema.PARAMS if field.key != "seed"]
    counts = {column: Counter(param_of(run, "trial") for run in runs) for column, runs in seed_runs.items()}
    rows = []
    for run in trial_runs:
        row = {field.key: param_of(run, field.key) for field in fields}
        row |= {column: count[row["trial"]] for column, count in counts.items()}
        for field in schema.COUNTS:
            required = row["n_seeds"] > 0 and field.key not in schema.NEWER_COUNTS
            row[field.key] = metric_of(run, "count", field.key, required=required)
        row |= {"run_id": run.run_id, "stopped": run.tags.get(schema.STOPPED), "study": tag_of(run, schema.STUDY_NAME)}
        rows.append(row | {"validation_fraction": _validation_fraction(run)})
    dtypes = {field.key: _DTYPES[field.dtype] for field in (*fields, *schema.COUNTS)}
    dtypes |= dict.fromkeys(("trial", *counts), "int64") | dict.fromkeys(("run_id", "stopped", "study"), "str")
    return _frame(rows, dtypes | {"validation_fraction": "float64"})


def _validation_fraction(run: RunRecord) -> float:
    text = tag_of(run, schema.VALIDATION_FRACTION)
    try:
        return float(text)
    except ValueError:
        raise AnalysisError(
            f"{run}: tag `{schema.VALIDATION_FRACTION}` must be a number, but is {text!r}; {MEND}"
        ) from None


def seeds_frame(runs: list[RunRecord]) -> pd.DataFrame:
    rows = [
        {"trial": param_of(run, "trial"), "seed": param_of(run, "seed"), "run_id": run.run_id}
        | {
            field.key: metric_of(run, "final", field.key, required=field.key in schema.CLAIMED)
            for field in schema.FINALS
        }
        | {tag: tag_of(run, tag) for tag in schema.RAN_ON}
        for run in runs
    ]
    finals = {field.key: _DTYPES[field.dtype] for field in schema.FINALS}
    ran_on = dict.fromkeys(schema.RAN_ON, "str")
    return _frame(rows, {"trial": "int64", "seed": "int64", "run_id": "str"} | finals | ran_on)


def failures_frame(runs: list[RunRecord]) -> pd.DataFrame:
    """Failed seeds, and trials that failed as a whole; a FAILED run without a reason is still a failure."""
    rows = [
        {**_names(run), "step": _failure_step(run), "reason": run.tags.get(schema.FAILURE, "not recorded")}
        for run in runs
        if schema.FAILURE in run.tags or "seed" in run.params
    ]
    return _frame(rows, {"trial": "int64", "arm": "str", "seed": "Int64", "step": "Int64", "reason": "str"})


def _failure_step(run: RunRecord) -> int | None:
    text = run.tags.get(schema.FAILURE_STEP)
    if text is None:
        return None
    if not text.isdecimal():
        raise AnalysisError(f"{run}: tag `{schema.FAILURE_STEP}` must be a whole number, but is {text!r}; {MEND}")
    return int(text)


def unfinished_frame(trial_runs: list[RunRecord], seed_runs: list[RunRecord]) -> pd.DataFrame:
    """Seeds that are not finished, and trials that wait for seeds but have no seed run yet."""
    begun = {param_of(run, "trial") for run in seed_runs}
    waiting = [
        run
        for run in trial_runs
        if run.status not in OVER and schema.STOPPED not in run.tags and param_of(run, "trial") not in begun
    ]
    rows = [{**_names(run), "status": run.status} for run in (*seed_runs, *waiting)]
    return _frame(rows, {"trial": "int64", "arm": "str", "seed": "Int64", "status": "str"})


def skipped_frame(runs: list[RunRecord]) -> pd.DataFrame:
    """Trials that were never trained because they break a limit of the search."""
    rows = [
        {key: param_of(run, key) for key in ("trial", "arm", "family", "chi")}
        | {"n_params": metric_of(run, "count", "n_params", required=False), "reason": run.tags[schema.SKIPPED]}
        for run in runs
    ]
    return _frame(
        rows, {"trial": "int64", "arm": "str", "family": "str", "chi": "Int64", "n_params": "Int64", "reason": "str"}
    )


def rel_errors_frame(runs: list[RunRecord]) -> pd.DataFrame:
    rows = []
    for run in runs:
        for key, value in run.metrics.items():
            parsed = schema.parse_rel_error_key(key)
            if parsed is not None:
                when, chi, layer = parsed
                rows.append(
                    {
                        "trial": param_of(run, "trial"),
                        "seed": param_of(run, "seed"),
                        "when": when,
                        "chi": chi,
                        "layer": layer,
                        "rel_error": value,
                    }
                )
    return _frame(
        rows, {"trial": "int64", "seed": "int64", "when": "str", "chi": "int64", "layer": "str", "rel_error": "float64"}
    )


def bonds_frame(runs: list[RunRecord]) -> pd.DataFrame:
    """The last value of each bond that could change."""
    rows = []
    for run in runs:
        names = {key: param_of(run, key) for key in ("trial", "seed")}
        for key, value in run.metrics.items():
            parsed = schema.parse_bond_key(key)
            if parsed is not None:
                rows.append(names | {"layer": parsed[0], "number": parsed[1], "bond": int(value)})
    rows.sort(key=lambda row: (row["trial"], row["seed"], row["layer"], row["number"]))
    return _frame(rows, {"trial": "int64", "seed": "int64", "layer": "str", "number": "int64", "bond": "int64"})


def no_frames() -> dict[str, pd.DataFrame]:
    """Empty frames, by their name in `runs.StudyRuns`, with the same columns and types as the frames of any runs."""
    return {
        "trials": trials_frame([], {"n_seeds": [], "n_failed": [], "n_unfinished": []}),
        "seeds": seeds_frame([]),
        "failures": failures_frame([]),
        "unfinished": unfinished_frame([], []),
        "rel_errors": rel_errors_frame([]),
        "bonds": bonds_frame([]),
        "skipped": skipped_frame([]),
    }
