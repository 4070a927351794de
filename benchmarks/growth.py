"""Growth of time with tokens, width, χ and the number of sites L, for both modes that hold no W between two calls.

One size varies. The others are 256 tokens, 4096 × 4096, χ = 8, L = 2 and balanced sites. All is in float32: forward and
backward, with the gradients of the input and of all cores. The rival is the dense layer of that width.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from benchmarks.measurement import Row, call_of, paired, run_alone
from mpo_core.layers.mpo import MPOLinear

BASE = {"tokens": 256, "width": 4096, "χ": 8, "L": 2}
VALUES = {
    "tokens": (1, 8, 64, 256, 1024, 4096),
    "width": (256, 512, 1024, 2048, 4096),
    "χ": (2, 4, 8, 16, 32, 64),
    "L": (2, 3, 4, 6),
}
PAIRS = 7


def rows() -> list[Row]:
    return [
        growth(axis, mode, value)
        for axis, values in VALUES.items()
        for mode in ("reconstruct", "chain")
        for value in values
    ]


def growth(axis: str, mode: str, value: int) -> Row:
    sizes = BASE | {axis: value}
    n_tokens, width = sizes["tokens"], sizes["width"]
    generator = torch.Generator().manual_seed(0)
    layer = MPOLinear(width, width, chi=sizes["χ"], n_sites=sizes["L"], bias=False, generator=generator, forward=mode)
    x = torch.randn(n_tokens, width, generator=generator, requires_grad=True)
    dy = torch.randn(n_tokens, width, generator=generator)
    W = layer.to_matrix().detach().requires_grad_()
    others = ", ".join(f"{name} {size}" for name, size in BASE.items() if name != axis)
    return paired(
        f"growth over {axis}: {mode}",
        others,
        call_of(layer, x, list(layer.cores), dy),
        "dense",
        call_of(lambda x: linear(x, W), x, [W], dy),
        pairs=PAIRS,
        sizes={axis: value},
    )


if __name__ == "__main__":
    run_alone(rows)
