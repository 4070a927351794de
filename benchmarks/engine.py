"""Cost of the engine beside training: units that do nothing, and the quick study against a bare loop.

    python -m benchmarks.engine [--pairs 3] [--override protocol.steps=100 ...]
    python -m benchmarks.engine --results 500 50000    (the driver alone, once a study has that many results)

Both parts run a whole study as `mpo-study run` does: with Ray, ledger and MLflow in the study's folder, two units at
once.

The units that do nothing report as much as a unit of the quick study, but train nothing. All modules are imported
before their time begins, with the call; Ray's start is included. One time ends with the last write of the ledger, the
other with the call, when MLflow has everything.

The bare loop trains what the quick study trained, in the same order, in two processes of a pool. It does nothing else:
no ledger, no Ray, no MLflow, no file. Its losses must equal the study's to the last bit. Start-up is left out of both.
The pool's processes are up before the loop's time begins; the study's time begins with its first training. The study's
time ends with the last write of the ledger. What MLflow's writer and Ray do after that is in the figures of the units
that do nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console

import study
from analysis import run_schema as schema
from benchmarks.measurement import Row, rate, run_alone, within
from study.commands.opening import open_ledger
from study.commands.progress import StudyProgress
from study.commands.run import run_study
from study.ledger.directory import StudyDirectory
from study.ledger.ledger import Ledger
from study.ledger.snapshot import Snapshot, read_ledger
from study.scheduler.queue import Queue, study_chis
from study.spec.config import StudyConfig
from study.spec.protocol import evaluation_steps
from study.spec.study_file import load_config
from study.spec.trial import SeedResult, Trial, TrialSpec, now
from study.training.corpus import Corpus
from study.training.loading import load_corpus
from study.training.seed_run import train_seed
from study.training.storage import Storage
from study.training.unit import Unit

SECTION = "engine"
QUICK = Path(study.__file__).parent / "configs" / "quick.yaml"
PROCESSES = 2
N_SEEDS = 5
N_UNITS = (50, 200)
"""The limits hold for the larger number; the smaller one shows the share of start-up."""
LEDGER_LIMIT, MLFLOW_LIMIT = 0.150, 0.250
"""Seconds per unit."""
QUICK_LIMIT = 1.05
START_UP = 300.0
"""Seconds that processes have to come up."""


def rows(pairs: int = 3, overrides: Sequence[str] = ()) -> list[Row]:
    """All parts; `overrides` change the quick study's file, for a shorter study."""
    return [*units_that_do_nothing(), *driver_alone(), quick_study(pairs, overrides)]


# Units that do nothing ------------------------------------------------------------------------------------------------


def units_that_do_nothing(times: int = 3) -> list[Row]:
    found, totals = [], {}
    for n_units in N_UNITS:
        measured = [engine_alone(n_units) for _ in range(times)]
        to_ledger, to_mlflow = ([value / n_units for value in values] for values in zip(*measured, strict=True))
        totals[n_units] = [median(values) for values in zip(*measured, strict=True)]
        what = f"{n_units} units that do nothing, each"
        both = [
            within(SECTION, f"{what}, to the last ledger write", to_ledger, LEDGER_LIMIT),
            within(SECTION, f"{what}, until MLflow has caught up", to_mlflow, MLFLOW_LIMIT),
        ]
        found += [row if n_units == N_UNITS[-1] else row._replace(target=None, is_met=None) for row in both]
    fewer, more = N_UNITS
    notes = []
    for few, many in zip(totals[fewer], totals[more], strict=True):
        each = (many - few) / (more - fewer)
        notes.append(f"{1e3 * each:.0f} ms for each further unit, {few - fewer * each:.1f} s for none")
    return [row._replace(note=notes[index % 2]) for index, row in enumerate(found)]


def engine_alone(n_units: int) -> tuple[float, float]:
    """Seconds from the call of a study to the last write of its ledger, and to its end."""
    config = study_of(n_units)
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # as `run_study` does before it imports Ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find `benchmarks`
    with (
        tempfile.TemporaryDirectory() as folder,
        patch("study.scheduler.ray.work", nothing),
        ledger_writes() as writes,
    ):
        begun = time.perf_counter()
        run_whole(config, folder, n_units)
        return writes[-1] - begun, time.perf_counter() - begun


