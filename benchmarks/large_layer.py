"""One large layer, 4096 × 4096 with two sites of 64, applied by the chain, against the dense layer in float32.

Forward and backward include the gradients of the input and of the weight or the cores. For one token the dense layer
has its weight ready. Memory is what inference adds to a process of its own, weights included. It is the peak of
resident memory minus the memory before the layer was made. Small layers of both kinds have warmed up the process
before.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.nn.functional import linear

from benchmarks.measurement import THREADS, Row, call_of, paired, process_memory, rate, run_alone
from mpo_core.layers.mpo import MPOLinear

WIDTH, SITES = 4096, (64, 64)
CHIS = (4, 8, 16, 32)
MEMORY_PAIRS = 5
TRAINING = "4096 × 4096, chain against dense: forward+backward, 256 tokens"
FORWARD = "4096 × 4096, chain against dense: forward"
MEMORY = "4096 × 4096, peak memory of inference, chain against dense"

LIMITS = {
    MEMORY: "For 256 tokens x and y take 4 MiB each, and the dense layer has them too. The chain's state is bounded, "
    "because a few tokens are contracted at a time."
}


def rows() -> list[Row]:
    return [*training(), *inference(), *memory()]


def training() -> list[Row]:
    found = []
    for chi, times in ((4, 4.5), (8, 1.8), (16, None), (32, None)):
        found.append(compared(TRAINING, chi, 256, True, times and 1 / times, f"{times} times as fast" if times else ""))
    return found


def inference() -> list[Row]:
    found = [compared(FORWARD, 16, 1, False, 1 / 8, "8 times as fast")]
    found += [compared(FORWARD, chi, 1, False, None) for chi in CHIS if chi != 16]
    return found + [compared(FORWARD, chi, 256, False, None) for chi in CHIS]


def compared(section: str, chi: int, n_tokens: int, backward: bool, target: float | None, note: str = "") -> Row:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, WIDTH, generator=generator).requires_grad_(backward)
    dy = torch.randn(n_tokens, WIDTH, generator=generator) if backward else None
    layer = chain_layer(chi)
    W = layer.to_matrix().detach().requires_grad_(backward)
    return paired(
        section,
        f"χ={chi}, {n_tokens} token{'s' * (n_tokens > 1)}",
        call_of(layer, x, list(layer.cores), dy),
        "dense",
        call_of(lambda x: linear(x, W), x, [W], dy),
        target=target,
        note=note,
    )


def chain_layer(chi: int, width: int = WIDTH, sites: tuple[int, ...] = SITES) -> MPOLinear:
    generator = torch.Generator().manual_seed(1)
    return MPOLinear(
        width, width, chi=chi, d_out=sites, d_in=sites, bias=False, generator=generator, forward="chain"
    ).eval()


# Memory ---------------------------------------------------------------------------------------------------------------


def memory() -> list[Row]:
    found = []
    for n_tokens in (1, 16, 256):
        peaks: dict[str, list[float]] = {"chain": [], "dense": []}
        for pair in range(MEMORY_PAIRS):
            for kind in ("chain", "dense") if pair % 2 else ("dense", "chain"):
                # Each inference has a process of its own: it would use memory that an earlier one gave back.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    peaks[kind].append(pool.submit(peak_bytes, kind, n_tokens).result())
        found.append(
            rate(
                MEMORY,
                f"χ=16, {n_tokens} token{'s' * (n_tokens > 1)}",
                peaks["chain"],
                "dense",
                peaks["dense"],
                unit="bytes",
                target=0.1,
            )
        )
    return found


@torch.no_grad()
def peak_bytes(kind: str, n_tokens: int) -> float:
    """Bytes that making a layer and applying it once adds to the peak of this process's resident memory."""
    torch.set_num_threads(THREADS)
    small = chain_layer(4, 64, (8, 8))
    linear(small(torch.zeros(4, 64)), torch.zeros(64, 64))
    before = process_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    x = torch.zeros(n_tokens, WIDTH).fill_(1.0)
    if kind == "chain":
        chain_layer(16)(x)
    else:
        linear(x, torch.empty(WIDTH, WIDTH).fill_(1.0))
    return float(process_memory("VmHWM") - before)


if __name__ == "__main__":
    run_alone(rows)
