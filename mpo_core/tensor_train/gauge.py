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
    """The cores of these shapes, differentiable; undoes `fix_cores`, apart from the gauge."""
    placed = [place_rows(C, order) for C, order in zip(stored[:-1], orders, strict=True)]
    return [core.reshape(tuple(shape)) for core, shape in zip([*placed, stored[-1]], shapes, strict=True)]
