"""A dense matrix kept beside the cores that it was formed from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class CachedMatrix:
    """W, and a record that shows whether the cores are still those that W was formed from.

    On a CPU the values of the cores are compared: they are few compared to W's, and a write through `.data` changes
    nothing else. On an accelerator this would wait for the device. There the tensors, their memory and version counters
    are compared, and a write through `.data` must be followed by `drop_cached_matrix`.
    """

    def __init__(self, cores: Sequence[Tensor], W: Tensor) -> None:
        self.W = W
        self._by_value = W.device.type == "cpu"
        self._cores = [core.detach().clone() for core in cores] if self._by_value else list(cores)
        self._marks = [] if self._by_value else self.marks(cores)

    def holds_for(self, cores: Sequence[Tensor], dtype: torch.dtype) -> bool:
        if self.W.dtype != dtype or self.W.device != cores[0].device:
            return False
        pairs = list(zip(self._cores, cores, strict=True))
        if self._by_value:
            return all(old.dtype == new.dtype and torch.equal(old, new) for old, new in pairs)
        return all(old is new for old, new in pairs) and self._marks == self.marks(cores)

    @staticmethod
    def marks(cores: Sequence[Tensor]) -> list[tuple[int, int | None]]:
        """Memory address and version counter of each core; inference tensors have no counter."""
        return [(core.data_ptr(), None if core.is_inference() else core._version) for core in cores]
