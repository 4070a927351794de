"""The ways to apply a chain of cores to activations, y = x Wᵀ, and what each costs in FLOPs and bytes.

"reconstruct" forms W and multiplies by it. "cached" has W already. "chain" contracts x with one core after the other
and never forms W. It goes from the first site to the last ("left") or from the last to the first ("right").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad

from mpo_core.tensor_train.algebra import bonds_and_sizes
from mpo_core.tensor_train.bonds import contraction_order
from mpo_core.tensor_train.chain_steps import (
    Step,
    contracted,
    contracted_in_parts,
    copies,
    is_traced,
    matrices_of,
    steps_of,
)
from mpo_core.tensor_train.few_rows import columns_of, few_rows

DIRECTIONS = ("auto", "left", "right")
MODES = ("reconstruct", "chain", "cached")
CHAIN_STATE = 2**19
"""Number of entries of the state between two sites on a CPU, few enough to stay in a cache (see `rows_at_once`)."""

Sizes = Sequence[int]


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, a multiply-add counted as two; bytes read and written, each operand once per use."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


class Product(NamedTuple):
    """`batch` matrix products (m × k) @ (k × n), the left factor the same in all of them (a weight)."""

    batch: int
    m: int
    k: int
    n: int
    copied: int = 0
    """Elements copied into another order before or after."""
    partial: int = 0
    """Elements of the weight's gradient before they are summed over the batch."""
    summed: int = 0
    """Number of such elements that this product writes and reads."""

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n

    @property
    def read(self) -> int:
        """Elements read."""
        return self.m * self.k + self.batch * self.k * self.n + self.copied + self.summed

    @property
    def written(self) -> int:
        """Elements written."""
        return self.batch * self.m * self.n + self.copied + self.summed

    def backward(self) -> tuple[Product, Product]:
        """The products that give the gradients of the right factor and of the left one."""
        batch, m, k, n, copied, partial, _ = self
        return Product(batch, k, m, n, copied), Product(1, m, batch * n, k, copied, summed=partial)


# Applying -------------------------------------------------------------------------------------------------------------


def chain(cores: Sequence[Tensor], x: Tensor, direction: str = "auto") -> Tensor:
    """y = x Wᵀ by contracting x with one core after the other; W is never formed.

    The state between two sites has the row sizes of the sites that are done and the column sizes of those to come. It
    is never permuted: each step is one product, or a batch of products with the same core. Differentiable. On a CPU
    many rows of x are contracted in parts (`rows_at_once`). The backward pass then computes the state of each part
    again.

    Args:
        cores: site l is (bonds[l], d_out[l], d_in[l], bonds[l+1]).
        x: (..., prod(d_in)).
        direction: "left" from the first site to the last, "right" from the last to the first, "auto" the one with
            fewer FLOPs (`cheapest_direction`).
    Returns:
        (..., prod(d_out)), in the autocast dtype if autocast is enabled.
    Raises:
        ValueError: an unknown direction; cores that do not fit together, or x that does not fit them.
    """
    bonds, d_out, d_in = bonds_and_sizes(cores)
    if direction not in DIRECTIONS:
        raise ValueError(f"`direction` must be one of {', '.join(DIRECTIONS)}, but got {direction!r}")
    if x.ndim < 1 or x.shape[-1] != math.prod(d_in):
        raise ValueError(
            f"`x.shape[-1] == prod(d_in)` must hold, but got x of shape {tuple(x.shape)}, d_in={list(d_in)}"
        )
    if direction == "auto":
        direction = cheapest_direction(bonds, d_out, d_in)
    n_rows, n_at_once = math.prod(x.shape[:-1]), None
    if x.device.type == "cpu" and not is_traced():  # on a GPU each part would be launched by itself
        tensors = (x, *cores)
        if torch.is_autocast_enabled("cpu") and all(tensor.dtype is not torch.float64 for tensor in tensors):
            # Cast as autocast would, but once, so that the parts need no autocast.
            x, *cores = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors)
            with torch.autocast("cpu", enabled=False):
                return chain(cores, x, direction)
        training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        n_at_once = rows_at_once(bonds, d_out, d_in, direction, n_rows, training=training)
        if n_at_once >= n_rows or x.is_complex() or any(map(_has_tangent, tensors)):
            n_at_once = None
    steps = steps_of(bonds, d_out, d_in, direction)
    As = matrices_of(cores, steps, direction)
    rows = x.reshape(n_rows, x.shape[-1])
    y = contracted(steps, As, rows) if n_at_once is None else contracted_in_parts(steps, As, rows, n_at_once)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def rows_at_once(bonds: Sizes, d_out: Sizes, d_in: Sizes, direction: str, n_rows: int, *, training: bool) -> int:
    """Return how many of the n_rows rows of x `chain` contracts at once on a CPU, in the direction "left" or "right".

    Without gradients: as many rows as have a state of CHAIN_STATE entries. With gradients: all rows if they are at most
    eight times as many, otherwise twice as many. Computing the state again in the backward pass costs a sixth of the
    FLOPs (for two equal steps; at most a third). Memory costs more than that only if it is so large that it is mapped
    again in every call.
    """
    few = _few_rows(tuple(bonds), tuple(d_out), tuple(d_in), direction)
    if not training:
        return min(n_rows, few)
    return n_rows if n_rows <= 8 * few else 2 * few


