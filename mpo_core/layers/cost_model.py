"""Predict the fastest way to apply a chain of cores: seconds from FLOPs and bytes, with rates measured on the device.

The time of a product is a sum: an overhead, which depends on the mode; its FLOPs over a rate that is lower for small
sides; and its reads and writes over the rates of memory. The sum of these fits thin products, while their maximum does
not. Writing has its own rate, because a large result goes to memory that must first be mapped.
"""

from __future__ import annotations

import math
import time
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate

import torch
from torch.nn.functional import linear

from mpo_core.layers.cached_matrix import CachedMatrix
from mpo_core.tensor_train.algebra import contract
from mpo_core.tensor_train.contraction import Product, chain, cheapest_direction, products, rows_at_once, with_gradients

_IN_PARTS = (1.1, 1.5)
"""Ratio of the time of a chain in parts to the sum of its products: in a forward pass, and with gradients. Measured 1.0
to 1.2 and 1.2 to 2 on a CPU. It is higher if the cache that holds the state, which other programs share, is busier."""

Curve = tuple[tuple[float, float], ...]
"""(size, seconds per unit of size) in ascending order of size: linear in log(size) between points, constant beyond."""


@dataclass(frozen=True, eq=False)  # looked up at every call of a layer: by identity, which costs nothing to hash
class DeviceRates:
    """Speed of a device in one dtype with one number of threads."""

    overhead: Mapping[str, tuple[float, float]]
    """Mode -> seconds for each of its products without anything to compute: in a forward pass, and with gradients."""
    flop: Curve
    """Power mean of m, k and n with exponent -3 -> seconds per FLOP; the mean is near the smallest of the three."""
    read: Curve
    """Bytes -> seconds per byte read."""
    write: Curve
    """Bytes -> seconds per byte written to new memory."""
    itemsize: int = 4
    copy: Curve | None = None
    """Bytes -> seconds per byte copied into another order; None: from `read` and `write`."""
    vector: float | None = None
    """Seconds per FLOP of a product of a matrix and a vector, or of two vectors; None: from `flop`."""
    in_parts: bool = True
    """Whether a chain is computed for a few rows at a time (see `contraction.rows_at_once`)."""

    def seconds(self, steps: Sequence[Product], *, keeps: bool = False) -> float:
        """Predicted time of these products, one after the other, without overheads.

        Args:
            keeps: whether all results stay in memory until the last product. Each product then writes at the rate of a
                result as large as all of them together, because memory in use cannot be used again.
        """
        written = sum(step.written - step.summed for step in steps) * self.itemsize if keeps else 0
        return sum(self._seconds(step, written) for step in steps)

    def _seconds(self, step: Product, written: int) -> float:
        total = 0.0
        if step.flops:
            of_vector = self.vector if step.batch == 1 and 1 in (step.m, step.k, step.n) else None
            side = ((step.m**-3.0 + step.k**-3.0 + step.n**-3.0) / 3) ** (-1 / 3)
            total += step.flops * (_interpolate(self.flop, side) if of_vector is None else of_vector)
        summed, copied = step.summed * self.itemsize, step.copied * self.itemsize
        for curve, elements, least in ((self.read, step.read, 0), (self.write, step.written, written)):
            own = elements * self.itemsize - summed - copied
            total += own * _interpolate(curve, max(own, least)) + summed * _interpolate(curve, summed)
            if self.copy is None:
                total += copied * _interpolate(curve, max(copied, least))
        if self.copy is not None:
            total += copied * _interpolate(self.copy, max(copied, written))
        return total


def choose(
    bonds: Sequence[int],
    d_out: Sequence[int],
    d_in: Sequence[int],
    n_tokens: int,
    *,
    training: bool,
    rates: DeviceRates,
    modes: Sequence[str] = ("reconstruct", "chain"),
    gauge: str = "free",
) -> str:
    """Return the mode of `modes` (see `contraction.products`) that is predicted to be fastest for n_tokens rows of x.

    Args:
        training: whether the gradients of x and of all cores are computed too.
        gauge: of the cores, "free" or "fixed".
    """
    return _choose(tuple(bonds), tuple(d_out), tuple(d_in), n_tokens, training, rates, tuple(modes), gauge)


