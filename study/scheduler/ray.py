"""Ray Tune as a stateless executor: a Searcher over the queue, a worker, and the Tuner.

Tune's own state is never needed again: every start makes a fresh Tuner over the work that the ledger still lacks.
Tune's restore loses finished trials when its driver is killed, and its repeaters and grids do not know the ledger.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray import cloudpickle, tune
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put
from ray.job_config import JobConfig
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from analysis.runs.urls import hide_password
from study.errors import StudyError
from study.scheduler import worker
from study.scheduler.interrupts import interrupts
from study.scheduler.private_folder import private_folder
from study.scheduler.queue import Queue
from study.scheduler.worker import work
from study.spec.trial import SeedResult
from study.training import program
from study.training.unit import Unit

for _module in (program, worker):
    cloudpickle.register_pickle_by_value(_module)

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # its box of settings says nothing useful about a study
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # no snapshots: nothing is restored from them
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
"""Default environment variables for Ray; the user's own values take precedence."""

NODE_WATCH_SECONDS = 10
"""Time between two checks that a node is left."""

OnEvaluation = Callable[[Unit, int, dict[str, float]], None]


def run_on_ray(queue: Queue, on_evaluation: OnEvaluation, study: Path, address: str) -> None:
    """Run every unit that the queue issues on Ray, as many at once as its resources allow.

    Args:
        study: the study's folder.
        address: address of a Ray cluster, or "local" for a new Ray instance, which ends with this call.

    Raises:
        StudyError: there is no Ray at that address, Ray cannot be started, or none of its nodes can hold a unit.
    """
    with private_folder(study) as folder:
        try:
            _connect(address, folder)
            _run(queue, on_evaluation, folder)
        finally:
            _shut_down()


def _run(queue: Queue, on_evaluation: OnEvaluation, folder: Path) -> None:
    execution = queue.config.execution
    slots = execution.max_units or _slots(execution.cpus, execution.gpus)
    if execution.max_units is not None and _slots(execution.cpus, execution.gpus) == 0:
        queue.say("no node of this Ray can hold a unit yet; waiting for its autoscaler")
    if slots == 0:
        there = ray.cluster_resources()
        raise StudyError(
            f"no node of this Ray can hold a unit of execution.cpus={execution.cpus:g}, "
            f"execution.gpus={execution.gpus:g}; in all it has {there.get('CPU', 0):g} CPUs and "
            f"{there.get('GPU', 0):g} GPUs"
        )
    _fit(queue, on_evaluation, folder, slots)


def _fit(queue: Queue, on_evaluation: OnEvaluation, folder: Path, slots: int) -> None:
    execution = queue.config.execution
    watch = _NodeWatch(
        lambda: execution.max_units is not None or _slots(execution.cpus, execution.gpus) > 0, queue.forgive_death
    )
    searcher = _LedgerSearcher(queue, on_evaluation, watch)
    this_program, storage_key = program.this_program(), f"mpo-study-storage-{uuid4().hex}"

    def trainable(config: dict[str, str]) -> None:
        work(config, this_program, storage_key)

    try:
        _internal_kv_put(storage_key, queue.storage.url)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": execution.cpus, "gpu": execution.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_Cancelling(searcher.is_cancelled),
                num_samples=-1,
                max_concurrent_trials=slots,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=f"{queue.config.name}-{uuid4().hex[:8]}",
                storage_path=str(folder / "tune"),  # one folder per unit; workers send no files
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),  # the queue counts, and issues a unit again
                callbacks=[watch, _HungWorkers(searcher)],
            ),
        )

        def interrupt() -> None:
            watch.interrupt()
            queue.stop_waiting()

        with interrupts(interrupt):
            tuner.fit()
    except Exception as error:
        if not watch.has_nodes():
            queue.aborted = _NO_NODES
        elif isinstance(error, OSError) and error.errno is not None:  # the driver's disk is full, for example
            queue.aborted = f"{error} (Ray's folder is {folder})"
        else:
            raise
    finally:
        with suppress(Exception):  # if Ray is gone, so is its store
            _internal_kv_del(storage_key)


