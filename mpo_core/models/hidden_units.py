"""Find the hidden units of a model's MLPs: the outputs of some layers, and the inputs of one other, alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpo_core.models.dense_layers import DenseLayer
from mpo_core.models.evaluating import evaluating


@dataclass(frozen=True)
class HiddenUnits:
    """Units between layers of one module, such as those of an MLP."""

    inner: tuple[str, ...]
    """Names of the layers whose outputs the units are computed from, one by one: gate_proj and up_proj."""
    outer: str
    """Name of the layer that reads them: down_proj."""
    n: int
    """Their number."""


def find_hidden_units(model: nn.Module, layers: Sequence[DenseLayer]) -> list[HiddenUnits]:
    """The hidden units that can be removed, each alone.

    Layers of one module are tried: some that have as many outputs as another has inputs. They hold removable units
    if the module, called with one tensor, gives the same without half of the units as with weights of zero at them.
    So an attention is none, nor an MLP with a norm inside.

    Args:
        layers: those that may be replaced.
    """
    by_owner: dict[str, dict[str, DenseLayer]] = {}
    for layer in layers:
        if layer.reason is None and not layer.sharers and not layer.linear.weight.is_meta:
            by_owner.setdefault(layer.name.rpartition(".")[0], {})[layer.name] = layer
    found = []
    for owner, own in by_owner.items():
        free = dict(own)
        for outer in own.values():
            n = outer.linear.in_features
            inner = [each for each in free.values() if each.name != outer.name and each.linear.out_features == n]
            if outer.name in free and inner and _are_removable(model.get_submodule(owner), inner, outer):
                found.append(HiddenUnits(tuple(each.name for each in inner), outer.name, n))
                for each in (*inner, outer):
                    del free[each.name]
    return found


@torch.no_grad()
def _are_removable(module: nn.Module, inner: Sequence[DenseLayer], outer: DenseLayer) -> bool:
    weight, n = inner[0].linear.weight, outer.linear.in_features
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, inner[0].linear.in_features, generator=generator).to(weight)
    left = torch.randperm(n, generator=generator)[: max(1, n // 2)].sort().values.to(weight.device)
    zeros = torch.zeros_like(outer.linear.weight)
    zeros[:, left] = outer.linear.weight[:, left]
    narrow, zeroed = copy.deepcopy(module), copy.deepcopy(module)
    for each in inner:
        narrow.set_submodule(_last(each.name), with_outputs(each.linear, left))
    narrow.set_submodule(_last(outer.name), with_inputs(outer.linear, outer.linear.weight[:, left]))
    zeroed.set_submodule(_last(outer.name), with_inputs(outer.linear, zeros))
    try:
        with evaluating(narrow), evaluating(zeroed):
            ours, theirs = narrow(x), zeroed(x)
    except Exception:  # a module's own code may raise anything for an input or a size that it does not expect
        return False
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor) or ours.shape != theirs.shape:
        return False
    close = torch.finfo(weight.dtype).eps ** 0.5
    return torch.allclose(ours.float(), theirs.float(), rtol=close, atol=close * float(theirs.float().abs().max()))


def with_outputs(linear: nn.Linear, left: Tensor) -> nn.Linear:
    """The layer with these outputs alone."""
    bias = None if linear.bias is None else linear.bias[left]
    return _linear(linear, linear.weight[left], bias)


def with_inputs(linear: nn.Linear, columns: Tensor) -> nn.Linear:
    """The layer with other inputs, and these weights (out_features, in_features) for them."""
    return _linear(linear, columns, linear.bias)


def _linear(like: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=like.weight.requires_grad)
    if bias is not None:
        assert like.bias is not None
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=like.bias.requires_grad)
    return linear.train(like.training)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
