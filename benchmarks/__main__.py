"""Run every benchmark, print one table, and write docs/performance.json and .md: `make bench`.

    python -m benchmarks [NAME ...]    (default: all; the figures of the others stay in the JSON)

The JSON is written after each benchmark. So a benchmark that fails does not lose the figures of another.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.measurement import THREADS, machine, print_table

NAMES = ("training_step", "layers", "large_layer", "growth", "decompositions", "decoding", "engine", "analysis", "gpu")
"""Modules with `rows() -> list[Row]`, a docstring that says what is measured, and possibly `LIMITS`: by a section's
name, the reason why a target is missed there."""
ON_GPU = ("gpu",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    asked = parser.parse_args().names or NAMES
    unknown = sorted(set(asked) - set(NAMES))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; choose among {', '.join(NAMES)}")
    console = Console()
    names = [name for name in asked if name not in ON_GPU or torch.cuda.is_available()]
    if len(names) < len(asked):
        console.print(f"left out: {', '.join(ON_GPU)}, because PyTorch finds no CUDA device")
    if not names:
        return
    failed, rows = [], []
    for name in names:
        console.rule(name)
        torch.set_num_threads(THREADS)
        begun = time.perf_counter()
        try:
            module = import_module(f"benchmarks.{name}")
            measured = module.rows()
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        print_table(measured, console)
        rows += measured
        entry = {
            "about": (module.__doc__ or "").strip(),
            "limits": getattr(module, "LIMITS", {}),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "took_seconds": time.perf_counter() - begun,
            "machine": machine(),
            "rows": [row._asdict() for row in measured],
        }
        write(report.RESULTS, name, entry)
    with_target = [row for row in rows if row.is_met is not None]
    console.print(f"{sum(map(bool, (row.is_met for row in with_target)))} of {len(with_target)} targets are met")
    if rows:
        report.main()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def write(path: Path, name: str, entry: dict) -> None:
    """Add or replace the entry of one benchmark; the entries keep the order of `NAMES`."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    entries[name] = entry
    in_order = {known: entries[known] for known in NAMES if known in entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(in_order, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
