"""What is asked, running and done: the one source of truth of a study.

One SQL database holds Optuna's own tables (the sampler's memory) and the tables below; results are keyed by
(trial, seed). Only the driver writes. Ours is the truth: Optuna's side is reconciled with it at every opening.
"""

from __future__ import annotations

import json
import uuid as uuid_module
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna
import sqlalchemy as sa
import sqlalchemy.exc
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from pydantic import TypeAdapter, ValidationError

from study.config import StudyConfig
from study.early_stopping import Stop, stops_after
from study.errors import StudyError
from study.samplers import make_sampler
from study.search_space import directions, listed_specs, suggest
from study.tally import missing_seeds, search_ended
from study.telling import Pruned, what_to_tell, why_pruned, worst_loss
from study.trial import SeedResult, TrialShape, TrialSpec, now

SCHEMA_VERSION = 1

LEDGER_ERRORS = (sqlalchemy.exc.SQLAlchemyError, StorageInternalError)
"""What a ledger raises that cannot be read or written any more."""

_metadata = sa.MetaData()
_study = sa.Table(
    "mpo_study",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("uuid", sa.String, nullable=False),
    sa.Column("schema_version", sa.Integer, nullable=False),
    sa.Column("config", sa.Text, nullable=False),  # JSON of the study file that it was begun with
    sa.Column("corpus_sha256", sa.String, nullable=False),
    sa.Column("created", sa.String, nullable=False),
)
_result = sa.Table(
    "mpo_result",
    _metadata,
    sa.Column("study_uuid", sa.String, primary_key=True),
    sa.Column("trial", sa.Integer, primary_key=True),
    sa.Column("seed", sa.Integer, primary_key=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("content", sa.Text, nullable=False),  # JSON of the whole SeedResult
)
_stop = sa.Table(
    "mpo_stop",
    _metadata,
    sa.Column("study_uuid", sa.String, primary_key=True),
    sa.Column("trial", sa.Integer, primary_key=True),
    sa.Column("content", sa.Text, nullable=False),  # JSON of the whole Stop
)
_driver = sa.Table(
    "mpo_driver",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_uuid", sa.String, nullable=False),
    sa.Column("started", sa.String, nullable=False),
    sa.Column("environment", sa.Text, nullable=False),  # JSON
)


@dataclass(frozen=True)
class Trial:
    """One configuration, its place in Optuna's numbering, and the counts that its shapes give.

    pruned: it breaks a limit of the budget, and is never trained. stop: it, or the trial it repeats, was given up.
    """

    number: int
    spec: TrialSpec
    shape: TrialShape
    budget_hash: str
    tuning_trials: int
    duplicate_of: int | None = None
    pruned: Pruned | None = None
    stop: Stop | None = None


@dataclass(frozen=True)
class Asked:
    """What the ledger needs to know of a freshly resolved spec."""

    shape: TrialShape
    budget_hash: str
    tuning_trials: int


class Ledger:
    """Open or create the ledger of a study.

    Args:
        url: SQLAlchemy URL of the database, SQLite or PostgreSQL.
        config: the study; must define the same study as the one on record.
        corpus_sha256: must be the one on record.
        examine: shape and budget of a spec; called once for each new trial.
        uuid: of the study that must be there; None where it may be a new one.

    Raises:
        StudyError: the database holds another study under this name, lacks the one that must be there, or cannot be
            opened.
    """

    def __init__(
        self,
        url: str,
        config: StudyConfig,
        corpus_sha256: str,
        examine: Callable[[TrialSpec], Asked],
        uuid: str | None = None,
    ) -> None:
        self._config = config
        self._examine = examine
        with _in_one_line():
            self._open(url, corpus_sha256, uuid)

    def _open(self, url: str, corpus_sha256: str, uuid: str | None) -> None:
        config = self._config
        self._engine = open_database(url)
        _metadata.create_all(self._engine)
        self.uuid, self.created = self._open_study(corpus_sha256, uuid)
        self._optuna_storage = optuna.storages.RDBStorage(url)
        self._optuna = optuna.create_study(
            storage=self._optuna_storage,
            study_name=_optuna_name(config.name, self.uuid),
            directions=directions(config),
            load_if_exists=True,
        )
        self.results: dict[tuple[int, int], SeedResult] = {
            (result.trial, result.seed): result for result in read_results(self._engine, self.uuid)
        }
        self._stops = read_stops(self._engine, self.uuid)
        self._reopened: dict[tuple[int, int], SeedResult] = {}
        self.trials: dict[int, Trial] = {}
        self._by_identity: dict[str, int] = {}
        self._untold: set[int] = set()
        """Numbers of the trials that Optuna has not been told of."""
        self._lacking: dict[int, Trial] = {}
        """Trials that have no result yet for some seed."""
        self._unasked = dict.fromkeys(listed_specs(config))
        """Listed specs that are no trial yet, in the order of the file."""
        self._reconcile()

    # Opening ------------------------------------------------------------------------------------------------------

    def _open_study(self, corpus_sha256: str, expected: str | None) -> tuple[str, str]:
        """UUID and time of creation of the study on record, or of a new one."""
        with self._engine.begin() as connection:
            row = connection.execute(sa.select(_study).where(_study.c.name == self._config.name)).one_or_none()
            if expected is not None and (row is None or row.uuid != expected):
                raise StudyError(
                    f"the ledger does not hold study {self._config.name} ({expected}), which was run here before; "
                    "put its ledger.db back, or begin a new study with another --dir"
                )
            if row is None:
                uuid, created = uuid_module.uuid4().hex, now()
                connection.execute(
                    _study.insert().values(
                        name=self._config.name,
                        uuid=uuid,
                        schema_version=SCHEMA_VERSION,
                        config=self._config.model_dump_json(),
                        corpus_sha256=corpus_sha256,
                        created=created,
                    )
                )
                return uuid, created
        if row.schema_version != SCHEMA_VERSION:
            raise StudyError(
                f"the ledger of study {row.name} has schema version {row.schema_version}, this program knows "
                f"{SCHEMA_VERSION}"
            )
        try:
            begun_with = StudyConfig.model_validate_json(row.config)
        except ValidationError as error:
            raise StudyError(
                f"study {row.name} was begun by another version, whose study file this one does not understand: "
                f"{error.errors()[0]['msg']}"
            ) from None
        changed = list(_differences(_definition(begun_with), _definition(self._config)))
        if row.corpus_sha256 != corpus_sha256:
            changed.append(f"corpus (SHA-256 was {row.corpus_sha256[:12]}…, now {corpus_sha256[:12]}…)")
        if changed:
            raise StudyError(
                f"study {row.name} was begun with another study file; it differs in {', '.join(changed)}; "
                "undo the change, or begin a new study with another name or --dir"
            )
        return row.uuid, row.created

    def _reconcile(self) -> None:
        """Bring Optuna's tables in line with ours."""
        for frozen in self._optuna.get_trials(deepcopy=False):
            if _TRIAL in frozen.user_attrs:
                trial = _trial_from(frozen, self._stops)
                self._remember(trial)
                if frozen.state == TrialState.RUNNING:
                    self._untold.add(trial.number)
            elif frozen.state == TrialState.RUNNING:
                # The driver died before the trial was completely written.
                self._optuna.tell(frozen.number, state=TrialState.FAIL)
        homeless = sorted({number for number, _ in self.results} - self.trials.keys())
        if homeless:
            raise StudyError(f"the ledger is damaged: it has results of trial {homeless[0]}, but not the trial")
        for number in sorted(self._untold):
            self._tell_if_over(number)

    # Asking -------------------------------------------------------------------------------------------------------

    def ask(self, may_start: Callable[[TrialSpec], bool] = lambda spec: True) -> Trial | None:
        """The next trial of the study, or None where its budget is met, or every listed one left may not start yet."""
        spec = next(filter(may_start, self._unasked), None)
        if self._unasked and spec is None:
            return None  # so that what is searched neither comes before it nor makes a duplicate of it
        if spec is not None:
            self._optuna.sampler = optuna.samplers.RandomSampler(seed=0)  # has nothing to choose in a listed trial
            asked = self._optuna.ask()
        elif self.is_searching:
            next_number = len(self._optuna.get_trials(deepcopy=False))
            self._optuna.sampler = make_sampler(self._config, next_number)
            asked = self._optuna.ask()
            spec = suggest(self._config, asked)
        else:
            return None
        examined = self._examine(spec)
        original = self._by_identity.get(examined.shape.identity)
        is_searched = self._config.arm(spec.arm).is_searched
        reason = why_pruned(self._config.budget, examined.shape) if is_searched and original is None else None
        trial = Trial(
            asked.number,
            spec,
            examined.shape,
            examined.budget_hash,
            examined.tuning_trials,
            duplicate_of=original,
            pruned=Pruned(reason, now()) if reason is not None else None,
            stop=self._stops.get(original) if original is not None else None,
        )
        asked.set_user_attr(_TRIAL, _attribute(trial))  # with it, the trial is completely written
        self._remember(trial)
        self._untold.add(trial.number)
        self._tell_if_over(trial.number)
        return trial

    @property
    def is_searching(self) -> bool:
        """Whether a sampler has trials to choose yet."""
        return self._n_searched() < self._config.budget.trials and self.search_ended is None

    @property
    def search_ended(self) -> str | None:
        """Why the sampler is asked no more before the budget is met."""
        return search_ended(self._config, self.trials.values())

    def _n_searched(self) -> int:
        return sum(self._config.arm(trial.spec.arm).is_searched for trial in self.trials.values())

    def _remember(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        self._unasked.pop(trial.spec, None)
        if trial.duplicate_of is None:
            self._by_identity[trial.shape.identity] = trial.number
        if self.missing_seeds(trial):
            self._lacking[trial.number] = trial

    # Recording ----------------------------------------------------------------------------------------------------

    def record(self, result: SeedResult) -> None:
        """Write one seed's result, and which trials it stops; a result that is already there stays as it is."""
        if (result.trial, result.seed) in self.results:
            return
        stops = self._stops_after(result)
        of_seed = (_result.c.trial == result.trial) & (_result.c.seed == result.seed)
        with self._engine.begin() as connection:
            connection.execute(_result.delete().where((_result.c.study_uuid == self.uuid) & of_seed))  # see `reopen`
            connection.execute(
                _result.insert().values(
                    study_uuid=self.uuid,
                    trial=result.trial,
                    seed=result.seed,
                    state=result.state,
                    content=json.dumps(result.__dict__, allow_nan=False),
                )
            )
            for stop in stops:  # with the result, so that what is decided once is never decided again
                content = _STOP.dump_json(stop).decode()
                connection.execute(_stop.insert().values(study_uuid=self.uuid, trial=stop.trial, content=content))
        self.results[result.trial, result.seed] = result
        self._reopened.pop((result.trial, result.seed), None)
        for stop in stops:
            self._stops[stop.trial] = stop
            for number in [stop.trial, *self._duplicates_of(stop.trial)]:
                self.trials[number] = replace(self.trials[number], stop=stop)
        for number in [result.trial, *(stop.trial for stop in stops)]:
            if not self.missing_seeds(self.trials[number]):
                self._lacking.pop(number, None)
            for told in [number, *self._duplicates_of(number)]:
                self._tell_if_over(told)

    def _stops_after(self, result: SeedResult) -> list[Stop]:
        if self._config.early_stopping is None:
            return []
        results = self.results | {(result.trial, result.seed): result}

        def is_open(trial: Trial) -> bool:
            return trial.number in self._untold and bool(missing_seeds(self._config, trial, results))

        return stops_after(self._config, self.trials, results, result, is_open)

    def reopen(self, results: Iterable[SeedResult]) -> None:
        """Take results for missing, until new ones replace them on record; Optuna keeps what it was told."""
        for result in list(results):
            if self.trials[result.trial].stop is not None:
                continue  # it would not be trained again
            self._reopened[result.trial, result.seed] = self.results.pop((result.trial, result.seed))
            self._lacking[result.trial] = self.trials[result.trial]

    def on_record(self, trial: Trial) -> list[SeedResult]:
        """A trial's results, or those of the trial it repeats, be they to be replaced."""
        number = trial.number if trial.duplicate_of is None else trial.duplicate_of
        every = self.results | self._reopened
        return [every[number, seed] for seed in self._config.seed_list if (number, seed) in every]

    def record_driver(self, environment: Mapping[str, Any]) -> None:
        """Note a start of the driver, with the versions it runs on."""
        with _in_one_line(), self._engine.begin() as connection:
            connection.execute(
                _driver.insert().values(study_uuid=self.uuid, started=now(), environment=json.dumps(environment))
            )

    def first_environment(self) -> dict[str, Any]:
        """What the study was begun on."""
        query = sa.select(_driver.c.environment).where(_driver.c.study_uuid == self.uuid).order_by(_driver.c.id)
        with self._engine.connect() as connection:
            row = connection.execute(query.limit(1)).one_or_none()
        return json.loads(row.environment) if row is not None else {}

    def unasked(self) -> list[TrialSpec]:
        """Listed specs that are no trial yet."""
        return list(self._unasked)

    def lacking(self) -> list[Trial]:
        """Trials that have no result yet for some seed."""
        return list(self._lacking.values())

    def missing_seeds(self, trial: Trial) -> list[int]:
        """Seeds of the study that this trial has no result for and is to have."""
        return missing_seeds(self._config, trial, self.results)

    def _duplicates_of(self, number: int) -> Iterator[int]:
        return (trial.number for trial in self.trials.values() if trial.duplicate_of == number)

    def _tell_if_over(self, number: int) -> None:
        """Tell Optuna of a trial (or of the trial it repeats) once all its first seeds are in, or it has no more."""
        if number not in self._untold:
            return
        trial = self.trials[number]
        source = self.trials[trial.duplicate_of] if trial.duplicate_of is not None else trial
        if self.missing_seeds(source):
            return
        keys = [(source.number, seed) for seed in self._config.seed_list]
        results = [self.results[key] for key in keys if key in self.results]
        is_lacking = len(results) < len(keys) or any(result.state == "failed" for result in results)
        worst = worst_loss(source.shape, self.results.values()) if is_lacking else 0.0
        told = what_to_tell(self._config, trial, source, results, worst)
        self._untold.remove(number)
        if told.constraints:
            study_id = self._optuna_storage.get_study_id_from_name(self._optuna.study_name)
            trial_id = self._optuna_storage.get_trial_id_from_study_id_trial_number(study_id, number)
            for (
                name,
                value,
            ) in told.constraints.items():  # as `Trial.set_constraint` does, which needs a trial asked now
                self._optuna_storage.set_trial_system_attr(trial_id, f"constraints:{name}", value)
        if told.values is None:
            self._optuna.tell(number, state=TrialState.FAIL)
        else:
            self._optuna.tell(number, told.values)

    def close(self) -> None:
        self._engine.dispose()
        _close_storage(self._optuna_storage)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except LEDGER_ERRORS as error:
        raise StudyError(f"the ledger cannot be used: {error}".splitlines()[0]) from None


# Helpers --------------------------------------------------------------------------------------------------------------


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
        try:
            shown = sa.make_url(url).render_as_string(hide_password=True)
        except sqlalchemy.exc.SQLAlchemyError:
            shown = "the URL given"
        raise StudyError(f"cannot open the ledger {shown}: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class Snapshot:
    """A ledger as it was when it was read."""

    trials: list[Trial]
    results: list[SeedResult]
    corpus_sha256: str


def read_ledger(url: str, name: str) -> Snapshot:
    """Read a ledger without changing it, also while a driver writes.

    Raises:
        StudyError: there is no such study.
    """
    engine = open_database(url)
    try:
        with engine.connect() as connection:
            query = sa.select(_study.c.uuid, _study.c.corpus_sha256).where(_study.c.name == name)
            uuid, corpus_sha256 = connection.execute(query).one()
    except sqlalchemy.exc.SQLAlchemyError:
        engine.dispose()
        raise StudyError(f"the ledger holds no study {name}") from None
    storage = optuna.storages.RDBStorage(url)
    try:
        study = optuna.load_study(storage=storage, study_name=_optuna_name(name, uuid))
        stops = read_stops(engine, uuid)
        trials = [
            _trial_from(frozen, stops) for frozen in study.get_trials(deepcopy=False) if _TRIAL in frozen.user_attrs
        ]
        return Snapshot(trials, read_results(engine, uuid), corpus_sha256)
    finally:
        engine.dispose()
        _close_storage(storage)


def _close_storage(storage: optuna.storages.RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()


def _optuna_name(name: str, uuid: str) -> str:
    return f"{name}-{uuid}"


def read_results(engine: sa.Engine, study_uuid: str) -> list[SeedResult]:
    """Every result on record, in the order of (trial, seed)."""
    query = sa.select(_result.c.content).where(_result.c.study_uuid == study_uuid)
    with engine.connect() as connection:
        rows = connection.execute(query.order_by(_result.c.trial, _result.c.seed)).all()
    try:
        return [SeedResult(**json.loads(row.content)) for row in rows]
    except (ValueError, TypeError) as error:
        raise StudyError(f"a result in the ledger is damaged: {error}") from None


def read_stops(engine: sa.Engine, study_uuid: str) -> dict[int, Stop]:
    """Every decision to stop a trial, by its number."""
    query = sa.select(_stop.c.content).where(_stop.c.study_uuid == study_uuid)
    try:
        with engine.connect() as connection:
            rows = connection.execute(query.order_by(_stop.c.trial)).all()
    except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.ProgrammingError):
        return {}  # a ledger that an earlier version made, and that is only read
    try:
        stops = [_STOP.validate_json(row.content) for row in rows]
    except ValidationError as error:
        raise StudyError(f"a decision in the ledger is damaged: {error.errors()[0]['msg']}") from None
    return {stop.trial: stop for stop in stops}


def _definition(config: StudyConfig) -> dict[str, Any]:
    """What may not change under a study: all but its words, where it runs, and where its corpus lies."""
    plain = config.model_dump(
        mode="json",
        exclude={"description": True, "execution": True, "corpus": {"path", "sha256"}, "budget": {"max_repeats"}},
    )
    plain["seeds"] = list(config.seed_list)
    plain["arms"] = {arm["name"]: arm for arm in plain["arms"]}
    return plain


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Dotted keys in which two nested structures differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path} (was {json.dumps(old)}, now {json.dumps(new)})"


_STOP = TypeAdapter(Stop)
_TRIAL = "trial"
"""Optuna's user attribute that holds a trial of ours: one, so that it is written whole or not at all."""


def _attribute(trial: Trial) -> dict[str, Any]:
    return {
        "spec": trial.spec.model_dump(mode="json"),
        "shape": trial.shape.__dict__,
        "budget_hash": trial.budget_hash,
        "tuning_trials": trial.tuning_trials,
        "duplicate_of": trial.duplicate_of,
        "pruned": asdict(trial.pruned) if trial.pruned is not None else None,
    }


def _trial_from(frozen: optuna.trial.FrozenTrial, stops: Mapping[int, Stop]) -> Trial:
    content = frozen.user_attrs[_TRIAL]
    try:
        shape = content["shape"] | {"bonds": {name: tuple(b) for name, b in content["shape"]["bonds"].items()}}
        return Trial(
            number=frozen.number,
            spec=TrialSpec.model_validate_json(json.dumps(content["spec"])),
            shape=TrialShape(**shape),
            budget_hash=content["budget_hash"],
            tuning_trials=content["tuning_trials"],
            duplicate_of=content["duplicate_of"],
            pruned=Pruned(**content["pruned"]) if content.get("pruned") is not None else None,
            stop=stops.get(frozen.number if content["duplicate_of"] is None else content["duplicate_of"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise StudyError(f"trial {frozen.number} in the ledger is damaged: {error}".splitlines()[0]) from None
