"""Checks that runs are as their study wrote them."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from analysis import run_schema as schema
from analysis.errors import AnalysisError
from analysis.runs.run_records import MEND, RunRecord, metric_of, param_of, tag_of


def study_of(runs: list[RunRecord], where: str, uuid: str | None) -> tuple[str, str]:
    """Name and UUID of the one study to which the runs belong."""
    studies = sorted({(tag_of(run, schema.STUDY_NAME), tag_of(run, schema.STUDY_UUID)) for run in runs})
    if not studies:
        raise AnalysisError(f"{where} holds no runs of {f'study {uuid}' if uuid else 'a study'}")
    if len(studies) > 1:
        listed = ", ".join(f"{name} ({uuid})" for name, uuid in studies)
        raise AnalysisError(f"{where} holds several studies: {listed}; report on one through its study directory")
    versions = {tag_of(run, schema.SCHEMA) for run in runs}
    if versions != {str(schema.SCHEMA_VERSION)}:
        found = ", ".join(sorted(versions))
        raise AnalysisError(
            f"{where} has runs of schema version {found}, but this program reads version {schema.SCHEMA_VERSION}"
        )
    return studies[0]


def with_params(trial_runs: list[RunRecord], seed_runs: list[RunRecord]) -> tuple[list[RunRecord], list[RunRecord]]:
    """Give a run that is just being written, and has no params yet, the params of another run of its trial.

    A trial's run is created before its seeds' runs, and gets its params after them. A run without another run that
    describes its trial is left out: the next report will have it.
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


def check_digests(runs: list[RunRecord], is_settled: bool) -> None:
    """Check that the study wrote every run that is over, and that none has changed, as far as the digests show.

    Args:
        is_settled: whether the study's writer has left the runs whole. Then all of them have a digest.
    """
    for run in (run for run in runs if run.status != "RUNNING"):
        said = run.tags.get(schema.DIGEST)
        if said is None and is_settled:
            raise AnalysisError(f"{run} was not written by the study it is in; {MEND}")
        if said is not None and said != schema.digest(run.params, run.metrics, run.tags):
            raise AnalysisError(f"{run} is no longer as the study wrote it: somebody else has changed it; {MEND}")


def _trial_and_seed(run: RunRecord) -> tuple[str, str | None]:
    """Trial and seed from the run's key."""
    trial, *seed = tag_of(run, schema.KEY).split("/")[1:]
    return trial, seed[0] if seed else None


def check_keys(runs: list[RunRecord], uuid: str) -> None:
    """Check that every run is the only one of its trial and seed, and has the matching key."""
    seen: dict[str, RunRecord] = {}
    for run in runs:
        key = tag_of(run, schema.KEY)
        if key in seen:
            raise AnalysisError(f"{run} has the same key as run {seen[key].run_id}: {key}; {MEND}")
        seen[key] = run
        expected = schema.run_key(uuid, param_of(run, "trial"), param_of(run, "seed"))
        if key != expected:
            raise AnalysisError(f"{run} must have the key {expected}, but has {key}; {MEND}")


def check_n_seeds(trial_runs: list[RunRecord], trials: pd.DataFrame) -> None:
    """Every trial has as many seed runs as it records: without a deleted one, its mean would change."""
    counted = trials.set_index("trial")
    for key, state in ((schema.N_SEEDS, "complete"), (schema.N_FAILED, "failed")):
        for run in trial_runs:
            recorded, n = run.metrics.get(key), counted.at[param_of(run, "trial"), key]
            if recorded is not None and recorded != n:
                raise AnalysisError(f"{run} has {recorded:g} {state} seeds, but there are {n} runs of them; {MEND}")


def check_against_trials(seed_runs: list[RunRecord], trials: pd.DataFrame) -> None:
    """Check that every seed belongs to a trial and has its params, and its counts if both have them."""
    known = trials.astype("object").where(trials.notna(), None).set_index("trial").to_dict("index")
    for run in seed_runs:
        trial = known.get(param_of(run, "trial"))
        if trial is None:
            raise AnalysisError(f"{run} belongs to no trial run; {MEND}")
        own = {field.key: param_of(run, field.key) for field in schema.PARAMS if field.key not in ("trial", "seed")}
        counts = {field.key: metric_of(run, "count", field.key, required=False) for field in schema.COUNTS}
        own |= {key: count for key, count in counts.items() if count is not None}
        for key, value in own.items():
            if value != trial[key]:
                raise AnalysisError(f"{run}: `{key}` is {value}, but its trial has {trial[key]}; {MEND}")