@lru_cache(maxsize=4096)
def _choose(
    bonds: tuple[int, ...],
    d_out: tuple[int, ...],
    d_in: tuple[int, ...],
    n_tokens: int,
    training: bool,
    rates: DeviceRates,
    modes: tuple[str, ...],
    gauge: str,
) -> str:
    def seconds(mode: str, n_rows: int) -> float:
        steps = products(mode, bonds, d_out, d_in, n_rows, gauge=gauge)
        every = with_gradients(steps) if training else steps
        if training and n_rows < n_tokens:
            every += steps[:-1]  # the backward pass of a part forms its states again
        overhead = len(steps) * rates.overhead[mode][training]
        excess = _IN_PARTS[training] if n_rows < n_tokens else 1.0
        total = overhead + excess * rates.seconds(every, keeps=training)
        if mode == "cached" and rates.in_parts:  # on a CPU every call compares the cores with those of the kept W
            n_entries = sum(map(math.prod, zip(bonds[:-1], d_out, d_in, bonds[1:], strict=True)))
            total += rates.seconds([Product(0, 1, 2 * n_entries, 0)])
        return total

    def in_all(mode: str) -> float:
        n_at_once = n_tokens
        if mode == "chain" and rates.in_parts:
            direction = cheapest_direction(bonds, d_out, d_in)
            n_at_once = rows_at_once(bonds, d_out, d_in, direction, n_tokens, training=training)
        n_full, left = divmod(n_tokens, max(1, n_at_once))
        total = n_full * seconds(mode, n_at_once) + (seconds(mode, left) if left else 0.0)
        if n_at_once < n_tokens:  # the parts of y, and of the gradient of x, are put together
            total += rates.seconds([Product(0, 0, 0, 0, copied=n_tokens * math.prod(d_out))])
            if training:
                total += rates.seconds([Product(0, 0, 0, 0, copied=n_tokens * math.prod(d_in))])
        return total

    return min(modes, key=in_all)


# Measuring ------------------------------------------------------------------------------------------------------------

_rates: dict[tuple[torch.device, torch.dtype, int], DeviceRates] = {}


def rates_of(device: torch.device | str, dtype: torch.dtype) -> DeviceRates:
    """Rates of a device for a dtype and the present number of threads: measured once in a process, then kept.

    Measuring takes up to a second, and some hundred megabytes for that time.
    """
    key = _key(device, dtype)
    if key not in _rates:
        _rates[key] = measure_rates(device, dtype)
    return _rates[key]


def set_rates(device: torch.device | str, dtype: torch.dtype, rates: DeviceRates | None) -> None:
    """Use these rates from now on, so that choices repeat from run to run; None: measure again when needed."""
    if rates is None:
        _rates.pop(_key(device, dtype), None)
    else:
        _rates[_key(device, dtype)] = rates


def measure_rates(device: torch.device | str, dtype: torch.dtype) -> DeviceRates:
    """Time a few products and copies on the device; draws no random numbers."""
    where = torch.device(device)
    # The caller's contexts must not affect what is timed here, nor the other way round.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved),
        torch.autocast(where.type, enabled=False),
    ):
        return _measured(where, dtype)


