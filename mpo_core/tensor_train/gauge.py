"""The gauge of a bond: W = A B is the same for A R and R⁻¹ B, so χ² of the numbers at a bond say nothing.

In the fixed gauge, χ rows of A are those of the identity, and only the others are stored. Known for low rank as PIFA
(Zhao et al. 2025); here it is used for every bond of a chain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

GAUGES = ("free", "fixed")


def check_gauge(gauge: str) -> None:
    """Raise ValueError unless it is one of `GAUGES`."""
    if gauge not in GAUGES:
        raise ValueError(f"`gauge` must be one of {', '.join(GAUGES)}, but got {gauge!r}")


LARGEST = 1.05
"""`fix_rows` exchanges rows until no stored entry is larger: rounding of these is then not amplified."""


def fix_rows(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M (n, r), r <= n, as rows of the identity and others: M = place_rows(C, order) R.

    The rows of the identity are those of nearly the largest volume. They start as the pivots of an LU decomposition,
    and are exchanged as long as an entry of C is larger than `LARGEST` (maxvol).

    Returns:
        C (n − r, r) with entries at most `LARGEST`, order (n,) of whole numbers, and R (r, r), in M's dtype. For an M
        that has no full rank, R has none.
    Source: Goreinov et al. 2010.
    """
    n, r = M.shape
    Q, T = torch.linalg.qr(M.double())  # Q has full rank whatever M is
    places = torch.arange(n, device=M.device)
    for row, pivot in enumerate(torch.linalg.lu_factor(Q)[1].tolist()):
        places[[row, pivot - 1]] = places[[pivot - 1, row]]
    full = torch.linalg.solve(Q[places[:r]], Q[places], left=False)  # identity on top
    for _ in range(100 * n):  # each exchange enlarges the volume, so it ends long before
        flat = int(full[r:].abs().argmax()) if n > r else -1
        i, j = divmod(flat, r)
        if n == r or float(full[r + i, j].abs()) <= LARGEST:
            break
        row = full[r + i].clone()
        row[j] -= 1
        full = full - full[:, j, None] * (row / full[r + i, j])
        swap, other = torch.tensor([j, r + i]), torch.tensor([r + i, j])
        full[swap], places[swap] = full[other], places[other]
    R = Q[places[:r]] @ T
    return full[r:].to(M.dtype), torch.argsort(places), R.to(M.dtype)


def place_rows(C: Tensor, order: Tensor) -> Tensor:
    """The matrix (n, r) with rows of the identity and those of C (n − r, r), differentiable."""
    identity = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    return torch.cat([identity, C]).index_select(0, order)


def n_fixed(bonds: Sequence[int]) -> int:
    """Number of entries that the fixed gauge saves: χ² for each bond between two sites."""
    return sum(bond * bond for bond in bonds[1:-1])


def n_fixed_bits(bonds: Sequence[int], d_out: Sequence[int], d_in: Sequence[int]) -> int:
    """Bits of the row numbers of all rows of the identity."""
    rows = [bond * o * i for bond, o, i in zip(bonds, d_out, d_in, strict=False)]
    return sum(bond * math.ceil(math.log2(n)) for bond, n in zip(bonds[1:-1], rows, strict=False))


def fix_cores(cores: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The chain in the fixed gauge, from the first site on.

    Returns:
        The stored part of every core: C (rows − bond, bond), with `rows` = left bond · outputs · inputs. The last core
        is whole. And the orders of the rows of all cores but the last.
    """
    stored, orders = [], []
    core = cores[0]
    for site in range(len(cores) - 1):
        C, order, R = fix_rows(core.reshape(-1, core.shape[3]))
        stored.append(C)
        orders.append(order)
        core = torch.tensordot(R, cores[site + 1], dims=1)
    return [*stored, core], orders


def free_cores(stored: Sequence[Tensor], orders: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The cores of these shapes, differentiable; undoes `fix_cores` but for the gauge."""
    placed = [place_rows(C, order) for C, order in zip(stored[:-1], orders, strict=True)]
    return [core.reshape(tuple(shape)) for core, shape in zip([*placed, stored[-1]], shapes, strict=True)]


# Applying a chain in the fixed gauge ----------------------------------------------------------------------------------


def few_rows(shapes: Sequence[Sequence[int]], direction: str) -> int:
    """The most rows of x for which `chain_of_stored` is cheaper than a chain of `free_cores`; 0 if it never is.

    It moves as many entries for each row of a core as its product has columns, instead of as many as the bond has.
    """
    fixed = range(len(shapes) - 1)
    return min(((shapes[site][3] - 1) // columns_of(shapes, site, direction) for site in fixed), default=0)


def columns_of(shapes: Sequence[Sequence[int]], site: int, direction: str) -> int:
    """Columns of the product with the stored rows of this core, for each row of x."""
    first, second = (1, 2) if direction == "left" else (2, 1)
    sides = [shape[first] for shape in shapes[: site + 1]] + [shape[second] for shape in shapes[site + 1 :]]
    return math.prod(sides)


def chain_of_stored(
    stored: Sequence[Tensor], orders: Sequence[Tensor], shapes: Sequence[Sequence[int]], x: Tensor, direction: str
) -> Tensor:
    """`contraction.chain` of the cores of `free_cores`, which are not formed: for `few_rows` of x.

    A core is a matrix M with rows (left bond, output, input) and the right bond as columns. Its product with a state,
    from the right or from the left, is one with the stored rows. The index that M has among its rows, but that the
    other direction sums over, is repeated in the state: the input from the right, the output from the left.

    Args:
        x: (..., prod(d_in)). direction: "left" or "right".
    Returns:
        (..., prod(d_out)).
    """
    state, n_rows, n_sites = x, math.prod(x.shape[:-1]), len(shapes)
    rest, done = x.shape[-1], 1  # columns to come, and rows so far
    for site in range(n_sites) if direction == "left" else reversed(range(n_sites)):
        (a, o, i, b), core, is_whole = shapes[site], stored[site], site == n_sites - 1
        rest = rest // i
        if direction == "left":
            items, n = n_rows * done, rest
            state = state.reshape(items, a * i, n)
            if is_whole:
                state = core.permute(1, 3, 0, 2).reshape(o * b, a * i) @ state
            else:
                rows = state.reshape(items, a, i, n).permute(1, 2, 0, 3)
                if o > 1:
                    same = torch.eye(o, dtype=x.dtype, device=x.device)[:, None, None, :, None]
                    rows = rows[:, None, :, :, None] * same  # (a, o, i, items, o, n)
                rows = rows.reshape(a * o * i, items * o * n)
                rows = rows.index_copy(0, orders[site], rows)
                state = (rows[:b] + core.mT @ rows[b:]).reshape(b, items, o, n).permute(1, 2, 0, 3)
        else:
            items, n = n_rows * rest, done
            state = state.reshape(items, i * b, n)
            if is_whole:
                state = core.reshape(a * o, i * b) @ state
            else:
                rows = state.reshape(items, i, b, n).permute(2, 0, 1, 3).reshape(b, items * i * n)
                rows = torch.cat([rows, core @ rows]).index_select(0, orders[site])
                rows = rows.reshape(a * o, i, items, i, n)
                state = (rows.squeeze((1, 3)) if i == 1 else rows.diagonal(dim1=1, dim2=3).sum(-1)).transpose(0, 1)
        done = done * o
    return state.reshape(*x.shape[:-1], done)
