"""The frontier's support, hypervolume and attainment surfaces, against moocore draw by draw, on one core.

Both ways get the same draws and pay for drawing them, and must agree. Every pair of timings is of one way and the
other, in alternating order; a figure is the ratio of the two, with the middle half of the pairs.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import moocore
import numpy as np
from rich.console import Console
from rich.table import Table

from analysis.frontier.attainment import attainment_surfaces, mean_frontier_band
from analysis.frontier.draws import SeedMeans
from analysis.frontier.hypervolume import HypervolumeReference, hypervolume_interval
from analysis.frontier.support import frontier_support, size_needed

RESULTS = Path("results/frontier.json")
MAXIMISE = [False, True]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=2_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    rows = measure(arguments)
    machine = {"cpu": platform.processor() or platform.machine(), "numpy": np.__version__, **vars(arguments)}
    machine["moocore"] = moocore.__version__
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    title = "{configurations} configurations, {seeds} seeds, {draws} draws, {pairs} pairs".format(**vars(arguments))
    table = Table(title=f"{title}; numpy {np.__version__}, moocore {moocore.__version__}", title_justify="left")
    for heading in ("what", "against", "median (ms)", "rival (ms)", "ratio", "middle half"):
        table.add_column(heading)
    for row in rows:
        cells = [row["what"], row["against"] or "-", f"{1e3 * row['seconds']:.1f}"]
        if row["against"]:
            low, high = row["middle_half"]
            cells += [f"{1e3 * row['rival_seconds']:.1f}", f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}"]
        table.add_row(*cells)
    Console().print(table)
    Console().print(f"written to {RESULTS}")


def measure(arguments: argparse.Namespace) -> list[dict]:
    rng = np.random.default_rng(0)
    # Ascending and mostly distinct, some tied, as counts of parameters are.
    sizes = np.sort(np.round(10 ** rng.uniform(4, 6, arguments.configurations)))
    means = 40 + 4 * np.log10(sizes / 1e6) + rng.normal(0, 0.4, sizes.size)
    values = means + rng.normal(0, 0.4, (arguments.seeds, sizes.size))
    reference = HypervolumeReference(worst_value=30, largest_size=1e6, base=10, direction="maximize")
    sets = np.repeat(np.arange(arguments.seeds), sizes.size)
    draws, seed_means = arguments.draws, SeedMeans.of(values)

    def fresh() -> np.random.Generator:
        return np.random.default_rng(1)

    def support() -> np.ndarray:
        return frontier_support(sizes, values, fresh(), epsilon=0.1, direction="maximize", n_draws=draws).on_frontier

    def support_by_moocore() -> np.ndarray:
        counts = np.zeros(sizes.size)
        for drawn in seed_means.contrast_draws(draws, fresh()):
            for row in drawn:
                points = np.column_stack((sizes, row))
                counts += moocore.is_nondominated(points, maximise=MAXIMISE, keep_weakly=True)
        return counts / draws

    def hypervolumes() -> np.ndarray:
        interval = hypervolume_interval(sizes, values, reference, fresh(), n_draws=draws)
        return np.array([interval.low, interval.high])

    def hypervolumes_by_moocore() -> np.ndarray:
        area = moocore.Hypervolume(ref=[np.log10(reference.largest_size), reference.worst_value], maximise=MAXIMISE)
        log_sizes = np.log10(sizes)
        redrawn = [
            area(np.column_stack((log_sizes, row))) for drawn in seed_means.draws(draws, fresh()) for row in drawn
        ]
        return 2 * area(np.column_stack((log_sizes, seed_means.means))) - np.quantile(redrawn, [0.975, 0.025])

    def surfaces() -> np.ndarray:
        return attainment_surfaces(sizes, values, [25, 50, 75], "maximize").values[:, -1]

    def surfaces_by_moocore() -> np.ndarray:
        # moocore's surfaces are of objectives that are all minimised.
        points = np.column_stack((np.tile(sizes, arguments.seeds), -values.ravel()))
        found = moocore.eaf(points, sets, percentiles=[25, 50, 75])
        return np.array([-found[found[:, 2] == q, 1].min() for q in (25, 50, 75)])

    def band() -> np.ndarray:
        return mean_frontier_band(sizes, values, fresh(), direction="maximize", n_draws=draws).low

    def needed() -> np.ndarray:
        last = sizes.size - 1
        return size_needed(sizes, values, last, fresh(), delta=0.5, direction="maximize", n_draws=draws).support

    compared: list[tuple[str, Callable[[], np.ndarray], str, Callable[[], np.ndarray]]] = [
        ("support and ε-support", support, "moocore's mask (no ε)", support_by_moocore),
        ("hypervolume interval", hypervolumes, "moocore's hypervolume", hypervolumes_by_moocore),
        ("attainment surfaces (no draws)", surfaces, "moocore's EAF", surfaces_by_moocore),
    ]
    rows = [paired(what, ours, against, rival, arguments.pairs) for what, ours, against, rival in compared]
    for what, ours in (("band of the frontier of means", band), ("size needed", needed)):
        times = [seconds(ours) for _ in range(arguments.pairs)]
        rows.append({"what": what, "against": None, "seconds": median(times)})
    return rows


def paired(what: str, run: Callable[[], np.ndarray], against: str, rival: Callable[[], np.ndarray], pairs: int) -> dict:
    """Time two calls alternately, in both orders, after one call of each, whose results must agree."""
    np.testing.assert_allclose(run(), rival(), rtol=1e-9)
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            times[which].append(seconds((run, rival)[which]))
    lower, _, upper = quantiles([ours / theirs for ours, theirs in zip(*times, strict=True)], n=4)
    return {
        "what": what,
        "against": against,
        "seconds": median(times[0]),
        "rival_seconds": median(times[1]),
        "ratio": median(ours / theirs for ours, theirs in zip(*times, strict=True)),
        "middle_half": [lower, upper],
    }


def seconds(call: Callable[[], np.ndarray]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
