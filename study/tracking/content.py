"""The content that a study's runs must have in MLflow: params, tags, metrics and times, from the ledger alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from analysis import run_schema as schema
from study.spec.trial import RungStop, SeedResult, Skipped, Stop, Trial, milliseconds


@dataclass(frozen=True)
class StudyRecord:
    """The content that MLflow gets about a study besides its runs."""

    name: str
    uuid: str
    description: str
    study_file: str
    claims: str
    """JSON, see `run_schema.CLAIMS`."""
    growths: list[dict[str, Any]]
    """See `run_schema.GROWTHS`."""
    environment: dict[str, Any]
    n_missing: int
    """Number of runs that the study lacks at this start."""
    created: str
    changed: str
    """Time of the study's last growth, or of its beginning."""
    corpus_sha256: str
    """Checksum of the text alone."""
    tokenizer: str
    validation_fraction: float
    vocab_size: int
    tuned_among: Mapping[str, int | None]
    """Value for each arm, see `config.Arm`."""
    log_weights: bool


class Point(NamedTuple):
    """One value of a metric; timestamp in milliseconds."""

    key: str
    value: float
    timestamp: int
    step: int = 0


@dataclass(frozen=True)
class RunContent:
    """The content that one run must have; times in milliseconds, `ended` is None while results are missing."""

    key: str
    name: str
    started: int
    ended: int | None
    status: str
    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The value that MLflow shows for each metric: the last one."""
        in_order = sorted(self.points, key=lambda point: (point.step, point.timestamp, point.value))
        return {point.key: point.value for point in in_order}

    @cached_property
    def digest(self) -> str:
        return schema.digest(self.params, self.metrics, self.tags)


def summary_content(record: StudyRecord) -> RunContent:
    """The summary run, for content that is not of a single trial.

    It leaves out `schema.MISSING`, which changes as the study runs.
    """
    tags = schema.long_tag(schema.CLAIMS, record.claims)
    tags |= schema.long_tag(schema.GROWTHS, json.dumps(record.growths))
    tags |= schema.long_tag(schema.ENVIRONMENT, json.dumps(record.environment))
    key = f"{record.uuid}/{schema.KIND_SUMMARY}"
    return RunContent(
        key=key,
        name=f"study {record.name}",
        started=milliseconds(record.created),
        ended=milliseconds(record.changed),
        status="FINISHED",
        tags=_tags(record, key, schema.KIND_SUMMARY, tags),
    )


def trial_content(
    record: StudyRecord, trial: Trial, results: Sequence[SeedResult], is_over: bool, begun: int = 0
) -> RunContent:
    """A trial's run: means and standard deviations over its complete seeds; the step is the number of results.

    Args:
        results: in the order in which they ended; for a duplicate, those of its original.
        begun: time in milliseconds at which the first seed began, for a trial without results.
    """
    complete = [result for result in results if result.state == "complete"]
    metrics: dict[str, float] = {}
    if results:
        metrics = {schema.N_SEEDS: len(complete), schema.N_FAILED: len(results) - len(complete)}
    for each in schema.FINALS if complete else ():
        values = [result.final[each.key] for result in complete if each.key in result.final]
        if len(values) < len(complete):
            continue  # trained before this metric was recorded
        metrics[schema.mean_key(each.key)] = statistics.fmean(values)
        if len(values) > 1:
            metrics[schema.std_key(each.key)] = statistics.stdev(values)
    started = milliseconds(results[0].started) if results else begun
    ended = milliseconds(results[-1].ended) if results else begun
    tags = _trial_tags(record, trial)
    if trial.stop is not None and trial.duplicate_of is None:
        tags[schema.STOPPED] = trial.stop.reason
    key = schema.run_key(record.uuid, trial.number)
    return RunContent(
        key=key,
        name=trial_name(trial),
        started=started,
        ended=ended if is_over else None,
        status=("FINISHED" if complete else "FAILED") if is_over else "RUNNING",
        tags=_tags(record, key, schema.KIND_TRIAL, tags),
        params=_params(record, trial),
        points=[*_points(_counts(trial), started), *_points(metrics, ended, step=len(results))],
    )


def untrained_content(record: StudyRecord, trial: Trial, why: Skipped | Stop | RungStop) -> RunContent:
    """The run of a trial without results, because it was skipped or stopped before: it ends when it begins."""
    key, when = schema.run_key(record.uuid, trial.number), milliseconds(why.when)
    tag = schema.SKIPPED if isinstance(why, Skipped) else schema.STOPPED
    return RunContent(
        key=key,
        name=trial_name(trial),
        started=when,
        ended=when,
        status="KILLED",
        tags=_tags(record, key, schema.KIND_TRIAL, _trial_tags(record, trial) | {tag: why.reason}),
        params=_params(record, trial),
        points=_points(_counts(trial), when),
    )


def seed_content(record: StudyRecord, trial: Trial, result: SeedResult) -> RunContent:
    """One seed's run: its learning curve, and its final metrics if it is over."""
    tags = _group_tags(trial) | result.ran_on
    if result.failure is not None:
        tags[schema.FAILURE] = result.failure
    if result.failure_step is not None:
        tags[schema.FAILURE_STEP] = str(result.failure_step)
    ended = milliseconds(result.ended)
    final = result.final if result.state != "paused" else {}  # those of a rung
    points = _points(_counts(trial) | final | result.rel_errors, ended)
    for row in result.curve:
        values = {key: value for key, value in row.items() if key != "step"}
        points += _points(values, ended, step=int(row["step"]))
    for layer, changes in result.bonds.items():
        for step, *bonds in changes:
            points += _points(
                {schema.bond_key(layer, place): bond for place, bond in enumerate(bonds)}, ended, step=step
            )
    key = schema.run_key(record.uuid, trial.number, result.seed)
    return RunContent(
        key=key,
        name=f"seed {result.seed} of {trial_name(trial)}",  # MLflow's tables truncate long names
        started=milliseconds(result.started),
        ended=None if result.state == "paused" else ended,
        status={"complete": "FINISHED", "failed": "FAILED", "paused": "RUNNING"}[result.state],
        tags=_tags(record, key, schema.KIND_SEED, tags),
        params=_params(record, trial) | {"seed": str(result.seed)},
        points=points,
    )


