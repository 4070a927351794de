"""The number formats that a training computes in: `protocol.precision`, whatever another library has switched on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Within it, float32 matrix products of the process are made in full float32; those of CUDA in TF32 under "tf32".

    Whatever was set before holds again afterwards.

    Args:
        precision: one of `config.Protocol.precision`. The parts of a CUDA product in bfloat16 are summed in float32.
    """
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]  # set at run time
    before = cuda.fp32_precision, cpu.fp32_precision, cuda.allow_bf16_reduced_precision_reduction
    cuda.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    cpu.fp32_precision = "ieee"
    cuda.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision, cuda.allow_bf16_reduced_precision_reduction = before


def logits_in(precision: str, device: torch.device | str, model: Callable[..., Tensor], *args: object) -> Tensor:
    """`model(*args)`, in bfloat16 by autocast where that is the precision; the logits are float32 for the loss."""
    if precision != "bfloat16":
        return model(*args)
    # Every weight is used once in a forward: there is nothing to cache, and under vmap or in a graph nothing can be.
    with torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False):
        logits = model(*args)
    return logits.float()
