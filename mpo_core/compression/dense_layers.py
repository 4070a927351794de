"""Which layers of a model can be replaced by structured ones, whatever kind of model it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter


@dataclass(frozen=True)
class DenseLayer:
    """A weight matrix and the modules that hold it."""

    name: str
    """The module's name; the first in the model's order where several modules hold the weight."""
    sharers: tuple[str, ...]
    """Names of the other modules that hold the same weight, and other names of the same module."""
    linear: nn.Linear
    """The layer as nn.Linear: itself, or one that has the transposed weight of a Conv1D."""
    reason: str | None
    """Why it has to stay as it is; None if it can be replaced."""


def find_dense_layers(model: nn.Module, include: str | Sequence[str], exclude: str | Sequence[str]) -> list[DenseLayer]:
    """The nn.Linear layers, and Conv1D layers of Hugging Face, that match one of `include` and none of `exclude`.

    A layer has to stay as it is where its owner would miss its weight or where the weight is also used elsewhere.

    Args:
        include, exclude: patterns; a string is one.
    Raises:
        ValueError: nothing matches; or a layer that has to stay is named in `include` outright, not by a pattern.
    """
    include, exclude = ([given] if isinstance(given, str) else list(given) for given in (include, exclude))
    layers = {name: module for name, module in model.named_modules(remove_duplicate=False) if name and is_dense(module)}
    matching = [
        name
        for name in layers
        if any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]
    if not matching:
        raise ValueError(
            f"no nn.Linear inside the model matches include={include}, exclude={exclude}; "
            f"it has {', '.join(layers) or 'none'}"
        )
    holders: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)].append(name)

    found: list[DenseLayer] = []
    done: set[str] = set()
    for name in matching:
        if name in done:
            continue
        module = layers[name]
        reason = _owner_reads(module)
        sharers: list[str] = []
        if reason is None:
            sharers = [holder.removesuffix(".weight") for holder in holders[id(module.weight)]]
            reason = _shared(name, layers, matching, sharers, holders)
        if reason is None:
            done.update(sharers)
        elif name in include:
            raise ValueError(f"{name} cannot be replaced: {reason}")
        others = tuple(other for other in sharers if other != name) if reason is None else ()
        found.append(DenseLayer(name, others, as_linear(module), reason))
    return found


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every layer of a type that `compress` replaces, by its first name, as nn.Linear; subclasses are left out."""
    return {
        name: as_linear(module)
        for name, module in model.named_modules()
        if name and is_dense(module) and (type(module) is nn.Linear or not isinstance(module, nn.Linear))
    }


def is_dense(module: nn.Module) -> bool:
    """Whether it is an nn.Linear, subclasses included, or a Conv1D of Hugging Face."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def as_linear(module: nn.Module) -> nn.Linear:
    """The module itself if it is an nn.Linear; for a Conv1D one that shares its bias and has its weight transposed."""
    if isinstance(module, nn.Linear):
        return module
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    linear = nn.Linear(*weight.shape, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)
    linear.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
    return linear.train(module.training)


def _is_conv1d(module: nn.Module) -> bool:
    # Hugging Face's y = x W + b, W (in_features, out_features), told by its name as transformers is not imported here.
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(weight, "ndim", 0) == 2


def _owner_reads(module: nn.Module) -> str | None:
    if isinstance(module.weight, UninitializedParameter):
        return "its weight has no shape yet: run the model once before"
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        # The out_proj of nn.MultiheadAttention, for one, is never called.
        return f"it is a {type(module).__name__}, whose owner may read its weight"
    return None


def _shared(
    name: str,
    layers: dict[str, nn.Module],
    matching: list[str],
    sharers: list[str],
    holders: dict[int, list[str]],
) -> str | None:
    outside = [other for other in sharers if other not in layers]
    left_out = [other for other in sharers if other not in matching]
    if outside or left_out:
        return f"its weight is shared with {(outside or left_out)[0]}, which is not replaced"
    if len({type(layers[other]) for other in sharers}) > 1:
        return f"its weight is shared between layers of different types, {' and '.join(sharers)}"
    bias = layers[name].bias
    if bias is not None and any(holder.removesuffix(".bias") not in sharers for holder in holders[id(bias)]):
        return "its bias is shared with another module"
    return None
