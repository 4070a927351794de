"""Find the hidden units of a model's MLPs: the outputs of some layers, and the inputs of one other layer only."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpo_core.layers.computed_weights import copied_results
from mpo_core.models.dense_layers import DenseLayer
from mpo_core.models.evaluating import evaluating

TOLERANCE = 1e-4
"""Largest relative difference of two outputs that count as equal, in float32."""


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
    """The hidden units that can be removed one by one.

    Layers of one module are tried: some that have as many outputs as another has inputs. They hold removable units if
    the module, called with one tensor, gives the same output when half of the units are removed as when their weights
    in the last layer are zero. So attention is not cut, nor an MLP with a norm inside.

    The layers must be called by the forward of their own module only, which must take one tensor.

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
            if n < 2 or outer.name not in free or not inner:
                continue
            if _are_removable(model.get_submodule(owner), inner, outer):
                found.append(HiddenUnits(tuple(each.name for each in inner), outer.name, n))
                for each in (*inner, outer):
                    del free[each.name]
    return found


@torch.no_grad()
def _are_removable(module: nn.Module, inner: Sequence[DenseLayer], outer: DenseLayer) -> bool:
    weight, n = outer.linear.weight, outer.linear.in_features
    generator = torch.Generator().manual_seed(0)
    precision = torch.promote_types(weight.dtype, torch.float32)
    x = torch.randn(3, inner[0].linear.in_features, generator=generator).to(weight.device, precision)
    left = torch.randperm(n, generator=generator)[: n // 2].sort().values.to(weight.device)
    some = torch.zeros_like(weight)
    some[:, left] = weight[:, left]

    def output(weights: Tensor, removed: bool = False) -> Tensor:
        """The output of the module with these weights in the last layer."""
        changed = {outer.name: with_inputs(outer.linear, weights)}
        changed |= {each.name: with_outputs(each.linear, left) for each in inner if removed}
        tried = _copied(module, precision)
        for name, linear in changed.items():
            tried.set_submodule(name.rpartition(".")[2], linear.to(precision))
        with evaluating(tried), torch.random.fork_rng(devices=[]):
            return tried(x)

    try:
        ours, theirs, without = output(weight[:, left], True), output(some), output(torch.zeros_like(weight))
        # A residual connection or a bias must not hide a difference.
        scale = float((theirs - without).abs().max())
        return scale > 0 and float((ours - theirs).abs().max()) <= TOLERANCE * scale
    except Exception:  # a module's own code may raise anything for an input or a size that it does not expect
        return False


def with_outputs(linear: nn.Linear, left: Tensor) -> nn.Linear:
    """The layer with these outputs alone."""
    bias = None if linear.bias is None else linear.bias[left]
    return _linear(linear, linear.weight[left], bias)


def with_inputs(linear: nn.Linear, columns: Tensor) -> nn.Linear:
    """The layer with other inputs, and these weights (out_features, in_features) for them."""
    return _linear(linear, columns, linear.bias)


def _copied(module: nn.Module, precision: torch.dtype) -> nn.Module:
    """A copy without hooks, which would see inputs that are not data."""
    tried = copy.deepcopy(module, copied_results(module)).to(precision)
    for part in tried.modules():
        for hooks in ("_forward_pre_hooks", "_forward_hooks"):
            getattr(part, hooks).clear()
    return tried


def _linear(like: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=like.weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=like.bias.requires_grad)
    return linear.train(like.training)
