"""The runs of one study as typed, tidy frames, checked against the schema. Knows nothing of MLflow."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pandas as pd

from analysis import run_schema as schema
from analysis.errors import AnalysisError

OPTIONAL_PARAMS = (
    *("seed", "teacher", "chi", "as_chi", "n_sites", "factorisation", "init", "refinement", "lr_rule", "decay"),
    *("forward", "sites", "largest_bond"),
)
"""Params without meaning for some family or kind of run; every other param of the schema must be on every run."""
CLAIMED = ("final/val_loss", "final/val_acc")
"""Metrics that claims rest on: a complete seed has them, finite. Other final metrics may be absent (NaN)."""

_OVER = ("FINISHED", "FAILED")
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
        seed = f", seed {self.params['seed']}" if "seed" in self.params else ""
        return f"run {self.run_id} (trial {self.params.get('trial', 'unknown')}{seed})"


@dataclass(frozen=True)
class StudyAddress:
    """Where the runs of a study are; uuid None: whichever study the experiment holds."""

    tracking_uri: str
    experiment: str
    uuid: str | None = None


@dataclass(frozen=True)
class Claims:
    """What the study file declared before it ran. margins: how much worse is still no loss, by metric of the curves
    (nats, or a fraction). contrasts: pairs (arm, against)."""

    margins: dict[str, float] = field(default_factory=dict)
    contrasts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class StudyRuns:
    """All that is known of one study, without duplicated trials and those that were never trained since they break a
    limit of the search (n_duplicates and n_pruned count them).

    trials: one row per configuration: trial, the params of the schema but the seed, its counts, and how many of its
        seeds are complete (n_seeds), failed (n_failed) and not finished yet (n_unfinished). stopped: why a trial was
        given up before it had all its seeds; missing for all others.
    seeds: one row per complete seed: trial, seed, run_id, the final metrics of the schema under their own keys.
    failures: trial, arm, seed, step, reason; a failure of a whole trial has no seed.
    unfinished: trial, arm, seed, status, of seeds neither complete nor failed; a trial that waits for seeds of which
        there is no run yet has no seed.
    rel_errors: trial, seed, when, chi, layer, rel_error, of complete seeds.
    latest: when the last of these runs ended, in UTC; None if none has.
    claims: empty where the study's summary run is missing.
    """

    address: StudyAddress
    name: str
    uuid: str
    trials: pd.DataFrame
    seeds: pd.DataFrame
    failures: pd.DataFrame
    unfinished: pd.DataFrame
    rel_errors: pd.DataFrame
    n_duplicates: int
    n_pruned: int
    latest: pd.Timestamp | None
    claims: Claims = Claims()

    @property
    def budgets(self) -> list[str]:
        """The budget hashes of the trials, sorted; trials are comparable without a word of warning if there is one."""
        return sorted(self.trials["budget_hash"].unique())

    @property
    def data_source(self) -> str:
        """The tracking URI without its password, and the experiment."""
        return f"{without_password(self.address.tracking_uri)}, experiment {self.address.experiment!r}"


def study_runs(
    address: StudyAddress,
    trial_runs: list[RunRecord],
    seed_runs: list[RunRecord],
    summary_runs: Sequence[RunRecord] = (),
) -> StudyRuns:
    """Convert and check the runs of one study.

    Raises:
        AnalysisError: there are none, they are of several studies or of another schema version, a param is missing or
            of the wrong type, a key occurs twice, or a seed does not match its trial.
    """
    name, uuid = _identity([*trial_runs, *seed_runs], address)
    trial_runs, seed_runs = _fill_in(trial_runs, seed_runs)
    _check_keys(trial_runs, uuid)
    _check_keys(seed_runs, uuid)
    duplicates = {_param(run, "trial") for run in trial_runs if schema.DUPLICATE_OF in run.tags}
    pruned = {_param(run, "trial") for run in trial_runs if schema.PRUNED in run.tags}
    trial_runs = [run for run in trial_runs if _param(run, "trial") not in duplicates | pruned]
    seed_runs = [run for run in seed_runs if _param(run, "trial") not in duplicates | pruned]
    complete = [run for run in seed_runs if run.status == "FINISHED"]
    failed = [run for run in seed_runs if run.status == "FAILED"]
    unfinished = [run for run in seed_runs if run.status not in _OVER]
    trials = _trials_frame(trial_runs, {"n_seeds": complete, "n_failed": failed, "n_unfinished": unfinished})
    _check_against_trials(seed_runs, trials)
    ends = [run.end_time for run in (*trial_runs, *seed_runs) if run.end_time]
    return StudyRuns(
        address=address,
        name=name,
        uuid=uuid,
        trials=trials,
        seeds=_seeds_frame(complete),
        failures=_failures_frame([*trial_runs, *failed]),
        unfinished=_unfinished_frame(trial_runs, unfinished),
        rel_errors=_rel_errors_frame(complete),
        n_duplicates=len(duplicates),
        n_pruned=len(pruned - duplicates),
        latest=pd.Timestamp(max(ends), unit="ms", tz="UTC") if ends else None,
        claims=_claims(summary_runs, uuid),
    )


def without_password(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")))


def _claims(summary_runs: Sequence[RunRecord], uuid: str) -> Claims:
    for run in summary_runs:
        if run.tags.get(schema.STUDY_UUID) == uuid and schema.CLAIMS in run.tags:
            try:
                declared = json.loads(run.tags[schema.CLAIMS])
                margins = {key: float(value) for key, value in declared["margins"].items()}
                return Claims(margins, tuple((pair["arm"], pair["against"]) for pair in declared["contrasts"]))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise AnalysisError(f"run {run.run_id}: tag `{schema.CLAIMS}` is not what a study declares") from error
    return Claims()


def _tag(run: RunRecord, key: str) -> str:
    if key not in run.tags:
        raise AnalysisError(f"{run} has no tag `{key}`")
    return run.tags[key]


def _param(run: RunRecord, key: str) -> Any:
    """The param as the schema types it, None where it has no meaning."""
    dtype = schema.FIELDS["param", key].dtype
    text = run.params.get(key)
    if text is None:
        if key in OPTIONAL_PARAMS:
            return None
        raise AnalysisError(f"{run} has no param `{key}`")
    try:
        return dtype(text)
    except ValueError as error:
        raise AnalysisError(f"{run}: param `{key}` must be {dtype.__name__}, but is {text!r}") from error


def _metric(run: RunRecord, kind: str, key: str, required: bool) -> float | int | None:
    dtype = schema.FIELDS[kind, key].dtype
    value = run.metrics.get(key)
    if value is None:
        if required:
            raise AnalysisError(f"{run} is complete but has no metric `{key}`")
        return None
    # MLflow stores an infinity as the largest float.
    if required and not abs(value) < 1e308:
        raise AnalysisError(f"{run} is complete but its metric `{key}` is {value:.3g}")
    if dtype is int:
        if not math.isfinite(value) or value != int(value):
            raise AnalysisError(f"{run}: metric `{key}` must be a whole number, but is {value}")
        return int(value)
    return value


def _identity(runs: list[RunRecord], address: StudyAddress) -> tuple[str, str]:
    """Name and UUID of the one study the runs are of."""
    studies = sorted({(_tag(run, schema.STUDY_NAME), _tag(run, schema.STUDY_UUID)) for run in runs})
    where = f"experiment {address.experiment!r} at {without_password(address.tracking_uri)}"
    if not studies:
        raise AnalysisError(f"{where} holds no runs of {f'study {address.uuid}' if address.uuid else 'a study'}")
    if len(studies) > 1:
        listed = ", ".join(f"{name} ({uuid})" for name, uuid in studies)
        raise AnalysisError(f"{where} holds several studies: {listed}; report on one through its study directory")
    versions = {_tag(run, schema.SCHEMA) for run in runs}
    if versions != {str(schema.SCHEMA_VERSION)}:
        raise AnalysisError(f"{where} has runs of schema versions {sorted(versions)}, not {schema.SCHEMA_VERSION} only")
    return studies[0]


def _fill_in(trial_runs: list[RunRecord], seed_runs: list[RunRecord]) -> tuple[list[RunRecord], list[RunRecord]]:
    """Give a run that is just being written, and has no params yet, those of another run of its trial.

    A trial's run is created before its seeds' and gets its params after them. One of which no other run says anything
    is left out: it comes with the next report.
    """
    described = {_trial_and_seed(run)[0]: run for run in (*seed_runs, *trial_runs) if run.params}

    def filled(run: RunRecord) -> RunRecord | None:
        if run.params or run.status != "RUNNING":
            return run
        trial, seed = _trial_and_seed(run)
        if trial not in described:
            return None
        params = {key: value for key, value in described[trial].params.items() if key != "seed"}
        counts = {field.key for field in schema.COUNTS}
        metrics = {key: value for key, value in described[trial].metrics.items() if key in counts}
        return replace(run, params=params | ({} if seed is None else {"seed": seed}), metrics=metrics)

    return [run for run in map(filled, trial_runs) if run], [run for run in map(filled, seed_runs) if run]


def _trial_and_seed(run: RunRecord) -> tuple[str, str | None]:
    """Trial and seed as the key has them."""
    trial, *seed = _tag(run, schema.KEY).split("/")[1:]
    return trial, seed[0] if seed else None


def _check_keys(runs: list[RunRecord], uuid: str) -> None:
    """Every run is the only one of its trial and seed, and its key says so."""
    seen: dict[str, RunRecord] = {}
    for run in runs:
        key = _tag(run, schema.KEY)
        if key in seen:
            raise AnalysisError(f"{run} has the same key as run {seen[key].run_id}: {key}")
        seen[key] = run
        expected = schema.run_key(uuid, _param(run, "trial"), _param(run, "seed"))
        if key != expected:
            raise AnalysisError(f"{run} must have the key {expected}, but has {key}")


def _check_against_trials(seed_runs: list[RunRecord], trials: pd.DataFrame) -> None:
    """Every seed belongs to a trial and has its params, and its counts where both have them."""
    known = trials.astype("object").where(trials.notna(), None).set_index("trial").to_dict("index")
    for run in seed_runs:
        trial = known.get(_param(run, "trial"))
        if trial is None:
            raise AnalysisError(f"{run} belongs to no trial run; repair with `mpo-study sync`")
        own = {field.key: _param(run, field.key) for field in schema.PARAMS if field.key not in ("trial", "seed")}
        counts = {field.key: _metric(run, "count", field.key, required=False) for field in schema.COUNTS}
        own |= {key: count for key, count in counts.items() if count is not None}
        for key, value in own.items():
            if value != trial[key]:
                raise AnalysisError(f"{run}: `{key}` is {value}, but its trial has {trial[key]}")


def _frame(rows: list[dict[str, Any]], dtypes: dict[str, str]) -> pd.DataFrame:
    """Rows sorted by their first columns; the dtypes hold for an empty frame too."""
    frame = pd.DataFrame(rows, columns=list(dtypes)).astype(dtypes)
    keys = [key for key in ("trial", "seed", "when", "chi", "layer") if key in dtypes]
    return frame.sort_values(keys, kind="stable", ignore_index=True)


def _names(run: RunRecord) -> dict[str, Any]:
    return {key: _param(run, key) for key in ("trial", "arm", "seed")}


def _trials_frame(trial_runs: list[RunRecord], seed_runs: dict[str, list[RunRecord]]) -> pd.DataFrame:
    """`seed_runs`: by the column that counts them."""
    fields = [field for field in schema.PARAMS if field.key != "seed"]
    counts = {column: Counter(_param(run, "trial") for run in runs) for column, runs in seed_runs.items()}
    rows = []
    for run in trial_runs:
        row = {field.key: _param(run, field.key) for field in fields}
        row |= {column: count[row["trial"]] for column, count in counts.items()}
        row |= {field.key: _metric(run, "count", field.key, required=row["n_seeds"] > 0) for field in schema.COUNTS}
        rows.append(row | {"run_id": run.run_id, "stopped": run.tags.get(schema.STOPPED)})
    dtypes = {field.key: _DTYPES[field.dtype] for field in (*fields, *schema.COUNTS)}
    return _frame(rows, dtypes | dict.fromkeys(("trial", *counts), "int64") | {"run_id": "str", "stopped": "str"})


def _seeds_frame(runs: list[RunRecord]) -> pd.DataFrame:
    rows = [
        {"trial": _param(run, "trial"), "seed": _param(run, "seed"), "run_id": run.run_id}
        | {field.key: _metric(run, "final", field.key, required=field.key in CLAIMED) for field in schema.FINALS}
        for run in runs
    ]
    finals = {field.key: _DTYPES[field.dtype] for field in schema.FINALS}
    return _frame(rows, {"trial": "int64", "seed": "int64", "run_id": "str"} | finals)


def _failures_frame(runs: list[RunRecord]) -> pd.DataFrame:
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
        raise AnalysisError(f"{run}: tag `{schema.FAILURE_STEP}` must be a whole number, but is {text!r}")
    return int(text)


def _unfinished_frame(trial_runs: list[RunRecord], seed_runs: list[RunRecord]) -> pd.DataFrame:
    """Seeds that are not finished, and trials of which more seeds are to come that have no run yet."""
    begun = {_param(run, "trial") for run in seed_runs}
    waiting = [run for run in trial_runs if run.status not in _OVER and _param(run, "trial") not in begun]
    rows = [{**_names(run), "status": run.status} for run in (*seed_runs, *waiting)]
    return _frame(rows, {"trial": "int64", "arm": "str", "seed": "Int64", "status": "str"})


def _rel_errors_frame(runs: list[RunRecord]) -> pd.DataFrame:
    rows = []
    for run in runs:
        for key, value in run.metrics.items():
            parsed = schema.parse_rel_error_key(key)
            if parsed is not None:
                when, chi, layer = parsed
                rows.append(
                    {
                        "trial": _param(run, "trial"),
                        "seed": _param(run, "seed"),
                        "when": when,
                        "chi": chi,
                        "layer": layer,
                        "rel_error": value,
                    }
                )
    return _frame(
        rows, {"trial": "int64", "seed": "int64", "when": "str", "chi": "int64", "layer": "str", "rel_error": "float64"}
    )