def trial_name(trial: Trial) -> str:
    """Name of a trial in the MLflow UI: its arm, with the values that distinguish it within the arm."""
    spec = trial.spec
    width = f"d_model={spec.model.width}" if spec.model.width else None
    return " ".join(filter(None, [spec.arm, spec.size or width, f"(trial {trial.number})"]))


def _tags(record: StudyRecord, key: str, kind: str, tags: dict[str, str]) -> dict[str, str]:
    own = {
        schema.KIND: kind,
        schema.KEY: key,
        schema.STUDY_NAME: record.name,
        schema.STUDY_UUID: record.uuid,
        schema.SCHEMA: str(schema.SCHEMA_VERSION),
    }
    return {tag: schema.tag_text(value) for tag, value in (own | tags).items()}


def _trial_tags(record: StudyRecord, trial: Trial) -> dict[str, str]:
    return _group_tags(trial) | {schema.VALIDATION_FRACTION: str(record.validation_fraction)}


def _group_tags(trial: Trial) -> dict[str, str]:
    repeats = {} if trial.duplicate_of is None else {schema.DUPLICATE_OF: str(trial.duplicate_of)}
    return {schema.FAMILY: trial.spec.family, schema.ARM: trial.spec.arm} | repeats


def _params(record: StudyRecord, trial: Trial) -> dict[str, str]:
    spec = trial.spec
    values = spec.model_dump(exclude={"model"}) | spec.protocol.model_dump() | spec.model.recorded
    values |= spec.recorded | {
        "trial": trial.number,
        "family_label": trial.shape.label,
        "vocab_size": record.vocab_size,
        "sites": ", ".join(sorted({str(len(bonds) - 1) for bonds in trial.shape.bonds.values()})) or None,
        "largest_bond": max((max(bonds) for bonds in trial.shape.bonds.values()), default=None),
        "tuning_trials": trial.tuning_trials,
        "tuned_among": record.tuned_among.get(spec.arm),
        "budget_hash": trial.budget_hash,
        "corpus_sha256": record.corpus_sha256,
        "tokenizer": record.tokenizer,
    }
    unrecorded = {**dict.fromkeys(each.key for each in schema.PARAMS), **schema.ABSENT}
    return {key: str(values[key]) for key, usual in unrecorded.items() if values.get(key) not in (None, usual)}


def _counts(trial: Trial) -> dict[str, float]:
    counts = {each.key: getattr(trial.shape, each.key) for each in schema.COUNTS}
    return {key: value for key, value in counts.items() if value is not None}


def _points(values: Mapping[str, float], timestamp: int, step: int = 0) -> list[Point]:
    return [Point(key, value, timestamp, step) for key, value in values.items()]
