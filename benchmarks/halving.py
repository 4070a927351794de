"""The cost that successive halving saves, in searches replayed from a shipped study's learning curves.

    python -m benchmarks.halving    writes the table into docs/study.md

The curves are those of docs/results/search-quick: 60 searched trials of the quick model, each with three seeds and
evaluations at every quarter of its steps. A repetition takes its trials in a random order, one after another. A trial
trains until `study.search.halving.Rungs` stops it or it ends. So nothing is trained here, and the sampler does not
react to what was stopped.

Cost is counted in FLOPs, as a share of those of the 60 whole trials. The frontier is that of the trials that trained to
the end, by the means of their three seeds. Its shortfall is how far it lies above that of all 60 trials, on average
over the logarithm of the parameters: the difference of their hypervolumes, in nats. Where it has no trial it counts as
a uniform guess. A shorter search has the same trials in the same order without halving, until it has cost as much.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.document import ROOT, put_table
from benchmarks.sampler_noise import area
from study.commands.exchange import import_study
from study.ledger.directory import StudyDirectory
from study.ledger.snapshot import read_ledger
from study.search.halving import Rungs
from study.spec.config import StudyConfig
from study.spec.search import Halving
from study.spec.trial import SeedResult, Trial

STUDY = "search-quick"
N_REPETITIONS = 10
SETTINGS = (
    Halving(),
    Halving(seeds=3),
    Halving(rungs=(0.25,)),
    Halving(rungs=(0.5,)),
    Halving(rungs=(0.25, 0.5), keep=0.25),
)
Results = Mapping[int, Mapping[int, SeedResult]]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        import_study(ROOT / "docs" / "results" / STUDY / "ledger.db.xz", StudyDirectory(Path(folder) / STUDY))
        ledger = read_ledger(f"sqlite:///{folder}/{STUDY}/ledger.db", STUDY)
    config = ledger.growths.history[-1]
    trials = [trial for trial in ledger.trials if config.arm(trial.spec.arm).is_searched]
    results: dict[int, dict[int, SeedResult]] = {trial.number: {} for trial in trials}
    for result in ledger.results:
        if result.trial in results:
            results[result.trial][result.seed] = result
    caption = (
        f"{N_REPETITIONS} searches of the {len(trials)} trials of `{STUDY}`, replayed in random orders; means ± twice "
        "their standard errors. Cost is a share of the whole search's FLOPs. Shortfall is how much worse the frontier "
        "is than that of the whole search, in nats. `python -m benchmarks.halving` writes this table, and says how."
    )
    headings = ("rungs", "keep", "deciding seeds", "cost", "shortfall", "shortfall of a shorter search of this cost")
    put_table("docs/study.md", "halving", caption, headings, list(rows(config, trials, results)))


def rows(config: StudyConfig, trials: Sequence[Trial], results: Results) -> Iterator[tuple[str, ...]]:
    """A row for each setting."""
    whole = frontier_area(trials, results, trials)
    for halving in SETTINGS:
        measured = []
        for repetition in range(N_REPETITIONS):
            order = [trials[at] for at in np.random.default_rng(repetition).permutation(len(trials))]
            cost, ended = search(config, halving, order, results)
            areas = [frontier_area(each, results, trials) for each in (ended, shorter(order, results, cost))]
            measured.append([cost / cost_of(trials, results), *(whole - area for area in areas)])
        means, errors = np.mean(measured, axis=0), 2 * np.std(measured, axis=0, ddof=1) / math.sqrt(N_REPETITIONS)
        rungs = ", ".join(f"{rung:g}" for rung in halving.rungs)
        shown = [f"{mean:.{n}f} ± {error:.{n}f}" for mean, error, n in zip(means, errors, (2, 4, 4), strict=True)]
        yield rungs, f"{halving.keep:g}", str(halving.seeds), *shown


def search(
    config: StudyConfig, halving: Halving, order: Sequence[Trial], results: Results
) -> tuple[float, list[Trial]]:
    """FLOPs of a search with halving, and the trials that trained to the end."""
    config = config.model_copy(update={"search": config.search.model_copy(update={"halving": halving})})
    rungs = Rungs(config, config.seed_list)
    cost, ended = 0.0, []
    for trial in order:
        known: dict[int, SeedResult] = {}
        is_over = False
        while not is_over:
            missing = [seed for seed in results[trial.number] if not _is_whole(known, seed)]
            seeds, until = rungs.leg(trial, missing, known)
            for seed in seeds:
                whole = results[trial.number][seed]
                known[seed] = whole if until is None else _part(whole, until)
            is_over = until is None or rungs.note(trial, known, after=(trial.number, seeds[-1])) is not None
        if all(_is_whole(known, seed) for seed in results[trial.number]):
            ended.append(trial)
        cost += sum(_flops(trial, result) for result in known.values())
    return cost, ended


def shorter(order: Sequence[Trial], results: Results, cost: float) -> list[Trial]:
    """The first trials, whole, that together cost at most this much; the one that exceeds it counts if half is in."""
    costs = np.cumsum([cost_of([trial], results) for trial in order])
    return list(order[: max(1, int(np.abs(costs - cost).argmin()) + 1)])


def cost_of(trials: Sequence[Trial], results: Results) -> float:
    """FLOPs of whole trials; a seed that diverged counts up to there."""
    return sum(_flops(trial, result) for trial in trials for result in results[trial.number].values())


def frontier_area(ended: Sequence[Trial], results: Results, every: Sequence[Trial]) -> float:
    """How far the frontier of the complete trials is below a uniform guess, on average over the log of all sizes."""
    sound = [trial for trial in ended if all(result.state == "complete" for result in results[trial.number].values())]
    sizes = np.array([trial.shape.n_params for trial in sound], dtype=float)
    losses = np.array([np.mean([r.final["final/val_loss"] for r in results[t.number].values()]) for t in sound])
    worst = math.log(every[0].shape.vocab_size)
    smallest, largest = (end(trial.shape.n_params for trial in every) for end in (min, max))
    return area(sizes, losses, worst, largest) / math.log2(largest / smallest)


def _is_whole(known: Mapping[int, SeedResult], seed: int) -> bool:
    return seed in known and known[seed].state != "paused"


def _part(result: SeedResult, step: int) -> SeedResult:
    """A result as it was at a rung; one that had failed by then stays as it is."""
    if result.failure_step is not None and result.failure_step <= step:
        return result
    return replace(
        result, state="paused", curve=[row for row in result.curve if row["step"] <= step], failure_step=None
    )


def _flops(trial: Trial, result: SeedResult) -> float:
    last = result.failure_step if result.failure_step is not None else result.curve[-1]["step"]
    return trial.shape.flops * last / trial.spec.protocol.steps


if __name__ == "__main__":
    main()