def _measured(where: torch.device, dtype: torch.dtype) -> DeviceRates:
    on_cpu = where.type == "cpu"
    itemsize = torch.empty((), dtype=dtype).element_size()

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=where)

    def seconds(call: Callable[[], object]) -> float:
        times, begun = [], time.perf_counter()
        while len(times) < 40 and (len(times) < 3 or time.perf_counter() - begun < 0.03):
            _wait(where)
            start = time.perf_counter()
            call()
            _wait(where)
            times.append(time.perf_counter() - start)
        return min(times)  # other programs on the machine only add time

    least = seconds(ones(4, 4).clone)
    overhead = _overheads(ones, seconds)

    def beyond_overhead(call: Callable[[], object]) -> float:
        # If a call takes little more than its overhead, the rest is noise: at least a tenth of the time is kept.
        measured = seconds(call)
        return max(measured - least, measured / 10)

    read, write, copy = [], [], []
    for exponent in (14, 18, 22, 24, 26):  # bytes: from the innermost cache to main memory
        size, x = 2.0**exponent, ones(2**exponent // itemsize)
        reading, both = beyond_overhead(lambda x=x: x.sum()), beyond_overhead(lambda x=x: x.clone())
        read.append((size, reading / size))
        write.append((size, max(both - reading, both / 2) / size))
        third = 2 ** ((exponent - 4 - int(math.log2(itemsize))) // 3)
        permuted = x.reshape(third, third, -1, 16).transpose(1, 2)  # reordered as W's rows and columns are
        copy.append((size, beyond_overhead(permuted.contiguous) / size))
    read, write, copy = map(_no_slower_than_larger, (read, write, copy))
    moving = DeviceRates({}, ((1.0, 0.0),), read, write, itemsize)

    def per_flop(call: Callable[[], object], step: Product) -> float:
        total = beyond_overhead(call)
        return max(total - moving.seconds([step]), total / 4) / step.flops

    flop = []
    for side in (8, 16, 32, 64, 128, 512) if on_cpu else (16, 64, 256, 1024, 4096):
        batch = max(1, (2**22 if on_cpu else 2**30) // side**3)
        left, right = ones(side, side).expand(batch, side, side), ones(batch, side, side)
        call = partial(torch.bmm, left, right)
        flop.append((float(side), per_flop(call, Product(batch, side, side, side))))
    n = 512 if on_cpu else 4096
    vector = per_flop(partial(linear, ones(1, n), ones(n, n)), Product(1, n, n, 1))
    return DeviceRates(overhead, tuple(flop), read, write, itemsize, copy, vector, on_cpu)


def _no_slower_than_larger(curve: Sequence[tuple[float, float]]) -> Curve:
    """Lower each size's seconds per byte to at most those of every larger size; the excess is noise.

    On a busy machine two threads wait for each other for milliseconds, which is not negligible for small sizes.
    """
    sizes, seconds = zip(*curve, strict=True)
    return tuple(zip(sizes, reversed(list(accumulate(reversed(seconds), min))), strict=True))


def _overheads(
    ones: Callable[..., torch.Tensor], seconds: Callable[[Callable[[], object]], float]
) -> dict[str, tuple[float, float]]:
    """Overheads from two tiny sites: the time of each mode, with and without gradients, over its number of products."""
    cores, x = [ones(1, 2, 2, 2), ones(2, 2, 2, 1)], ones(1, 4)
    kept = CachedMatrix(cores, contract(cores))

    def cached() -> torch.Tensor:
        kept.holds_for(cores, x.dtype)
        return linear(x, kept.W)

    # A layer knows the direction. Working it out here stands for the time that the layer itself adds to a chain.
    ways = {"reconstruct": lambda: linear(x, contract(cores)), "chain": lambda: chain(cores, x), "cached": cached}

    def least(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        rounds = [{mode: seconds(call) for mode, call in calls.items()} for _ in range(2)]  # the first warms up
        return {mode: min(own[mode] for own in rounds) for mode in calls}

    forward = least(ways)
    inputs = [tensor.requires_grad_() for tensor in (x, *cores)]
    with torch.enable_grad():
        # A kept W passes no gradient on to the cores.
        wanted = {mode: [x] if mode == "cached" else inputs for mode in ways}
        both = least({mode: partial(_gradients, way, wanted[mode], x.detach()) for mode, way in ways.items()})
    n_products = {"reconstruct": 2, "chain": 2, "cached": 1}
    return {mode: (forward[mode] / n, both[mode] / n) for mode, n in n_products.items()}


def _gradients(
    way: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor], dy: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(way(), inputs, dy)


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
