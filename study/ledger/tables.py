"""The tables of a ledger, and what is read from them.

One SQL database holds Optuna's own tables (the sampler's memory) and those below; results are keyed by (trial, seed).
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
import sqlalchemy as sa
import sqlalchemy.exc
from optuna.exceptions import StorageInternalError
from pydantic import TypeAdapter, ValidationError

from analysis.urls import hide_password
from study.config import StudyConfig
from study.early_stopping import Stop
from study.errors import StudyError
from study.trial import SeedResult

SCHEMA_VERSION = 1

LEDGER_ERRORS = (sqlalchemy.exc.SQLAlchemyError, StorageInternalError)
"""What a ledger raises that cannot be read or written any more."""

STOP = TypeAdapter(Stop)

metadata = sa.MetaData()
study_table = sa.Table(
    "mpo_study",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("uuid", sa.String, nullable=False),
    sa.Column("schema_version", sa.Integer, nullable=False),
    sa.Column("config", sa.Text, nullable=False),  # JSON of the study file that it was begun with
    sa.Column("corpus_sha256", sa.String, nullable=False),
    sa.Column("created", sa.String, nullable=False),
)
result_table = sa.Table(
    "mpo_result",
    metadata,
    sa.Column("study_uuid", sa.String, primary_key=True),
    sa.Column("trial", sa.Integer, primary_key=True),
    sa.Column("seed", sa.Integer, primary_key=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("content", sa.Text, nullable=False),  # JSON of the whole SeedResult
)
stop_table = sa.Table(
    "mpo_stop",
    metadata,
    sa.Column("study_uuid", sa.String, primary_key=True),
    sa.Column("trial", sa.Integer, primary_key=True),
    sa.Column("content", sa.Text, nullable=False),  # JSON of the whole Stop
)
driver_table = sa.Table(
    "mpo_driver",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_uuid", sa.String, nullable=False),
    sa.Column("started", sa.String, nullable=False),
    sa.Column("environment", sa.Text, nullable=False),  # JSON
)
growth_table = sa.Table(
    "mpo_growth",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_uuid", sa.String, nullable=False),
    sa.Column("made", sa.String, nullable=False),
    sa.Column("command", sa.String, nullable=False),  # what the user asked for
    sa.Column("config", sa.Text, nullable=True),  # JSON of the study from then on, where all of it has grown
    sa.Column("seeds", sa.Text, nullable=True),  # JSON: the seeds that single trials got, [[trial, [seed, ...]], ...]
)


def optuna_name(name: str, uuid: str) -> str:
    """What Optuna calls a study: names may come again, UUIDs not."""
    return f"{name}-{uuid}"


# The database ---------------------------------------------------------------------------------------------------------


@contextmanager
def in_one_line() -> Iterator[None]:
    """Say in one line what a database refuses.

    Raises:
        StudyError: it does.
    """
    try:
        yield
    except LEDGER_ERRORS as error:
        raise StudyError(f"the ledger cannot be used: {error}".splitlines()[0]) from None


def open_database(url: str) -> sa.Engine:
    """An engine for a ledger's URL.

    Raises:
        StudyError: it cannot be opened; the password, if the URL has one, is not shown.
    """
    try:
        engine = sa.create_engine(url)
        sa.inspect(engine).get_table_names()  # to connect alone does not read a SQLite file
        return engine
    except (sqlalchemy.exc.SQLAlchemyError, ModuleNotFoundError) as error:
        said = hide_password(str(error).splitlines()[0], url)
        raise StudyError(f"cannot open the ledger {hide_password(url)}: {said}") from None


def empty_ledger(url: str) -> sa.Engine:
    """A ledger with all its tables, Optuna's included, and no study."""
    engine = open_database(url)
    metadata.create_all(engine)
    close_optuna(optuna.storages.RDBStorage(url))
    return engine


def close_optuna(storage: optuna.storages.RDBStorage) -> None:
    """Let go of every connection that Optuna has to a ledger."""
    storage.remove_session()
    storage.engine.dispose()


