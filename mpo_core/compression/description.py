"""Describe a model as JSON, except for the values of its tensors, and rebuild the model from that."""

from __future__ import annotations

import copy
import json
import operator
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from mpo_core.compression.origin import LOADED_INTO, build, check_same_settings, origin_of
from mpo_core.layers.computed_weights import copied_results, tensors_in
from mpo_core.layers.registry import kind_called
from mpo_core.layers.structured import StructuredLinear
from mpo_core.models.dense_layers import is_dense, note_original_features, original_features

_LINEAR = "linear"


@dataclass
class _Layer:
    """A structured layer, or an nn.Linear, which may have replaced a Conv1D."""

    names: list[str]
    """All names of the one module."""
    kind: str
    in_features: int
    out_features: int
    bias: bool
    options: dict[str, Any]
    original_features: tuple[int, int] | None = None
    """(in_features, out_features) before it was narrowed, if it was."""

    @staticmethod
    def of(name: str, module: StructuredLinear | nn.Linear) -> _Layer:
        kind, options = _LINEAR, {}
        if isinstance(module, StructuredLinear):
            if any(is_parametrized(part) for part in module.modules()):
                raise ValueError(f"{name}: its parameters are parametrized: call `remove_parametrizations` first")
            try:
                kind, options = module.kind, as_json(module.options())
            except NotImplementedError:
                what = type(module).__name__
                raise ValueError(f"{name}: {what} cannot be saved, since it does not define `options`") from None
        original = original_features(module)
        layer = _Layer(
            [name], kind, module.in_features, module.out_features, module.bias is not None, options, original
        )
        if isinstance(module, StructuredLinear):
            there, again = _shapes(module), _shapes(layer.make(type(module)))
            if there != again:
                raise ValueError(f"{name}: it has tensors {there}, but its `options` {options} lead to {again}")
        return layer

    def described(self) -> dict[str, Any]:
        """All fields, but the original features only if there are some."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def make(self, kind: type[StructuredLinear] | None = None) -> nn.Module:
        """The layer on the meta device."""
        made = nn.Linear if self.kind == _LINEAR else kind or kind_called(self.kind)
        try:
            return made(self.in_features, self.out_features, bias=self.bias, device="meta", **self.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.names[0]}: {made.__name__} with {self.options}: {error}") from error


def describe(model: nn.Module) -> dict[str, Any]:
    """Return all that is needed to rebuild the model, except the code of its class and the values of its tensors.

    Raises:
        ValueError: a part of the model, which is named, would be lost.
    """
    modules = list(_places(model))
    parameters, buffers = named_tensors(model)
    tensors = {**parameters, **buffers}
    _check_tensors(model, parameters, tensors)
    layers: dict[int, _Layer] = {}
    for name, module in modules:
        if id(module) in layers:
            layers[id(module)].names.append(name)
        elif isinstance(module, StructuredLinear) or type(module) is nn.Linear:
            layers[id(module)] = _Layer.of(name, module)
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    orders = {name: _order(tensors[name]) for name in first.values()}
    every_module = model.named_modules(remove_duplicate=False)
    description = as_json(
        {
            "origin": origin_of(model),
            "modules": {name: type(module).__name__ for name, module in modules},
            "layers": [layer.described() for layer in layers.values()],
            "tied": {name: other for name, other in names.items() if name != other},
            "buffers": list(buffers),
            "frozen": [name for name, parameter in parameters.items() if not parameter.requires_grad],
            "orders": {name: order for name, order in orders.items() if order != sorted(order)},
            "training": model.training,
            "other_mode": [name for name, module in every_module if module.training != model.training],
        }
    )
    if description["origin"]["library"] and not _is_built_alike(model, description):
        description["origin"]["library"] = None
    return description


def rebuild(description: Mapping[str, Any], like: nn.Module | None) -> nn.Module:
    """The model that was described, its parameters and buffers still on the meta device; `like` is not changed.

    Raises:
        ValueError: `like` is another model than the one described; or is None although it is needed.
    """
    origin, classes = description["origin"], description["modules"]
    layers = [_Layer(**layer) for layer in description["layers"]]
    if like is None:
        model = layers[0].make() if layers and "" in layers[0].names else build(origin)
    else:
        if not isinstance(like, nn.Module):
            raise ValueError(f"`like` must be a model or a function that makes one, but got {type(like).__name__}")
        model = _on_meta(like)
        if type(model).__name__ != classes[""] and not _is_linear(model):
            raise ValueError(f"the saved model is a {classes['']}, but `like` is a {type(model).__name__}")
    check_same_settings(origin, as_json(origin_of(model)))
    for layer in layers:
        model = _put(model, layer)
    present = {name: type(module).__name__ for name, module in _places(model)}
    for name in [*classes, *present]:
        saved, ours = classes.get(name, "missing"), present.get(name, "missing")
        # `save` has compared all classes with those that the library builds; the library may have renamed some since.
        strict = like is not None or {saved, ours} & {"Linear", "Conv1D"}
        if saved != ours and strict:
            raise ValueError(f"{name} is {saved} in the saved model, but {ours} in {LOADED_INTO}")
    check_plain_tensors(model)
    return model


def check_plain_tensors(model: nn.Module) -> None:
    """Raise ValueError if a module has a tensor on the meta device that is not a parameter or buffer of the model."""
    known = {id(tensor) for tensors in named_tensors(model) for tensor in tensors.values()}
    for name, module in model.named_modules():
        for key, held in vars(module).items():
            for tensor in tensors_in(held):
                if tensor.is_meta and id(tensor) not in known:
                    where = f"{name}.{key}" if name else key
                    raise ValueError(f"{where} holds a tensor without values, which is not a parameter or buffer")


def set_modes(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Give every module the training mode that it had."""
    others = set(description["other_mode"])
    for name, module in model.named_modules(remove_duplicate=False):
        module.training = description["training"] != (name in others)


