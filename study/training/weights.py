"""The tensors of a model, each once: tied ones share their memory, which safetensors does not store twice."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; of tied ones the first."""
    names: dict[int, str] = {}
    every = model.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in every.items() if names.setdefault(id(tensor), name) == name}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy what `weights_of` gave into a model of the same shapes.

    Raises:
        RuntimeError: a tensor is missing, unknown or of another shape.
    """
    names: dict[int, str] = {}
    first = {name: names.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}
    tied = {name: weights[other] for name, other in first.items() if name != other and other in weights}
    model.load_state_dict({**weights, **tied})
