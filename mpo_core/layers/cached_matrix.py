"""A dense matrix kept beside the cores that it was formed of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class CachedMatrix:
    """W, and what tells whether the cores are still those it was formed of.

    On a CPU their values are compared: they are few beside W's, and writes through `.data` change nothing else. On an
    accelerator that would wait for the device, so there it is the tensors, their memory and version counters, and a
    write through `.data` has to be followed by `drop_cached_matrix`.
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
        """Memory and version counter of each, which inference tensors do not have."""
        return [(core.data_ptr(), None if core.is_inference() else core._version) for core in cores]
