"""The runs of one study as typed, tidy frames, checked against the schema. Does not use MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import pandas as pd

from analysis import run_schema as schema
from analysis.errors import AnalysisError
from analysis.runs.cache import Cache
from analysis.runs.run_records import (
    MEND,
    OVER,
    RunRecord,
    failures_frame,
    metric_of,
    param_of,
    rel_errors_frame,
    seeds_frame,
    skipped_frame,
    tag_of,
    trials_frame,
    unfinished_frame,
)
from analysis.runs.urls import hide_password

_T = TypeVar("_T")


@dataclass(frozen=True)
class StudyAddress:
    """The place of a study's runs. uuid None: the study that the experiment holds."""

    tracking_uri: str
    experiment: str
    uuid: str | None = None


class Contrast(NamedTuple):
    """Two arms of one study, given by its name; the study file declares their comparison."""

    study: str
    arm: str
    against: str


@dataclass(frozen=True)
class Claims:
    """Declarations of the study file before the study ran. margins: how much worse does not yet count as a loss, by
    metric of the curves (nats, or a fraction)."""

    margins: dict[str, float] = field(default_factory=dict)
    contrasts: tuple[Contrast, ...] = ()


class Growth(NamedTuple):
    """Growth of a study after its start. by: the command. n_over: number of runs whose results were there by then."""

    study: str
    by: str
    seeds_before: int
    seeds_after: int
    n_over: int


