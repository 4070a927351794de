"""The runs of one study as typed, tidy frames, checked against the schema. Does not use MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pandas as pd

from analysis import run_schema as schema
from analysis.errors import AnalysisError
from analysis.runs.cache import Cache
from analysis.runs.checks import (
    check_against_trials,
    check_digests,
    check_keys,
    check_n_seeds,
    study_of,
    with_params,
)
from analysis.runs.run_records import (
    MEND,
    OVER,
    RunRecord,
    bonds_frame,
    failures_frame,
    param_of,
    rel_errors_frame,
    seeds_frame,
    skipped_frame,
    trials_frame,
    unfinished_frame,
)
from analysis.runs.urls import hide_password

FRAMES = ("trials", "seeds", "failures", "unfinished", "rel_errors", "bonds", "skipped")
"""The frames of `StudyRuns`."""


@dataclass(frozen=True)
class StudyAddress:
    """The place of a study's runs. uuid None: the study that the experiment holds."""

    tracking_uri: str
    experiment: str
    uuid: str | None = None

    @property
    def shown(self) -> str:
        """The address without its password."""
        return f"experiment {self.experiment!r} at {hide_password(self.tracking_uri)}"


class Contrast(NamedTuple):
    """Two arms of one study, given by its name; the study file declares their comparison."""

    study: str
    arm: str
    against: str


@dataclass(frozen=True)
class Claims:
    """Declarations of the study file before the study ran. margins: how much worse does not yet count as a loss, by
    metric of the curves (nats, or a fraction). looks: the numbers of seeds at which the contrasts are tested, with the
    level of each; empty if they are tested once, on the seeds planned for every trial."""

    margins: dict[str, float] = field(default_factory=dict)
    contrasts: tuple[Contrast, ...] = ()
    looks: dict[int, float] = field(default_factory=dict)


class Growth(NamedTuple):
    """Growth of a study after its start. by: the command. n_over: number of runs whose results were there by then.
    seeds_before, seeds_after: number of seeds that every trial has."""

    study: str
    by: str
    seeds_before: int
    seeds_after: int
    n_over: int

    @property
    def is_of_some_trials(self) -> bool:
        """Whether single trials got more seeds, because of their results."""
        return self.by.startswith("refine")


@dataclass(frozen=True)
class StudyRuns:
    """All data of one study, without duplicated trials (n_duplicates counts them).

    trials: one row per configuration that was trained: trial, the params of the schema except the seed, its counts, and
        how many of its seeds are complete (n_seeds), failed (n_failed) and not finished yet (n_unfinished). stopped:
        the reason why a trial was stopped early; missing for all others. study: the study's name. validation_fraction:
        the fraction of the corpus, at its end, used for validation.
    seeds: one row per complete seed: trial, seed, run_id, the final metrics of the schema and its tags `RAN_ON`, under
        their own keys.
    failures: trial, arm, seed, step, reason; a failure of a whole trial has no seed.
    unfinished: trial, arm, seed, status, of seeds that are neither complete nor failed; seed is missing for a trial
        that waits for seeds without a run.
    rel_errors: trial, seed, when, chi, layer, rel_error, of complete seeds.
    bonds: trial, seed, layer, number, bond, of complete seeds whose bonds changed: the bond after core `number` at the
        end.
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
    bonds: pd.DataFrame
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
    name, uuid = study_of([*trial_runs, *seed_runs], address.shown, address.uuid)
    is_settled = any(schema.REVISION in run.tags for run in summary_runs)
    check_digests([*trial_runs, *seed_runs, *summary_runs], is_settled)
    trial_runs, seed_runs = with_params(trial_runs, seed_runs)
    check_keys(trial_runs, uuid)
    check_keys(seed_runs, uuid)
    duplicates = {param_of(run, "trial") for run in trial_runs if schema.DUPLICATE_OF in run.tags}
    trial_runs = [run for run in trial_runs if param_of(run, "trial") not in duplicates]
    skipped_runs = [run for run in trial_runs if schema.SKIPPED in run.tags]
    left_out = duplicates | {param_of(run, "trial") for run in skipped_runs}
    trial_runs = [run for run in trial_runs if schema.SKIPPED not in run.tags]
    seed_runs = [run for run in seed_runs if param_of(run, "trial") not in left_out]
    complete = [run for run in seed_runs if run.status == "FINISHED"]
    failed = [run for run in seed_runs if run.status == "FAILED"]
    stopped = {param_of(run, "trial") for run in trial_runs if schema.STOPPED in run.tags}
    unfinished = [run for run in seed_runs if run.status not in OVER and param_of(run, "trial") not in stopped]
    trials = trials_frame(trial_runs, {"n_seeds": complete, "n_failed": failed, "n_unfinished": unfinished})
    check_against_trials(seed_runs, trials)
    if is_settled:
        check_n_seeds(trial_runs, trials)
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
        bonds=bonds_frame(complete),
        skipped=skipped_frame(skipped_runs),
        n_duplicates=len(duplicates),
        latest=pd.Timestamp(max(ends), unit="ms", tz="UTC") if ends else None,
        **said_by_summary(summary_runs, name, uuid),
    )


def said_by_summary(summary_runs: Sequence[RunRecord], study: str, uuid: str) -> dict[str, Any]:
    """The fields of `StudyRuns` that the study's summary run has: n_missing, claims, growths, environment; empty
    without such a run.

    Raises:
        AnalysisError: a tag is not what a study writes.
    """
    tags = next((run.tags for run in summary_runs if run.tags.get(schema.STUDY_UUID) == uuid), {})
    missing = tags.get(schema.MISSING, "")
    found: dict[str, Any] = {"n_missing": int(missing) if missing.isdecimal() else 0}
    for name, tag, default, of in (
        ("claims", schema.CLAIMS, "{}", partial(_claims, study)),
        ("growths", schema.GROWTHS, "[]", partial(_growths, study)),
        ("environment", schema.ENVIRONMENT, "{}", dict),
    ):
        try:
            found[name] = of(json.loads(schema.read_long_tag(tags, tag) or default))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            why = f"study {study}: tag `{tag}` is not JSON as a study writes it ({error}); {MEND}"
            raise AnalysisError(why) from None
    return found


def _claims(study: str, declared: dict[str, Any]) -> Claims:
    margins = {key: float(value) for key, value in declared.get("margins", {}).items()}
    contrasts = tuple(Contrast(study, pair["arm"], pair["against"]) for pair in declared.get("contrasts", ()))
    looks = {int(n): float(level) for n, level in declared.get("looks", {}).items()}
    return Claims(margins, contrasts, dict(sorted(looks.items())))


def _growths(study: str, grown: list[dict[str, Any]]) -> tuple[Growth, ...]:
    return tuple(
        Growth(study, str(each["by"]), *map(int, each["seeds"][:2]), n_over=int(each["over"])) for each in grown
    )
