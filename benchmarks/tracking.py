"""Does writing to MLflow in the background slow a study's units? The same study with tracking on and off, alternately.

    python -m benchmarks.tracking [steps] [pairs]    (writes results/tracking.json)

Both run on Ray, with as many units at once as there are cores, so that what the writer takes is taken from them. Each
run (trial × seed) is compared with itself: a ratio of its training times, on over off. How much a unit can be slowed
depends on how long it takes, so the writer's own CPU time per run is measured too: the results of a finished study,
written one after another into an empty SQLite database.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median, quantiles

from rich.console import Console

from study.config import StudyConfig
from study.directory import DEFAULT_TRACKING_URI, StudyDirectory
from study.ledger import read_ledger
from study.run import open_ledger, open_tracker, run_study, study_corpus
from study.storage import Storage

RESULTS = Path("results/tracking.json")
CHIS, N_SEEDS = [2, 4, 8, 16], 6


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    n_pairs = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    ratios, seconds, walls = [], [], {"on": [], "off": []}
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(n_pairs):
            times = {}
            for tracking in ("off", "on") if pair % 2 else ("on", "off"):
                directory = StudyDirectory(Path(folder) / f"{tracking}-{pair}")
                times[tracking], wall = run(directory, steps, tracking)
                walls[tracking].append(wall)
            ratios += [times["on"][key] / off for key, off in times["off"].items()]
            seconds += times["off"].values()
        cpu = writer_seconds(StudyDirectory(Path(folder) / "off-0"), steps)
    lower, _, upper = quantiles(ratios, n=4)
    figures = {
        "unit_seconds": median(seconds),
        "ratio": median(ratios),
        "middle_half": [lower, upper],
        "mean_ratio": fmean(ratios),
        "wall_seconds": walls,
        "writer_cpu_seconds_per_run": cpu,
        "cores": os.cpu_count(),
        "n_runs": len(ratios),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console = Console()
    console.print(
        f"{len(ratios)} runs of {median(seconds):.2f} s: with tracking on they take {median(ratios):.3f} times as long "
        f"(middle half {lower:.3f} to {upper:.3f}, mean {fmean(ratios):.3f})"
    )
    console.print(f"the writer needs {cpu:.3f} s of CPU for a run; written to {RESULTS}")


def config_of(steps: int) -> StudyConfig:
    """The quick study's model, so many steps long, with little validation: units of a second or more."""
    study = {
        "name": "tracking",
        "corpus": {"validation_fraction": 0.01},
        "model": {"d_model": 64, "n_heads": 4, "n_layers": 2, "context": 64},
        "protocol": {"steps": steps, "warmup_steps": steps // 10, "batch_size": 8, "eval_every": steps // 4},
        "seeds": N_SEEDS,
        "arms": [{"name": "mpo", "family": "mpo", "chi": CHIS}],
    }
    return StudyConfig.model_validate_json(json.dumps(study))


def run(directory: StudyDirectory, steps: int, tracking: str) -> tuple[dict[tuple[int, int], float], float]:
    """Training time of every run of the study, by χ and seed, and how long the study took, in seconds."""
    begun = time.perf_counter()
    console = Console(file=io.StringIO())
    outcome = run_study(config_of(steps), directory, console, tracking="off" if tracking == "off" else None)
    wall = time.perf_counter() - begun
    if outcome.n_complete != len(CHIS) * N_SEEDS or outcome.tracking_trouble is not None:
        raise SystemExit(f"the study did not end as it should: {outcome}")
    snapshot = read_ledger(directory.ledger_url, "tracking")
    chi = {trial.number: trial.spec.chi for trial in snapshot.trials}
    return {(chi[r.trial], r.seed): r.final["train_seconds"] for r in snapshot.results}, wall


def writer_seconds(directory: StudyDirectory, steps: int) -> float:
    """CPU time that MLflow's writer needs for one run, its share of its trial's included."""
    config = config_of(steps)
    corpus, storage = study_corpus(config), Storage(directory.storage_url())
    ledger = open_ledger(config, corpus, directory)
    tracker = open_tracker(DEFAULT_TRACKING_URI, config, directory, ledger, corpus, storage)
    begun = time.process_time()
    for trial in ledger.trials.values():
        results = ledger.on_record(trial)
        for n_in in range(1, len(results) + 1):  # as they come in while a study runs
            tracker.write(trial, results[:n_in], N_SEEDS)
    seconds = time.process_time() - begun
    ledger.close()
    return seconds / (len(CHIS) * N_SEEDS)


if __name__ == "__main__":
    main()