@dataclass(frozen=True)
class StudyRuns:
    """All data of one study, without duplicated trials (n_duplicates counts them).

    trials: one row per configuration that was trained: trial, the params of the schema except the seed, its counts, and
        how many of its seeds are complete (n_seeds), failed (n_failed) and not finished yet (n_unfinished). stopped:
        the reason why a trial was given up before it had all its seeds; missing for all others. study: the study's
        name. validation_fraction: the fraction of the corpus, at its end, used for validation.
    seeds: one row per complete seed: trial, seed, run_id, the final metrics of the schema and its tags `RAN_ON`, under
        their own keys.
    failures: trial, arm, seed, step, reason; a failure of a whole trial has no seed.
    unfinished: trial, arm, seed, status, of seeds that are neither complete nor failed; seed is missing for a trial
        that waits for seeds without a run.
    rel_errors: trial, seed, when, chi, layer, rel_error, of complete seeds.
    skipped: trial, arm, family, chi, n_params, reason, of trials that were never trained because they break a limit of
        the search.
    latest: the time, in UTC, when the last of these runs ended; None if none has.
    n_missing: number of runs that the study lacked when its driver last began or ended; 0 if its summary run does not
        say.
    claims, growths, environment (see `run_schema.ENVIRONMENT`): empty if the study's summary run is missing.
    cache: the place for data read from this state of the study; None if there is none.
    parts: the studies that were joined (see `analysis.runs.studies`); empty for a single study. Joined studies have the
        address of the first.
    """

    address: StudyAddress
    name: str
    uuid: str
    trials: pd.DataFrame
    seeds: pd.DataFrame
    failures: pd.DataFrame
    unfinished: pd.DataFrame
    rel_errors: pd.DataFrame
    skipped: pd.DataFrame
    n_duplicates: int
    latest: pd.Timestamp | None
    n_missing: int = 0
    claims: Claims = Claims()
    growths: tuple[Growth, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    cache: Cache | None = None
    parts: tuple[StudyRuns, ...] = ()

    @property
    def n_lacking(self) -> int:
        """Number of runs that the study lacks, by its driver's record or by the runs themselves; 0 if finished."""
        return sum(part.n_lacking for part in self.parts) or max(self.n_missing, len(self.unfinished))

    @property
    def n_skipped(self) -> int:
        return len(self.skipped)

    @property
    def budgets(self) -> list[str]:
        """The budget hashes of the trials, sorted; with only one, all trials are comparable without a warning."""
        return sorted(self.trials["budget_hash"].unique())

    @property
    def ran_on(self) -> dict[str, int]:
        """Number of complete seeds on each machine, given in words, most first.

        On two machines, the results of the same seed differ by rounding, and training amplifies the difference.
        """
        seeds = self.seeds
        words = seeds[schema.DEVICE] + ", threads: " + seeds[schema.THREADS] + ", torch " + seeds[schema.TORCH]
        return {str(machine): int(n) for machine, n in words.value_counts().items()}

    @property
    def programs(self) -> dict[str, int]:
        """Number of complete seeds by the fingerprint of the program that trained them."""
        return {str(program): int(n) for program, n in self.seeds[schema.PROGRAM].value_counts().items()}

    @property
    def n_of_several_programs(self) -> int:
        """Number of configurations whose means are over seeds that different programs trained."""
        return int((self.seeds.groupby("trial")[schema.PROGRAM].nunique() > 1).sum())

    @property
    def data_source(self) -> str:
        """The tracking URI without its password, and the experiment; for all studies, if several are joined."""
        if self.parts:
            return "; ".join(part.data_source for part in self.parts)
        return f"{hide_password(self.address.tracking_uri)}, experiment {self.address.experiment!r}"


def study_runs(
    address: StudyAddress,
    trial_runs: list[RunRecord],
    seed_runs: list[RunRecord],
    summary_runs: Sequence[RunRecord] = (),
) -> StudyRuns:
    """Convert and check the runs of one study.

    Raises:
        AnalysisError: there are no runs, they are of several studies or of another schema version, a param is missing
            or of the wrong type, a key occurs twice, or a seed does not match its trial.
    """
    name, uuid = _identity([*trial_runs, *seed_runs], address)
    is_settled = any(schema.REVISION in run.tags for run in summary_runs)
    _check_digests([*trial_runs, *seed_runs, *summary_runs], is_settled)
    trial_runs, seed_runs = _fill_in(trial_runs, seed_runs)
    _check_keys(trial_runs, uuid)
    _check_keys(seed_runs, uuid)
    duplicates = {param_of(run, "trial") for run in trial_runs if schema.DUPLICATE_OF in run.tags}
    trial_runs = [run for run in trial_runs if param_of(run, "trial") not in duplicates]
    skipped_runs = [run for run in trial_runs if schema.SKIPPED in run.tags]
    left_out = duplicates | {param_of(run, "trial") for run in skipped_runs}
    trial_runs = [run for run in trial_runs if schema.SKIPPED not in run.tags]
    seed_runs = [run for run in seed_runs if param_of(run, "trial") not in left_out]
    complete = [run for run in seed_runs if run.status == "FINISHED"]
    failed = [run for run in seed_runs if run.status == "FAILED"]
    unfinished = [run for run in seed_runs if run.status not in OVER]
    trials = trials_frame(trial_runs, {"n_seeds": complete, "n_failed": failed, "n_unfinished": unfinished})
    _check_against_trials(seed_runs, trials)
    if is_settled:
        _check_n_seeds(trial_runs, trials)
    ends = [run.end_time for run in (*trial_runs, *seed_runs) if run.end_time]
    return StudyRuns(
        address=address,
        name=name,
        uuid=uuid,
        trials=trials,
        seeds=seeds_frame(complete),
        failures=failures_frame([*trial_runs, *failed]),
        unfinished=unfinished_frame(trial_runs, unfinished),
        rel_errors=rel_errors_frame(complete),
        skipped=skipped_frame(skipped_runs),
        n_duplicates=len(duplicates),
        latest=pd.Timestamp(max(ends), unit="ms", tz="UTC") if ends else None,
        n_missing=n_missing_of(summary_runs, uuid),
        claims=claims_of(summary_runs, name, uuid),
        growths=growths_of(summary_runs, name, uuid),
        environment=environment_of(summary_runs, uuid),
    )


def claims_of(summary_runs: Sequence[RunRecord], study: str, uuid: str) -> Claims:
    """The study's claims, from its summary run; empty if there is no such run.

    Raises:
        AnalysisError: its tag is not what a study writes.
    """
    declared = dict(_json_tag(summary_runs, uuid, schema.CLAIMS, {}))
    try:
        margins = {key: float(value) for key, value in declared.get("margins", {}).items()}
        contrasts = tuple(Contrast(study, pair["arm"], pair["against"]) for pair in declared.get("contrasts", ()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AnalysisError(f"study {study}: tag `{schema.CLAIMS}` is not what a study writes; {MEND}") from error
    return Claims(margins, contrasts)


def n_missing_of(summary_runs: Sequence[RunRecord], uuid: str) -> int:
    """Number of runs that the study lacked, from its summary run; 0 if that does not say."""
    tags = (run.tags.get(schema.MISSING, "") for run in summary_runs if run.tags.get(schema.STUDY_UUID) == uuid)
    return next((int(text) for text in tags if text.isdecimal()), 0)


def environment_of(summary_runs: Sequence[RunRecord], uuid: str) -> dict[str, Any]:
    """The environment at the study's start (see `run_schema.ENVIRONMENT`); empty if it has no summary run.

    Raises:
        AnalysisError: its tag is not what a study writes.
    """
    return dict(_json_tag(summary_runs, uuid, schema.ENVIRONMENT, {}))


def growths_of(summary_runs: Sequence[RunRecord], study: str, uuid: str) -> tuple[Growth, ...]:
    """The growths of the study, from its summary run; empty if that does not say.

    Raises:
        AnalysisError: its tag is not what a study writes.
    """
    grown = _json_tag(summary_runs, uuid, schema.GROWTHS, [])
    try:
        return tuple(
            Growth(study, str(each["by"]), *map(int, each["seeds"][:2]), n_over=int(each["over"])) for each in grown
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise AnalysisError(f"study {study}: tag `{schema.GROWTHS}` is not what a study writes; {MEND}") from error


def _json_tag(summary_runs: Sequence[RunRecord], uuid: str, tag: str, default: _T) -> _T:
    """The value of a tag of the study's summary run, which must have the default's type; the default if there is no
    such tag."""
    for run in summary_runs:
        if run.tags.get(schema.STUDY_UUID) == uuid and tag in run.tags:
            try:
                held = json.loads(schema.read_long_tag(run.tags, tag) or "")
                if not isinstance(held, type(default)):
                    raise ValueError("another kind of value")
            except ValueError as error:
                why = f"run {run.run_id}: tag `{tag}` is not JSON as a study writes it ({error}); {MEND}"
                raise AnalysisError(why) from None
            return held
    return default


def _identity(runs: list[RunRecord], address: StudyAddress) -> tuple[str, str]:
    """Name and UUID of the one study to which the runs belong."""
    studies = sorted({(tag_of(run, schema.STUDY_NAME), tag_of(run, schema.STUDY_UUID)) for run in runs})
    where = f"experiment {address.experiment!r} at {hide_password(address.tracking_uri)}"
    if not studies:
        raise AnalysisError(f"{where} holds no runs of {f'study {address.uuid}' if address.uuid else 'a study'}")
    if len(studies) > 1:
        listed = ", ".join(f"{name} ({uuid})" for name, uuid in studies)
        raise AnalysisError(f"{where} holds several studies: {listed}; report on one through its study directory")
    versions = {tag_of(run, schema.SCHEMA) for run in runs}
    if versions != {str(schema.SCHEMA_VERSION)}:
        raise AnalysisError(f"{where} has runs of schema versions {sorted(versions)}, not {schema.SCHEMA_VERSION} only")
    return studies[0]


def _fill_in(trial_runs: list[RunRecord], seed_runs: list[RunRecord]) -> tuple[list[RunRecord], list[RunRecord]]:
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


def _check_digests(runs: list[RunRecord], is_settled: bool) -> None:
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


def _check_keys(runs: list[RunRecord], uuid: str) -> None:
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


def _check_n_seeds(trial_runs: list[RunRecord], trials: pd.DataFrame) -> None:
    """Every trial has as many seed runs as it records: without a deleted one, its mean would change."""
    counted = trials.set_index("trial")
    for key, state in ((schema.N_SEEDS, "complete"), (schema.N_FAILED, "failed")):
        for run in trial_runs:
            recorded, n = run.metrics.get(key), counted.at[param_of(run, "trial"), key]
            if recorded is not None and recorded != n:
                raise AnalysisError(f"{run} has {recorded:g} {state} seeds, but there are {n} runs of them; {MEND}")


def _check_against_trials(seed_runs: list[RunRecord], trials: pd.DataFrame) -> None:
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
