"""The tensors of a model, each once: tied ones share their memory, which safetensors does not store twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

import mpo_core


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; of tied ones the first."""
    names: dict[int, str] = {}
    every = model.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in every.items() if names.setdefault(id(tensor), name) == name}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, bonds_differ: bool = False) -> None:
    """Copy what `weights_of` gave into a model of the same shapes.

    Args:
        bonds_differ: whether MPO layers take over the bonds of the weights.
    Raises:
        RuntimeError: a tensor is missing, unknown or of another shape.
    """
    if bonds_differ:
        adopt_bonds(model, weights)
    names: dict[int, str] = {}
    first = {name: names.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}
    tied = {name: weights[other] for name, other in first.items() if name != other and other in weights}
    model.load_state_dict({**weights, **tied})


def adopt_bonds(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace each MPO layer whose cores have other bonds in `weights` by a layer with those bonds, without values."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, mpo_core.MPOLinear) or layer.gauge != "free":
            continue
        shapes = [weights[key].shape for site in range(layer.n_sites) if (key := f"{name}.cores.{site}") in weights]
        if len(shapes) < layer.n_sites or shapes == [core.shape for core in layer.cores]:
            continue
        try:
            set_bonds(model, name, [1, *(shape[-1] for shape in shapes)])
        except ValueError as error:
            raise RuntimeError(f"{name}: {error}") from error


def set_bonds(model: nn.Module, name: str, bonds: Sequence[int]) -> mpo_core.MPOLinear:
    """Replace an MPO layer, under all its names, by one with these bonds; its cores have no values yet.

    Raises:
        ValueError: these are no bonds of its chain.
    """
    layer = model.get_submodule(name)
    assert isinstance(layer, mpo_core.MPOLinear)
    options = {key: value for key, value in layer.options().items() if key != "chi"}
    options |= {"bonds": list(bonds), "bias": layer.bias is not None, "dtype": layer.cores[0].dtype}
    new = type(layer)(layer.in_features, layer.out_features, device="meta", **options)
    new = new.to_empty(device=layer.cores[0].device).taking_over(layer)
    new.bias = layer.bias  # the same parameter, so that an optimiser keeps its moments
    for other, module in list(model.named_modules(remove_duplicate=False)):
        if module is layer:
            model.set_submodule(other, new)
    return new
