"""Find the layers of any kind of model that structured layers can replace."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from mpo_core.layers.computed_weights import copied_results, weight_of, why_computed

Model = TypeVar("Model", bound=nn.Module)

_ORIGINAL = "original_features"
_SHOWN = 4
"""Most names of layers in a message."""


@dataclass(frozen=True)
class DenseLayer:
    """A weight matrix and the modules that hold it."""

    name: str
    """The module's name; the first in the model's order if several modules hold the weight."""
    sharers: tuple[str, ...]
    """Names of the other modules that hold the same weight, and other names of the same module."""
    linear: nn.Linear
    """The layer as nn.Linear: itself, or one with the transposed weight of a Conv1D. If the layer has to stay: one of
    the same shape without values."""
    reason: str | None
    """Why it has to stay as it is; None if it can be replaced."""


def replaceable_layers(
    model: nn.Module, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = ()
) -> list[DenseLayer]:
    """The layers that `compress` can replace, of those that match one of `include` and none of `exclude`.

    Raises:
        ValueError: as `find_dense_layers`; or none of those that match can be replaced.
    """
    found = find_dense_layers(model, include, exclude)
    replaceable = [layer for layer in found if layer.reason is None]
    if not replaceable:
        raise ValueError(f"no layer can be replaced; for example {found[0].name}: {found[0].reason}")
    return replaceable


def find_dense_layers(model: nn.Module, include: str | Sequence[str], exclude: str | Sequence[str]) -> list[DenseLayer]:
    """The nn.Linear layers, and Conv1D layers of Hugging Face, that match one of `include` and none of `exclude`.

    A layer has to stay as it is if its owner would miss its weight or the weight is also used elsewhere. It also stays
    if it is uncertain that it is x Wᵀ + b of a stored weight W, and no more: see `_stays`.

    Args:
        include, exclude: patterns; a string is one pattern.
    Raises:
        ValueError: nothing matches; or a layer that has to stay is named in `include` exactly, not by a pattern.
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
            f"it has {_some(list(layers), include)}"
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
        reason = _stays(module)
        sharers: list[str] = []
        if reason is None:
            sharers = [holder.removesuffix(".weight") for holder in holders[id(weight_of(module))]]
            reason = _shared(layers, matching, sharers, holders)
        if reason is None:
            done.update(sharers)
        elif name in include:
            raise ValueError(f"{name} cannot be replaced: {reason}")
        others = tuple(other for other in sharers if other != name) if reason is None else ()
        found.append(DenseLayer(name, others, as_linear(module) if reason is None else _stand_in(module), reason))
    return found


def _some(names: list[str], patterns: Sequence[str]) -> str:
    """A few names, closest to the patterns first. Those of repeated blocks are one: "layers.*.mlp.up_proj"."""

    def distance(name: str) -> float:
        return min((1 - SequenceMatcher(None, pattern, name).ratio() for pattern in patterns), default=0.0)

    distinct = sorted(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names), key=distance)
    more = len(distinct) - _SHOWN
    return (", ".join(distinct[:_SHOWN]) or "none") + (f" and {more} more" if more > 0 else "")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every layer whose weight `compress` would read, by its first name, as nn.Linear."""
    return {
        name: as_linear(module)
        for name, module in model.named_modules()
        if name and is_dense(module) and _no_weight(module) is None
    }


def is_dense(module: nn.Module) -> bool:
    """Whether it is an nn.Linear, subclasses included, or a Conv1D of Hugging Face."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a dense layer; in_features is 0 while a lazy one has no shape."""
    if isinstance(module, nn.Linear):
        weight = weight_of(module)
        if weight is None or isinstance(weight, UninitializedParameter):
            return module.out_features, module.in_features
        return weight.shape[0], weight.shape[1]
    in_features, out_features = cast(Tensor, module.weight).shape
    return out_features, in_features


def as_linear(module: nn.Module) -> nn.Linear:
    """Return the module if it is an nn.Linear; for a Conv1D, an nn.Linear with its bias and its transposed weight."""
    if isinstance(module, nn.Linear):
        return module
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    linear = nn.Linear(*weight.shape, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)
    linear.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
    return linear.train(module.training)


def original_features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer before it was narrowed; None if it was not."""
    return vars(module).get(_ORIGINAL)


def note_original_features(module: nn.Module, features: tuple[int, int] | None) -> None:
    """Note (in_features, out_features) of a layer before it was narrowed, if it was."""
    if features is not None:
        vars(module)[_ORIGINAL] = features


def copied(model: Model) -> Model:
    """A deep copy. Weights that hooks compute at every call, and outputs that a module keeps, are copied as values."""
    return copy.deepcopy(model, copied_results(model))


def does_more(module: nn.Module) -> str | None:
    """Why a layer in its place would not do all that the module does; None if it would."""
    if "forward" in vars(module):
        return "its forward has been replaced: restore its own forward first"
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    if any(getattr(module, kind) for kind in kinds):
        return "it has hooks, which another layer would not run: remove them first, and register them again afterwards"
    return None


def _stand_in(module: nn.Module) -> nn.Linear:
    dtype = next((tensor.dtype for tensor in module.parameters()), None)
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.empty(shape_of(module), dtype=dtype, device="meta"), requires_grad=False)
    return linear


def _is_conv1d(module: nn.Module) -> bool:
    # Hugging Face's y = x W + b, W (in_features, out_features), known by name: transformers is not imported here.
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(weight, "ndim", 0) == 2


def _stays(module: nn.Module) -> str | None:
    return _no_weight(module) or does_more(module) or _holds_more(module)


def _holds_more(module: nn.Module) -> str | None:
    held = (dict(named) for named in (module.named_children(), module.named_buffers(), module.named_parameters()))
    more = [name for names in held for name in names if name not in ("weight", "bias")]
    return f"it also holds {more[0]}, which another layer would not" if more else None


def _no_weight(module: nn.Module) -> str | None:
    """Why it may compute something other than x Wᵀ + b, or use a W other than the stored one; None if it does not."""
    if isinstance(weight_of(module), UninitializedParameter):
        return "its weight has no shape yet: run the model once first"
    computed = why_computed(module)
    if computed is None and isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        # The out_proj of nn.MultiheadAttention, for example, is never called.
        return f"it is a {type(module).__name__}, whose owner may read its weight, or which may compute something else"
    return computed


def _shared(
    layers: dict[str, nn.Module], matching: list[str], sharers: list[str], holders: dict[int, list[str]]
) -> str | None:
    outside = [other for other in sharers if other not in layers]
    left_out = [other for other in sharers if other not in matching]
    if outside or left_out:
        return f"its weight is shared with {(outside or left_out)[0]}, which is not replaced"
    staying = [other for other in sharers if _stays(layers[other])]
    if staying:
        return f"its weight is shared with {staying[0]}, which is not replaced"
    if len({type(layers[other]) for other in sharers}) > 1:
        return f"its weight is shared between layers of different types, {' and '.join(sharers)}"
    biases = [layers[other].bias for other in sharers]
    held = [holder.removesuffix(".bias") for bias in biases if bias is not None for holder in holders[id(bias)]]
    return "its bias is shared with another module" if not set(held) <= set(sharers) else None
