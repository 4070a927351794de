"""The queue of units: the ledger's missing work in order, with starts before the trials that depend on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from study.ledger.ledger import Ledger
from study.ledger.lock import Hold
from study.ledger.outage import LedgerGone, Patience
from study.scheduler.reports import SILENT_SECONDS, Flights, Key
from study.spec.config import StudyConfig
from study.spec.trial import SeedResult, Trial, now
from study.spec.values import Choices, Range
from study.training.optimisers import why_alone
from study.training.storage import Storage
from study.training.unit import Starts, Unit, checkpointed, checkpoints_of

MAX_DEATHS = 3
"""A unit whose worker died this often, without an evaluation in between, is recorded as failed. If no worker began
with the unit, it is left for the next run of the study instead."""

MAX_STILLBORN = 10
"""If this many workers in a row die before they begin, the study stops."""

Finished = Literal["finished"]


@dataclass
class Queue:
    """Issues units from the ledger and takes their results back; both executors run on it.

    Args:
        on_result: called after each recorded result.
        on_record: called after each change of the ledger by results, before the others.
        on_stop: called with a trial that results have stopped, after those results.
        hold: this driver's hold on the ledger.
        on_answered: called with a new trial that needs no training: it repeats another, or is skipped.
        say: receives one line about things that the user should know.
    """

    config: StudyConfig
    ledger: Ledger
    storage: Storage
    corpus_sha256: str
    on_result: Callable[[SeedResult], None] = lambda result: None
    on_answered: Callable[[Trial], None] = lambda trial: None
    say: Callable[[str], None] = print
    on_stop: Callable[[Trial], None] = lambda trial: None
    on_record: Callable[[], None] = lambda: None
    hold: Hold = field(default_factory=Hold)
    aborted: str | None = None
    """Why no more units are issued although work is left; None if units can be issued."""
    in_flight: Flights = field(default_factory=Flights)
    _n_deaths: Counter[Key] = field(default_factory=Counter)
    _n_stillborn: Counter[Key] = field(default_factory=Counter)
    _n_stillborn_in_a_row: int = 0
    _given_up: dict[Key, str] = field(default_factory=dict)
    """Runs that were given up because no worker began them, with the reason for the last worker's death."""
    _block_that_fits: dict[int, int] = field(default_factory=dict)
    """For a trial that ran out of memory: the number of seeds to try."""
    _furthest_step: dict[Key, float] = field(default_factory=dict)
    _said_one_by_one: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._start_arms = {arm.start_arm for arm in self.config.arms} - {None}
        self._rel_error_chis = study_chis(self.config)
        self._patience = Patience(self.ledger, self.hold, self.say)

    def next_unit(self) -> Unit | Finished | None:
        """The next unit; None if all remaining work waits for units in flight; "finished" if nothing is left."""
        unit = self._issue()
        if unit is not None or (self.in_flight and self.aborted is None):
            return unit
        if self.aborted is None and self._given_up:
            n, why = len(self._given_up), next(iter(self._given_up.values()))
            self.aborted = (
                f"{n} run{'s' * (n != 1)} given up after {MAX_DEATHS} workers for each died before they began: {why}"
            )
        return "finished"

    def _issue(self) -> Unit | None:
        while self.aborted is None:
            must_wait = False
            for trial in self.ledger.lacking():
                block, doomed, is_waiting = self._startable(trial)
                must_wait |= is_waiting and self.config.arm(trial.spec.arm).is_searched
                if doomed:
                    self.complete(doomed)
                    break  # the iterator over `lacking` is no longer valid
                if block:
                    self.in_flight.issue((trial.number, seed) for seed in block)
                    return self._unit(trial, tuple(block))
            else:
                # Do not ask while a searched trial waits for its start: the sampler would choose without its result.
                if must_wait or not self._ask():
                    return None
        return None

    def _startable(self, trial: Trial) -> tuple[list[int], list[SeedResult], bool]:
        """Seeds that can start now; results of those whose start failed; whether a seed waits for its start."""
        block: list[int] = []
        doomed: list[SeedResult] = []
        is_waiting = False
        for seed in self.ledger.leg(trial)[0]:
            key = trial.number, seed
            if key in self.in_flight or key in self._given_up:
                continue
            waits = self.ledger.paused(*key) is not None
            if block and waits != (self.ledger.paused(trial.number, block[0]) is not None):
                continue  # seeds that train as one model are at the same step
            start = self._result_of_start(trial, seed)
            if start == "waits":
                is_waiting = True
            elif start is not None and start.state == "failed":
                reason = f"its start (arm {trial.spec.start}, seed {seed}) failed: {start.failure}"
                doomed.append(_failed(trial.number, seed, reason))
            else:
                block.append(seed)
                if len(block) == self._block_size(trial):
                    break
        return block, doomed, is_waiting

    def _ask(self) -> bool:
        """Ask the ledger for a new trial; returns whether there is one."""
        n_trials = len(self.ledger.trials)
        try:
            asked = self._patience.act(lambda: self.ledger.ask(self._may_start))
        except LedgerGone as gone:
            self.aborted = str(gone)
            return False
        if asked is not None and not self.ledger.tally.missing_seeds(asked):
            self.on_answered(asked)
        return len(self.ledger.trials) > n_trials  # also if it was added by an earlier call whose answer was lost

    def _block_size(self, trial: Trial) -> int:
        """Largest number of seeds in a unit of this trial."""
        execution = self.config.execution
        n_seeds = execution.seeds_per_unit
        if n_seeds == "auto":  # one seed keeps the cores of a CPU busy
            n_seeds = len(self.config.seed_list) if execution.gpus else 1
        alone = why_alone(trial.spec)
        if alone is not None:
            self._say_one_by_one(alone, n_seeds)
            return 1
        return min(n_seeds, self._block_that_fits.get(trial.number, n_seeds))

    def _say_one_by_one(self, what: str, n_seeds: int) -> None:
        """Say once what the study file asks for and this model or optimiser cannot do."""
        execution = self.config.execution
        asked = {
            "seeds are trained one by one": n_seeds > 1,
            "steps are not replayed from CUDA graphs": execution.capture and execution.gpus > 0,
        }
        lines = [line for line, is_asked in asked.items() if is_asked]
        if lines and what not in self._said_one_by_one:
            self._said_one_by_one.add(what)
            self.say(f"with {what}, {' and '.join(lines)}")

    def complete(self, results: Sequence[SeedResult]) -> None:
        """Record a unit's results; if the ledger does not take them, they are missing again, and the study stops."""
        if not results:
            return
        self.in_flight.end((result.trial, result.seed) for result in results)
        try:
            stopped = self._patience.act(lambda: self.ledger.record(*results))
        except LedgerGone as gone:
            self.aborted = str(gone)
            return
        self.on_record()
        results = [result for result in results if result.state != "paused"]
        for result in results:
            self._forget_checkpoints(result.trial, [result.seed])
        for trial in stopped:  # it may leave half-trained seeds
            if trial.duplicate_of is None:
                self._forget_checkpoints(trial.number, self.ledger.tally.seeds_of(trial))
        for result in results:
            self.on_result(result)
        for trial in stopped:
            self.on_stop(trial)

    def note_worker(self, unit: Unit) -> None:
        """Note that a worker was found for a unit; it has yet to start up."""
        self.in_flight.note(_keys(unit))

    def note_begin(self, unit: Unit) -> None:
        """Note that a worker has started up and begins with a unit."""
        self.in_flight.note(_keys(unit), begins=True)
        self._n_stillborn_in_a_row = 0

    def note_progress(self, unit: Unit, seed: int, step: float) -> None:
        """Note an evaluation of a run; at a new furthest step, the unit's earlier deaths no longer count."""
        self.in_flight.note(_keys(unit))
        if step > self._furthest_step.get((unit.trial, seed), -1):
            self._furthest_step[unit.trial, seed] = step
            for key in _keys(unit):
                self._n_deaths[key] = 0

    def note_death(self, unit: Unit, why: str) -> None:
        """Take back a unit whose worker died; see `MAX_DEATHS` if that has happened too often."""
        if not self.in_flight.have_begun(_keys(unit)):
            self._note_stillborn(unit, why)
            return
        self.put_back(unit)
        self._n_deaths.update(_keys(unit))
        reason = f"its worker died {MAX_DEATHS} times without progress: {why}"
        self.complete([_failed(*key, reason) for key in _keys(unit) if self._n_deaths[key] >= MAX_DEATHS])

    def why_overdue(self, unit: Unit) -> str | None:
        """A reason if a unit has not reported for longer than `execution.unit_timeout`, otherwise None."""
        limit = self.config.execution.unit_timeout
        if limit is None:
            return None
        if not self.in_flight.have_begun(_keys(unit)):  # starting up takes time, too
            limit = max(limit, SILENT_SECONDS)
        late = [silence for silence in self.in_flight.silences(_keys(unit)) if silence.seconds > limit]
        return f"no report for {late[0].seconds:.0f} s (execution.unit_timeout)" if late else None

    def note_out_of_memory(self, unit: Unit, why: str) -> None:
        """Take back a unit that was too large for its worker; half of its seeds at a time may fit."""
        if len(unit.seeds) == 1:
            self.note_death(unit, why)
            return
        self._block_that_fits[unit.trial] = len(unit.seeds) // 2
        self.put_back(unit)

    def forgive_death(self, unit: Unit) -> None:
        """Do not count a death caused by the loss of a node, such as a spot machine: it says nothing about the unit."""
        for key in _keys(unit):
            self._n_deaths[key] = max(0, self._n_deaths[key] - 1)
        self.say(f"Ray lost a node; its runs of trial {unit.trial} continue elsewhere from their checkpoints")

    def _note_stillborn(self, unit: Unit, why: str) -> None:
        """Take back a unit whose worker did not start up: that says nothing about the unit."""
        self._n_stillborn.update(_keys(unit))
        self._n_stillborn_in_a_row += 1
        self.put_back(unit)
        self._given_up |= {key: why for key in _keys(unit) if self._n_stillborn[key] == MAX_DEATHS}
        if self._n_stillborn_in_a_row == MAX_STILLBORN:
            self.aborted = f"{MAX_STILLBORN} workers in a row died before they began a run: {why}"

    def stop_waiting(self) -> None:
        """Stop waiting for an unreachable ledger: the study is interrupted."""
        self._patience.is_over = True

    def is_cancelled(self, unit: Unit) -> bool:
        """Whether the trial of a unit in flight has been stopped: its results are no longer needed."""
        return self.ledger.trials[unit.trial].stop is not None

    def put_back(self, unit: Unit) -> None:
        """Take back a unit that ended without results, for reasons outside the unit."""
        self.in_flight.end(_keys(unit))
        if self.is_cancelled(unit):
            self._forget_checkpoints(unit.trial, unit.seeds)

    def _forget_checkpoints(self, trial: int, seeds: Iterable[int]) -> None:
        try:
            for seed in seeds:
                checkpoints_of(self.storage, self.ledger.uuid, trial, seed).clear()
        except OSError as error:
            self.aborted = str(error)

    def forget_leftovers(self) -> None:
        """Remove checkpoints of runs that need no more training. A driver that was killed may have left them."""
        try:
            left = checkpointed(self.storage, self.ledger.uuid)
        except OSError as error:
            self.aborted = str(error)
            return
        for trial, seed in sorted(left):
            known = self.ledger.trials.get(trial)
            if known is None or seed not in self.ledger.tally.missing_seeds(known):
                self._forget_checkpoints(trial, [seed])

    def _may_start(self, arm: str) -> bool:
        """Whether trials that begin from this arm can be asked for.

        Trials that would have to wait for their start are not asked for yet, so that others come before them.
        """
        start = self.ledger.trials.first_of(arm)
        return start is not None and any((start.number, seed) in self.ledger.results for seed in self.config.seed_list)

    def _result_of_start(self, trial: Trial, seed: int) -> SeedResult | Literal["waits"] | None:
        """The result of the start that a run begins from; "waits" if there is none yet; None if from scratch."""
        if trial.spec.start_arm is None:
            return None
        start = self.ledger.trials.first_of(trial.spec.start_arm)
        return self.ledger.results.get((start.number, seed), "waits") if start is not None else "waits"

    def _unit(self, trial: Trial, seeds: tuple[int, ...]) -> Unit:
        starts = None
        if trial.spec.start_arm is not None:
            start = self.ledger.trials.first_of(trial.spec.start_arm)
            assert start is not None
            weights = {seed: self.ledger.results[start.number, seed].weights for seed in seeds}
            starts = Starts(
                weights={seed: key for seed, key in weights.items() if key is not None},
                tokens=start.spec.train_tokens,
            )
        execution = self.config.execution
        is_reference = trial.spec.family == "dense" and trial.spec.start_arm is None
        return Unit(
            trial=trial.number,
            seeds=seeds,
            until=self.ledger.leg(trial)[1],
            spec=trial.spec,
            storage=self.storage.url,
            study_uuid=self.ledger.uuid,
            corpus_sha256=self.corpus_sha256,
            validation_fraction=self.config.corpus.validation_fraction,
            starts=starts,
            rel_error_chis=self._rel_error_chis if is_reference else (),
            keep_weights=execution.keep_weights or trial.spec.arm in self._start_arms,
            cpus=execution.cpus,
            gpus=execution.gpus,
            checkpoint_seconds=execution.checkpoint_seconds,
            capture=execution.capture,
            timing=self.config.is_timed,
        )


def study_chis(config: StudyConfig) -> tuple[int, ...]:
    """Every χ at which dense layers are decomposed; a searched range counts as the powers of 2 in it."""
    chis = set(config.rel_error_chi)
    for arm in config.arms:
        match arm.values().get("chi"):
            case tuple(listed):
                chis |= set(listed)
            case Choices(choices=choices):
                chis |= set(choices)
            case Range(low=low, high=high):
                chis |= {low, high} | {2**power for power in range(31) if low < 2**power < high}
            case int(fixed):
                chis.add(fixed)
    return tuple(sorted(chis))


def _keys(unit: Unit) -> list[Key]:
    return [(unit.trial, seed) for seed in unit.seeds]


def _failed(trial: int, seed: int, reason: str) -> SeedResult:
    return SeedResult(trial, seed, "failed", started=now(), ended=now(), failure=reason)
