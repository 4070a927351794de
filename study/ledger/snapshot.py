"""A ledger read without changing it."""

from __future__ import annotations

from dataclasses import dataclass

import optuna
import sqlalchemy as sa
import sqlalchemy.exc

from study.errors import StudyError
from study.ledger.tables import (
    Growths,
    check_results,
    close_optuna,
    driver_table,
    open_database,
    optuna_name,
    read_growths,
    read_results,
    read_stops,
    study_table,
)
from study.ledger.trials import TRIAL, Trial, from_attribute
from study.trial import SeedResult


@dataclass(frozen=True)
class Snapshot:
    """A ledger as it was when it was read."""

    uuid: str
    corpus_sha256: str
    trials: list[Trial]
    results: list[SeedResult]
    growths: Growths
    driver_started: str | None
    """When a driver began last."""


def read_ledger(url: str, name: str) -> Snapshot:
    """Read a ledger, also while a driver writes.

    Raises:
        StudyError: there is no such study, or it is damaged.
    """
    engine = open_database(url)
    try:
        try:
            with engine.connect() as connection:
                query = sa.select(study_table.c.uuid, study_table.c.corpus_sha256).where(study_table.c.name == name)
                uuid, corpus_sha256 = connection.execute(query).one()
        except sqlalchemy.exc.SQLAlchemyError:
            raise StudyError(f"the ledger holds no study {name}") from None
        latest = sa.select(sa.func.max(driver_table.c.started)).where(driver_table.c.study_uuid == uuid)
        with engine.connect() as connection:
            started = connection.execute(latest).scalar()
        trials, results = _read_trials(url, engine, name, uuid), read_results(engine, uuid)
        check_results(results, {trial.number for trial in trials})
        return Snapshot(uuid, corpus_sha256, trials, results, read_growths(engine, uuid, name), started)
    finally:
        engine.dispose()


def _read_trials(url: str, engine: sa.Engine, name: str, uuid: str) -> list[Trial]:
    storage = optuna.storages.RDBStorage(url)
    try:
        study = optuna.load_study(storage=storage, study_name=optuna_name(name, uuid))
        stops = read_stops(engine, uuid)
        return [
            from_attribute(frozen, stops) for frozen in study.get_trials(deepcopy=False) if TRIAL in frozen.user_attrs
        ]
    finally:
        close_optuna(storage)
