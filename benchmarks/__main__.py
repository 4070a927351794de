"""Run every benchmark, print one table, and write it as JSON beside this file's results folder.

A figure is a ratio of two things timed alternately in one run; its spread is the range of the middle half of the pairs.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.table import Table

from study.config import Model, Protocol
from study.corpus import load_corpus
from study.training import Training
from study.trial import TrialSpec

RESULTS = Path("results/benchmarks.json")
PAIRS = 15


def main() -> None:
    torch.set_num_threads(2)
    rows = training_steps()
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 2}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"torch {torch.__version__}, 2 threads, {PAIRS} pairs", title_justify="left")
    for heading in ("what", "against", "median (ms)", "rival (ms)", "ratio", "middle half"):
        table.add_column(heading)
    for row in rows:
        low, high = row["middle_half"]
        table.add_row(
            row["what"],
            row["against"],
            f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * row['rival_seconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{low:.2f} to {high:.2f}",
        )
    Console().print(table)
    Console().print(f"written to {RESULTS}")


def training_steps() -> list[dict]:
    """One optimiser step of the paper's model as MPO, against the same step of the dense one."""
    corpus = load_corpus()
    protocol = Protocol(steps=10_000)

    def training(**family: object) -> Training:
        spec = TrialSpec.model_validate({"arm": "benchmark", "model": Model(), "protocol": protocol, **family})
        return Training(spec, 0, corpus)

    dense = training(family="dense")
    rows = []
    for chi in (4, 8, 16, 32):
        mpo = training(family="mpo", chi=chi, factorisation="paper", init="variance")
        rows.append(paired(f"training step, MPO χ={chi}", mpo.optimiser_step, "dense", dense.optimiser_step))
    return rows


def paired(what: str, run: Callable[[], None], against: str, rival: Callable[[], None]) -> dict:
    """Time two calls alternately, in both orders, after one call of each."""
    times: tuple[list[float], list[float]] = ([], [])
    calls = (run, rival)
    for call in calls:
        call()
    for pair in range(PAIRS):
        for which in (0, 1) if pair % 2 else (1, 0):
            start = time.perf_counter()
            calls[which]()
            times[which].append(time.perf_counter() - start)
    ratios = [ours / theirs for ours, theirs in zip(*times, strict=True)]
    lower, _, upper = quantiles(ratios, n=4)
    return {
        "what": what,
        "against": against,
        "seconds": median(times[0]),
        "rival_seconds": median(times[1]),
        "ratio": median(ratios),
        "middle_half": [lower, upper],
    }


if __name__ == "__main__":
    main()
