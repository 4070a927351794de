"""A model put in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; after it, an error included, every module is in the mode it was in."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        # Parents come first, and what they do to their children is set right by these. By train(), which frees what a
        # layer kept for evaluation.
        for module, mode in training.items():
            module.train(mode)