def _shut_down() -> None:
    """End Ray's part of this process.

    Objects that Tune leaves behind refer to actors. If another thread collects them as garbage while Ray shuts down,
    Ray ends the whole process at once and without a message (its `QuickExit`). So they are collected before or after.
    """
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


class _WithoutDriversPath(JobConfig):
    """A job whose workers do not search for modules first in the working folder or script folder of the driver.

    Ray adds these folders if the job has no working folder of its own, and calls this method for nothing else.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        return True


def _connect(address: str, folder: Path) -> None:
    for variable, setting in _SETTINGS.items():
        os.environ.setdefault(variable, setting)
    shown = hide_password(address)
    if address.startswith("ray://"):
        raise StudyError(
            f"--address {shown}: the Ray client cannot carry a study; run the driver on the cluster, with "
            "--address auto or HOST:6379"
        )
    host, _, port = address.rpartition(":")
    if port.isdecimal():  # if nobody listens, Ray itself would try for five minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise StudyError(f"--address {shown}: cannot connect to Ray: {error}") from None
    is_local = address == "local"
    try:
        ray.init(
            address=address,
            include_dashboard=False if is_local else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            job_config=_WithoutDriversPath(),
            _temp_dir=str(folder / "ray") if is_local else None,  # Ray's default is readable by all users
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        n_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        few = f" (ulimit -n allows {n_files} open files)" if 0 <= n_files < 1024 else ""
        what = f"cannot start Ray{few}" if is_local else f"--address {shown}: cannot connect to Ray"
        lines = str(error).splitlines() or [type(error).__name__]
        said = " ".join(" ".join(lines).split()) if lines[0].endswith(":") else lines[0]  # a version mismatch
        raise StudyError(f"{what}: {hide_password(said, address)}") from None
    # No long traceback for a worker's death: its unit is issued again.
    for name in ("ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _slots(cpus: float, gpus: float) -> int:
    """Number of units that the nodes that are up now can hold at once."""
    slots = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            fits = [has.get(kind, 0) / asked for kind, asked in (("CPU", cpus), ("GPU", gpus)) if asked]
            slots += int(min(fits))
    return slots


_NO_NODES = "no node of Ray is left that can hold a unit"


class _NodeWatch(tune.Callback):
    """Ends a run that is interrupted, or whose last node is gone: Tune would wait for ever without a message.

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
                raise ConnectionError(_NO_NODES)

    def error_of(self, trial_id: str) -> str:
        """Tune's error message for a dead worker, in one line."""
        trial = next((trial for trial in reversed(self._trials) if trial.trial_id == trial_id), None)
        path = trial.error_file if trial is not None else None  # `get_error` reads the later copy
        lines = Path(path).read_text(encoding="utf-8").splitlines() if path and Path(path).exists() else []
        lines = [line.strip() for line in lines if line.strip()]
        named = [line for line in lines if "Error: " in line]
        return (named or lines or ["Ray does not say why"])[-1]

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune pickles its parts for a restore that we never use, since the ledger holds everything."""
        return {}


class _HungWorkers(tune.Callback):
    """Ends the workers of units that are overdue; Tune then learns that they are dead."""

    def __init__(self, searcher: _LedgerSearcher) -> None:
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

    def __getstate__(self) -> dict[str, Any]:
        """See `_NodeWatch.__getstate__`."""
        return {}


class _Cancelling(FIFOScheduler):
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

    def __getstate__(self) -> dict[str, Any]:
        """See `_NodeWatch.__getstate__`: nothing is restored."""
        return {}


class _LedgerSearcher(Searcher):
    """Suggests units instead of points, and never asks Tune for a metric."""

    def __init__(self, queue: Queue, on_evaluation: OnEvaluation, watch: _NodeWatch) -> None:
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
            self._queue.aborted = _NO_NODES

    def __getstate__(self) -> dict[str, Any]:
        """See `_NodeWatch.__getstate__`."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """See `__getstate__`."""

    def restore(self, checkpoint_path: str) -> None:
        """See `__getstate__`."""
