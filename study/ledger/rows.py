"""The rows of a ledger's own tables, as they are read and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from pydantic import TypeAdapter, ValidationError

from analysis import run_schema
from study.errors import StudyError
from study.ledger.checksums import Damaged, insert, read_rows
from study.ledger.tables import SCHEMA_VERSION, driver_table, growth_table, result_table, stop_table, study_table
from study.ledger.trials import first_defect
from study.spec.config import StudyConfig
from study.spec.trial import RungStop, SeedResult, Stop, Trial

_RESULT, _STOP = TypeAdapter(SeedResult), TypeAdapter(Stop | RungStop)
_MORE_SEEDS = TypeAdapter(list[tuple[int, list[int]]])


def read_study(engine: sa.Engine, name: str) -> dict[str, Any] | None:
    """The row of a study; None if there is none.

    Raises:
        StudyError: another version wrote the row.
    """
    with engine.connect() as connection:
        versions = sa.select(study_table.c.schema_version).where(study_table.c.name == name)
        version = connection.execute(versions).scalar_one_or_none()
        if version not in (None, SCHEMA_VERSION):  # check first: all else may differ in that version
            raise StudyError(
                f"the ledger of study {name} has schema version {version}, but this mpo-study reads {SCHEMA_VERSION}; "
                "use the version that wrote it"
            )
        rows = read_rows(connection, study_table, study_table.c.name == name)
    return rows[0] if rows else None


def read_results(engine: sa.Engine, study_uuid: str) -> list[SeedResult]:
    """Every result on record, those of paused seeds included, in the order of (trial, seed)."""
    with engine.connect() as connection:
        return list(map(_result, read_rows(connection, result_table, result_table.c.study_uuid == study_uuid)))


def _result(row: Mapping[str, Any]) -> SeedResult:
    try:
        _RESULT.validate_json(row["content"], strict=True)
        result = SeedResult(**json.loads(row["content"]))
        _check_time(result.started)
        _check_time(result.ended)
    except (ValueError, TypeError) as error:
        raise Damaged(f"the result of trial {row['trial']}, seed {row['seed']}: {first_defect(error)}") from None
    is_whole = result.state == "failed" or result.final.keys() >= _NEEDED
    key = (result.trial, result.seed, result.state)
    if key != (row["trial"], row["seed"], row["state"]) or not is_whole:
        raise Damaged(
            f"the result of trial {row['trial']}, seed {row['seed']}, belongs to another run or is incomplete"
        )
    return result


def _check_time(time: str) -> None:
    if datetime.fromisoformat(time).tzinfo is None:
        raise ValueError(f"a time without a time zone: {time}")


_NEEDED = {*run_schema.CLAIMED, "train_seconds"}


def check_results(
    results: Iterable[SeedResult], trials: Mapping[int, Trial], seeds_of: Callable[[Trial], Collection[int]]
) -> None:
    """Raise a Damaged if a result's trial is not on record, or has no such seed."""
    of_study = None
    for result in results:
        trial = trials.get(result.trial)
        if trial is None:
            raise Damaged(f"it has results of trial {result.trial}, but the trial is missing")
        if of_study is None or trial.number != of_study[0]:
            of_study = trial.number, set(seeds_of(trial))
        if result.seed not in of_study[1]:
            raise Damaged(
                f"it has a result of trial {result.trial} for seed {result.seed}, which the trial does not have"
            )


def read_drivers(engine: sa.Engine, study_uuid: str) -> list[tuple[str, dict[str, Any]]]:
    """Start and environment of each driver of a study, in the order of their starts."""
    with engine.connect() as connection:
        rows = read_rows(connection, driver_table, driver_table.c.study_uuid == study_uuid)
    try:
        for row in rows:
            _check_time(row["started"])
        return [(row["started"], dict(json.loads(row["environment"]))) for row in rows]
    except (ValueError, TypeError) as error:
        raise Damaged(f"the environment of a driver: {first_defect(error)}") from None


