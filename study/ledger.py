"""What is asked, running and done: the one source of truth of a study.

One SQL database holds Optuna's own tables (the sampler's memory) and the tables below; results are keyed by
(trial, seed). Only the driver writes. Ours is the truth: Optuna's side is reconciled with it at every opening.
"""

from __future__ import annotations

import json
import statistics
import uuid as uuid_module
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
import sqlalchemy as sa
import sqlalchemy.exc
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from pydantic import ValidationError

from study.config import MPOArm, StudyConfig
from study.definition import definition, differences, only_adds, settled
from study.errors import StudyError
from study.search_space import METRIC_OF_OBJECTIVE, directions, listed_specs, make_sampler, suggest, teacher_spec
from study.trial import SeedResult, TrialShape, TrialSpec, budget_hash, now, tuning_trials

SCHEMA_VERSION = 1

LEDGER_ERRORS = (sqlalchemy.exc.SQLAlchemyError, StorageInternalError)
"""What a ledger raises that cannot be read or written any more."""

_UNDO = "undo the change, or begin a new study with another name or --dir"

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
_driver = sa.Table(
    "mpo_driver",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_uuid", sa.String, nullable=False),
    sa.Column("started", sa.String, nullable=False),
    sa.Column("environment", sa.Text, nullable=False),  # JSON
)
_growth = sa.Table(
    "mpo_growth",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_uuid", sa.String, nullable=False),
    sa.Column("made", sa.String, nullable=False),
    sa.Column("command", sa.String, nullable=False),  # what the user asked for
    sa.Column("config", sa.Text, nullable=True),  # JSON of the study from then on, where all of it has grown
    sa.Column("seeds", sa.Text, nullable=True),  # JSON: the seeds that single trials got, [[trial, [seed, ...]], ...]
)


