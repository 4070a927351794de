"""Put a model in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside. Afterwards, also after an error, every module is back in its former mode."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        # Children come after their parents and correct what these did to them. train() also frees what a layer kept
        # for evaluation.
        for module, mode in training.items():
            module.train(mode)