# Rows -----------------------------------------------------------------------------------------------------------------


def read_results(engine: sa.Engine, study_uuid: str) -> list[SeedResult]:
    """Every result on record, in the order of (trial, seed)."""
    query = sa.select(result_table.c.content).where(result_table.c.study_uuid == study_uuid)
    with engine.connect() as connection:
        rows = connection.execute(query.order_by(result_table.c.trial, result_table.c.seed)).all()
    try:
        return [SeedResult(**json.loads(row.content)) for row in rows]
    except (ValueError, TypeError) as error:
        raise StudyError(f"a result in the ledger is damaged: {error}") from None


def check_results(results: Iterable[SeedResult], trials: Container[int]) -> None:
    """Raise a StudyError where a result's trial is not on record."""
    homeless = next((result.trial for result in results if result.trial not in trials), None)
    if homeless is not None:
        raise StudyError(f"the ledger is damaged: it has results of trial {homeless}, but not the trial")


def read_stops(engine: sa.Engine, study_uuid: str) -> dict[int, Stop]:
    """Every decision to stop a trial, by its number."""
    if not sa.inspect(engine).has_table(stop_table.name):
        return {}  # a ledger that an earlier version made, and that is only read
    query = sa.select(stop_table.c.content).where(stop_table.c.study_uuid == study_uuid)
    with engine.connect() as connection:
        rows = connection.execute(query.order_by(stop_table.c.trial)).all()
    try:
        stops = [STOP.validate_json(row.content) for row in rows]
    except ValidationError as error:
        raise StudyError(f"a decision in the ledger is damaged: {error.errors()[0]['msg']}") from None
    return {stop.trial: stop for stop in stops}


@dataclass(frozen=True)
class GrowthRecord:
    """One growth: when it was made, what was asked for, and how many seeds every trial was to have before and after."""

    made: str
    command: str
    seeds_before: int
    seeds_after: int


@dataclass(frozen=True)
class Growths:
    """What became of a study.

    records: each growth, in order. history: the study as it was begun, and after each growth of all of it. more_seeds:
    the seeds that single trials got, by their numbers. changed: when it grew last, or was begun.
    """

    records: Sequence[GrowthRecord]
    history: Sequence[StudyConfig]
    more_seeds: Mapping[int, Sequence[int]]
    changed: str


def read_growths(engine: sa.Engine, study_uuid: str, name: str) -> Growths:
    """How a study was begun and has grown.

    Raises:
        StudyError: another version wrote what this one does not understand.
    """
    begun = sa.select(study_table.c.config, study_table.c.created).where(study_table.c.uuid == study_uuid)
    query = sa.select(growth_table).where(growth_table.c.study_uuid == study_uuid).order_by(growth_table.c.id)
    with engine.connect() as connection:
        study = connection.execute(begun).one()
        is_old = not sa.inspect(engine).has_table(growth_table.name)  # see `read_stops`
        rows = [] if is_old else connection.execute(query).all()
    try:
        history, records = [StudyConfig.model_validate_json(study.config)], []
        for row in rows:
            before = len(history[-1].seed_list)
            if row.config:
                history.append(StudyConfig.model_validate_json(row.config))
            records.append(GrowthRecord(row.made, row.command, before, len(history[-1].seed_list)))
    except ValidationError as error:
        raise StudyError(
            f"study {name} was begun by another version, whose study file this one does not understand: "
            f"{error.errors()[0]['msg']}; go on with that version, or begin a new study with another --dir"
        ) from None
    more_seeds: dict[int, list[int]] = {}
    try:
        for row in rows:
            for number, seeds in json.loads(row.seeds or "[]"):
                more_seeds.setdefault(number, []).extend(seeds)
    except (ValueError, TypeError) as error:
        raise StudyError(f"a growth in the ledger is damaged: {error}") from None
    return Growths(records, history, more_seeds, changed=records[-1].made if records else study.created)
