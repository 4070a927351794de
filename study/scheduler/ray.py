"""Ray Tune as a stateless executor: a Searcher over the queue, a worker, and the Tuner.

Tune's own state is never needed again: every start makes a fresh Tuner over the work that the ledger still lacks.
Tune's restore loses finished trials when its driver is killed, and its repeaters and grids do not know the ledger.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import socket
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import ray
from ray import cloudpickle, tune
from ray.exceptions import OutOfMemoryError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put
from ray.job_config import JobConfig

from analysis.runs.urls import hide_password
from study.errors import StudyError
from study.scheduler import worker
from study.scheduler.interrupts import interrupts
from study.scheduler.private_folder import private_folder
from study.scheduler.queue import Queue
from study.scheduler.tune_parts import (
    NO_NODES,
    Cancelling,
    HungWorkers,
    LedgerSearcher,
    NodeWatch,
    OnEvaluation,
    n_slots,
)
from study.scheduler.worker import work
from study.training import program

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


def run_on_ray(queue: Queue, on_evaluation: OnEvaluation, study: Path, address: str) -> None:
    """Run every unit that the queue issues on Ray, as many at once as its resources allow.

    Args:
        study: the study's folder.
        address: address of a Ray cluster, or "local" for a new Ray instance, which ends with this call.

    Raises:
        StudyError: there is no Ray at that address, Ray cannot be started, or none of its nodes can hold a unit.
    """
    slots = None
    while True:
        with private_folder(study) as folder:
            try:
                if address == "local":
                    queue.say("starting Ray")
                _connect(address, folder)
                slots = _run(queue, on_evaluation, folder, slots)
            finally:
                _shut_down()
        if slots is None:
            return


def _run(queue: Queue, on_evaluation: OnEvaluation, folder: Path, most: int | None) -> int | None:
    """Run units, at most `most` at once. If memory was too small, returns how many to run at once from now on."""
    execution = queue.config.execution
    slots = most or execution.max_units or n_slots(execution.cpus, execution.gpus)
    if execution.max_units is not None and n_slots(execution.cpus, execution.gpus) == 0:
        queue.say("no node of this Ray cluster can hold a unit yet; waiting for its autoscaler")
    if slots == 0:
        there = ray.cluster_resources()
        raise StudyError(
            f"no node of this Ray can hold a unit of execution.cpus={execution.cpus:g}, "
            f"execution.gpus={execution.gpus:g}; in total it has {there.get('CPU', 0):g} CPUs and "
            f"{there.get('GPU', 0):g} GPUs"
        )
    return _fit(queue, on_evaluation, folder, slots)


def _fit(queue: Queue, on_evaluation: OnEvaluation, folder: Path, slots: int) -> int | None:
    execution = queue.config.execution
    watch = NodeWatch(
        lambda: execution.max_units is not None or n_slots(execution.cpus, execution.gpus) > 0, queue.forgive_death
    )
    searcher = LedgerSearcher(queue, on_evaluation, watch)
    this_program, storage_key = program.this_program(), f"mpo-study-storage-{uuid4().hex}"

    def trainable(config: dict[str, str]) -> None:
        work(config, this_program, storage_key)

    try:
        _internal_kv_put(storage_key, queue.storage.url)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": execution.cpus, "gpu": execution.gpus}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=Cancelling(searcher.is_cancelled),
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
                callbacks=[watch, HungWorkers(searcher)],
            ),
        )

        def interrupt() -> None:
            watch.interrupt()
            queue.stop_waiting()

        with interrupts(interrupt):
            tuner.fit()
    except Exception as error:
        if not watch.has_nodes():
            queue.aborted = NO_NODES
        elif isinstance(error, OSError) and error.errno is not None:  # the driver's disk is full, for example
            queue.aborted = f"{error} (Ray's folder is {folder})"
        elif isinstance(error.__cause__, OutOfMemoryError):  # Tune ends at this death of a worker
            searcher.take_back("a node ran out of memory", is_death=slots == 1)
            if slots > 1:
                queue.say(
                    f"a node ran out of memory, so Ray ended a worker; from here on at most {slots - 1} "
                    f"unit{'s' * (slots != 2)} at once"
                )
            return max(slots - 1, 1)
        else:
            raise
    finally:
        with suppress(Exception):  # if Ray is gone, so is its store
            _internal_kv_del(storage_key)
    return None


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
            f"--address {shown}: the Ray client cannot run a study; run the driver on the cluster, with "
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
