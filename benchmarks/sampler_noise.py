"""Does it help a search to hear how noisy its means are? Simulated searches with a known truth.

    python -m benchmarks.sampler_noise    writes the table into docs/study.md

The loss of a trial is 1.9 + 2 χ^-0.8 + 0.15 (log10 of its rate over the best rate)², where the best rate falls with χ.
Parameters grow as χ. A search has 40 trials, of χ from 2 to 32 and rates from 1e-3 to 1e-1, and two objectives:
parameters, and the mean loss over 5 seeds, whose single seeds have a standard deviation of .02 or .1. (That of the
quick study is .01 to .02.) Optuna's samplers take a value without a standard error. Its Gaussian process can fit the
noise, or take values as exact.

A search ends with the trials that no other beats by the measured means. Its score is the area that these trials'
*true* losses have below 4, over the logarithm of χ: the hypervolume of `analysis.statistics.hypervolume`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from analysis.statistics.nondominated import on_frontier
from benchmarks.document import put_table

N_TRIALS, N_SEEDS, N_SEARCHES = 40, 5, 10
SPREADS = (0.02, 0.1)
"""Standard deviations over seeds, in nats."""
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True),
    "gp, noise fitted (ours)": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "gp, values as exact": lambda seed: optuna.samplers.GPSampler(seed=seed, deterministic_objective=True),
}


def true_loss(chi: float, rate: float) -> float:
    best = 0.03 * (chi / 8) ** -0.5
    return 1.9 + 2 * chi**-0.8 + 0.15 * math.log10(rate / best) ** 2


def score(sampler: str, spread: float, seed: int) -> float:
    """The true area of what one search ends with."""
    rng = np.random.default_rng([seed, round(1000 * spread)])
    study = optuna.create_study(directions=["minimize"] * 2, sampler=SAMPLERS[sampler](seed))
    found = []
    for _ in range(N_TRIALS):
        trial = study.ask()
        chi, rate = trial.suggest_int("chi", 2, 32, log=True), trial.suggest_float("rate", 1e-3, 1e-1, log=True)
        loss = true_loss(chi, rate)
        mean = loss + spread * rng.normal() / math.sqrt(N_SEEDS)
        study.tell(trial, [float(chi), mean])
        found.append((chi, mean, loss))
    sizes, means, losses = np.array(found).T
    chosen = on_frontier(sizes, means, np.full(N_TRIALS, N_SEEDS), np.full(N_TRIALS, True))
    return area(sizes[chosen], losses[chosen], worst=4.0, largest=32)


def area(sizes: np.ndarray, losses: np.ndarray, worst: float, largest: float) -> float:
    """Area between the step line of the lowest loss so far and the worst loss, over log2 of the size, up to a size."""
    order = np.argsort(sizes)
    ends = np.log2(np.append(sizes[order], largest))
    best = np.minimum.accumulate(losses[order])
    return float((np.maximum(worst - best, 0) * np.diff(ends)).sum())


def rows() -> Iterator[tuple[str, ...]]:
    for spread in SPREADS:
        scores = {name: [score(name, spread, seed) for seed in range(N_SEARCHES)] for name in SAMPLERS}
        for name, own in scores.items():
            difference = np.array(own) - scores["gp, noise fitted (ours)"]
            error = difference.std(ddof=1) / math.sqrt(N_SEARCHES)
            shown = "–" if name.endswith("(ours)") else f"{difference.mean():+.3f} ± {2 * error:.3f}".replace("-", "−")
            yield f"{spread:g}", name, f"{np.mean(own):.3f}", shown


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    caption = (
        f"{N_SEARCHES} simulated searches of {N_TRIALS} trials each. The score is the true area under the frontier "
        "found; ± is twice the standard error of the difference. `python -m benchmarks.sampler_noise` writes this "
        "table, and says what is simulated."
    )
    headings = ("spread over seeds (nats)", "sampler", "score", "difference to noise fitted")
    put_table("docs/study.md", "sampler-noise", caption, headings, list(rows()))


if __name__ == "__main__":
    main()
