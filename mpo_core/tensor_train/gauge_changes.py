"""Changes of a chain's gauge while it is trained: the same W in other cores, with the moments of their optimiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_core.tensor_train.algebra import orthogonalize


class GaugeChange:
    """Cores of one W before and after a change of gauge: after[l] = X_l⁻¹ before[l] X_{l+1}, with X_0 = X_L = 1.

    Args:
        before, after: chains of the same W and bonds. A bond's directions are all in use: no bond is out of its
            neighbours' reach.
    """

    @torch.no_grad()
    def __init__(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        one = own = mixed = before[0].new_ones(1, 1, dtype=torch.float64)
        self._changes = [one]
        for old, new in zip(before[:-1], after[:-1], strict=True):
            old, new = old.double(), new.double()
            own = torch.einsum("ab,aoic,boid->cd", own, old, old)
            mixed = torch.einsum("ab,aoic,boid->cd", mixed, old, new)
            self._changes.append(torch.linalg.pinv(own, hermitian=True) @ mixed)
        self._changes.append(one)
        self._inverses = [torch.linalg.pinv(change) for change in self._changes]

    @torch.no_grad()
    def carried(self, tensors: Sequence[Tensor], power: int = 1) -> list[Tensor]:
        """Tensors of the cores' shapes that change as gradients do, such as first moments, after the change; float64.

        A gradient becomes X_lᵀ ∂_l X_{l+1}⁻ᵀ. power 2: for second moments, the entries of the factors are squared, as
        if the entries of the gradient were uncorrelated.
        """
        carried = []
        for site, tensor in enumerate(tensors):
            left, right = self._changes[site], self._inverses[site + 1]
            if power == 2:
                left, right = left.square(), right.square()
            carried.append(torch.einsum("ab,aoic,dc->boid", left, tensor.double(), right))
        return carried


def with_centre(cores: Sequence[Tensor], site: int) -> tuple[list[Tensor], GaugeChange]:
    """The cores in the canonical gauge around a site (`orthogonalize`), and the change of gauge.

    Seen from the core at the site, the others are then orthogonal: its steps are steps of W in the Frobenius norm.

    Raises:
        ValueError: as `orthogonalize`; or a bond is out of its neighbours' reach.
    """
    after = orthogonalize([core.double() for core in cores], site)
    if any(new.shape != old.shape for new, old in zip(after, cores, strict=True)):
        raise ValueError("every bond must be within reach of its neighbours (`clip_bonds`)")
    return after, GaugeChange(cores, after)
