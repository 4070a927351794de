"""A real LLaMA compressed without any training: every method at equal parameters, by perplexity on held-out text.

    python -m benchmarks.smollm2 FOLDER [--keep .8 .6 .4] [--seeds 0 1] [--methods PATTERN …]

SmolLM2-135M-Instruct; the 210 matrices of its 30 blocks are compressed (`smollm2_data` says where model and text come
from). `keep` is the share of their parameters that is left. Indices and masks count, unless a row says that its mask
does not. A seed draws the calibration text: 40,960 tokens, of which a fifth are held out. FOLDER keeps the model, the
text and the statistics of each seed. A line of JSON for each result is added to benchmarks/smollm2.jsonl: a result
that is there is not measured again. The table of all of them is written into docs/mpo_core.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.document import put_table
from benchmarks.smollm2_data import WINDOW, Split, documents, load_model, split
from mpo_core import (
    Perplexity,
    Statistics,
    collect_statistics,
    compress,
    next_token_losses,
    paired_difference,
    perplexity,
)
from mpo_core.tensor_train.splitting import splits_to_try

INCLUDE = ("model.layers.*",)
CALIBRATION, EVALUATION = 40_960, 20_000
"""Numbers of tokens."""
MASK = 1 / 32
"""A mask is a bit for each weight, and a weight has 32: so much more is kept where the mask is not counted."""

RESULTS = Path("benchmarks/smollm2.jsonl")
LOW_RANK = {"layer": "low_rank"}
SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))


def halves(*shapes: tuple[int, int]) -> list[tuple[str, dict[str, Any]]]:
    """An MPO of two sites with the longer side of a matrix cut in two: each way to do so."""
    splits = [split for shape in shapes for split in splits_to_try(*shape)]
    return [("mpo", {"d_out": d_out, "d_in": d_in, "forward": "chain"}) for d_out, d_in in splits]


FIXED = {"gauge": "fixed"}
EVEN_OUTPUTS = {"metric": "outputs", "spread": "even"}
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "low rank, outputs, even (SVD-LLM's way)": (0, {**LOW_RANK, **EVEN_OUTPUTS}),
    "low rank, outputs, by relative errors": (0, {**LOW_RANK, "metric": "outputs"}),
    "low rank, outputs, even, fixed gauge": (0, {**LOW_RANK, **EVEN_OUTPUTS, **FIXED}),
    "low rank, loss, even": (0, {**LOW_RANK, "spread": "even"}),
    "low rank, loss": (0, LOW_RANK),
    "low rank, loss, fixed gauge": (0, {**LOW_RANK, **FIXED}),
    "MPO of halves, loss, fixed gauge": (0, {"layer": halves(*SHAPES), **FIXED}),
    "auto, loss, fixed gauge": (0, {"layer": "auto", **FIXED}),
    "low rank, loss, fixed gauge, fewer hidden units": (0, {**LOW_RANK, **FIXED, "narrow": True}),
    "auto, loss, fixed gauge, fewer hidden units": (0, {"layer": "auto", **FIXED, "narrow": True}),
    "Monarch of 2×2 blocks, loss": (0, {"layer": "monarch", "n_blocks": 2}),
    "pruned, outputs, even (Wanda)": (0, {"layer": "pruned", **EVEN_OUTPUTS}),
    "pruned, outputs, even (Wanda), mask not counted": (MASK, {"layer": "pruned", **EVEN_OUTPUTS}),
    "pruned, loss (Fisher)": (0, {"layer": "pruned"}),
    "pruned, loss (Fisher), mask not counted": (MASK, {"layer": "pruned"}),
}
"""By name: a number to add to `keep`, and the options of `compress`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=["*"], help="patterns of names, such as 'low rank*'")
    arguments = parser.parse_args()
    methods = [name for name in METHODS if any(fnmatchcase(name, pattern) for pattern in arguments.methods)]
    if not methods:
        parser.error(f"no method matches; there are {'; '.join(METHODS)}")
    done = {(row["method"], row["keep"], row["seed"]) for row in _rows(RESULTS)}
    model, tokenizer = load_model(arguments.folder)
    texts = documents(arguments.folder)
    before: Perplexity | None = None
    for seed in arguments.seeds:
        cut = split(texts, tokenizer, calibration_tokens=CALIBRATION, evaluation_tokens=EVALUATION, seed=seed)
        statistics, seconds = statistics_of(model, cut, arguments.folder / f"statistics-{seed}.safetensors")
        for keep in arguments.keep:
            for method in methods:
                if (method, keep, seed) in done:
                    continue
                before = before or measured(model, cut)
                row = {"method": method, "keep": keep, "seed": seed, "statistics_seconds": seconds}
                row |= measure(model, method, keep, statistics, cut, before)
                print(json.dumps(row), flush=True)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    put_table("docs/mpo_core.md", "smollm2", *table(list(_rows(RESULTS))))


