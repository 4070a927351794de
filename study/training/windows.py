"""Batches of a split's tokens: random windows to train on, and consecutive ones to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from study.training.randomness import generator


class Windows:
    """Random windows of a split: batch k depends only on the seed, not on earlier draws.

    Args:
        tokens: (n,), of any integer type.
        n_batches, batch_size, context: number of batches, and their shape.
        seed, purpose: name the random stream; equal streams give equal windows.
    """

    def __init__(self, tokens: Tensor, n_batches: int, batch_size: int, context: int, seed: int, purpose: str):
        self._tokens, self._context = tokens, context
        self._windows = tokens.unfold(0, context + 1, 1)
        shape = (n_batches, batch_size)
        self._starts = torch.randint(len(self._windows), shape, generator=generator(seed, purpose))

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (batch_size, context), int64; targets are the inputs' next tokens."""
        windows = self._windows[self._starts[index]].to(torch.int64)
        return windows[:, :-1], windows[:, 1:]


class StackedWindows:
    """Batches of several `Windows` of the same split and shape, stacked on a device."""

    def __init__(self, stacked: Sequence[Windows], device: torch.device | str) -> None:
        first = stacked[0]
        # A GPU may not index unsigned numbers.
        self._windows = first._tokens.to(device).to(torch.int32).unfold(0, first._context + 1, 1)
        self._starts = torch.stack([windows._starts for windows in stacked], dim=1).to(device)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (len(stacked), batch_size, context), int64."""
        windows = self._windows[self._starts[index]].to(torch.int64)
        return windows[..., :-1], windows[..., 1:]


def consecutive_windows(tokens: Tensor, context: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Non-overlapping windows that predict every token but the first exactly once.

    Yields inputs and targets, each (≤ batch_size, context), int64; the remainder at the end is one shorter window.
    """
    n_predicted = max(0, len(tokens) - 1)
    whole = n_predicted // context * context
    for begin in range(0, whole, batch_size * context):
        end = min(begin + batch_size * context, whole)
        piece = tokens[begin : end + 1].to(torch.int64)  # of one batch only: the split may be larger than the memory
        yield piece[:-1].view(-1, context), piece[1:].view(-1, context)
    if whole < n_predicted:
        rest = tokens[whole:].to(torch.int64)
        yield rest[None, :-1], rest[None, 1:]