def study_of(n_units: int) -> StudyConfig:
    """The quick study's model and protocol, and as many units, none of which repeats another."""
    chis, n_trials = [2, 4, 8, 16, 32], n_units // N_SEEDS
    content = load_config(QUICK).model_dump(mode="json", include={"model", "protocol"}) | {
        "name": "nothing",
        "seeds": N_SEEDS,
        "execution": {"max_units": PROCESSES},
        "arms": [
            {"name": "mpo", "family": "mpo", "chi": chis}
            | {"learning_rate": [1e-3 * (1 + index) for index in range(n_trials // len(chis))]}
        ],
    }
    return StudyConfig.model_validate_json(json.dumps(content))


def nothing(config: dict[str, str], driver: dict[str, str], storage: str) -> None:
    """Replaces `study.scheduler.worker.work`: reports as much as a worker does for a unit, without training."""
    import ray  # only after `run_study` has set the environment that Ray reads at import
    from ray import tune

    unit = Unit.model_validate_json(json.dumps(json.loads(config["unit"]) | {"storage": storage}))
    tune.report({"begin": ray.get_runtime_context().get_node_id()})
    results = [of_nothing(unit.trial, unit.spec, seed) for seed in unit.seeds]
    for result in results:
        for row in result.curve:
            tune.report({"evaluation": json.dumps([result.seed, row])})
    tune.report({"results": json.dumps([asdict(result) for result in results])})


def of_nothing(trial: int, spec: TrialSpec, seed: int) -> SeedResult:
    """A result as large as that of a training."""
    curve = [{"step": step, **{field.key: 1.0 for field in schema.CURVES}} for step in evaluation_steps(spec.protocol)]
    final = {field.key: 1.0 for field in schema.FINALS}
    ran_on: dict[str, str] = dict.fromkeys(schema.RAN_ON, "1")
    return SeedResult(trial, seed, "complete", now(), now(), final=final, curve=curve, ran_on=ran_on)


# The driver alone -----------------------------------------------------------------------------------------------------

N_RESULTS = (500, 5_000)
N_MEASURED = 100
"""Units that are measured at each of these numbers of results."""
GROWTH_LIMIT = 1.5


def driver_alone(sizes: Sequence[int] = N_RESULTS) -> list[Row]:
    """Time of ledger, queue and progress per unit, without Ray and MLflow, when a study has that many results."""
    config, corpus = study_of(sizes[-1] + N_MEASURED * N_SEEDS), load_corpus()
    measured: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = StudyDirectory(folder)
        ledger = open_ledger(config, corpus, directory)
        storage = Storage(directory.storage_url())
        with StudyProgress(Console(file=io.StringIO(), force_terminal=True), ledger) as progress:
            queue = Queue(config, ledger, storage, corpus.sha256, progress.on_result, progress.on_answered)
            for size in sizes:
                while len(ledger.results) < size and (trial := ledger.ask()) is not None:
                    ledger.record(*(of_nothing(trial.number, trial.spec, seed) for seed in config.seed_list))
                measured[size] = [seconds_of_unit(queue) for _ in range(N_MEASURED)]
        ledger.close()
    first = measured[sizes[0]]
    return [
        rate(
            SECTION,
            f"the driver's work for a unit, with {size:,} results",
            seconds,
            f"with {sizes[0]:,}",
            first,
            target=GROWTH_LIMIT if size > sizes[0] else None,
        )
        for size, seconds in measured.items()
    ]


def seconds_of_unit(queue: Queue) -> float:
    begun = time.perf_counter()
    unit = queue.next_unit()
    assert isinstance(unit, Unit)
    queue.complete([of_nothing(unit.trial, unit.spec, seed) for seed in unit.seeds])
    return time.perf_counter() - begun


# The quick study ------------------------------------------------------------------------------------------------------


def quick_study(pairs: int, overrides: Sequence[str] = ()) -> Row:
    """The study and the bare loop; each is timed first in turn."""
    config = load_config(QUICK, [*overrides, f"execution.max_units={PROCESSES}"])
    corpus = load_corpus()
    of_study, of_loop = [], []
    trained = None
    for pair in range(pairs):
        if pair % 2 and trained is not None:
            of_loop.append(bare_loop(config, corpus, trained))
        seconds, trained = study_alone(config)
        of_study.append(seconds)
        if not pair % 2:
            of_loop.append(bare_loop(config, corpus, trained))
    what = f"quick study, {len(trained.results) if trained else 0} trainings, start-up left out"
    note = ", ".join(overrides)
    return rate(SECTION, what, of_study, "bare loop", of_loop, target=QUICK_LIMIT, note=note)


def study_alone(config: StudyConfig) -> tuple[float, Snapshot]:
    """Seconds from the first training to the last write of the ledger, and what was trained."""
    with tempfile.TemporaryDirectory() as folder, ledger_writes(time.time) as writes:
        trained = run_whole(config, folder)
    first = min(datetime.fromisoformat(result.started).timestamp() for result in trained.results)
    return writes[-1] - first, trained


def bare_loop(config: StudyConfig, corpus: Corpus, trained: Snapshot) -> float:
    """Seconds of the same trainings in a pool of processes that are up.

    Raises:
        RuntimeError: a loss is not the study's.
    """
    specs = {trial.number: trial.spec for trial in trained.trials}
    keys = sorted((result.trial, result.seed) for result in trained.results)
    starts = {spec.start for spec in specs.values()} - {None}
    chis = study_chis(config)
    context = multiprocessing.get_context("spawn")
    up = context.Barrier(PROCESSES + 1)
    with ProcessPoolExecutor(PROCESSES, context, _begin, (corpus.sha256, corpus.validation_fraction, up)) as pool:
        for _ in range(PROCESSES):  # each call starts a process
            pool.submit(int)
        up.wait(START_UP)
        begun = time.perf_counter()
        futures = {
            (number, seed): pool.submit(train, specs[number], seed, chis, specs[number].arm in starts)
            for number, seed in keys
            if specs[number].start is None
        }
        # Starts come first, so that other trainings remain while fine-tuned ones wait for their starts.
        weights: dict[tuple[str | None, int], dict[str, np.ndarray]] = {
            (specs[number].arm, seed): futures[number, seed].result()[1]
            for number, seed in futures
            if specs[number].arm in starts
        }
        futures |= {
            (number, seed): pool.submit(train, specs[number], seed, (), False, weights[specs[number].start, seed])
            for number, seed in keys
            if specs[number].start is not None
        }
        losses = {key: future.result()[0] for key, future in futures.items()}
        seconds = time.perf_counter() - begun
    if losses != {(result.trial, result.seed): result.final["final/val_loss"] for result in trained.results}:
        raise RuntimeError("the bare loop did not train what the study did")
    return seconds


_corpora: dict[str, Corpus] = {}


def _begin(sha256: str, validation_fraction: float, up: Barrier) -> None:
    torch.set_num_threads(1)
    _corpora["own"] = load_corpus(None, sha256, validation_fraction)
    up.wait()


def train(
    spec: TrialSpec, seed: int, chis: Sequence[int], keeps: bool, start: dict[str, np.ndarray] | None = None
) -> tuple[float, dict[str, np.ndarray]]:
    """The final loss, and the weights if `keeps`."""
    result, weights = train_seed(
        spec,
        seed,
        _corpora["own"],
        start_weights={name: torch.from_numpy(weight) for name, weight in start.items()} if start else None,
        rel_error_chis=chis if spec.family == "dense" else (),
    )
    return result.final["final/val_loss"], {name: weight.numpy() for name, weight in weights.items()} if keeps else {}


# A study --------------------------------------------------------------------------------------------------------------


def run_whole(config: StudyConfig, folder: str, n_units: int | None = None) -> Snapshot:
    """Run a study in an empty folder, and return the content of its ledger.

    Raises:
        RuntimeError: something failed or is missing.
    """
    directory = StudyDirectory(folder)
    outcome = run_study(config, directory, Console(file=io.StringIO()))
    if outcome.n_failed or outcome.n_missing or outcome.tracking_trouble or n_units not in (None, outcome.n_complete):
        raise RuntimeError(f"a benchmark's study has failed or missing runs: {outcome}")
    return read_ledger(directory.ledger_url, config.name)


@contextmanager
def ledger_writes(clock: Callable[[], float] = time.perf_counter) -> Iterator[list[float]]:
    """The times at which writes of results end inside the block."""
    record, times = Ledger.record, []

    def noted(ledger: Ledger, *results: SeedResult) -> list[Trial]:
        stopped = record(ledger, *results)
        times.append(clock())
        return stopped

    with patch.object(Ledger, "record", noted):
        yield times


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="number of pairs of the quick study and the bare loop")
    parser.add_argument("--override", nargs="*", default=[], help="changes of the quick study's file")
    parser.add_argument(
        "--results", nargs="*", type=int, help="numbers of results at which the driver alone is measured"
    )
    arguments = parser.parse_args()
    if arguments.results:
        run_alone(partial(driver_alone, arguments.results))
    else:
        run_alone(partial(rows, arguments.pairs, arguments.override))