def named_tensors(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Parameters and buffers under all their names, including those that a state_dict leaves out."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters, dict(model.named_buffers(remove_duplicate=False))


def as_json(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content as JSON keeps it: tuples become lists, keys strings, and numpy integers Python integers.

    Raises:
        ValueError: it contains something that JSON does not support.
    """
    try:
        return json.loads(json.dumps(content, default=operator.index))
    except TypeError as error:
        raise ValueError(f"the description of the model cannot be written as JSON: {error}") from None


def _places(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under all its names, except those inside a structured layer."""
    yield name, module
    if not isinstance(module, StructuredLinear):
        for key, child in module._modules.items():
            if child is not None:
                yield from _places(child, f"{name}.{key}" if name else key)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, StructuredLinear) or is_dense(module)


def _is_built_alike(model: nn.Module, description: Mapping[str, Any]) -> bool:
    """Whether the library builds the same model from its configuration, so that it was not changed by hand since."""
    try:
        again = rebuild(description, None)
    except ValueError:
        return False
    return _shapes(again) == _shapes(model) and _outline(again) == _outline(model)


def _outline(model: nn.Module) -> list[str]:
    return [f"{name}: {type(module).__name__}({module.extra_repr()})" for name, module in _places(model)]


def _put(model: nn.Module, layer: _Layer) -> nn.Module:
    """The model with this layer at all its names."""
    new: nn.Module | None = None
    for name in layer.names:
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{name} is a layer of the saved model, but {LOADED_INTO} has none of that name") from None
        sizes, wanted_sizes = _sizes(old), (layer.in_features, layer.out_features)
        if layer.kind == _LINEAR and type(old) is nn.Linear and (sizes == wanted_sizes or not layer.original_features):
            continue
        if sizes not in (wanted_sizes, tuple(layer.original_features or wanted_sizes)):
            wanted = f"goes from {layer.in_features} to {layer.out_features} features in the saved model"
            present = f"{type(old).__name__} from {sizes[0]} to {sizes[1]}" if sizes else type(old).__name__
            raise ValueError(f"{name} {wanted}, but {LOADED_INTO} has {present} there")
        if new is None:
            new = layer.make()
            if layer.original_features is not None:
                in_features, out_features = layer.original_features
                note_original_features(new, (in_features, out_features))
        if not name:
            return new
        model.set_submodule(name, new)
    return model


def _sizes(module: nn.Module) -> tuple[int, ...]:
    """(in_features, out_features) of a linear layer; empty for other modules."""
    if isinstance(module, StructuredLinear | nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.get_parameter("weight").shape) if is_dense(module) else ()


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model that takes no memory for parameters and buffers."""
    memo: dict[int, Any] = dict(copied_results(model))
    for tensor in (*model.buffers(), *model.parameters()):
        if not is_lazy(tensor):
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
            memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _check_tensors(model: nn.Module, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    lost = [name for name in model.state_dict() if name not in tensors]
    if lost:
        raise ValueError(
            f"{lost[0]} is in the model's state_dict, but is not a parameter or buffer, so it would be lost"
        )
    starts: dict[tuple[torch.device, int], str] = {}
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: run the model once first")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device, so has no values to save")
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(f"{name} is a {type(tensor).__name__} ({tensor.layout}), not a plain tensor")
        if name in parameters and tensor.numel():
            other = starts.setdefault((tensor.device, tensor.data_ptr()), name)
            if tensors[other] is not tensor:
                raise ValueError(
                    f"{other} and {name} are two parameters in the same memory, which would be untied: "
                    "make them one parameter, or give one of them a copy"
                )


def _order(tensor: Tensor) -> list[int]:
    """The order of the dimensions in memory; a product of a transposed matrix may round differently."""
    order = sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim))
    return order if not tensor.is_contiguous() and tensor.permute(order).is_contiguous() else sorted(order)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for tensors in named_tensors(module) for name, tensor in tensors.items()}
