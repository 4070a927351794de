"""The ledger that a driver writes.

Only the driver writes. Our tables are authoritative: Optuna's are reconciled with them at every opening.
"""

from __future__ import annotations

import json
import math
import uuid as uuid_module
from collections import ChainMap, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from analysis import run_schema as schema
from study.errors import StudyError
from study.ledger.checksums import insert
from study.ledger.database import (
    check_file,
    check_tables,
    close_optuna,
    in_one_line,
    open_database,
    open_optuna,
    way_back,
)
from study.ledger.tables import (
    SCHEMA_VERSION,
    STOP,
    GrowthRecord,
    check_results,
    driver_table,
    growth_table,
    metadata,
    optuna_name,
    read_drivers,
    read_growths,
    read_results,
    read_stops,
    read_study,
    result_table,
    stop_table,
    study_table,
)
from study.ledger.tally import Tally
from study.ledger.trials import TRIAL, check_trials, from_attribute, read_frozen, to_attribute
from study.search.early_stopping import stops_after
from study.search.samplers import make_sampler
from study.search.telling import what_to_tell, why_skipped, worst_value
from study.spec.config import StudyConfig
from study.spec.definition import definition, differences, only_adds, settled
from study.spec.search_space import directions, listed_specs, start_spec, suggest
from study.spec.trial import SeedResult, Skipped, Stop, Trial, TrialShape, TrialSpec, budget_hash, now, tuning_trials

_UNDO = "undo the change, or begin a new study with another name or --dir"


@dataclass(frozen=True)
class Asked:
    """The data that the ledger needs about a freshly resolved spec."""

    shape: TrialShape
    budget_hash: str
    tuning_trials: int