def read_stops(engine: sa.Engine, study_uuid: str) -> dict[int, Stop | RungStop]:
    """Every decision to stop a trial, by its number."""
    with engine.connect() as connection:
        rows = read_rows(connection, stop_table, stop_table.c.study_uuid == study_uuid)
    try:
        stops = [_STOP.validate_json(row["content"]) for row in rows]
    except ValueError as error:
        raise Damaged(f"a decision to stop a trial: {first_defect(error)}") from None
    return {stop.trial: stop for stop in stops}


@dataclass(frozen=True)
class GrowthRecord:
    """One growth: its time, the user's command, and the number of seeds planned for every trial before and after.

    more_seeds: the seeds that single trials got by this growth, by their numbers.
    """

    made: str
    command: str
    seeds_before: int
    seeds_after: int
    more_seeds: Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Growths:
    """The growths of a study.

    records: each growth, in order. history: the study as it was begun, and after each growth of the whole study.
    changed: time of the last growth or the beginning.
    """

    records: Sequence[GrowthRecord]
    history: Sequence[StudyConfig]
    changed: str

    @property
    def more_seeds(self) -> Mapping[int, Sequence[int]]:
        """All seeds that single trials got, by their numbers."""
        found: dict[int, list[int]] = {}
        for record in self.records:
            for number, seeds in record.more_seeds.items():
                found.setdefault(number, []).extend(seeds)
        return found


def read_growths(engine: sa.Engine, study_uuid: str, name: str) -> Growths:
    """The beginning of a study and its growths.

    Raises:
        StudyError: another version wrote content that this version cannot read.
    """
    with engine.connect() as connection:
        [study] = read_rows(connection, study_table, study_table.c.uuid == study_uuid)
        rows = read_rows(connection, growth_table, growth_table.c.study_uuid == study_uuid)
    try:
        history, records = [StudyConfig.model_validate_json(study["config"])], []
        for row in rows:
            before = len(history[-1].seed_list)
            if row["config"]:
                history.append(StudyConfig.model_validate_json(row["config"]))
            more_seeds = dict(_more_seeds(row["seeds"]))
            records.append(GrowthRecord(row["made"], row["command"], before, len(history[-1].seed_list), more_seeds))
    except ValidationError as error:
        raise StudyError(
            f"study {name} was begun by another version of mpo-study, whose study file this version cannot read: "
            f"{error.errors()[0]['msg']}; use that version, or begin a new study with another --dir"
        ) from None
    return Growths(records, history, changed=records[-1].made if records else study["created"])


def _more_seeds(text: str | None) -> list[tuple[int, list[int]]]:
    try:
        return _MORE_SEEDS.validate_json(text or "[]", strict=True)
    except ValueError as error:
        raise Damaged(f"a growth: {first_defect(error)}") from None


# Writing --------------------------------------------------------------------------------------------------------------


def write_results(
    engine: sa.Engine, study_uuid: str, results: Iterable[SeedResult], stops: Iterable[Stop | RungStop]
) -> None:
    """Write results and the stops that they cause in one transaction, so that each decision is made only once.

    Rows on record under the same keys are replaced: results of paused seeds and of runs that were trained again, and
    stops of an attempt whose answer was lost.
    """
    with engine.begin() as connection:
        for result in results:
            key = {"study_uuid": study_uuid, "trial": result.trial, "seed": result.seed}
            content = json.dumps(result.__dict__, allow_nan=False)
            _replace(connection, result_table, key, state=result.state, content=content)
        for stop in stops:
            key = {"study_uuid": study_uuid, "trial": stop.trial}
            _replace(connection, stop_table, key, content=_STOP.dump_json(stop).decode())


def _replace(connection: sa.Connection, table: sa.Table, key: Mapping[str, Any], **values: Any) -> None:
    connection.execute(table.delete().where(*(table.c[column] == value for column, value in key.items())))
    insert(connection, table, **key, **values)


def write_growth(
    engine: sa.Engine,
    study_uuid: str,
    record: GrowthRecord,
    config: StudyConfig | None,
) -> None:
    """Write a growth; for the arguments see `Ledger.record_growth`."""
    with engine.begin() as connection:
        insert(
            connection,
            growth_table,
            study_uuid=study_uuid,
            made=record.made,
            command=record.command,
            config=config.model_dump_json() if config is not None else None,
            seeds=json.dumps(list(record.more_seeds.items())) if record.more_seeds else None,
        )
