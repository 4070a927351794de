"""Finished and remaining work of a study, read from its ledger, also while a driver writes to it."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from study.ledger.directory import StudyDirectory
from study.ledger.frontier import Point, frontier, points
from study.ledger.snapshot import Snapshot, read_ledger
from study.ledger.tally import Tally
from study.scheduler.reports import Silence, read_reports
from study.spec.definition import settled
from study.spec.trial import SeedResult, Trial


@dataclass(frozen=True)
class TrialStatus:
    """One trial of a study: its seeds by their outcome, and its mean validation loss in nats."""

    trial: Trial
    complete: list[int]
    failed: list[int]
    missing: list[int]
    val_loss: float | None
    on_frontier: bool


@dataclass(frozen=True)
class StudyStatus:
    """The current state of a study in its ledger.

    n_unasked: number of trials that have not begun; the ledger knows only their number. driver: host and process of
    the driver that runs the study now. run_seconds_left: time of the remaining runs one after another, at the speed of
    finished runs. seconds_left: time until the driver is done, at the rate of the runs that ended since its start.
    Either is None if it is not known. search_ended: why the sampler is no longer asked although trials are missing.
    running: time since the last report of each run that a worker has now.
    """

    name: str
    uuid: str
    seeds: list[int]
    trials: list[TrialStatus]
    n_unasked: int
    n_complete: int
    n_failed: int
    n_missing: int
    failures: list[SeedResult]
    frontier: list[Point]
    driver: dict[str, Any] | None
    run_seconds_left: float | None
    seconds_left: float | None
    search_ended: str | None
    running: list[Silence]


def study_status(directory: StudyDirectory) -> StudyStatus:
    """Read the status of the study in a folder.

    Raises:
        StudyError: there is no study, or its ledger cannot be read.
    """
    own = directory.load_config()
    snapshot = read_ledger(directory.ledger_url, own.name)
    config, driver = settled(own, snapshot.growths.history), directory.driver()
    on = frontier(points(snapshot.trials, snapshot.results))
    results: dict[int, dict[int, SeedResult]] = defaultdict(dict)
    for result in snapshot.results:
        results[result.trial][result.seed] = result
    keys = {(result.trial, result.seed) for result in snapshot.results}
    tally = Tally(config, snapshot.growths.more_seeds, keys, snapshot.trials)
    numbers = {point.trial for point in on}
    trials = [
        _trial_status(trial, results[trial.number], tally.missing_seeds(trial), numbers) for trial in snapshot.trials
    ]
    failures = [result for result in snapshot.results if result.state == "failed"]
    run_seconds_left, seconds_left = _time_left(snapshot, tally.flops_left, driver is not None)
    return StudyStatus(
        name=config.name,
        uuid=snapshot.uuid,
        seeds=list(config.seed_list),
        trials=trials,
        n_unasked=tally.n_runs_unasked // len(config.seed_list),
        n_complete=len(snapshot.results) - len(failures),
        n_failed=len(failures),
        n_missing=tally.n_missing,
        failures=failures,
        frontier=on,
        driver=driver,
        run_seconds_left=run_seconds_left,
        seconds_left=seconds_left,
        search_ended=tally.search_ended,
        running=read_reports(directory.reports_file, driver.get("pid")) if driver is not None else [],
    )


def as_json(status: StudyStatus) -> str:
    """The status as JSON; times in seconds, losses in nats."""
    plain = {key: value for key, value in vars(status).items() if key not in ("trials", "failures", "frontier")}
    plain["running"] = [
        {"trial": one.trial, "seeds": one.seeds, "seconds_since_report": round(one.seconds)} for one in status.running
    ]
    plain["trials"] = [_plain_trial(row) for row in status.trials]
    plain["failures"] = [
        {
            "trial": result.trial,
            "arm": next(row.trial.spec.arm for row in status.trials if row.trial.number == result.trial),
            "seed": result.seed,
            "step": result.failure_step,
            "reason": result.failure,
        }
        for result in status.failures
    ]
    plain["frontier"] = [
        {"trial": point.trial, "n_params": point.n_params, "val_loss": point.mean, "n_seeds": len(point.losses)}
        for point in status.frontier
    ]
    return json.dumps(plain, indent=2)


def _plain_trial(row: TrialStatus) -> dict[str, Any]:
    trial = row.trial
    return {
        "number": trial.number,
        "arm": trial.spec.arm,
        "spec": trial.spec.model_dump(mode="json"),
        "n_params": trial.shape.n_params,
        "duplicate_of": trial.duplicate_of,
        "skipped": trial.skipped.reason if trial.skipped is not None else None,
        "stopped": trial.stop.reason if trial.stop is not None else None,
    } | {key: value for key, value in asdict(row).items() if key != "trial"}


def _trial_status(
    trial: Trial, results: dict[int, SeedResult], missing: list[int], on_frontier: set[int]
) -> TrialStatus:
    losses = {seed: result.final["final/val_loss"] for seed, result in results.items() if result.state == "complete"}
    return TrialStatus(
        trial,
        complete=sorted(losses),
        failed=sorted(results.keys() - losses.keys()),
        missing=missing,
        val_loss=float(np.mean([losses[seed] for seed in sorted(losses)])) if losses else None,
        on_frontier=trial.number in on_frontier,
    )


def _time_left(snapshot: Snapshot, flops_left: float, is_running: bool) -> tuple[float | None, float | None]:
    """Seconds of the remaining runs one after another, and seconds until a working driver is done."""
    flops = {trial.number: trial.shape.flops for trial in snapshot.trials}
    done = [result for result in snapshot.results if result.state == "complete"]
    seconds = sum(result.final["train_seconds"] for result in done)
    if not done or seconds <= 0:
        return None, None
    run_seconds_left = flops_left * seconds / sum(flops[result.trial] for result in done)
    recent = [result for result in done if snapshot.driver_started and result.ended > snapshot.driver_started]
    if not (is_running and recent):
        return run_seconds_left, None
    since = datetime.now(UTC) - datetime.fromisoformat(snapshot.driver_started or "")
    return run_seconds_left, flops_left * since.total_seconds() / sum(flops[result.trial] for result in recent)