class Ledger:
    """Open or create the ledger of a study.

    Args:
        url: SQLAlchemy URL of the database, SQLite or PostgreSQL.
        config: the study; must match the one on record as it was begun, or as it was before or after any growth.
        corpus_sha256: checksum of the corpus; must equal the one on record.
        examine: gives shape and budget of a spec in the current study; called once for each new trial.
        uuid: UUID of the study that must be there; None allows any.
        may_begin: whether it may be a new study.
        extend: let the study grow by everything that the config has beyond the study on record.

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
        *,
        may_begin: bool = True,
        extend: bool = False,
    ) -> None:
        self.config = config
        """The current study: the content of the file, with all growths since."""
        self._corpus_sha256 = corpus_sha256
        self._examine = examine
        self._driver: int | None = None
        """Number of this start in the table of drivers."""
        self.flops_recorded = 0.0
        """FLOPs of the runs recorded since the ledger was opened."""
        self._url = url
        with in_one_line(url):
            self._open(url, uuid, may_begin, extend)

    def _open(self, url: str, uuid: str | None, may_begin: bool, extend: bool) -> None:
        self._engine = open_database(url)
        check_file(self._engine)
        check_tables(self._engine, study_table, result_table)
        metadata.create_all(self._engine)
        self.uuid, self.created = self._open_study(uuid, may_begin)
        is_extended = self._open_growths(extend)
        self._optuna_database = open_optuna(url)
        # One cache for all calls: without it, the database searches all trials for a trial's number.
        self._optuna_storage = optuna.storages.get_storage(self._optuna_database)
        self._optuna = optuna.create_study(
            storage=self._optuna_storage,
            study_name=optuna_name(self.config.name, self.uuid),
            directions=directions(self.config),
            load_if_exists=True,
        )
        self._optuna_study_id = self._optuna_storage.get_study_id_from_name(self._optuna.study_name)
        self.results: dict[tuple[int, int], SeedResult] = {
            (result.trial, result.seed): result for result in read_results(self._engine, self.uuid)
        }
        self._environments = [environment for _, environment in read_drivers(self._engine, self.uuid)]
        self._extremes = self._extremes_on_record()
        self._stops = read_stops(self._engine, self.uuid)
        self._reopened: dict[tuple[int, int], SeedResult] = {}
        self.trials: dict[int, Trial] = {}
        self._by_identity: dict[str, int] = {}
        self._first_of_arm: dict[str, int] = {}
        self._duplicates: dict[int, list[int]] = defaultdict(list)
        """Numbers of the trials that repeat a trial, by the number of that trial."""
        self._untold: set[int] = set()
        """Numbers of the trials that Optuna has not been told of."""
        self._to_tell: list[int] = []
        """Untold trials that may have ended since Optuna was last told."""
        self._stopped: list[Trial] = []
        """Trials that results have stopped, which `record` has not returned yet."""
        self._tally = Tally(self.config, self._more_seeds, self.results)
        self._unasked: dict[str | None, OrderedDict[TrialSpec, int]] = defaultdict(OrderedDict)
        """Listed specs that are not trials yet, with their positions in the file, by the start that they wait for."""
        for place, spec in enumerate(listed_specs(self.config)):
            self._unasked[spec.start][spec] = place
        self._reconcile()
        if is_extended:
            self.record_growth("--extend", self.config)

    # Opening ------------------------------------------------------------------------------------------------------

    def _open_study(self, expected: str | None, may_begin: bool) -> tuple[str, str]:
        """UUID and time of creation of the study on record, or of a new one."""
        name = self.config.name
        row = read_study(self._engine, name)
        if expected is not None and (row is None or row["uuid"] != expected):
            raise StudyError(
                f"the ledger does not hold study {name} ({expected}), which was run here before; "
                f"put its ledger.db back, or begin a new study with another --dir{way_back(self._url, '; ')}"
            )
        if row is None and not may_begin:
            raise StudyError(f"no study {name} here that could grow; run it without that first")
        if row is None:
            uuid, created = uuid_module.uuid4().hex, now()
            with self._engine.begin() as connection:
                insert(
                    connection,
                    study_table,
                    name=name,
                    uuid=uuid,
                    schema_version=SCHEMA_VERSION,
                    config=self.config.model_dump_json(),
                    corpus_sha256=self._corpus_sha256,
                    created=created,
                )
            return uuid, created
        if row["corpus_sha256"] != self._corpus_sha256:
            raise StudyError(
                f"study {name} was begun with another study file; it differs in corpus (SHA-256 was "
                f"{row['corpus_sha256'][:12]}…, now {self._corpus_sha256[:12]}…); {_UNDO}"
            )
        return row["uuid"], row["created"]

    def _open_growths(self, extend: bool) -> bool:
        """Read the study's growths and check the config against them; returns whether the config adds more."""
        growths = read_growths(self._engine, self.uuid, self.config.name)
        self._first_seeds = growths.history[0].seed_list
        self.changed = growths.changed
        self.growths = list(growths.records)
        newest = growths.history[-1]
        self.config = settled(self.config, growths.history)
        self._more_seeds = growths.more_seeds
        self._start_arms = {arm.start for arm in self.config.arms} - {None}
        changed = list(differences(definition(newest), definition(self.config)))
        self._has_grown = len(growths.history) > 1 or bool(changed)
        if not changed:
            return False
        adds = only_adds(newest, self.config)
        if not (adds and extend):
            hint = "it only adds to the study: give --extend too to let it grow by that, or undo the change"
            raise StudyError(
                f"study {newest.name} was begun with another study file; it differs in {', '.join(changed)}; "
                f"{hint if adds else _UNDO}"
            )
        return True

    def record_growth(
        self, command: str, config: StudyConfig | None = None, more_seeds: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        """Put a growth on record; it takes effect when the ledger is next opened.

        Args:
            command: what the user asked for.
            config: the study from now on; None if it stays as it is.
            more_seeds: further seeds of single trials, by their numbers.
        """
        self.changed = now()
        before = self.growths[-1].seeds_after if self.growths else len(self._first_seeds)
        after = before if config is None else len(config.seed_list)
        self.growths.append(GrowthRecord(self.changed, command, before, after))
        with in_one_line(self._url), self._engine.begin() as connection:
            insert(
                connection,
                growth_table,
                study_uuid=self.uuid,
                made=self.changed,
                command=command,
                config=config.model_dump_json() if config is not None else None,
                seeds=json.dumps(list(more_seeds.items())) if more_seeds is not None else None,
            )

    def _reconcile(self) -> None:
        """Bring Optuna's tables in line with ours."""
        known = read_frozen(self._optuna)
        self._next_number = len(known)
        for frozen in known:
            self._take_in(frozen)
        check_trials(self.trials, {arm.name for arm in self.config.arms}, self._stops)
        for trial in self.trials.values():
            if trial.duplicate_of is not None and trial.spec.arm in self._start_arms:
                raise StudyError(
                    f"arm {trial.spec.arm} cannot be a start: its trial {trial.number} repeats trial "
                    f"{trial.duplicate_of}, and was never trained itself"
                )
        check_results(self.results.values(), self.trials, self.seeds_of)
        for number in sorted(self._untold):
            self._tell_if_over(number)

    def _take_in(self, frozen: optuna.trial.FrozenTrial) -> None:
        if TRIAL in frozen.user_attrs:
            trial = from_attribute(frozen, self._stops)
            if self._has_grown:  # then tuning chooses among more trials
                trial = self._with_new_budget(trial)
            self._remember(trial)
            if frozen.state == TrialState.RUNNING:
                self._untold.add(trial.number)
        elif frozen.state == TrialState.RUNNING:
            # The driver died before the trial was completely written.
            self._optuna.tell(frozen.number, state=TrialState.FAIL)

    def catch_up(self) -> None:
        """Take in trials that were asked for when the connection was lost, so that the answer never came.

        Raises:
            StudyError: another driver has started meanwhile.
        """
        self._optuna_database.remove_session()
        drivers = sa.select(sa.func.max(driver_table.c.id)).where(driver_table.c.study_uuid == self.uuid)
        with self._engine.connect() as connection:
            if connection.scalar(drivers) != self._driver and self._driver is not None:
                raise StudyError("another driver has worked on this study")
        for frozen in self._optuna.get_trials(deepcopy=False):
            if frozen.number not in self.trials:
                self._next_number = max(self._next_number, frozen.number + 1)
                self._take_in(frozen)
                self._to_tell += [frozen.number] if frozen.number in self._untold else []
        self._tell_what_is_over()

    def _with_new_budget(self, trial: Trial) -> Trial:
        start = start_spec(self.config, trial.spec)
        return replace(
            trial,
            budget_hash=budget_hash(trial.spec, self.config, self._corpus_sha256, start),
            tuning_trials=tuning_trials(trial.spec.arm, self.config),
        )

    # Asking -------------------------------------------------------------------------------------------------------

    def ask(self, may_start: Callable[[str], bool] = lambda arm: True) -> Trial | None:
        """The next trial of the study; None if it has all its trials, or if no remaining listed trial may start yet.

        Args:
            may_start: whether trials that begin from this arm may start.
        """
        self._tell_what_is_over()
        heads = [
            next((place, spec) for spec, place in specs.items())
            for start, specs in self._unasked.items()
            if specs and (start is None or may_start(start))
        ]
        if heads:
            _, spec = min(heads, key=lambda head: head[0])
            # Avoid Optuna's `ask`, which first searches all trials for a waiting one; its sampler has nothing to choose
            # here.
            trial_id = self._optuna_storage.create_new_trial(self._optuna_study_id)
            number = self._optuna_storage.get_trial_number_from_id(trial_id)
        elif any(self._unasked.values()):
            return None  # a searched trial must neither precede a listed one nor make it a duplicate
        elif self.is_searching:
            self._optuna.sampler = make_sampler(self.config, self._next_number)
            asked = self._optuna.ask()
            number, spec = asked.number, suggest(self.config, asked)
            trial_id = self._optuna_id(number)
        else:
            return None
        self._next_number = number + 1
        trial = self._new_trial(number, spec)
        self._optuna_storage.set_trial_user_attr(trial_id, TRIAL, to_attribute(trial))  # now it is completely written
        self._remember(trial)
        self._untold.add(trial.number)
        self._to_tell.append(trial.number)
        self._tell_what_is_over()
        return trial

    def _new_trial(self, number: int, spec: TrialSpec) -> Trial:
        examined = self._examine(spec, self.config)
        is_searched = self.config.arm(spec.arm).is_searched
        original = self._original_for(spec.arm, examined.shape)
        skipped = original.skipped if original is not None else None
        reason = why_skipped(self.config.search, examined.shape) if is_searched and original is None else None
        return Trial(
            number,
            spec,
            examined.shape,
            examined.budget_hash,
            examined.tuning_trials,
            duplicate_of=original.number if original is not None else None,
            skipped=Skipped(reason, now()) if reason is not None else skipped,
            stop=original.stop if original is not None else None,
        )

    def _original_for(self, arm: str, shape: TrialShape) -> Trial | None:
        """The trial that a new trial of this arm repeats; None if it repeats none.

        A start must have its own weights, so it repeats none. In a study that grew, a listed trial may come after an
        equal searched one. It does not repeat that one if the search skipped or stopped it, or may still do so.
        """
        original = self.trials.get(self._by_identity.get(shape.identity, -1))
        if original is None or arm in self._start_arms:
            return None
        may_differ = self.config.arm(original.spec.arm).is_searched and not self.config.arm(arm).is_searched
        is_whole = original.skipped is None and original.stop is None and not self.missing_seeds(original)
        return original if is_whole or not may_differ else None

    @property
    def is_searching(self) -> bool:
        """Whether a sampler still has trials to choose."""
        return self._tally.is_searching

    @property
    def search_ended(self) -> str | None:
        """Why the sampler is no longer asked although trials are missing."""
        return self._tally.search_ended

    def _remember(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        self._first_of_arm.setdefault(trial.spec.arm, trial.number)
        if trial.spec.start in self._unasked:
            self._unasked[trial.spec.start].pop(trial.spec, None)
        if trial.duplicate_of is None:
            self._by_identity[trial.shape.identity] = trial.number
        else:
            self._duplicates[trial.duplicate_of].append(trial.number)
        self._tally.add(trial)

    # Recording ----------------------------------------------------------------------------------------------------

    def record(self, *results: SeedResult) -> list[Trial]:
        """Write results of one trial, all or none; a result already on record stays as it is.

        If the database fails in between, the same call completes the rest later.

        Returns:
            The trials that these results stop, with the trials that repeat them.
        """
        new = [result for result in results if (result.trial, result.seed) not in self.results]
        if new:
            self._write(new)
        self._tell_what_is_over()
        stopped, self._stopped = self._stopped, []
        return stopped

    def _write(self, new: Sequence[SeedResult]) -> None:
        stops = self._stops_after(new)
        rows = result_table.c
        with self._engine.begin() as connection:
            for result in new:
                of_seed = (rows.study_uuid == self.uuid) & (rows.trial == result.trial) & (rows.seed == result.seed)
                connection.execute(result_table.delete().where(of_seed))  # see `reopen`
                insert(
                    connection,
                    result_table,
                    study_uuid=self.uuid,
                    trial=result.trial,
                    seed=result.seed,
                    state=result.state,
                    content=json.dumps(result.__dict__, allow_nan=False),
                )
            for stop in stops:  # in the same transaction, so that a decision is made only once
                content = STOP.dump_json(stop).decode()
                of_trial = (stop_table.c.study_uuid == self.uuid) & (stop_table.c.trial == stop.trial)
                connection.execute(stop_table.delete().where(of_trial))  # from an attempt whose answer was lost
                insert(connection, stop_table, study_uuid=self.uuid, trial=stop.trial, content=content)
        for result in new:
            self.results[result.trial, result.seed] = result
            self._reopened.pop((result.trial, result.seed), None)
            trial = self.trials[result.trial]
            self._tally.note(trial, result.seed)
            self.flops_recorded += trial.shape.flops
            self._extremes = _updated(self._extremes, [result])
        for stop in stops:
            self._stops[stop.trial] = stop
            for trial in self.sharing(stop.trial):
                self.trials[trial.number] = replace(trial, stop=stop)
                self._tally.look_at(self.trials[trial.number])
                self._stopped.append(self.trials[trial.number])
        for number in [new[0].trial, *(stop.trial for stop in stops)]:
            self._to_tell += [trial.number for trial in self.sharing(number)]

    def _stops_after(self, new: Sequence[SeedResult]) -> list[Stop]:
        if self.config.search.early_stopping is None:
            return []
        own = {(result.trial, result.seed): result for result in new}
        lacking = [trial for trial in self.lacking() if trial.number in self._untold]
        may_stop = [t for t in lacking if any((t.number, seed) not in own for seed in self.missing_seeds(t))]
        may_stop.sort(key=lambda trial: trial.number)
        return stops_after(self.config, self.trials, ChainMap(own, self.results), new[-1], may_stop)

    def reopen(self, results: Iterable[SeedResult]) -> None:
        """Treat results as missing until new ones replace them on record; Optuna keeps what it was told."""
        for result in list(results):
            if self.trials[result.trial].stop is not None:
                continue  # it would not be trained again
            self._reopened[result.trial, result.seed] = self.results.pop((result.trial, result.seed))
            self._tally.look_at(self.trials[result.trial])
        self._extremes = self._extremes_on_record()

    def record_driver(self, environment: Mapping[str, Any]) -> None:
        """Record a start of the driver, with its environment."""
        with in_one_line(self._url), self._engine.begin() as connection:
            content = json.dumps(environment)
            self._driver = insert(connection, driver_table, study_uuid=self.uuid, started=now(), environment=content)
        self._environments.append(dict(environment))

    # Telling ------------------------------------------------------------------------------------------------------

    def _tell_what_is_over(self) -> None:
        while self._to_tell:
            self._tell_if_over(self._to_tell[0])
            del self._to_tell[0]

    def _tell_if_over(self, number: int) -> None:
        """Tell Optuna about a trial (or the one it repeats) when no result of its first seeds is missing any more.

        First seeds are those that the study was begun with, the same for every trial. So the sampler compares equal
        seeds, and it makes no difference to the search whether a study grows while it runs or when it is over.
        """
        if number not in self._untold:
            return
        trial = self.trials[number]
        source = self.trials[trial.source]
        if self._tally.first_missing(source) in self._first_seeds:  # first seeds come first
            return
        keys = [(source.number, seed) for seed in self._first_seeds]
        results = [self.results[key] for key in keys if key in self.results]
        is_lacking = len(results) < len(keys) or any(result.state == "failed" for result in results)
        worst = self._worst_values(source.shape) if is_lacking else {}
        told = what_to_tell(self.config, trial, source, results, worst)
        if told.constraints:
            self._tell_constraints(number, told.constraints)
        state = TrialState.FAIL if told.values is None else None
        self._optuna.tell(number, told.values, state, skip_if_finished=True)  # by an attempt whose answer was lost
        self._untold.remove(number)

    def _tell_constraints(self, number: int, constraints: Mapping[str, float]) -> None:
        """Like Optuna's `Trial.set_constraint`, which needs a trial that was asked in this process."""
        trial_id = self._optuna_id(number)
        with suppress(UpdateFinishedTrialError):  # it has been told already, see `_tell_if_over`
            for name, value in constraints.items():
                self._optuna_storage.set_trial_system_attr(trial_id, f"constraints:{name}", value)

    def _optuna_id(self, number: int) -> int:
        return self._optuna_storage.get_trial_id_from_study_id_trial_number(self._optuna_study_id, number)

    # State --------------------------------------------------------------------------------------------------------

    def on_record(self, trial: Trial) -> list[SeedResult]:
        """Results of a trial or of the one it repeats, including those to be replaced."""
        keys = [(trial.source, seed) for seed in self.seeds_of(trial)]
        found = [self.results.get(key) or self._reopened.get(key) for key in keys]
        return [result for result in found if result is not None]

    def unasked(self) -> list[TrialSpec]:
        """Listed specs that are not trials yet."""
        places = {spec: place for specs in self._unasked.values() for spec, place in specs.items()}
        return sorted(places, key=places.__getitem__)

    def lacking(self) -> Iterator[Trial]:
        """Trials that lack a result for a seed; the iterator is invalid after a change of the ledger."""
        return (self.trials[number] for number in self._tally.lacking)

    def sharing(self, number: int) -> list[Trial]:
        """The trial with this number, and those that repeat it."""
        return [self.trials[each] for each in (number, *self._duplicates.get(number, ()))]

    def first_of(self, arm: str) -> Trial | None:
        """The first trial of an arm; None if it has none yet."""
        number = self._first_of_arm.get(arm)
        return self.trials[number] if number is not None else None

    def seeds_of(self, trial: Trial) -> list[int]:
        """All seeds planned for a trial (or the one it repeats): the study's, and those added to this trial alone."""
        return self._tally.seeds_of(trial)

    def missing_seeds(self, trial: Trial) -> list[int]:
        """Planned seeds for which this trial has no result."""
        return self._tally.missing_seeds(trial)

    @property
    def n_trials(self) -> int:
        """Number of trials that the study will have."""
        return self._tally.n_trials

    @property
    def n_trials_over(self) -> int:
        """Number of trials that lack no seed."""
        return self._tally.n_over

    @property
    def n_missing(self) -> int:
        """Number of runs that the study lacks, including those of trials not asked yet."""
        return self._tally.n_missing

    @property
    def flops_left(self) -> float:
        """FLOPs of the missing runs, see `Tally.flops_left`."""
        return self._tally.flops_left

    @property
    def best_loss(self) -> float | None:
        """The lowest final validation loss on record, in nats; None if no run is complete."""
        lowest, _ = self._extremes[_LOSS]
        return lowest if math.isfinite(lowest) else None

    def _extremes_on_record(self) -> dict[str, tuple[float, float]]:
        """The lowest and the highest value of the loss and of each objective that seeds have, by key."""
        keys = [_LOSS, *map(schema.key_of, self._seed_objectives().values())]
        return _updated(dict.fromkeys(keys, (math.inf, -math.inf)), self.results.values())

    def _seed_objectives(self) -> dict[str, schema.Metric]:
        found = {objective: schema.OBJECTIVES[objective] for objective in self.config.objectives}
        return {objective: metric for objective, metric in found.items() if "count" not in metric.recorded}

    def _worst_values(self, shape: TrialShape) -> dict[str, float]:
        worst = {
            objective: worst_value(metric, shape, self._extremes[schema.key_of(metric)])
            for objective, metric in self._seed_objectives().items()
        }
        return {objective: value for objective, value in worst.items() if value is not None}

    def n_over_at(self, time: str) -> int:
        """Number of results on record that had ended at a time, given in the format of `trial.now`."""
        return sum(result.ended <= time for result in self.results.values())

    def first_environment(self) -> dict[str, Any]:
        """The environment in which the study was begun."""
        return next(iter(self._environments), {})

    def last_environment(self) -> dict[str, Any]:
        """The environment of the study's last run; empty before its first run."""
        return next(reversed(self._environments), {})

    def close(self) -> None:
        """Close the database."""
        self._engine.dispose()
        close_optuna(self._optuna_database)


def _updated(
    extremes: Mapping[str, tuple[float, float]], results: Iterable[SeedResult]
) -> dict[str, tuple[float, float]]:
    """The lowest and the highest values, with those of further complete results."""
    finals = [result.final for result in results if result.state == "complete"]
    updated = {}
    for key, (lowest, highest) in extremes.items():
        values = [final[key] for final in finals if key in final]
        updated[key] = min(lowest, *values, math.inf), max(highest, *values, -math.inf)
    return updated


_LOSS = "final/val_loss"
