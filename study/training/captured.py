"""An optimiser step on its device; on a GPU it is recorded once as CUDA graphs, to save the time of kernel launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
"""Eager steps before the recording: in them libraries load kernels, and the optimiser creates its state."""


class DeviceStep:
    """Gradients of a batch and, if the host finds them finite, the update: the same functions, called or replayed.

    There are two graphs because the host decides between them. A replay runs the recorded kernels on the same memory.
    Batches are copied to the memory of the first one; the return value of `gradients` and each `.grad` are overwritten.
    So parameters, moments and learning rates may only change in place; if one is replaced, replace this object too.
    """

    def __init__(self, is_captured: bool) -> None:
        self._is_captured, self._n_eager = is_captured, 0
        self._inputs: tuple[Tensor, ...] = ()
        self._values: Tensor | None = None
        self._replay_gradients: Callable[[], None] | None = None
        self._replay_update: Callable[[], None] | None = None

    def gradients(self, body: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`body(*inputs)`, which leaves gradients in `.grad`; the result is valid until the next call."""
        if not self._is_captured:
            return body(*inputs)
        if self._replay_gradients is None:
            if self._n_eager < WARM_UP:
                self._n_eager += 1
                return beside(partial(body, *inputs))
            self._inputs = tuple(given.clone() for given in inputs)
            self._replay_gradients, self._values = record(partial(body, *self._inputs))
        for own, given in zip(self._inputs, inputs, strict=True):
            if own.shape != given.shape:  # copy_ might broadcast
                raise ValueError(f"recorded with a batch of {tuple(own.shape)}, so cannot take {tuple(given.shape)}")
            own.copy_(given)
        self._replay_gradients()
        assert self._values is not None
        return self._values

    def update(self, body: Callable[[], Any]) -> None:
        """Call `body()`, which updates parameters from their `.grad`."""
        if not self._is_captured:
            body()
        elif self._replay_gradients is None:  # before the recording, gradients have new memory at every step
            beside(body)
        else:
            if self._replay_update is None:
                self._replay_update, _ = record(body)
            self._replay_update()


def beside(body: Callable[[], Any]) -> Any:
    """`body()` on its own stream, as in a recording; it stays in order with the work before and after it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = body()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def record(body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record `body`; returns a function that replays its kernels, and the return value of `body`.

    The returned tensors have values only after a replay.

    Raises:
        RuntimeError: something in `body` cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = body()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"cannot record the step as CUDA graphs (`execution.capture: false` avoids this): {error}"
        ) from error
    return graph.replay, result