@cache
def _few_rows(bonds: Sizes, d_out: Sizes, d_in: Sizes, direction: str) -> int:
    largest = max(math.prod(d_in), *(step.n_written for step in steps_of(bonds, d_out, d_in, direction)))
    return max(1, CHAIN_STATE // largest)


def pad_features(x: Tensor, features: int) -> Tensor:
    """x with zeros appended to its last dimension, up to `features` entries."""
    missing = features - x.shape[-1]
    return x if missing == 0 else pad(x, (0, missing))


# Counting -------------------------------------------------------------------------------------------------------------


def cheapest_direction(bonds: Sizes, d_out: Sizes, d_in: Sizes) -> str:
    """Return the direction with fewer FLOPs, "left" or "right"; in a tie, fewer elements moved, then "right"."""

    def cost(direction: str) -> tuple[int, int]:
        steps = chain_products(bonds, d_out, d_in, 1, direction)
        return sum(step.flops for step in steps), sum(step.read + step.written for step in steps)

    return "left" if cost("left") < cost("right") else "right"


def chain_products(bonds: Sizes, d_out: Sizes, d_in: Sizes, n_tokens: int, direction: str = "auto") -> list[Product]:
    """The products of `chain`, in their order."""
    if direction == "auto":
        direction = cheapest_direction(bonds, d_out, d_in)
    return [_product_of(step, n_tokens) for step in steps_of(bonds, d_out, d_in, direction)]


def stored_products(bonds: Sizes, d_out: Sizes, d_in: Sizes, n_tokens: int, direction: str) -> list[Product]:
    """The products of `few_rows.chain_of_few_rows` in the fixed gauge, in the order of the sites."""
    shapes = list(zip(bonds[:-1], d_out, d_in, bonds[1:], strict=True))
    steps = []
    for site, (a, o, i, b) in enumerate(shapes[:-1]):
        rows, columns = a * o * i, n_tokens * columns_of(shapes, site, direction)
        m, k = (b, rows - b) if direction == "left" else (rows - b, b)
        steps.append(Product(1, m, k, columns, copied=rows * columns))
    last = steps_of(bonds, d_out, d_in, direction)[-1 if direction == "left" else 0]
    return [*steps, _product_of(last, n_tokens)]


def _product_of(step: Step, n_tokens: int) -> Product:
    items, m, k, n = step
    batch = n_tokens * items
    if n == 1:
        return Product(1, m, k, batch)
    if copies(m, k, n):
        return Product(1, m, k, batch * n, copied=batch * (m + k) * n)
    return Product(batch, m, k, n, partial=n_tokens * step.n_partial_sums if batch > 1 else 0)


def contract_products(bonds: Sizes, d_out: Sizes, d_in: Sizes) -> list[Product]:
    """The products that form W, in the order of `tensor_train.contract`, each with a copy of its result."""
    split, _ = contraction_order(bonds, d_out, d_in)

    def steps(first: int, last: int) -> Iterator[Product]:
        if last - first == 1:
            return
        middle = split[first, last]
        yield from steps(first, middle)
        yield from steps(middle, last)
        m = bonds[first] * math.prod(d_out[first:middle]) * math.prod(d_in[first:middle])
        n = math.prod(d_out[middle:last]) * math.prod(d_in[middle:last]) * bonds[last]
        yield Product(1, m, bonds[middle], n, copied=m * n)

    return list(steps(0, len(d_out)))


def dense_product(out_features: int, in_features: int, n_tokens: int) -> Product:
    """The product x Wᵀ with a given W."""
    return Product(1, out_features, in_features, n_tokens)


def products(
    mode: str,
    bonds: Sizes,
    d_out: Sizes,
    d_in: Sizes,
    n_tokens: int,
    *,
    out_features: int | None = None,
    in_features: int | None = None,
    direction: str = "auto",
    gauge: str = "free",
) -> list[Product]:
    """The matrix products of a forward pass in the mode "reconstruct", "chain" or "cached".

    Args:
        gauge: in the "fixed" one the cores are formed first, except for few rows (`few_rows.chain_of_few_rows`).
        out_features, in_features: sizes of the dense product if the local sizes are padded. Default: prod(d_out),
            prod(d_in).
    Raises:
        ValueError: an unknown mode or direction.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {', '.join(MODES)}, but got {mode!r}")
    if direction not in DIRECTIONS:
        raise ValueError(f"`direction` must be one of {', '.join(DIRECTIONS)}, but got {direction!r}")
    dense = dense_product(out_features or math.prod(d_out), in_features or math.prod(d_in), n_tokens)
    if mode == "cached":
        return [dense]
    shapes = list(zip(bonds[:-1], d_out, d_in, bonds[1:], strict=True))
    if mode == "chain":
        direction = cheapest_direction(bonds, d_out, d_in) if direction == "auto" else direction
        if gauge == "fixed" and n_tokens <= few_rows(shapes, direction, gauge):
            return stored_products(bonds, d_out, d_in, n_tokens, direction)
        steps = chain_products(bonds, d_out, d_in, n_tokens, direction)
    else:
        steps = [*contract_products(bonds, d_out, d_in), dense]
    formed = [2 * math.prod(shape) for shape in shapes[:-1]] if gauge == "fixed" else []  # with the identity, in place
    return [*(Product(0, 0, 0, 0, copied=entries) for entries in formed), *steps]


def cost(steps: Sequence[Product], itemsize: int, *, training: bool = False) -> Cost:
    """FLOPs and bytes of these products, with `itemsize` bytes per element; training adds both gradients of each."""
    every = with_gradients(steps) if training else steps
    return Cost(sum(step.flops for step in every), itemsize * sum(step.read + step.written for step in every))


def with_gradients(steps: Sequence[Product]) -> list[Product]:
    """These products, and those of the backward pass."""
    return [*steps, *(back for step in steps for back in step.backward())]
