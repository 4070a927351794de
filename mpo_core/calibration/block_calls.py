"""Calls of a model's blocks, in a form that can be stored: JSON and tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from mpo_core.calibration.recording import version_of


class Call(NamedTuple):
    """The arguments of a block. The first, by place or else by name, is its input: the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def x(self) -> Any:
        """The input."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def with_x(self, x: Any) -> Call:
        """The same call with another input."""
        if self.args:
            return Call((x, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, next(iter(self.kwargs)): x})

    def output(self, block: Callable[..., Any]) -> Tensor:
        """The hidden states that the block gives."""
        return hidden_states(block(*self.args, **self.kwargs))

    def others(self) -> dict[str, Any]:
        """All arguments but the input, with names for messages."""
        named = {f"argument {place}": value for place, value in enumerate(self.args)} | self.kwargs
        return dict(list(named.items())[1:])


def hidden_states(output: Any) -> Tensor:
    """The output of a block, or the first of its outputs.

    Raises:
        TypeError: it is neither a tensor nor a tuple that begins with one.
    """
    first = output[0] if type(output) is tuple and output else output
    if not isinstance(first, Tensor):
        raise TypeError(f"it returns a {type(output).__name__}, not a tensor or a tuple that begins with one")
    return first


class BatchCalls:
    """The calls of all blocks in one batch without their inputs. A tensor that many blocks get is held once."""

    def __init__(self) -> None:
        self._calls: list[Any] = []
        self._devices: list[str] = []
        self._seen: list[tuple[Tensor, int]] = []
        self.tensors: dict[str, Tensor] = {}
        """Copies, because a model may write into its own."""

    def add(self, call: Call) -> None:
        """Add the call of the next block.

        Raises:
            TypeError: an argument is something other than tensors, numbers, strings and None, and tuples, lists and
                dictionaries of these.
        """
        for name, value in call.others().items():
            try:
                self._packed(value)
            except TypeError as error:
                raise TypeError(f"its {name} holds {error}, which cannot be stored") from None
        args, kwargs = call.with_x(None)
        self._calls.append([self._packed(args), self._packed(kwargs)])

    def metadata(self) -> dict[str, str]:
        """The data that `unpacked` needs beside the tensors."""
        return {"calls": json.dumps(self._calls), "devices": json.dumps(self._devices)}

    def _packed(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Tensor | nn.Parameter):
            return {"tensor": self._place_of(value)}
        if type(value) in (tuple, list):
            return {type(value).__name__: [self._packed(item) for item in value]}
        if type(value) is dict and all(type(key) is str for key in value):
            return {"dict": {key: self._packed(item) for key, item in value.items()}}
        raise TypeError(f"a {type(value).__name__}")

    def _place_of(self, tensor: Tensor) -> int:
        version = version_of(tensor)
        for place, (known, known_version) in enumerate(self._seen):
            if known is tensor and known_version == version >= 0:
                return place
        self._seen.append((tensor, version))
        self._devices.append(str(tensor.device))
        self.tensors[str(len(self.tensors))] = tensor.detach().clone()
        return len(self.tensors) - 1


def unpacked(metadata: dict[str, str], block: int, tensor: Callable[[str], Tensor], x: Tensor) -> Call:
    """The call of one block, with the input x; `tensor` gets one of the stored tensors by its name."""
    devices = json.loads(metadata["devices"])

    def value_of(packed: Any) -> Any:
        if not isinstance(packed, dict):
            return packed
        [(kind, content)] = packed.items()
        if kind == "tensor":
            return tensor(str(content)).to(devices[content])
        if kind == "dict":
            return {key: value_of(item) for key, item in content.items()}
        return (tuple if kind == "tuple" else list)(value_of(item) for item in content)

    args, kwargs = (value_of(packed) for packed in json.loads(metadata["calls"])[block])
    return Call(args, kwargs).with_x(x)
