"""MPOLinear against tensorly-torch on the same cores, and its mode `auto` against the best of our own modes.

Layers are square, in float32, with two balanced sites. Width, tokens and χ vary. There are three uses: a forward that
keeps nothing; a forward in evaluation, where ours may keep W; and forward and backward. Gradients are those of the
input and all cores. The rival is the faster of tensorly-torch's two implementations in each cell: "factorized" is one
einsum, "reconstructed" forms W. Values and gradients of both must agree. The target is the rival's time, or 1.03 times
that if at least 80 % of it is dense matrix products. "factorized" is left out if its states between the sites would
need more than MOST_BYTES (4 GiB).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.measurement import Call, Row, call_of, fastest, paired, repeats_of, run_alone, seconds_of
from mpo_core.layers.mpo import MPOLinear
from mpo_core.tensor_train.contraction import chain_products

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tltorch
    from tltorch.factorized_tensors.tensorized_matrices import BlockTT

WIDTHS = (128, 512, 1024, 4096)
TOKENS = (1, 16, 256, 2048, 8192)
CHIS = (4, 8, 16, 32)
USES = ("forward, nothing kept", "forward in evaluation", "forward+backward")
MOST_BYTES = 4 * 2**30
DENSE_SHARE = 0.8

CHANGING = (
    "the speed of a chain of many tokens depends on other use of the machine's caches, so it varies between pairs."
)
LIMITS = {
    **dict.fromkeys(
        (f"auto against our best mode: {use}" for use in USES),
        "`auto` predicts times from rates that are measured once in a process. Thin products, and memory that must be "
        f"mapped first, are predicted worst. Also, {CHANGING} For one token, the choice itself takes microseconds.",
    ),
    **dict.fromkeys(
        (f"MPOLinear against tensorly-torch: {use}" for use in USES),
        f"Both form W and multiply by it. Or `auto` takes the slower of two modes. Or {CHANGING}",
    ),
}


def rows() -> list[Row]:
    cells = [
        row
        for use in USES
        for width in WIDTHS
        for n_tokens in TOKENS
        for chi in CHIS
        for row in cell(use, width, n_tokens, chi)
    ]
    return sorted(cells, key=lambda row: row.section.startswith("auto"))


def cell(use: str, width: int, n_tokens: int, chi: int) -> list[Row]:
    """Ours against tensorly-torch, and `auto` against the best of our modes."""
    training = use == "forward+backward"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, width, generator=generator).requires_grad_(training)
    dy = torch.randn(n_tokens, width, generator=generator) if training else None
    layer = layer_of(width, chi, "auto", use)

    modes = ["reconstruct", "chain"] if use != "forward in evaluation" else ["reconstruct", "cached", "chain"]
    implementations = ["reconstructed"]
    if largest_state(layer, n_tokens) * (4 if training else 2) <= MOST_BYTES:
        implementations.append("factorized")
    ours = {mode: layer_of(width, chi, mode, use) for mode in modes}
    cores = [nn.Parameter(core.detach().clone(), requires_grad=training) for core in layer.cores]
    theirs = {name: peer_of(layer, cores, name) for name in implementations}

    auto = call_of(layer, x, list(layer.cores), dy)
    our_calls = {mode: call_of(each, x, list(each.cores), dy) for mode, each in ours.items()}
    their_calls = {name: call_of(each, x, cores, dy) for name, each in theirs.items()}
    check(auto(), their_calls["reconstructed"]())

    rival = fastest(their_calls)
    W = layer.to_matrix().detach().requires_grad_(training)
    share = 0.0
    if rival == "reconstructed":
        dense = call_of(lambda x: linear(x, W), x, [W], dy)
        share = min(1.0, least_seconds(dense) / least_seconds(their_calls[rival]))
    what, sizes = f"{width}², {n_tokens} tokens, χ={chi}", {"width": width, "tokens": n_tokens, "χ": chi}
    best = fastest(our_calls)
    return [
        paired(
            f"MPOLinear against tensorly-torch: {use}",
            what,
            auto,
            rival,
            their_calls[rival],
            target=1.03 if share >= DENSE_SHARE else 1.0,
            note=f"dense products {100 * share:.0f} % of its time" if share else "",
            sizes=sizes,
        ),
        paired(f"auto against our best mode: {use}", what, auto, best, our_calls[best], target=1.1, sizes=sizes),
    ]


def layer_of(width: int, chi: int, mode: str, use: str) -> MPOLinear:
    """The layer of a cell: the same cores in every mode."""
    generator = torch.Generator().manual_seed(1)
    layer = MPOLinear(width, width, chi=chi, bias=False, generator=generator, forward=mode)
    return layer.train(use != "forward in evaluation")


def peer_of(layer: MPOLinear, cores: Sequence[nn.Parameter], implementation: str) -> Callable[[Tensor], Tensor]:
    """tensorly-torch's layer on given cores."""
    sizes = (layer.d_out, layer.d_in)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight: Any = BlockTT(list(cores), tensorized_shape=sizes, rank=layer.bonds)
        return tltorch.FactorizedLinear(
            layer.d_in, layer.d_out, bias=False, factorization=weight, implementation=implementation
        )


def check(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Raise an error if values or gradients differ by more than rounding in float32."""
    for a, b in zip(ours, theirs, strict=True):
        error, scale = float((a - b).norm()), float(b.norm())
        if error > 1e-4 * scale:
            raise ValueError(f"tensorly-torch's result differs: ‖a − b‖ = {error:.2g}, ‖b‖ = {scale:.2g}")


def largest_state(layer: MPOLinear, n_tokens: int) -> int:
    """Bytes in float32 of the largest state between two sites of a chain."""
    return 4 * max(step.written for step in chain_products(layer.bonds, layer.d_out, layer.d_in, n_tokens))


def least_seconds(call: Call) -> float:
    repeats = repeats_of(call)
    return min(seconds_of(call, repeats) for _ in range(3))


if __name__ == "__main__":
    run_alone(rows)