def measure(
    model: nn.Module, method: str, keep: float, statistics: Statistics, cut: Split, before: Perplexity
) -> dict[str, Any]:
    """One row: what is kept, the predicted and the measured loss, and what it took."""
    more, options = METHODS[method]
    cpu, wall = time.process_time(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the predicted loss")
        small, report = compress(model, include=INCLUDE, keep=keep + more, statistics=statistics, **options)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    after = measured(small, cut)
    difference, error = paired_difference(after, before)
    return {
        "kept": report.kept,
        "predicted": report.total("predicted_loss"),
        "held_out": report.total("held_out_loss"),
        "dense": before.value,
        "perplexity": after.value,
        "standard_error": after.standard_error,
        "nats": difference,
        "nats_error": error,
        "cpu_seconds": cpu,
        "seconds": wall,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "threads": torch.get_num_threads(),
    }


def measured(model: nn.Module, cut: Split) -> Perplexity:
    """Perplexity on the evaluation documents."""
    return perplexity(model, [document.ids for document in cut.evaluation], window=WINDOW)


def statistics_of(model: nn.Module, cut: Split, path: Path) -> tuple[Statistics, float]:
    """The statistics of a seed, and their CPU seconds. Both are read from files if they are there."""
    took = path.with_suffix(".seconds")
    if not took.exists():
        names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "layers" in name]
        start = time.process_time()
        batches = [tokens[None] for tokens in cut.calibration]
        statistics = collect_statistics(model, batches, loss=next_token_losses, modules=names)
        seconds = time.process_time() - start
        statistics.save(path)
        took.write_text(str(seconds))
    return Statistics.load(path), float(took.read_text())


def table(rows: list[dict[str, Any]]) -> tuple[str, tuple[str, ...], list[list[str]]]:
    """Caption, headings and lines: for each method and `keep` the seeds' perplexities, the mean of the rest."""
    lines = []
    for keep in sorted({row["keep"] for row in rows}, reverse=True):
        for method in METHODS:
            found = [row for row in rows if (row["method"], row["keep"]) == (method, keep)]
            if not found:
                continue
            found.sort(key=lambda row: row["seed"])
            nats, error = (sum(row[key] for row in found) / len(found) for key in ("nats", "nats_error"))
            predicted = [f"{_mean(found, key):.2f}" if found[0][key] is not None else "–" for key in _LOSSES]
            shown = " · ".join(f"{row['perplexity']:.1f}" for row in found)
            lines.append([f"{keep}", method, shown, f"{nats:.3f} ± {error:.3f}", *predicted])
            lines[-1].append(f"{_mean(found, 'cpu_seconds'):.0f}")
    headings = ("kept", "method", "perplexity", "loss above dense", "predicted", "held out", "CPU s")
    seeds = sorted({row["seed"] for row in rows})
    caption = (
        f"`python -m benchmarks.smollm2 FOLDER`: dense perplexity {rows[0]['dense']:.2f}; calibration seeds "
        f"{', '.join(map(str, seeds))}, one perplexity each; loss in nats per token, ± one standard error over the "
        "documents, paired; predicted loss on the fitted and on the held-out calibration text; PyTorch "
        f"{torch.__version__}, {rows[0]['threads']} threads"
    )
    return caption, headings, lines


_LOSSES = ("predicted", "held_out")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return (json.loads(line) for line in lines)


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


if __name__ == "__main__":
    main()
