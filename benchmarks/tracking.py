"""Does writing to MLflow in the background slow a study's units?

    python -m benchmarks.tracking [steps] [rounds]    (writes results/tracking.json)

As in a study on one machine, there is one unit per core, each in a process of its own. The writer is in the driver's
process, so its CPU time is taken from the units. The same units are trained twice, back to back. Once the results of
the units before them are written to SQLite, as a study does; once there is nothing to write. Each order comes in turn.
A unit's training times are compared with each other. The slowdown depends on the length of a unit, so the writer's CPU
time is measured too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean, median, quantiles

from rich.console import Console

from study.commands.opening import open_ledger, study_corpus
from study.ledger.directory import DEFAULT_TRACKING_URI, StudyDirectory
from study.ledger.ledger import Ledger
from study.scheduler.queue import Queue
from study.spec.config import StudyConfig
from study.spec.trial import SeedResult
from study.tracking.background import BackgroundTracker
from study.tracking.opening import open_tracker, study_record
from study.tracking.tracker import Tracker
from study.training.corpus_storage import store_corpus
from study.training.storage import Storage
from study.training.unit import Unit, run_unit

RESULTS = Path("results/tracking.json")
CORES = os.cpu_count() or 1


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    n_rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    config = config_of(steps, n_rounds)
    with tempfile.TemporaryDirectory() as folder:
        directory = StudyDirectory(folder)
        corpus, storage = study_corpus(config), Storage(directory.storage_url())
        store_corpus(storage, corpus)
        ledger = open_ledger(config, corpus, directory)
        tracker = open_tracker(DEFAULT_TRACKING_URI, directory, storage, study_record(config, ledger, corpus))
        times, cpu = measure(Queue(config, ledger, storage, corpus.sha256), tracker, n_rounds)
        ledger.close()
    ratios = [on / off for on, off in zip(times["on"], times["off"], strict=True)]
    lower, _, upper = quantiles(ratios, n=4)
    figures = {
        "unit_seconds": median(times["off"]),
        "ratio": median(ratios),
        "middle_half": [lower, upper],
        "mean_ratio": fmean(ratios),
        "writer_cpu_seconds_per_run": cpu / len(ratios),
        "cores": CORES,
        "load": os.getloadavg()[1],
        "n_units": len(ratios),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console = Console()
    console.print(
        f"{len(ratios)} units of {figures['unit_seconds']:.2f} s: with tracking they take {median(ratios):.3f} "
        f"times as long (middle half {lower:.3f} to {upper:.3f}, mean {fmean(ratios):.3f})"
    )
    console.print(f"the writer takes {cpu / len(ratios):.3f} s of CPU time per run; written to {RESULTS}")


def config_of(steps: int, n_rounds: int) -> StudyConfig:
    """The quick study's model with little validation: units of a second or more."""
    study = {
        "name": "tracking",
        "corpus": {"validation_fraction": 0.01},
        "model": {"d_model": 64, "n_heads": 4, "n_layers": 2, "context": 64},
        "protocol": {"steps": steps, "warmup_steps": steps // 10, "batch_size": 8, "eval_every": steps // 10},
        "seeds": 5,
        "arms": [{"name": "mpo", "family": "mpo", "chi": list(range(2, 3 + (n_rounds + 1) * CORES // 5))}],
    }
    return StudyConfig.model_validate_json(json.dumps(study))


def measure(queue: Queue, tracker: Tracker, n_rounds: int) -> tuple[dict[str, list[float]], float]:
    """Training times, in seconds, of the same units with tracking on and off, and the writer's CPU time."""
    times: dict[str, list[float]] = {"on": [], "off": []}
    written, writer_cpu = [], 0.0
    background = BackgroundTracker(lambda sign: tracker, print)
    with ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn")) as pool:
        for number in range(n_rounds + 1):  # the first round starts the processes and makes results to write
            units = [unit for _ in range(CORES) if isinstance(unit := queue.next_unit(), Unit)]
            results: Sequence[SeedResult] = ()
            for mode in ("off", "on") if number % 2 else ("on", "off"):
                begun = time.process_time()
                if mode == "on" and number:
                    put(background, queue.ledger, written)
                results = list(pool.map(train, units))
                while background.n_pending:
                    time.sleep(0.02)
                if number:
                    times[mode] += [result.final["train_seconds"] for result in results]
                    writer_cpu += (time.process_time() - begun) * (1 if mode == "on" else -1)
            queue.complete(results)
            written = sorted({result.trial for result in results})
    trouble = background.close(0)
    if trouble is not None:
        raise SystemExit(f"MLflow: {trouble}")
    return times, writer_cpu


def put(background: BackgroundTracker, ledger: Ledger, numbers: Sequence[int]) -> None:
    """Queue these trials, so that their runs in MLflow are brought up to date."""
    for number in numbers:
        background.put(ledger.trials[number], ledger.on_record(ledger.trials[number]), 5)


def train(unit: Unit) -> SeedResult:
    """Train a unit in a process of its own, without checkpoints: the second training would continue from them."""
    [result] = run_unit(unit.model_copy(update={"checkpoint_seconds": 1e9}), lambda seed, row: None)
    return result


if __name__ == "__main__":
    main()