@dataclass(frozen=True)
class Trial:
    """One configuration, its place in Optuna's numbering, and the counts that its shapes give."""

    number: int
    spec: TrialSpec
    shape: TrialShape
    budget_hash: str
    tuning_trials: int
    duplicate_of: int | None = None


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
        config: the study; must define the one on record, as it was begun or as it was before or after any growth.
        corpus_sha256: must be the one on record.
        examine: shape and budget of a spec in the study as it is now; called once for each new trial.
        uuid: of the study that must be there; None where it may be a new one.
        extend: take what the config has more than the study on record for a growth of it.

    Raises:
        StudyError: the database holds another study under this name, lacks the one that must be there, or cannot be
            opened.
    """

    def __init__(
        self,
        url: str,
        config: StudyConfig,
        corpus_sha256: str,
        examine: Callable[[TrialSpec, StudyConfig], Asked],
        uuid: str | None = None,
        extend: bool = False,
    ) -> None:
        self.config = config
        """The study as it is now: what the file says, with all that it has grown by since."""
        self._corpus_sha256 = corpus_sha256
        self._examine = examine
        with _in_one_line():
            self._open(url, corpus_sha256, uuid, extend)

    def _open(self, url: str, corpus_sha256: str, uuid: str | None, extend: bool) -> None:
        self._engine = open_database(url)
        _metadata.create_all(self._engine)
        self.uuid, self.created = self._open_study(corpus_sha256, uuid)
        self._open_growth(extend)
        config = self.config
        storage = optuna.storages.RDBStorage(url)
        self._optuna = optuna.create_study(
            storage=storage,
            study_name=optuna_name(config.name, self.uuid),
            directions=directions(config),
            load_if_exists=True,
        )
        self.results: dict[tuple[int, int], SeedResult] = {
            (result.trial, result.seed): result for result in read_results(self._engine, self.uuid)
        }
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
            row = connection.execute(sa.select(_study).where(_study.c.name == self.config.name)).one_or_none()
            if expected is not None and (row is None or row.uuid != expected):
                raise StudyError(
                    f"the ledger does not hold study {self.config.name} ({expected}), which was run here before; "
                    "put its ledger.db back, or begin a new study with another --dir"
                )
            if row is None:
                uuid, created = uuid_module.uuid4().hex, now()
                connection.execute(
                    _study.insert().values(
                        name=self.config.name,
                        uuid=uuid,
                        schema_version=SCHEMA_VERSION,
                        config=self.config.model_dump_json(),
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
        if row.corpus_sha256 != corpus_sha256:
            raise StudyError(
                f"study {row.name} was begun with another study file; it differs in corpus (SHA-256 was "
                f"{row.corpus_sha256[:12]}…, now {corpus_sha256[:12]}…); {_UNDO}"
            )
        return row.uuid, row.created

    def _open_growth(self, extend: bool) -> None:
        """Find out what the study has become, and whether the config means that."""
        grown = read_growth(self._engine, self.uuid, self.config.name)
        self._first_seeds = grown.history[0].seed_list
        self.more_seeds = grown.more_seeds
        self.changed = grown.changed
        self.newest_growth = grown.newest
        newest = grown.history[-1]
        self.config = settled(self.config, grown.history)
        changed = list(differences(definition(newest), definition(self.config)))
        if not changed:
            self._has_grown = len(grown.history) > 1
            return
        adds = only_adds(newest, self.config)
        if not (adds and extend):
            hint = "it only adds to the study: give --extend too to let it grow by that, or undo the change"
            raise StudyError(
                f"study {newest.name} was begun with another study file; it differs in {', '.join(changed)}; "
                f"{hint if adds else _UNDO}"
            )
        self.record_growth("--extend", self.config)
        self._has_grown = True

    def record_growth(
        self, command: str, config: StudyConfig | None = None, more_seeds: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        """Let the study grow; all of that but the words on record waits for the next opening.

        Args:
            command: what the user asked for.
            config: the study from now on; None where it stays as it is.
            more_seeds: further seeds of single trials, by their numbers.
        """
        self.newest_growth, self.changed = command, now()
        with _in_one_line(), self._engine.begin() as connection:
            connection.execute(
                _growth.insert().values(
                    study_uuid=self.uuid,
                    made=self.changed,
                    command=command,
                    config=config.model_dump_json() if config is not None else None,
                    seeds=json.dumps(list(more_seeds.items())) if more_seeds is not None else None,
                )
            )

    def _reconcile(self) -> None:
        """Bring Optuna's tables in line with ours."""
        for frozen in self._optuna.get_trials(deepcopy=False):
            if _TRIAL in frozen.user_attrs:
                trial = _trial_from(frozen)
                if self._has_grown:  # then more trials are among those that tuning chooses from
                    trial = self._with_new_budget(trial)
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

    def _with_new_budget(self, trial: Trial) -> Trial:
        teacher = teacher_spec(self.config, trial.spec)
        return replace(
            trial,
            budget_hash=budget_hash(trial.spec, self.config, self._corpus_sha256, teacher),
            tuning_trials=tuning_trials(trial.spec.arm, self.config),
        )

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
            self._optuna.sampler = make_sampler(self.config, next_number)
            asked = self._optuna.ask()
            spec = suggest(self.config, asked)
        else:
            return None
        examined = self._examine(spec, self.config)
        # What others start from has weights of its own, also where its arm came after a trial that it repeats.
        is_teacher = spec.arm in {arm.teacher for arm in self.config.arms if isinstance(arm, MPOArm)}
        trial = Trial(
            asked.number,
            spec,
            examined.shape,
            examined.budget_hash,
            examined.tuning_trials,
            duplicate_of=None if is_teacher else self._by_identity.get(examined.shape.identity),
        )
        asked.set_user_attr(_TRIAL, _attribute(trial))  # with it, the trial is completely written
        self._remember(trial)
        self._untold.add(trial.number)
        self._tell_if_over(trial.number)
        return trial

    @property
    def is_searching(self) -> bool:
        """Whether a sampler has trials to choose yet."""
        return self._n_searched() < self.config.budget.trials

    def _n_searched(self) -> int:
        return sum(self.config.arm(trial.spec.arm).is_searched for trial in self.trials.values())

    def _remember(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        self._unasked.pop(trial.spec, None)
        if trial.duplicate_of is None:
            self._by_identity[trial.shape.identity] = trial.number
        if self.missing_seeds(trial):
            self._lacking[trial.number] = trial

    # Recording ----------------------------------------------------------------------------------------------------

    def record(self, result: SeedResult) -> None:
        """Write one seed's result; a result that is already there stays as it is."""
        if (result.trial, result.seed) in self.results:
            return
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
        self.results[result.trial, result.seed] = result
        self._reopened.pop((result.trial, result.seed), None)
        if not self.missing_seeds(self.trials[result.trial]):
            self._lacking.pop(result.trial, None)
        for number in [result.trial, *self._duplicates_of(result.trial)]:
            self._tell_if_over(number)

    def reopen(self, results: Iterable[SeedResult]) -> None:
        """Take results for missing, until new ones replace them on record; Optuna keeps what it was told."""
        for result in list(results):
            self._reopened[result.trial, result.seed] = self.results.pop((result.trial, result.seed))
            self._lacking[result.trial] = self.trials[result.trial]

    def on_record(self, trial: Trial) -> list[SeedResult]:
        """A trial's results, or those of the trial it repeats, be they to be replaced."""
        number = trial.number if trial.duplicate_of is None else trial.duplicate_of
        every = self.results | self._reopened
        return [every[number, seed] for seed in self.seeds_of(trial) if (number, seed) in every]

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

    def seeds_of(self, trial: Trial) -> list[int]:
        """Seeds that a trial (or the one it repeats) is to have: the study's, and those that were added to it alone."""
        return seeds_of(trial, self.config, self.more_seeds)

    def missing_seeds(self, trial: Trial) -> list[int]:
        """Seeds that this trial has no result for; a duplicate lacks none."""
        if trial.duplicate_of is not None:
            return []
        return [seed for seed in self.seeds_of(trial) if (trial.number, seed) not in self.results]

    @property
    def n_trials(self) -> int:
        """Trials that the study will have."""
        return n_trials(self.config)

    @property
    def n_missing(self) -> int:
        """Runs that the study lacks, those of trials that are not asked yet included."""
        n_unasked = self.n_trials - len(self.trials)
        return sum(map(len, map(self.missing_seeds, self.lacking()))) + n_unasked * len(self.config.seed_list)

    def last_environment(self) -> dict[str, Any]:
        """What the study ran on last; empty before its first run."""
        query = sa.select(_driver.c.environment).where(_driver.c.study_uuid == self.uuid)
        with _in_one_line(), self._engine.connect() as connection:
            row = connection.execute(query.order_by(_driver.c.id.desc()).limit(1)).one_or_none()
        return json.loads(row.environment) if row is not None else {}

    def _duplicates_of(self, number: int) -> Iterator[int]:
        return (trial.number for trial in self.trials.values() if trial.duplicate_of == number)

    def _tell_if_over(self, number: int) -> None:
        """Tell Optuna the seed means of a trial (or of the trial it repeats) once all its first seeds are in.

        They are those that the study was begun with, for each of its trials: so the sampler compares like with like,
        and a study that grows while it runs is searched as one that grew when it was over.
        """
        if number not in self._untold:
            return
        trial = self.trials[number]
        source = self.trials[trial.duplicate_of] if trial.duplicate_of is not None else trial
        results = [self.results.get((source.number, seed)) for seed in self._first_seeds]
        results = [result for result in results if result is not None]
        if len(results) < len(self._first_seeds):
            return
        self._untold.remove(number)
        if any(result.state == "failed" for result in results):
            self._optuna.tell(number, state=TrialState.FAIL)
        else:
            self._optuna.tell(number, [_objective(objective, source, results) for objective in self.config.objectives])

    def close(self) -> None:
        self._engine.dispose()


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


def empty_ledger(url: str) -> sa.Engine:
    """A ledger with all its tables, Optuna's included, and no study."""
    engine = open_database(url)
    _metadata.create_all(engine)
    optuna.storages.RDBStorage(url).engine.dispose()
    return engine


@dataclass(frozen=True)
class Snapshot:
    """A ledger as it was when it was read."""

    trials: list[Trial]
    results: list[SeedResult]
    corpus_sha256: str
    uuid: str
    config: StudyConfig
    """The study as it is now; of what may change between runs, as it was when it was begun or grew."""
    more_seeds: dict[int, list[int]]
    driver_started: str | None
    """When a driver began last."""

    def seeds_of(self, trial: Trial) -> list[int]:
        return seeds_of(trial, self.config, self.more_seeds)


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
        raise StudyError(f"the ledger holds no study {name}") from None
    study = optuna.load_study(storage=optuna.storages.RDBStorage(url), study_name=optuna_name(name, uuid))
    trials = [_trial_from(frozen) for frozen in study.get_trials(deepcopy=False) if _TRIAL in frozen.user_attrs]
    grown = read_growth(engine, uuid, name)
    with engine.connect() as connection:
        started = connection.execute(
            sa.select(sa.func.max(_driver.c.started)).where(_driver.c.study_uuid == uuid)
        ).scalar()
    results = read_results(engine, uuid)
    return Snapshot(trials, results, corpus_sha256, uuid, grown.history[-1], grown.more_seeds, started)


def n_trials(config: StudyConfig) -> int:
    """Trials that a study will have."""
    return len(listed_specs(config)) + config.budget.trials


def seeds_of(trial: Trial, config: StudyConfig, more_seeds: Mapping[int, list[int]]) -> list[int]:
    """See `Ledger.seeds_of`."""
    number = trial.number if trial.duplicate_of is None else trial.duplicate_of
    return list(dict.fromkeys([*config.seed_list, *more_seeds.get(number, [])]))


@dataclass(frozen=True)
class Grown:
    """What became of a study: as it was begun and after each growth, and the seeds of single trials."""

    history: list[StudyConfig]
    changed: str
    """When it grew last, or was begun."""
    newest: str | None = None
    """What was asked for last."""
    more_seeds: dict[int, list[int]] = field(default_factory=dict)


def read_growth(engine: sa.Engine, study_uuid: str, name: str) -> Grown:
    """How a study was begun and has grown.

    Raises:
        StudyError: another version wrote what this one does not understand.
    """
    begun = sa.select(_study.c.config, _study.c.created).where(_study.c.uuid == study_uuid)
    query = sa.select(_growth).where(_growth.c.study_uuid == study_uuid).order_by(_growth.c.id)
    with engine.connect() as connection:
        study = connection.execute(begun).one()
        is_old = not sa.inspect(engine).has_table(_growth.name)  # and was only read since
        rows = [] if is_old else connection.execute(query).all()
    try:
        history = [
            StudyConfig.model_validate_json(text) for text in (study.config, *(row.config for row in rows)) if text
        ]
    except ValidationError as error:
        raise StudyError(
            f"study {name} was begun by another version, whose study file this one does not understand: "
            f"{error.errors()[0]['msg']}; go on with that version, or begin a new study with another --dir"
        ) from None
    more_seeds: dict[int, list[int]] = {}
    for row in rows:
        for number, seeds in json.loads(row.seeds or "[]"):
            more_seeds.setdefault(number, []).extend(seeds)
    newest = rows[-1] if rows else None
    return Grown(
        history,
        changed=newest.made if newest is not None else study.created,
        newest=newest.command if newest is not None else None,
        more_seeds=more_seeds,
    )


def optuna_name(name: str, uuid: str) -> str:
    """What Optuna calls a study: names may come again, UUIDs not."""
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


def _objective(objective: str, trial: Trial, results: list[SeedResult]) -> float:
    if objective == "n_params":
        return trial.shape.n_params
    return statistics.fmean(result.final[METRIC_OF_OBJECTIVE[objective]] for result in results)


_TRIAL = "trial"
"""Optuna's user attribute that holds a trial of ours: one, so that it is written whole or not at all."""


def _attribute(trial: Trial) -> dict[str, Any]:
    return {
        "spec": trial.spec.model_dump(mode="json"),
        "shape": trial.shape.__dict__,
        "budget_hash": trial.budget_hash,
        "tuning_trials": trial.tuning_trials,
        "duplicate_of": trial.duplicate_of,
    }


def _trial_from(frozen: optuna.trial.FrozenTrial) -> Trial:
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
        )
    except (KeyError, ValueError, TypeError) as error:
        raise StudyError(f"trial {frozen.number} in the ledger is damaged: {error}".splitlines()[0]) from None
