"""Checks of the values of a weight, and scaling by powers of two if squares would over- or underflow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes in which matrices can be multiplied and decomposed."""


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless `dtype` is one of `DTYPES`."""
    if dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{name} must be one of {allowed}, but got {dtype}")


def check_matrix(W: Tensor) -> None:
    """Raise ValueError unless W is a finite floating-point matrix with values."""
    if W.ndim != 2 or 0 in W.shape:
        raise ValueError(f"`W` must have shape (out_features, in_features), but got {tuple(W.shape)}")
    if W.is_meta:
        raise ValueError("a weight on the meta device has no values to decompose")
    check_dtype("`W`", W.dtype)
    if not torch.isfinite(W).all():
        raise ValueError(f"`W` must be finite to be decomposed, but {int((~torch.isfinite(W)).sum())} entries are not")


def check_cores_finite(cores: Sequence[Tensor]) -> None:
    """Raise ValueError if a core has an infinite or NaN entry."""
    for place, core in enumerate(cores):
        if not torch.isfinite(core).all():
            raise ValueError(f"`cores` must be finite, but core {place} is not")


def in_range(W: Tensor) -> tuple[Tensor, float]:
    """Return W / scale and the scale, a power of two.

    The scale is 1 if the squares of W's entries are well within the range of its dtype.
    """
    largest = float(W.abs().max())
    limit, highest = (1e100, 1000) if W.dtype is torch.float64 else (1e10, 120)
    if largest == 0 or not math.isfinite(largest) or 1 / limit < largest < limit:
        return W, 1.0
    scale = 2.0 ** max(-highest, min(math.frexp(largest)[1], highest))
    return W / scale, scale


def to_unit(T: Tensor) -> tuple[Tensor, Tensor]:
    """Return T / 2^k, whose largest entry is from 1/2 to 1, and k.

    If that entry is zero or not finite, k is 0. Differentiable, with k as a constant.
    """
    exponent = torch.frexp(T.detach().abs().amax()).exponent
    return times_power(T, -exponent), exponent


def to_units(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return every tensor scaled by `to_unit`, and the sum of their exponents."""
    scaled = [to_unit(tensor) for tensor in tensors]
    return [unit for unit, _ in scaled], torch.stack([exponent for _, exponent in scaled]).sum()


def times_power(T: Tensor, exponent: Tensor) -> Tensor:
    """T · 2^exponent, correct even if the power alone is out of range."""
    half = exponent.div(2, rounding_mode="floor")
    return T * torch.exp2(half.to(T.dtype)) * torch.exp2((exponent - half).to(T.dtype))


def norm(T: Tensor) -> Tensor:
    """Root of the sum of squares, as a float64 scalar; differentiable if it is not zero."""
    unit, exponent = to_unit(T.double())
    return times_power(torch.linalg.vector_norm(unit), exponent)


def error_ratio(error: float, norm: float) -> float:
    """Return error / norm. If the norm is zero: 0 for a zero error, infinity otherwise."""
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return error / norm


def with_equal_norms(tensors: Sequence[Tensor], exponent: Tensor) -> list[Tensor]:
    """Factors of one product times 2^exponent, with equal norms, which suits an optimiser; float64.

    If a factor is zero, so is the product, and the norms stay. A power that does not divide evenly is in the last one.
    """
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
    if (norms > 0).all():
        mean = norms.log().mean().exp()
        tensors = [tensor * (mean / size) for tensor, size in zip(tensors, norms, strict=True)]
    share = exponent.div(len(tensors), rounding_mode="floor")
    *first, last = tensors
    return [*(times_power(tensor, share) for tensor in first), times_power(last, exponent - share * len(first))]
