"""Weights that are not parameters but results of a computation, so that the stored ones may be out of date."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def weight_of(module: nn.Module) -> nn.Parameter | None:
    """Return the module's weight if that is a parameter of its own, else None.

    Reading `module.weight` may compute it, and change the module.
    """
    return dict(module.named_parameters(recurse=False)).get("weight")


def why_computed(module: nn.Module) -> str | None:
    """Say which of weight and bias is not a linear layer's own parameter, and what to do; None if both are."""
    own = dict(module.named_parameters(recurse=False))
    for name in ("weight", "bias"):
        if parametrize.is_parametrized(module, name):
            call = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
            return f"its {name} is computed from other parameters: call {call} first"
        if name not in own and getattr(module, name, None) is not None:
            return f"its {name} is computed from other parameters{_by_hook(module, name)}"
    return None


def copied_results(model: nn.Module) -> dict[int, Tensor]:
    """Return a memo for deepcopy: copies, by the id of the original, of tensors that came out of a computation.

    torch's deepcopy refuses such tensors.
    """
    found = (tensor for module in model.modules() for tensor in tensors_in(vars(module)))
    return {id(tensor): tensor.detach().clone() for tensor in found if not tensor.is_leaf}


def tensors_in(held: object) -> Iterator[Tensor]:
    """Iterate over tensors, also those in nested lists, tuples and dicts."""
    to_see, seen = [held], set()
    while to_see:
        one = to_see.pop()
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))  # one may hold itself
            to_see.extend(one.values() if isinstance(one, dict) else one)


def _by_hook(module: nn.Module, name: str) -> str:
    """How to make the tensor of that name a parameter again."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            return f": call torch.nn.utils.prune.remove(layer, {name!r}) first"
        if isinstance(hook, WeightNorm | SpectralNorm):
            kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            return f": call torch.nn.utils.remove_{kind}(layer, {name!r}) first"
    return ", or is a buffer: make it a parameter first"
