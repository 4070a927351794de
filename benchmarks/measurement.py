"""How every benchmark measures: two things alternately in one run, the ratio of each pair, and its spread.

A figure is the median of the pairs' ratios; its spread is the range of their middle half. Other programs on the machine
then slow both alike. A call that is too short for the clock is repeated within one timing.
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

PAIRS = 15
MIN_PAIRS = 3
"""Minimum number of pairs, however long they take, if the caller does not ask for fewer."""
PATIENCE = 15.0
"""Seconds after which no further pair starts."""
SHORTEST = 2e-3
"""Seconds: a shorter call is repeated until a timing takes about this long."""
THREADS = 2

PACKAGES = (
    "torch",
    "numpy",
    "pandas",
    "ray",
    "optuna",
    "mlflow",
    "tensorly",
    "tensorly-torch",
    "opt-einsum",
    "moocore",
)

Call = Callable[[], Any]


class Row(NamedTuple):
    """One comparison. If there is no rival, the limit takes its place."""

    section: str
    what: str
    against: str
    seconds: float
    """Median of ours, in `unit`."""
    rival_seconds: float
    ratio: float
    """Median of the pairs' ratios, ours over the rival's."""
    low: float
    high: float
    """The middle half of the pairs' ratios."""
    target: float | None
    """The limit on the ratio; None if there is none."""
    is_met: bool | None
    note: str = ""
    unit: str = "s"
    """Unit of `seconds` and `rival_seconds`: "s", "bytes" or "FLOP/s"."""
    n_pairs: int = PAIRS
    at_most: bool = True
    """Whether the target is the maximum of the ratio (or else its minimum)."""
    sizes: Mapping[str, int] | None = None
    """The place of the row in a table of many such rows, such as {"width": 128, "tokens": 1, "χ": 4}."""


def paired(
    section: str,
    what: str,
    run: Call,
    against: str,
    rival: Call,
    *,
    target: float | None = None,
    at_most: bool = True,
    pairs: int = PAIRS,
    note: str = "",
    sizes: Mapping[str, int] | None = None,
) -> Row:
    """Time two calls alternately, in both orders, after a warm-up call of each; ratio = seconds / rival_seconds.

    Args:
        target, at_most: the target is met if ratio <= target, or without `at_most` if ratio >= target.
        pairs: number of pairs. After PATIENCE fewer are timed, but at least MIN_PAIRS.
    """
    calls = (run, rival)
    repeats = [repeats_of(call) for call in calls]
    times: tuple[list[float], list[float]] = ([], [])
    begun = time.perf_counter()
    for pair in range(pairs):
        if pair >= MIN_PAIRS and time.perf_counter() - begun > PATIENCE:
            break
        for which in (0, 1) if pair % 2 else (1, 0):
            times[which].append(seconds_of(calls[which], repeats[which]))
    return rate(section, what, times[0], against, times[1], target=target, at_most=at_most, note=note, sizes=sizes)


def rate(
    section: str,
    what: str,
    values: Sequence[float],
    against: str,
    rival_values: Sequence[float],
    *,
    unit: str = "s",
    target: float | None = None,
    at_most: bool = True,
    note: str = "",
    sizes: Mapping[str, int] | None = None,
) -> Row:
    """The row of values that were measured in pairs, in any unit; see `paired`. The spread of two is their range."""
    ratios = [ours / theirs for ours, theirs in zip(values, rival_values, strict=True)]
    # The quartiles of two values would be outside their range.
    low, ratio, high = quantiles(ratios, n=4) if len(ratios) > 2 else (min(ratios), median(ratios), max(ratios))
    is_met = None if target is None else ratio <= target if at_most else ratio >= target
    medians = median(values), median(rival_values)
    return Row(
        section, what, against, *medians, ratio, low, high, target, is_met, note, unit, len(ratios), at_most, sizes
    )


def within(
    section: str, what: str, values: Sequence[float], limit: float, *, unit: str = "s", note: str = "", **options: Any
) -> Row:
    """The row of values with a limit and no rival: the target is met if their median is at most the limit."""
    limits = [limit] * len(values)
    return rate(section, what, values, "limit", limits, unit=unit, target=1.0, note=note, **options)


def fastest(calls: Mapping[str, Call], rounds: int = 3) -> str:
    """The name of the fastest call, by its minimum of a few timings; a call that takes twice as long is timed once."""
    repeats = {name: repeats_of(call) for name, call in calls.items()}
    least = {name: seconds_of(call, repeats[name]) for name, call in calls.items()}
    close = [name for name, seconds in least.items() if seconds < 2 * min(least.values())]
    if len(close) > 1:
        for _ in range(rounds - 1):
            for name in close:
                least[name] = min(least[name], seconds_of(calls[name], repeats[name]))
    return min(close, key=lambda name: least[name])


def seconds_of(call: Call, repeats: int = 1) -> float:
    """Mean seconds of one call, over `repeats` calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def repeats_of(call: Call) -> int:
    """Number of calls in one timing. It calls once or twice, as a warm-up."""
    seconds = seconds_of(call)  # the first call also chooses kernels and maps memory
    if seconds < 50 * SHORTEST:
        seconds = seconds_of(call)
    return max(1, math.ceil(SHORTEST / max(seconds, 1e-7)))


def call_of(layer: Callable[[Tensor], Tensor], x: Tensor, weights: Sequence[Tensor], dy: Tensor | None) -> Call:
    """A forward without gradients, or, with dy, a forward and the gradients of x and the weights.

    The call returns y, or y and the gradients.
    """
    if dy is None:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [layer(x)]

        return forward

    wanted = [x, *weights]

    def forward_and_backward() -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

    return forward_and_backward


def process_memory(name: str) -> int:
    """Bytes that Linux reports for this process: "VmRSS", its resident memory now, or "VmHWM", the peak of that."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


# The machine and the table --------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """CPU, GPU if any, cores, PyTorch's threads, load of the last minute, and versions of installed packages."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": versions,
    }


def run_alone(rows: Callable[[], list[Row]]) -> None:
    """`python -m benchmarks.NAME`: measure, and print the table without writing a file."""
    torch.set_num_threads(THREADS)
    measured = rows()
    print_table(measured)


def print_table(rows: Sequence[Row], console: Console | None = None) -> None:
    console = console or Console()
    for section in dict.fromkeys(row.section for row in rows):
        table = Table(title=section, title_justify="left")
        for heading in ("what", "against", "median", "rival", "ratio", "middle half", "target", "met", "note"):
            table.add_column(heading)
        for row in rows:
            if row.section == section:
                table.add_row(row.what, row.against, *cells_of(row), row.note)
        console.print(table)


def cells_of(row: Row) -> list[str]:
    """Median, rival's median, ratio, middle half, target and whether it is met, as text."""
    target = "" if row.target is None else f"{'≤' if row.at_most else '≥'} {row.target:.3g}"
    met = {None: "", True: "yes", False: "no"}[row.is_met]
    values = [quantity(value, row.unit) for value in (row.seconds, row.rival_seconds)]
    return [*values, f"{row.ratio:.3g}", f"{row.low:.3g} to {row.high:.3g}", target, met]


def quantity(value: float, unit: str) -> str:
    """A value with three digits, and a unit for its size."""
    scales = {
        "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
        "bytes": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
        "FLOP/s": ((1e9, "GFLOP/s"),),
    }.get(unit, ((1.0, unit),))
    scale, name = next(((scale, name) for scale, name in scales if abs(value) >= scale), scales[-1])
    scaled = value / scale
    return f"{scaled:.0f} {name}" if abs(scaled) >= 100 else f"{scaled:.3g} {name}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
