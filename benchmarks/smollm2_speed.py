"""How fast and how large a compressed LLaMA is: SmolLM2 at half the parameters of its blocks, against the dense model.

    python -m benchmarks.smollm2_speed FOLDER

One token is decoded after `CONTEXT` others, whose keys and values are cached, at batch 1; a prefill reads 512 tokens
and gives the logits of the last. Times are measured in pairs. Memory is what loading the saved model, a prefill and 16
tokens add to a process of its own. Time depends on sizes, not on values, so models are compressed in the metric
"weights", except where hidden units are removed: that needs the statistics of a loss. FOLDER keeps the model of
`smollm2_data`, its statistics, and the compressed models. The table is written into docs/mpo_core.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.document import put_table
from benchmarks.measurement import THREADS, Row, machine, paired, print_table, process_memory, rate
from benchmarks.smollm2 import CALIBRATION, EVALUATION, FIXED, INCLUDE, SHAPES, halves, statistics_of
from benchmarks.smollm2_data import CONVERTED, documents, load_model, split
from mpo_core import Statistics, compress, load, save

KEEP = 0.5
CONTEXT, PREFILL, NEW = 64, 512, 16
"""Numbers of tokens."""
MEMORY_PAIRS = 3
DENSE = "dense"
MODELS: dict[str, dict[str, Any]] = {
    "low rank, free gauge": {"layer": "low_rank"},
    "low rank, fixed gauge": {"layer": "low_rank", **FIXED},
    "low rank, fixed gauge, fewer hidden units": {"layer": "low_rank", **FIXED, "narrow": True},
    "MPO of halves, fixed gauge": {"layer": halves(*SHAPES), **FIXED},
    "MPO for v and down, low rank for the rest, fixed gauge": {
        "layer": {"*.v_proj": halves((192, 576)), "*.down_proj": halves((576, 1536)), "*": "low_rank"},
        **FIXED,
    },
}
"""By name: options of `compress`."""
TARGETS = {"decoding": 1 / 1.5, "prefill": 1 / 1.3, "memory": 0.65}
"""Most of the dense model's time or memory."""
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.set_num_threads(THREADS)
    dense, _ = load_model(folder)
    rows: list[Row] = []
    for name in (DENSE, *MODELS):
        if not all((_folder(folder, name, dtype) / "config.json").exists() for dtype in DTYPES):
            write(dense, folder, name)
    for dtype in DTYPES:
        rows += rows_of(folder, dtype)
    print_table(rows)
    about = machine()
    caption = (
        f"`python -m benchmarks.smollm2_speed FOLDER`: keep {KEEP} of the blocks' parameters; time and memory as "
        f"shares of the dense model's, [middle half of the pairs]; {about['cpu']}, {THREADS} threads, "
        f"PyTorch {about['torch']}"
    )
    put_table("docs/mpo_core.md", "smollm2_speed", caption, *table(rows))


def table(rows: list[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Headings and lines: one line for a model and a dtype."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        name, _, dtype = row.what.rpartition(", ")
        line = lines.setdefault((name, dtype), [name, dtype])
        line.append(f"{row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}]")
    targets = [f"{section} (aim ≤ {target:.2f})" for section, target in TARGETS.items()]
    return ("model", "dtype", *targets), list(lines.values())


def rows_of(folder: Path, dtype: torch.dtype) -> Iterator[Row]:
    shown = str(dtype).removeprefix("torch.")
    dense = loaded(_folder(folder, DENSE, dtype))
    for name in MODELS:
        model, what = loaded(_folder(folder, name, dtype)), f"{name}, {shown}"
        for section, call in (("decoding", decoding), ("prefill", prefill)):
            yield paired(section, what, call(model), DENSE, call(dense), target=TARGETS[section])
        peaks = [[peak(_folder(folder, each, dtype)) for each in (name, DENSE)] for _ in range(MEMORY_PAIRS)]
        yield rate(
            "memory",
            what,
            [ours for ours, _ in peaks],
            DENSE,
            [theirs for _, theirs in peaks],
            unit="bytes",
            target=TARGETS["memory"],
        )


@torch.no_grad()
def decoding(model: nn.Module) -> Callable[[], object]:
    """One more token after CONTEXT."""
    cache = DynamicCache(config=model.config)
    model(_tokens(CONTEXT), past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def call() -> object:
        logits = model(_tokens(1), past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return call


def prefill(model: nn.Module) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return model(_tokens(PREFILL), use_cache=True, logits_to_keep=1).logits

    return call


def peak(folder: Path) -> float:
    """Bytes that loading, a prefill and decoding add to a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, folder).result()


def _peak(folder: Path) -> float:
    torch.set_num_threads(THREADS)
    nn.Linear(64, 64)(torch.ones(1, 64))  # starts the threads and kernels
    before = process_memory("VmRSS")
    model = loaded(folder)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(_tokens(PREFILL), past_key_values=cache, use_cache=True, logits_to_keep=1)
        for _ in range(NEW):
            model(_tokens(1), past_key_values=cache, use_cache=True)
    return float(process_memory("VmHWM") - before)


def loaded(folder: Path) -> Any:
    if (folder / "mpo_core.json").exists():
        return load(folder).eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def write(dense: nn.Module, folder: Path, name: str) -> None:
    """Put a model into its folders, one for each dtype."""
    if name == DENSE:
        for dtype in DTYPES:
            model = AutoModelForCausalLM.from_pretrained(folder / CONVERTED, dtype=dtype)
            model.save_pretrained(_folder(folder, name, dtype))
        return
    options = MODELS[name]
    how = {"statistics": _statistics(dense, folder)} if options.get("narrow") else {"metric": "weights"}
    small, report = compress(dense, include=INCLUDE, keep=KEEP, **how, **options)
    print(f"{name}: kept {report.kept:.3f}", flush=True)
    for dtype in DTYPES:
        save(small.to(dtype), _folder(folder, name, dtype))


def _statistics(model: nn.Module, folder: Path) -> Statistics:
    """Those of the first seed of `benchmarks.smollm2`."""
    _, tokenizer = load_model(folder)
    cut = split(documents(folder), tokenizer, calibration_tokens=CALIBRATION, evaluation_tokens=EVALUATION, seed=0)
    return statistics_of(model, cut, folder / "statistics-0.safetensors")[0]


def _folder(folder: Path, name: str, dtype: torch.dtype) -> Path:
    return folder / "speed" / f"{name}, {dtype}".replace(", ", "-").replace(" ", "-")


def _tokens(n: int) -> torch.Tensor:
    return torch.randint(40_000, (1, n), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()
