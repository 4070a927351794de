"""Second moments of the inputs and of the output gradients of layers, summed batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mpo_core.calibration.tensor_files import StoredTensor

_LARGEST = {torch.float64: 1e140, torch.float32: 1e15}
"""Entries must not be larger, because sums of their squares are formed."""


_ROWS = 512
"""Samples, and rows of a moment, that are multiplied at a time."""


class UnusableValues(ValueError):
    """No second moment can be formed: values are infinite, NaN or too large."""


class Moment:
    """The second moment of vectors, E[v vᵀ], summed batch by batch.

    Products and sums are float32, or float64 for float64 vectors. A sum of n products is then exact to about √n · 6e-8,
    entry by entry, far below the ridge.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._stored: list[StoredTensor] = []
        """Tensors whose sum is the total, if it is not in memory."""
        self._stored_has_values = False
        self.n_samples = 0

    @property
    def total(self) -> Tensor | None:
        """Σ v vᵀ (size, size). If it is stored in files, each call reads it, and does not keep it."""
        if self._stored:
            return sum_of(stored.read() for stored in self._stored)
        return self._total

    @total.setter
    def total(self, total: Tensor | None) -> None:
        self._total, self._stored = total, []

    @property
    def has_values(self) -> bool:
        """Whether there are samples, and not only zeros."""
        if self._stored:
            return self._stored_has_values
        return self._total is not None and bool(self._total.diagonal().any())

    def add_stored(self, stored: StoredTensor, n_samples: int, has_values: bool) -> None:
        """Add a sum that stays in its file; it is not possible after `add` or `merge`."""
        assert self._total is None
        self._stored.append(stored)
        self._stored_has_values |= has_values
        self.n_samples += n_samples

    @torch.no_grad()
    def add(self, vectors: Tensor) -> None:
        """Add vectors (..., size); all leading axes count as samples.

        Raises:
            UnusableValues: an entry is infinite, NaN or too large to be squared.
            ValueError: the size is another than before.
        """
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        total = self.total
        if vectors.ndim == 0 or (total is not None and vectors.shape[-1] != len(total)):
            size = "size" if total is None else len(total)
            raise ValueError(f"vectors must have shape (..., {size}), but got {tuple(vectors.shape)}")
        samples = vectors.reshape(-1, vectors.shape[-1]).to(dtype)
        if not torch.isfinite(samples).all():
            raise UnusableValues(f"values must be finite, but {int((~torch.isfinite(samples)).sum())} are not")
        largest = float(samples.abs().amax()) if samples.numel() else 0.0
        if largest > _LARGEST[dtype]:
            raise UnusableValues(f"values must be at most {_LARGEST[dtype]:g}, but got one of {largest:.3g}")
        if total is None:
            total = torch.zeros(samples.shape[1], samples.shape[1], dtype=dtype, device=samples.device)
        self.total = total = total.to(samples.device)
        # A product that is added to a total inside the kernel is rounded at every sample, ten times worse than here.
        for part in samples.split(_ROWS):
            for row in range(0, len(total), _ROWS):
                total[row : row + _ROWS] += part[:, row : row + _ROWS].T @ part
        self.n_samples += len(samples)

    def merge(self, other: Moment) -> None:
        """Add the vectors of another moment of the same size."""
        total, more = self.total, other.total
        if more is not None:
            self.total = more.clone() if total is None else total.to(more.device).add_(more)
            self.n_samples += other.n_samples

    def mean(self, ridge: float = 0.0) -> Tensor:
        """E[v vᵀ] + ridge · (mean of its diagonal) · 1, float64.

        Raises:
            ValueError: no samples, or only zeros or values too small to be squared.
        """
        total = self.total
        if total is None or self.n_samples == 0:
            raise ValueError("there are no samples")
        if not total.diagonal().any():
            raise ValueError(f"all {self.n_samples} samples are zero, or too small to be squared")
        matrix = total.double() / self.n_samples
        matrix.diagonal().add_(ridge * float(matrix.diagonal().mean()))
        return matrix


class Part:
    """The moments over one part of the batches."""

    def __init__(self) -> None:
        self.inputs: dict[tuple[str, ...], Moment] = {}
        """By the names of the layers that got the same tensors, such as query, key and value of a block."""
        self.gradients: dict[str, Moment] = {}
        """By layer."""
        self.n_losses = 0
        """Number of losses, one for each predicted token."""

    def moments_of(self, name: str) -> list[Moment]:
        """The moments whose sum is that of one layer's inputs."""
        return [moment for names, moment in self.inputs.items() if name in names]

    def inputs_of(self, name: str) -> Moment:
        """The moment of one layer's inputs."""
        found = self.moments_of(name)
        if len(found) == 1:
            return found[0]
        summed = Moment()
        for moment in found:
            summed.merge(moment)
        return summed

    def n_inputs(self, name: str) -> int:
        """Number of one layer's inputs."""
        return sum(moment.n_samples for moment in self.moments_of(name))

    def holders(self, names: Sequence[str], with_gradients: bool) -> list[str]:
        """Those of the layers that got inputs and, if asked for, whose outputs changed a loss."""
        return [
            name
            for name in names
            if any(moment.has_values for moment in self.moments_of(name))
            and (not with_gradients or (name in self.gradients and self.gradients[name].has_values))
        ]


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of at least one tensor."""
    first, *others = tensors
    return sum(others, start=first)
