"""Which way to apply a chain of cores is fastest: seconds from FLOPs and bytes, with rates measured on the device.

A product takes an overhead, plus its FLOPs over a rate that falls with the size of its sides, plus what it reads and
what it writes over the rates of memory. Adding these up rather than taking the largest is what fits thin products.
Writing has a rate of its own since a large result goes to memory that must first be mapped.
"""

from __future__ import annotations

import math
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from mpo_core.contraction import Product, products, with_gradients

Curve = tuple[tuple[float, float], ...]
"""(size, seconds per unit of size) in ascending order of size: linear in log(size) between them, constant beyond."""


@dataclass(frozen=True, eq=False)  # looked up at every call of a layer: by identity, which costs nothing to hash
class Calibration:
    """What a device does how fast, in one dtype with one number of threads."""

    overhead: float
    """Seconds of a product of nothing."""
    flop: Curve
    """Harmonic mean of m, k and n -> seconds per FLOP; it is near the smallest of them."""
    read: Curve
    """Bytes -> seconds per byte read."""
    write: Curve
    """Bytes -> seconds per byte written to new memory."""
    itemsize: int = 4

    def seconds(self, steps: Sequence[Product]) -> float:
        """Predicted time of these products, one after the other."""
        return sum(self._seconds(step) for step in steps)

    def _seconds(self, step: Product) -> float:
        total = self.overhead
        if step.flops:
            side = 3 / (1 / step.m + 1 / step.k + 1 / step.n)
            total += step.flops * _interpolate(self.flop, side)
        for curve, elements in ((self.read, step.read), (self.write, step.written)):
            total += elements * self.itemsize * _interpolate(curve, elements * self.itemsize)
        return total


def choose(
    bonds: Sequence[int],
    d_out: Sequence[int],
    d_in: Sequence[int],
    n_tokens: int,
    *,
    training: bool,
    calibration: Calibration,
    modes: Sequence[str] = ("reconstruct", "chain"),
) -> str:
    """The mode of `modes` (see `contraction.products`) predicted to be fastest for n_tokens rows of x.

    Args:
        training: whether the gradients of x and of all cores are computed too.
    """
    return _choose(tuple(bonds), tuple(d_out), tuple(d_in), n_tokens, training, calibration, tuple(modes))


@lru_cache(maxsize=4096)
def _choose(
    bonds: tuple[int, ...],
    d_out: tuple[int, ...],
    d_in: tuple[int, ...],
    n_tokens: int,
    training: bool,
    calibration: Calibration,
    modes: tuple[str, ...],
) -> str:
    def seconds(mode: str) -> float:
        steps = products(mode, bonds, d_out, d_in, n_tokens)
        return calibration.seconds(with_gradients(steps) if training else steps)

    return min(modes, key=seconds)


# Measuring ------------------------------------------------------------------------------------------------------------

_calibrations: dict[tuple[torch.device, torch.dtype, int], Calibration] = {}


def calibration_of(device: torch.device | str, dtype: torch.dtype) -> Calibration:
    """The calibration of a device for a dtype and the present number of threads: measured once in a process, then kept.

    Measuring takes about half a second, and some hundred megabytes for that time.
    """
    key = _key(device, dtype)
    if key not in _calibrations:
        _calibrations[key] = calibrate(device, dtype)
    return _calibrations[key]


def set_calibration(device: torch.device | str, dtype: torch.dtype, calibration: Calibration | None) -> None:
    """Use this calibration from now on, for choices that repeat from run to run; None: measure afresh when needed."""
    if calibration is None:
        _calibrations.pop(_key(device, dtype), None)
    else:
        _calibrations[_key(device, dtype)] = calibration


@torch.no_grad()
def calibrate(device: torch.device | str, dtype: torch.dtype) -> Calibration:
    """Time a few products and copies on the device; draws no random numbers."""
    where = torch.device(device)
    on_cpu = where.type == "cpu"
    itemsize = torch.empty((), dtype=dtype).element_size()

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=where)

    def seconds(call: Callable[[], object]) -> float:
        times, begun = [], time.perf_counter()
        while len(times) < 8 and (len(times) < 3 or time.perf_counter() - begun < 0.03):
            _wait(where)
            start = time.perf_counter()
            call()
            _wait(where)
            times.append(time.perf_counter() - start)
        return min(times)  # what else runs on the machine only ever adds

    A, items = ones(4, 4), ones(2, 4, 4)
    least = seconds(lambda: A.clone())
    overhead = seconds(lambda: torch.bmm(A.reshape(4, 4).expand(2, 4, 4), items.reshape(2, 4, 4)).reshape(8, 4))

    def beyond_overhead(call: Callable[[], object]) -> float:
        # What is left of a call that takes little more than its overhead is noise: at least a tenth of it is kept.
        measured = seconds(call)
        return max(measured - least, measured / 10)

    read, write = [], []
    for exponent in (14, 18, 22, 24, 26):  # bytes: from the innermost cache to main memory
        size, x = 2.0**exponent, ones(2**exponent // itemsize)
        reading, both = beyond_overhead(lambda x=x: x.sum()), beyond_overhead(lambda x=x: x.clone())
        read.append((size, reading / size))
        write.append((size, max(both - reading, both / 2) / size))
    moving = Calibration(0.0, ((1.0, 0.0),), tuple(read), tuple(write), itemsize)
    flop = []
    for side in (8, 16, 32, 64, 128, 512) if on_cpu else (16, 64, 256, 1024, 4096):
        batch = max(1, (2**22 if on_cpu else 2**30) // side**3)
        left, right = ones(side, side).expand(batch, side, side), ones(batch, side, side)
        total = beyond_overhead(lambda left=left, right=right: torch.bmm(left, right))
        step = Product(batch, side, side, side)
        flop.append((float(side), max(total - moving.seconds([step]), total / 4) / step.flops))
    return Calibration(overhead, tuple(flop), tuple(read), tuple(write), itemsize)


def _key(device: torch.device | str, dtype: torch.dtype) -> tuple[torch.device, torch.dtype, int]:
    where = torch.device(device)
    if where.index is None and where.type != "cpu":  # a tensor's device has the index that "cuda" alone stands for
        where = torch.empty(0, device=where).device
    return where, dtype, torch.get_num_threads()


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _interpolate(curve: Curve, size: float) -> float:
    at = bisect([point[0] for point in curve], size)
    if at in (0, len(curve)):
        return curve[min(at, len(curve) - 1)][1]
    (low, before), (high, after) = curve[at - 1 : at + 1]
    return before + (after - before) * math.log(size / low) / math.log(high / low)
