"""The time that a trained model takes to read a text and to go on with it, beside the dense model of its sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import mpo_core
from study.training.precision import logits_in

N_ROUNDS = 5
"""Number of times that each model is measured, in turns; the median counts."""
N_DECODED = 8
"""Tokens that are decoded in one measurement."""


@torch.no_grad()
def times(
    model: nn.Module,
    dense: nn.Module,
    vocab_size: int,
    context: int,
    device: torch.device | str = "cpu",
    precision: str = "float32",
) -> dict[str, float]:
    """Milliseconds of both models at batch 1, under the names of `run_schema.METRICS`.

    `prefill_ms`: a forward pass over `context` tokens. `decode_ms`: one token after as many as fit before it, whose
    keys and values are cached; absent for a module of a user's own, which has no cache. `dense_…`: the same for
    `dense`, measured in turns with the model. They depend on the machine, and on all that runs on it.
    """
    tokens = torch.arange(context, device=device)[None] % vocab_size
    both = {"": model.eval(), "dense_": dense.eval()}
    found: dict[str, list[float]] = {}
    for turn in range(N_ROUNDS + 1):
        for prefix, each in both.items():

            def read(each: nn.Module = each) -> None:
                logits_in(precision, device, mpo_core.logits_of, each, tokens)

            taken = {"prefill_ms": _milliseconds(device, read)}
            if context > 1 and (cache := mpo_core.cache_of(each, 1)) is not None:
                n_decoded = min(N_DECODED, context - 1)
                logits_in(precision, device, mpo_core.logits_of, each, tokens[:, : context - n_decoded], cache)

                def decode(each: nn.Module = each, cache: object = cache, n: int = n_decoded) -> None:
                    for at in range(context - n, context):
                        logits_in(precision, device, mpo_core.logits_of, each, tokens[:, at : at + 1], cache)

                taken["decode_ms"] = _milliseconds(device, decode) / n_decoded
            for name, value in taken.items() if turn else ():  # the first turn warms up
                found.setdefault(prefix + name, []).append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def _milliseconds(device: torch.device | str, call: Callable[[], object]) -> float:
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if is_cuda:
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)
