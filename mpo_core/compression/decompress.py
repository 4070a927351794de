"""Turn structured layers back into dense ones."""

from __future__ import annotations

from typing import overload

from torch import nn

from mpo_core.layers.structured import StructuredLinear
from mpo_core.models.dense_layers import Model, copied, does_more, note_original_features, original_features


@overload
def decompress(model: StructuredLinear) -> nn.Linear: ...
@overload
def decompress(model: Model) -> Model: ...
def decompress(model: nn.Module) -> nn.Module:
    """Return a copy of the model with every structured layer, itself included, as an nn.Linear of the same matrix.

    Layers that share their parameters share the weight; dtype, device, bias, requires_grad and training mode stay.
    A Conv1D that was compressed becomes an nn.Linear too.

    Raises:
        ValueError: a structured layer has a forward of its own, or hooks, some of which compute its parameters.
    """
    dense = copied(model)
    made: dict[int, nn.Linear] = {}
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    for name, layer in list(dense.named_modules(remove_duplicate=False)):
        if not isinstance(layer, StructuredLinear):
            continue
        if id(layer) not in made:
            more = does_more(layer)
            if more is not None:
                raise ValueError(f"{name or 'the layer'} cannot be replaced: {more}")
            parameters = layer.factors()
            shared = tuple(id(parameter) for parameter in parameters)
            if shared not in weights:
                trainable = any(parameter.requires_grad for parameter in parameters)
                weights[shared] = nn.Parameter(layer.to_matrix().detach().clone(), requires_grad=trainable)
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = weights[shared]
            linear.register_parameter("bias", layer.bias)
            note_original_features(linear, original_features(layer))
            made[id(layer)] = linear.train(layer.training)
        if not name:
            return made[id(layer)]
        dense.set_submodule(name, made[id(layer)])
    return dense
