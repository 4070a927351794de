"""The frontier's probabilities and hypervolume, against moocore draw by draw.

Both get the same draws, include the time for drawing them, and must agree. What moocore does not have is timed against
our own probabilities.
"""

from __future__ import annotations

from collections.abc import Callable

import moocore
import numpy as np

from analysis.statistics.band import mean_frontier_band
from analysis.statistics.frontier_probability import frontier_probability, size_needed
from analysis.statistics.hypervolume import HypervolumeReference, hypervolume_interval
from analysis.statistics.posterior import Posterior
from benchmarks.measurement import Row, paired, run_alone

SECTION = "frontier"
PAIRS = 5
MAXIMISE = [False, True]


def rows(n_configurations: int = 2_000, n_seeds: int = 5, n_draws: int = 10_000) -> list[Row]:
    """The two parts of the frontier's uncertainty that moocore has too, and the two that it does not have.

    Raises:
        AssertionError: moocore's result differs from ours.
    """
    rng = np.random.default_rng(0)
    # Ascending and mostly distinct, some tied, as counts of parameters are.
    sizes = np.sort(np.round(10 ** rng.uniform(4, 6, n_configurations)))
    means = 40 + 4 * np.log10(sizes / 1e6) + rng.normal(0, 0.4, sizes.size)
    values = means + rng.normal(0, 0.4, (n_seeds, sizes.size))
    reference = HypervolumeReference(worst_value=30, largest_size=1e6, base=10, direction="maximize")

    def posterior() -> Posterior:
        return Posterior.of(sizes, values)

    def fresh() -> np.random.Generator:
        return np.random.default_rng(1)

    def probability() -> np.ndarray:
        found = frontier_probability(sizes, posterior(), fresh(), epsilon=0.1, direction="maximize", n_draws=n_draws)
        return found.on_frontier

    def probability_by_moocore() -> np.ndarray:
        counts = np.zeros(sizes.size)
        for drawn in posterior().draws(n_draws, fresh()):
            for row in drawn:
                points = np.column_stack((sizes, row))
                counts += moocore.is_nondominated(points, maximise=MAXIMISE, keep_weakly=True)
        return counts / n_draws

    def hypervolumes() -> np.ndarray:
        interval = hypervolume_interval(sizes, posterior(), reference, fresh(), n_draws=n_draws)
        return np.array([interval.low, interval.high])

    def hypervolumes_by_moocore() -> np.ndarray:
        area = moocore.Hypervolume(ref=[np.log10(reference.largest_size), reference.worst_value], maximise=MAXIMISE)
        log_sizes = np.log10(sizes)
        drawn = [
            area(np.column_stack((log_sizes, row))) for part in posterior().draws(n_draws, fresh()) for row in part
        ]
        return np.quantile(drawn, [0.025, 0.975])

    def band() -> np.ndarray:
        return mean_frontier_band(sizes, posterior(), fresh(), direction="maximize", n_draws=n_draws).low

    def needed() -> np.ndarray:
        last = sizes.size - 1
        found = size_needed(sizes, posterior(), last, fresh(), delta=0.5, direction="maximize", n_draws=n_draws)
        return found.probability

    ours_is = "our probability, also within ε"
    compared: list[tuple[str, Callable[[], np.ndarray], str, Callable[[], np.ndarray]]] = [
        ("probability on the frontier, also within ε", probability, "moocore's mask (no ε)", probability_by_moocore),
        ("hypervolume interval", hypervolumes, "moocore's hypervolume", hypervolumes_by_moocore),
    ]
    note = f"{n_configurations:,} configurations, {n_seeds} seeds, {n_draws:,} draws"
    found = []
    for what, ours, against, rival in compared:
        np.testing.assert_allclose(ours(), rival(), rtol=1e-9)
        found.append(paired(SECTION, what, ours, against, rival, target=1.0, pairs=PAIRS, note=note))
    for what, ours in (("band of the frontier of means", band), ("size needed", needed)):
        found.append(paired(SECTION, what, ours, ours_is, probability, pairs=PAIRS, note=note))
    return found


if __name__ == "__main__":
    run_alone(rows)
