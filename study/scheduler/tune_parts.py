"""The parts of Ray Tune that issue the queue's units, watch their workers and take their results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from study.scheduler.queue import Queue
from study.spec.trial import SeedResult
from study.training.unit import Unit

NODE_WATCH_SECONDS = 10
"""Time between two checks that a node is left."""

OnEvaluation = Callable[[Unit, int, dict[str, float]], None]


def n_slots(cpus: float, gpus: float) -> int:
    """Number of units that the nodes that are up now can hold at once."""
    slots = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            fits = [has.get(kind, 0) / asked for kind, asked in (("CPU", cpus), ("GPU", gpus)) if asked]
            slots += int(min(fits))
    return slots


NO_NODES = "no node of Ray is left that can hold a unit"


class _Stateless:
    """A part of Tune without a state: Tune pickles its parts for a restore that we never use, see `ray`."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class NodeWatch(_Stateless, tune.Callback):
    """Ends a run that is interrupted, or whose last node is gone: Tune would wait forever without a message.

    Args:
        has_nodes: whether any node is left that can hold a unit.
        forgive: called with a unit that died with its node, and did not cause its end.
    """

    def __init__(self, has_nodes: Callable[[], bool], forgive: Callable[[Unit], None]) -> None:
        self.has_nodes, self._forgive = has_nodes, forgive
        self.died: list[tuple[str | None, Unit]] = []
        """Units whose workers died, with their node: Ray notices the end of a node only some time later."""
        self._looked = time.monotonic()
        self._trials: list[Any] = []
        self._is_interrupted = False

    def interrupt(self) -> None:
        """End the run between two steps of Tune, when no Ray lock is held."""
        self._is_interrupted = True

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._trials = trials
        if self._is_interrupted:
            raise KeyboardInterrupt
        if time.monotonic() - self._looked > NODE_WATCH_SECONDS:
            self._looked = time.monotonic()
            if self.died:
                gone = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
                for _, unit in filter(lambda death: death[0] in gone, self.died):
                    self._forgive(unit)
                self.died = [death for death in self.died if death[0] not in gone]
            if not self.has_nodes():
                raise ConnectionError(NO_NODES)

    def error_of(self, trial_id: str) -> str:
        """Tune's error message for a dead worker, in one line."""
        trial = next((trial for trial in reversed(self._trials) if trial.trial_id == trial_id), None)
        path = trial.error_file if trial is not None else None  # `get_error` reads the later copy
        lines = Path(path).read_text(encoding="utf-8").splitlines() if path and Path(path).exists() else []
        lines = [line.strip() for line in lines if line.strip()]
        named = [line for line in lines if "Error: " in line]
        return (named or lines or ["Ray does not say why"])[-1]


class HungWorkers(_Stateless, tune.Callback):
    """Ends the workers of units that are overdue; Tune then learns that they are dead."""

    def __init__(self, searcher: LedgerSearcher) -> None:
        self._searcher = searcher
        self._looked = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._searcher.note_worker(trial.trial_id)

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() - self._looked < 1:
            return
        self._looked = time.monotonic()
        for trial_id in self._searcher.overdue():
            actor = next(trial for trial in reversed(trials) if trial.trial_id == trial_id).temporary_state.ray_actor
            if actor is not None:
                ray.kill(actor)


class Cancelling(_Stateless, FIFOScheduler):
    """Ends units whose trial was stopped while they ran.

    Args:
        is_cancelled: whether a unit must end, by the id that Tune gave it.
    """

    def __init__(self, is_cancelled: Callable[[str], bool]) -> None:
        super().__init__()
        self._is_cancelled = is_cancelled

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        is_last = "results" in result
        return TrialScheduler.STOP if not is_last and self._is_cancelled(trial.trial_id) else TrialScheduler.CONTINUE


class LedgerSearcher(_Stateless, Searcher):
    """Suggests units instead of points, and never asks Tune for a metric."""

    def __init__(self, queue: Queue, on_evaluation: OnEvaluation, watch: NodeWatch) -> None:
        super().__init__()
        self._queue, self._watch = queue, watch
        self._on_evaluation = on_evaluation
        self._units: dict[str, Unit] = {}
        self._nodes: dict[str, str] = {}
        """Id of the node on which each unit began, by the unit's id."""
        self._overdue: dict[str, str] = {}
        """Ids of the units whose workers were ended, with the reason."""

    def suggest(self, trial_id: str) -> Any:
        unit = self._queue.next_unit()
        if unit == "finished":
            return Searcher.FINISHED
        if unit is None:
            return None
        self._units[trial_id] = unit
        return {"unit": unit.model_dump_json()}

    def note_worker(self, trial_id: str) -> None:
        """Note that Tune has a worker for a unit."""
        if trial_id in self._units:
            self._queue.note_worker(self._units[trial_id])

    def overdue(self) -> list[str]:
        """Ids of the units whose workers must be ended now."""
        found = {
            trial_id: why
            for trial_id, unit in self._units.items()
            if trial_id not in self._overdue and (why := self._queue.why_overdue(unit)) is not None
        }
        self._overdue |= found
        return list(found)

    def is_cancelled(self, trial_id: str) -> bool:
        """Whether a unit has to end at its next report."""
        unit = self._units.get(trial_id)
        return unit is not None and self._queue.is_cancelled(unit)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        unit = self._units.get(trial_id)
        if unit is None:
            return
        if "results" in result:
            self._queue.complete([SeedResult(**content) for content in json.loads(result["results"])])
            del self._units[trial_id]
        elif "abort" in result:
            self._queue.put_back(unit)
            self._queue.aborted = result["abort"]
            del self._units[trial_id]
        elif "out_of_memory" in result:
            del self._units[trial_id]
            self._queue.note_out_of_memory(unit, result["out_of_memory"])
        elif "begin" in result:
            self._queue.note_begin(unit)
            self._nodes[trial_id] = result["begin"]
        elif "said" in result:
            self._queue.say(result["said"])
        elif "evaluation" in result:
            seed, row = json.loads(result["evaluation"])
            self._queue.note_progress(unit, seed, row["step"])
            self._on_evaluation(unit, seed, row)

    def take_back(self, why: str, is_death: bool) -> None:
        """Take back all units that workers have, since their workers end now.

        Args:
            is_death: whether it counts as the death of each unit's worker, for this reason.
        """
        for unit in self._units.values():
            if is_death:
                self._queue.note_death(unit, why)
            else:
                self._queue.put_back(unit)
        self._units.clear()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result is not None and not error:
            self.on_trial_result(trial_id, result)
        unit, overdue = self._units.pop(trial_id, None), self._overdue.pop(trial_id, None)
        if unit is not None and self._queue.is_cancelled(unit):
            self._queue.put_back(unit)
        elif unit is not None and self._watch.has_nodes():
            self._queue.note_death(unit, overdue or self._watch.error_of(trial_id))
            self._watch.died.append((self._nodes.pop(trial_id, None), unit))
        elif unit is not None:
            self._queue.put_back(unit)
            self._queue.aborted = NO_NODES

    def save(self, checkpoint_path: str) -> None:
        """Nothing is restored."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is restored."""
