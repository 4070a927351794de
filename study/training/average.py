"""The average of a model's weights over the steps of a training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of the trained parameters of a model.

    After n steps the weights after step k have a share proportional to decay^(n − k); the shares add up to 1. Before
    the first step the average is the model itself.

    Args:
        decay: between 0 and 1.
    Source: Polyak and Juditsky 1992, Acceleration of stochastic approximation by averaging; Kingma and Ba 2015, Adam,
        sections 3 and 7.2, for the exponential form and the correction for its beginning.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._decay = decay
        self.values = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, n_steps: int) -> None:
        """Take in the weights after step `n_steps`, counted from 1."""
        rate = (1 - self._decay) / (1 - self._decay**n_steps)
        for value, parameter in zip(self.values, self._parameters, strict=True):
            value.lerp_(parameter, rate)

    @contextmanager
    def in_the_model(self) -> Iterator[None]:
        """Give the model the average; afterwards it has its own weights again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for at, parameter in enumerate(self._parameters):
            parameter.data, self.values[at] = self.values[at], parameter.data
