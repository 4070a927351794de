"""Numbers of parameters of a model."""

from __future__ import annotations

import math

from torch import nn
from torch.nn.parameter import is_lazy

from mpo_core.layers.computed_weights import weight_of
from mpo_core.layers.structured import StructuredLinear
from mpo_core.models.dense_layers import is_dense, shape_of


def n_params(model: nn.Module) -> int:
    """Number of trainable parameters that have a shape, shared ones once; for a pruned matrix, only kept entries."""
    numels = {id(p): p.numel() for p in model.parameters() if p.requires_grad and not is_lazy(p)}
    absent: dict[tuple[int, ...], int] = {}  # entries that a mask fixes at zero
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            factors = module.factors()
            if all(id(parameter) in numels for parameter in factors):
                absent[tuple(map(id, factors))] = sum(p.numel() for p in factors) - module.n_params_matrix
    return sum(numels.values()) - sum(absent.values())


def n_params_compressed(model: nn.Module) -> int:
    """Number of parameters of all linear layers' matrices, dense and structured, without biases, shared ones once."""
    counted: dict[tuple[int, ...], int] = {}
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            counted[tuple(map(id, module.factors()))] = module.n_params_matrix
        elif is_dense(module):
            weight = weight_of(module)
            counted[id(module if weight is None else weight),] = math.prod(shape_of(module))
    return sum(counted.values())
