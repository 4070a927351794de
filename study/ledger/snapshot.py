"""A ledger read without changing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import optuna
import sqlalchemy as sa

from study.errors import StudyError
from study.ledger.database import check_file, close_optuna, in_one_line, open_database, open_optuna, way_back
from study.ledger.rows import (
    Growths,
    check_results,
    read_drivers,
    read_growths,
    read_results,
    read_stops,
    read_study,
)
from study.ledger.tables import optuna_name, study_table
from study.ledger.tally import seeds_of
from study.ledger.trials import TRIAL, check_trials, from_attribute, read_frozen
from study.spec.trial import RungStop, SeedResult, Stop, Trial


@dataclass(frozen=True)
class Snapshot:
    """The content of a ledger at the time of reading."""

    uuid: str
    corpus_sha256: str
    trials: list[Trial]
    results: list[SeedResult]
    growths: Growths
    driver_started: str | None
    """Time of the last start of a driver."""


def read_ledger(url: str, name: str) -> Snapshot:
    """Read a ledger, also while a driver writes.

    Raises:
        StudyError: there is no such study, or the ledger is damaged.
    """
    with in_one_line(url):
        engine = open_database(url)
        try:
            return _read(url, engine, name)
        finally:
            engine.dispose()


def _read(url: str, engine: sa.Engine, name: str) -> Snapshot:
    check_file(engine)
    row = read_study(engine, name) if sa.inspect(engine).has_table(study_table.name) else None
    if row is None:
        raise StudyError(f"the ledger contains no study {name}{way_back(url, '; ')}")
    uuid, growths, stops = row["uuid"], read_growths(engine, row["uuid"], name), read_stops(engine, row["uuid"])
    results, trials = read_results(engine, uuid), _read_trials(url, name, uuid, stops)
    config, by_number = growths.history[-1], {trial.number: trial for trial in trials}
    check_trials(by_number, {arm.name for arm in config.arms}, stops)
    check_results(results, by_number, partial(seeds_of, config, growths.more_seeds))
    started = max((started for started, _ in read_drivers(engine, uuid)), default=None)
    results = [result for result in results if result.state != "paused"]
    return Snapshot(uuid, row["corpus_sha256"], trials, results, growths, started)


def _read_trials(url: str, name: str, uuid: str, stops: Mapping[int, Stop | RungStop]) -> list[Trial]:
    storage = open_optuna(url)
    try:
        study = optuna.load_study(storage=storage, study_name=optuna_name(name, uuid))
        return [from_attribute(frozen, stops) for frozen in read_frozen(study) if TRIAL in frozen.user_attrs]
    except KeyError:  # a driver was killed when it began the study; results without trials are found later
        return []
    finally:
        close_optuna(storage)
