"""The ledger that a driver writes.

Only the driver writes. Our tables are authoritative: Optuna's are reconciled with them at every opening.
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.trial import TrialState

from study.errors import StudyError
from study.ledger.checksums import insert
from study.ledger.database import in_one_line
from study.ledger.known import KnownResults, KnownTrials
from study.ledger.opening import adds_to, open_study, open_tables
from study.ledger.optuna_study import OptunaStudy
from study.ledger.rows import (
    GrowthRecord,
    check_results,
    read_drivers,
    read_growths,
    read_results,
    read_stops,
    write_growth,
    write_results,
)
from study.ledger.tables import driver_table, optuna_name
from study.ledger.tally import Tally
from study.ledger.trials import TRIAL, check_trials, from_attribute
from study.search.early_stopping import stops_after
from study.search.halving import Rungs
from study.search.samplers import make_sampler
from study.search.telling import what_to_tell, why_skipped, worst_values
from study.spec.config import StudyConfig
from study.spec.definition import settled
from study.spec.search_space import directions, listed_specs, start_spec, suggest
from study.spec.trial import (
    RungStop,
    SeedResult,
    Skipped,
    Stop,
    Trial,
    TrialShape,
    TrialSpec,
    budget_hash,
    now,
    tuning_trials,
)


class Ledger:
    """Open or create the ledger of a study.

    Args:
        url: SQLAlchemy URL of the database, SQLite or PostgreSQL.
        config: the study; must match the one on record as it was begun, or as it was before or after any growth.
        corpus_sha256: checksum of the corpus; must equal the one on record.
        shape_of: computes the shape of a spec; called once for each new trial.
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
        shape_of: Callable[[TrialSpec], TrialShape],
        uuid: str | None = None,
        *,
        may_begin: bool = True,
        extend: bool = False,
    ) -> None:
        self._url, self._corpus_sha256, self._shape_of = url, corpus_sha256, shape_of
        self._driver: int | None = None
        """Number of this start in the table of drivers."""
        self.flops_recorded = 0.0
        """FLOPs of the runs recorded since the ledger was opened."""
        with in_one_line(url):
            self._engine = open_tables(url)
            self.uuid, self.created = open_study(self._engine, url, config, corpus_sha256, uuid, may_begin)
            growths = read_growths(self._engine, self.uuid, config.name)
            self.config = settled(config, growths.history)
            """The current study: the content of the file, with all growths since."""
            is_extended = adds_to(growths, self.config, extend)
            self._has_grown = len(growths.history) > 1 or is_extended
            self._first_seeds = growths.history[0].seed_list
            self.changed, self.growths = growths.changed, list(growths.records)
            self._start_arms = {arm.start_arm for arm in self.config.arms} - {None}
            name = optuna_name(self.config.name, self.uuid)
            self._optuna = OptunaStudy(
                url, name, dict(zip(self.config.objectives, directions(self.config), strict=True))
            )
            on_record = read_results(self._engine, self.uuid)
            self.results = KnownResults(result for result in on_record if result.state != "paused")
            self._paused = {(each.trial, each.seed): each for each in on_record if each.state == "paused"}
            """Results of seeds at a rung, by (trial, seed), which are not in `results`."""
            self._rungs = Rungs(self.config, self._first_seeds)
            self.environments = [environment for _, environment in read_drivers(self._engine, self.uuid)]
            """Environments of the study's runs, in their order."""
            self._stops = read_stops(self._engine, self.uuid)
            self.trials = KnownTrials(listed_specs(self.config))
            self._untold: set[int] = set()
            """Numbers of the trials that Optuna has not been told of."""
            self._to_tell: list[int] = []
            """Untold trials that may have ended since Optuna was last told."""
            self._stopped: list[Trial] = []
            """Trials that results have stopped, which `record` has not returned yet."""
            self.tally = Tally(self.config, growths.more_seeds, self.results)
            self._reconcile()
            if is_extended:
                self.record_growth("--extend", self.config)

    # Growing and reconciling --------------------------------------------------------------------------------------

    def record_growth(
        self, command: str, config: StudyConfig | None = None, more_seeds: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        """Record a growth; it takes effect when the ledger is next opened.

        Args:
            command: what the user asked for.
            config: the study from now on; None if it stays as it is.
            more_seeds: further seeds of single trials, by their numbers.
        """
        self.changed = now()
        before = self.growths[-1].seeds_after if self.growths else len(self._first_seeds)
        after = before if config is None else len(config.seed_list)
        self.growths.append(GrowthRecord(self.changed, command, before, after, more_seeds or {}))
        with in_one_line(self._url):
            write_growth(self._engine, self.uuid, self.growths[-1], config)

    def _reconcile(self) -> None:
        """Bring Optuna's tables in line with ours."""
        known = self._optuna.trials()
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
        check_results([*self.results.values(), *self._paused.values()], self.trials, self.tally.seeds_of)
        if self.config.search.halving is not None:
            for trial in self.trials.values():
                self._rungs.restore(trial, self._by_seed(trial))
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
            self._optuna.fail(frozen.number)

    def catch_up(self) -> None:
        """Read trials that were created just before the connection was lost, so that this driver never got the answer.

        Raises:
            StudyError: another driver has started in the meantime.
        """
        self._optuna.refresh()
        drivers = sa.select(sa.func.max(driver_table.c.id)).where(driver_table.c.study_uuid == self.uuid)
        with self._engine.connect() as connection:
            if connection.scalar(drivers) != self._driver and self._driver is not None:
                raise StudyError("another driver has worked on this study")
        for frozen in self._optuna.trials():
            if frozen.number not in self.trials:
                self._next_number = max(self._next_number, frozen.number + 1)
                self._take_in(frozen)
                self._to_tell += [frozen.number] if frozen.number in self._untold else []
        self._tell_what_is_over()

    def _with_new_budget(self, trial: Trial) -> Trial:
        budget, tuning = self._budget_of(trial.spec)
        return replace(trial, budget_hash=budget, tuning_trials=tuning)

    def _budget_of(self, spec: TrialSpec) -> tuple[str, int]:
        """Budget hash of a spec in the current study, and its number of tuning trials."""
        budget = budget_hash(spec, self.config, self._corpus_sha256, start_spec(self.config, spec))
        return budget, tuning_trials(spec.arm, self.config)

    # Asking -------------------------------------------------------------------------------------------------------

    def ask(self, may_start: Callable[[str], bool] = lambda arm: True) -> Trial | None:
        """The next trial of the study; None if it has all its trials, or if no remaining listed trial may start yet.

        Args:
            may_start: whether trials that begin from this arm may start.
        """
        self._tell_what_is_over()
        spec = self.trials.next_listed(may_start)
        if spec is not None:
            number = self._optuna.new_trial()
        elif self.trials.has_unasked:
            return None  # a searched trial must neither precede a listed one nor make it a duplicate
        elif self.tally.is_searching:
            asked = self._optuna.ask(make_sampler(self.config, self._next_number))
            number, spec = asked.number, suggest(self.config, asked)
        else:
            return None
        self._next_number = number + 1
        trial = self._new_trial(number, spec)
        self._optuna.write(trial)
        self._remember(trial)
        self._untold.add(trial.number)
        self._to_tell.append(trial.number)
        self._tell_what_is_over()
        return trial

    def _new_trial(self, number: int, spec: TrialSpec) -> Trial:
        shape = self._shape_of(spec)
        original = self._original_for(spec.arm, shape)
        skipped = original.skipped if original is not None else None
        is_searched = self.config.arm(spec.arm).is_searched
        reason = why_skipped(self.config.search, shape) if is_searched and original is None else None
        return Trial(
            number,
            spec,
            shape,
            *self._budget_of(spec),
            duplicate_of=original.number if original is not None else None,
            skipped=Skipped(reason, now()) if reason is not None else skipped,
            stop=original.stop if original is not None else None,
        )

    def _original_for(self, arm: str, shape: TrialShape) -> Trial | None:
        """The trial that a new trial of this arm repeats; None if it repeats none.

        A start must have its own weights, so it repeats none. In a study that grew, a listed trial may come after an
        equal searched one. It does not repeat that one if the search skipped or stopped it, or may still do so.
        """
        original = self.trials.identical(shape.identity)
        if original is None or arm in self._start_arms:
            return None
        may_differ = self.config.arm(original.spec.arm).is_searched and not self.config.arm(arm).is_searched
        is_whole = original.skipped is None and original.stop is None and not self.tally.missing_seeds(original)
        return original if is_whole or not may_differ else None

    def _remember(self, trial: Trial) -> None:
        self.trials.add(trial)
        self.tally.add(trial)

    # Recording ----------------------------------------------------------------------------------------------------

    def record(self, *results: SeedResult) -> list[Trial]:
        """Write results of one trial, all or none; a result already on record stays as it is.

        If the database fails in between, the same call completes the rest later.

        Returns:
            The trials that these results stop, with the trials that repeat them.
        """
        new = [self._from_its_start(result) for result in results if (result.trial, result.seed) not in self.results]
        if new:
            self._write(new)
        self._tell_what_is_over()
        stopped, self._stopped = self._stopped, []
        return stopped

    def _from_its_start(self, result: SeedResult) -> SeedResult:
        """The result of a run that paused at a rung began when its first part did."""
        paused = self._paused.get((result.trial, result.seed))
        return result if paused is None else replace(result, started=paused.started)

    def _write(self, new: Sequence[SeedResult]) -> None:
        stops = self._stops_after(new)
        write_results(self._engine, self.uuid, new, stops)
        for result in new:
            trial, key = self.trials[result.trial], (result.trial, result.seed)
            before = _share_done(trial, self._paused.pop(key, None))
            self.flops_recorded += (_share_done(trial, result) - before) * trial.shape.flops
            if result.state == "paused":
                self._paused[key] = result
                continue
            self.results.add(result)
            self.tally.note(trial, result.seed)
        for stop in stops:
            self._stops[stop.trial] = stop
            for trial in self.trials.sharing(stop.trial):
                self.trials[trial.number] = replace(trial, stop=stop)
                self.tally.look_at(self.trials[trial.number])
                self._stopped.append(self.trials[trial.number])
        for number in [new[0].trial, *(stop.trial for stop in stops)]:
            self._to_tell += [trial.number for trial in self.trials.sharing(number)]

    def _stops_after(self, new: Sequence[SeedResult]) -> list[Stop] | list[RungStop]:
        if self.config.search.halving is not None:
            return self._rung_stops_after(new)
        if self.config.search.early_stopping is None:
            return []
        own = {(result.trial, result.seed): result for result in new}
        lacking = [trial for trial in self.lacking() if trial.number in self._untold]
        may_stop = [t for t in lacking if any((t.number, seed) not in own for seed in self.tally.missing_seeds(t))]
        may_stop.sort(key=lambda trial: trial.number)
        return stops_after(self.config, self.trials, ChainMap(own, self.results), new[-1], may_stop)

    def _rung_stops_after(self, new: Sequence[SeedResult]) -> list[RungStop]:
        trial = self.trials[new[0].trial]
        if trial.stop is not None:
            return []
        by_seed = self._by_seed(trial) | {result.seed: result for result in new}
        stop = self._rungs.note(trial, by_seed, after=(trial.number, new[-1].seed))
        return [] if stop is None else [stop]

    def _by_seed(self, trial: Trial) -> dict[int, SeedResult]:
        """A trial's own results by seed, those of paused seeds included."""
        keys = [(trial.number, seed) for seed in self.tally.seeds_of(trial)]
        return {key[1]: known[key] for key in keys for known in (self.results, self._paused) if key in known}

    def paused(self, trial: int, seed: int) -> SeedResult | None:
        """The result so far of a seed that waits at a rung, or trains from there; None for any other."""
        return self._paused.get((trial, seed))

    def leg(self, trial: Trial) -> tuple[Sequence[int], int | None]:
        """The missing seeds of a trial that may train now, and the step at which they pause; None: they do not."""
        missing = self.tally.missing_seeds(trial)
        if self.config.search.halving is None:
            return missing, None
        return self._rungs.leg(trial, missing, self._by_seed(trial))

    def reopen(self, results: Iterable[SeedResult]) -> None:
        """Treat results as missing until new ones replace them on record; Optuna keeps what it was told."""
        for result in list(results):
            if self.trials[result.trial].stop is None:  # a stopped trial would not be trained again
                self.results.reopen(result)
                self.tally.look_at(self.trials[result.trial])

    def record_driver(self, environment: Mapping[str, Any]) -> None:
        """Record a start of the driver, with its environment."""
        with in_one_line(self._url), self._engine.begin() as connection:
            content = json.dumps(environment)
            self._driver = insert(connection, driver_table, study_uuid=self.uuid, started=now(), environment=content)
        self.environments.append(dict(environment))

    # Telling ------------------------------------------------------------------------------------------------------

    def _tell_what_is_over(self) -> None:
        while self._to_tell:
            self._tell_if_over(self._to_tell[0])
            del self._to_tell[0]

    def _tell_if_over(self, number: int) -> None:
        """Tell Optuna about a trial (or the one it repeats) once all its first seeds have results.

        First seeds are those that the study was begun with, the same for every trial. So the sampler compares equal
        seeds. The search is the same whether a study grows while it runs or when it is over.
        """
        if number not in self._untold:
            return
        trial = self.trials[number]
        source = self.trials[trial.source]
        if self.tally.first_missing(source) in self._first_seeds:  # first seeds come first
            return
        keys = [(source.number, seed) for seed in self._first_seeds]
        results = [known[key] for key in keys for known in (self.results, self._paused) if key in known]
        is_lacking = len(results) < len(keys) or any(result.state == "failed" for result in results)
        worst = worst_values(self.config, source.shape, self.results.extremes) if is_lacking else {}
        told = what_to_tell(self.config, trial, source, results, worst)
        self._optuna.tell(number, told)
        self._untold.remove(number)

    # State --------------------------------------------------------------------------------------------------------

    def on_record(self, trial: Trial) -> list[SeedResult]:
        """Results of a trial or of the one it repeats, including those to be replaced."""
        return self.results.on_record(trial.source, self.tally.seeds_of(trial))

    def lacking(self) -> Iterator[Trial]:
        """Trials that lack a result for a seed; the iterator is invalid after a change of the ledger."""
        return (self.trials[number] for number in self.tally.lacking)

    def close(self) -> None:
        """Close the database."""
        self._engine.dispose()
        self._optuna.close()


def _share_done(trial: Trial, result: SeedResult | None) -> float:
    """The share of a run's training behind this result; a final one counts as whole."""
    if result is None:
        return 0.0
    return result.curve[-1]["step"] / trial.spec.protocol.steps if result.state == "paused" else 1.0
