"""A chain applied to few rows of x, such as the one token of a decoding step.

The time of one row is that of reading the cores, and of starting operations. So no core is copied, whether its gauge
is free or fixed, and each core is multiplied by all rows at once, with the rows on the left: this is up to 10 times as
fast as a product with few columns on the right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_ROWS = 16
"""Rows of a product that `contraction.chain` does not do faster."""

Shapes = Sequence[Sequence[int]]


def few_rows(shapes: Shapes, direction: str, gauge: str = "free") -> int:
    """The most rows of x for which `chain_of_few_rows` is faster than `contraction.chain`; 0 if it never is.

    In the fixed gauge the rival forms the cores first, and so moves as many entries for each row of a core as the bond
    has. `chain_of_few_rows` moves as many as its product has columns.
    """
    if gauge == "free":
        return MOST_ROWS
    fixed = range(len(shapes) - 1)
    return min(((shapes[site][3] - 1) // columns_of(shapes, site, direction) for site in fixed), default=0)


def columns_of(shapes: Shapes, site: int, direction: str) -> int:
    """Rows of the product with the stored rows of this core, for each row of x in the fixed gauge.

    Stored rows stand for (left bond, output, input) and columns for the right bond. "right" sums over the input, and
    "left" does not sum over the output: the product is done for each value of that index.
    """
    first, second = (1, 2) if direction == "left" else (2, 1)
    sides = [shape[first] for shape in shapes[: site + 1]] + [shape[second] for shape in shapes[site + 1 :]]
    return math.prod(sides)


def chain_of_few_rows(
    stored: Sequence[Tensor], orders: Sequence[Tensor], shapes: Shapes, x: Tensor, direction: str
) -> Tensor:
    """y = x Wᵀ as `contraction.chain` gives it, for `few_rows` of x.

    Args:
        stored: the cores, or what `gauge.fix_cores` stores of them.
        orders: in the fixed gauge, the orders of the rows of all cores but the last. Empty in the free gauge.
        shapes: of the cores.
        x: (..., prod(d_in)). direction: "left" or "right".
    Returns:
        (..., prod(d_out)).
    """
    contract = _from_left if direction == "left" else _from_right
    y = contract(stored, orders, shapes, x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _from_right(stored: Sequence[Tensor], orders: Sequence[Tensor], shapes: Shapes, x: Tensor) -> Tensor:
    items, done = x.numel(), 1  # rows of x and inputs to come; outputs so far
    state = x
    for site in reversed(range(len(shapes))):
        (a, o, i, b), core = shapes[site], stored[site]
        items = items // i
        # The state is (items, done, i, b), with the summed indices last.
        if site < len(orders):
            rows = state.reshape(items * done * i, b)
            rows = torch.cat([rows, torch.mm(rows, core.mT)], 1).index_select(1, orders[site])
            y = rows if i == 1 else rows.view(-1, i, a * o, i).diagonal(dim1=1, dim2=3).sum(-1)
        else:
            y = torch.mm(state.reshape(items * done, i * b), core.reshape(a * o, i * b).mT)
        if site:  # the next input out of the items, the bond beside it, and this output before those so far
            next_i = shapes[site - 1][2]
            state = y.view(items // next_i, next_i, done, a, o).permute(0, 4, 2, 1, 3)
        else:
            state = y.view(items, done, o).transpose(1, 2)
        done = done * o
    return state.reshape(x.shape[0], done)


def _from_left(stored: Sequence[Tensor], orders: Sequence[Tensor], shapes: Shapes, x: Tensor) -> Tensor:
    items, rest, done = x.shape[0], x.shape[1], 1  # rows of x and outputs so far; inputs to come; outputs
    state = x  # (items, a, i, rest)
    for site, ((a, o, i, b), core) in enumerate(zip(shapes, stored, strict=True)):
        rest = rest // i
        state = state.reshape(items, a, i, rest)
        if site < len(orders):
            rows = state.permute(0, 3, 1, 2).reshape(items * rest, a * i)
            if o > 1:
                same = torch.eye(o, dtype=x.dtype, device=x.device)[:, None, :, None]
                rows = (rows.view(-1, 1, a, 1, i) * same).reshape(-1, a * o * i)
            rows = rows.index_copy(1, orders[site], rows)
            y = (rows[:, :b] + torch.mm(rows[:, b:], core)).view(items, rest, o, b)
        else:
            rows = state.permute(0, 3, 1, 2).reshape(items * rest, a * i)
            if a > 1 and i > 1:
                y = torch.mm(rows, core.transpose(1, 2).reshape(a * i, o * b))  # copies the core if o > 1
            else:
                y = torch.matmul(rows, core.reshape(o, i, b)) if a == 1 else torch.mm(rows, core.reshape(a, o * b))
                y = y.transpose(0, 1) if a == 1 else y
            y = y.reshape(items, rest, o, b)
        state = y.permute(0, 2, 3, 1)  # (items, o, b, rest)
        items, done = items * o, done * o
    return state.reshape(x.shape[0], done)
