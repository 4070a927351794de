"""The number formats of a training: those of `protocol.precision`, whatever another library has set."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def device_name(device: torch.device | str) -> str:
    """The kind of GPU or CPU, on which rounding depends."""
    kind = torch.device(device).type
    return torch.cuda.get_device_name(device) if kind == "cuda" else platform.machine() or kind


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Context in which the process computes float32 matrix products in full float32; on CUDA in TF32 for "tf32".

    The previous settings are restored afterwards.

    Args:
        precision: one of `config.Protocol.precision`. Partial sums of a bfloat16 product on CUDA are added in float32.
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
    """`model(*args)`, in bfloat16 by autocast if that is the precision; the logits are float32 for the loss."""
    if precision != "bfloat16":
        return model(*args)
    # No autocast cache: each weight is used once in a forward pass, and under vmap or in a graph no cache is possible.
    with torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False):
        logits = model(*args)
    return logits.float()
