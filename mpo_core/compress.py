"""Turn the linear layers of a model into MPO layers, and count what that does."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import nn

from mpo_core.factorisation import factorise
from mpo_core.initialisation import INITS
from mpo_core.linear import MPOLinear
from mpo_core.tensor_train import contract, rel_error, tt_svd

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class CompressedLayer:
    """What became of one linear layer. Parameters are those of its weight matrix, without the bias."""

    name: str
    out_features: int
    in_features: int
    d_out: tuple[int, ...]
    d_in: tuple[int, ...]
    bonds: tuple[int, ...]
    n_params_before: int
    n_params_after: int
    rel_error: float | None
    """‖W − Ŵ‖_F / ‖W‖_F of the TT-SVD; None for cores drawn afresh."""


@dataclass(frozen=True)
class CompressionReport:
    """One row per replaced layer, in the order of the model; n_params are the whole model's trainable parameters."""

    rows: tuple[CompressedLayer, ...]
    n_params_before: int
    n_params_after: int

    def __str__(self) -> str:
        header = ("layer", "out×in", "d_out", "d_in", "bonds", "before", "after", "rel_error")
        table = [header] + [
            (
                row.name,
                f"{row.out_features}×{row.in_features}",
                _join(row.d_out),
                _join(row.d_in),
                _join(row.bonds),
                f"{row.n_params_before:,}",
                f"{row.n_params_after:,}",
                "–" if row.rel_error is None else f"{row.rel_error:.4f}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in table) for column in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 5 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        before, after = self.n_params_before, self.n_params_after
        return "\n".join([*lines, f"model: {before:,} -> {after:,} parameters, {before / after:.2f}×"])


def compress(
    model: Model,
    *,
    chi: int,
    factorisation: str = "paper",
    n_sites: int | None = None,
    init: str = "tt_svd",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    generator_for: Callable[[str], torch.Generator] | None = None,
) -> tuple[Model, CompressionReport]:
    """A copy of the model with its nn.Linear layers replaced by MPOLinear; all else is carried over, the model kept.

    Args:
        factorisation, n_sites: how each weight is split over sites, see `factorise`.
        init: "tt_svd" decomposes the present weights; "paper" and "variance" draw fresh cores.
        include, exclude: patterns (fnmatch, case-sensitive) of module names such as "blocks.0.attention.query"; a
            layer is replaced if it matches one of `include` and none of `exclude`.
        generator_for: from a parameter's name, such as "blocks.0.attention.query.cores.1", to the generator of its
            values; needed to draw fresh cores, except on the meta device, where there is nothing to draw.
    Raises:
        ValueError: no layer matches; a matching weight is shared with another module; an unknown init; fresh cores
            without generator_for; or as `factorise` and `tt_svd`, with the name of the layer.
    """
    if init not in INITS:
        raise ValueError(f"`init` must be one of {', '.join(INITS)}, but got {init!r}")
    names = [
        name
        for name in _linear_names(model)
        if any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]
    if not names:
        raise ValueError(
            f"no nn.Linear inside the model matches include={list(include)}, exclude={list(exclude)}; "
            f"it has {', '.join(_linear_names(model)) or 'none'}"
        )
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    compressed, rows = copy.deepcopy(model), []
    for name in names:
        linear = compressed.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if uses[id(model.get_parameter(f"{name}.weight"))] > 1:
            raise ValueError(f"the weight of {name} is shared with another module; exclude {name} or untie it first")
        try:
            layer = _replacement(name, linear, chi, factorisation, n_sites, init, generator_for)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        compressed.set_submodule(name, layer)
        rows.append(
            CompressedLayer(
                name=name,
                out_features=layer.out_features,
                in_features=layer.in_features,
                d_out=layer.d_out,
                d_in=layer.d_in,
                bonds=layer.bonds,
                n_params_before=linear.weight.numel(),
                n_params_after=sum(core.numel() for core in layer.cores),
                rel_error=rel_error(linear.weight, layer.to_matrix()) if init == "tt_svd" else None,
            )
        )
    return compressed, CompressionReport(tuple(rows), n_params(model), n_params(compressed))


def _replacement(
    name: str,
    linear: nn.Linear,
    chi: int,
    factorisation: str,
    n_sites: int | None,
    init: str,
    generator_for: Callable[[str], torch.Generator] | None,
) -> MPOLinear:
    if init == "tt_svd":
        return MPOLinear.from_linear(linear, chi=chi, n_sites=n_sites, factorisation=factorisation)
    layer = MPOLinear.empty_like(linear, chi=chi, n_sites=n_sites, factorisation=factorisation)
    if not linear.weight.is_meta:
        if generator_for is None:
            raise ValueError(f"init {init!r} draws fresh cores from `generator_for`, but got None")
        layer.init_cores(init, [generator_for(f"{name}.cores.{site}") for site in range(layer.n_sites)])
    return layer


def rel_errors(
    model: nn.Module, chis: Sequence[int], *, factorisation: str = "paper", n_sites: int | None = None
) -> dict[tuple[int, str], float]:
    """‖W − Ŵ‖_F / ‖W‖_F of the TT-SVD of every nn.Linear at every cap: {(chi, layer name): rel_error}.

    Computed in the dtype and on the device of the weights; the model is left as it is.
    """
    errors: dict[tuple[int, str], float] = {}
    for name in _linear_names(model):
        W = model.get_parameter(f"{name}.weight").detach()
        d_out, d_in = factorise(*W.shape, method=factorisation, n_sites=n_sites)
        for chi in chis:
            errors[chi, name] = rel_error(W, contract(tt_svd(W, d_out, d_in, chi)))
    return errors


def n_params(model: nn.Module) -> int:
    """All trainable parameters of the model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def n_params_compressed(model: nn.Module) -> int:
    """Parameters of the linear layers' matrices alone, dense weights and MPO cores, biases excluded."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += module.weight.numel()
        elif isinstance(module, MPOLinear):
            total += sum(core.numel() for core in module.cores)
    return total


def _linear_names(model: nn.Module) -> list[str]:
    # Not isinstance: the owners of subclasses, nn.MultiheadAttention for one, reach into their weights.
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and name]


def _join(sizes: Iterable[int]) -> str:
    return "·".join(str(size) for size in sizes)
