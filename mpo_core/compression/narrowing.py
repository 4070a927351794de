"""Fewer hidden units in the MLPs of a model, before matrices are compressed one by one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor, nn

from mpo_core.calibration.statistics import Statistics
from mpo_core.compression.allocation import allocate, together
from mpo_core.compression.report import CompressedLayer
from mpo_core.compression.sizing import Sizer
from mpo_core.fitting.elimination import eliminate, refit
from mpo_core.fitting.ladders import Rung
from mpo_core.fitting.metric import Metric
from mpo_core.layers.computed_weights import copied_results
from mpo_core.layers.low_rank import LowRankLinear
from mpo_core.models.dense_layers import DenseLayer, Model, note_original_features, original_features
from mpo_core.models.hidden_units import HiddenUnits, find_hidden_units, with_inputs, with_outputs

SHARES = tuple(eighths / 8 for eighths in range(8, 0, -1))
"""Shares of its hidden units that an MLP may keep."""


@dataclass(frozen=True)
class Narrowed(Generic[Model]):
    """A model with fewer hidden units."""

    model: Model
    """It shares all tensors except those of the narrowed layers with the model that it was made from."""
    outputs: Mapping[str, Tensor]
    """By the name of a layer that computes hidden units: the indices of those that are left."""
    inputs: Mapping[str, Tensor]
    """The same of the layers that read them."""
    before: Mapping[str, nn.Linear]
    """All these layers as they were, by name."""

    def layers(self, layers: Sequence[DenseLayer]) -> list[DenseLayer]:
        """The layers as they are now."""
        return [
            replace(layer, linear=self.model.get_submodule(layer.name)) if layer.name in self.before else layer
            for layer in layers
        ]

    def metric(self, name: str, metric: Metric) -> Metric:
        """The metric of a layer as it is now."""
        return metric.restricted(self.outputs.get(name), self.inputs.get(name))

    def whole(self, name: str, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix of a layer in `inputs` before, and the one that these columns are now, with zeros for the rest."""
        W = self.before[name].weight.detach()
        W_hat = torch.zeros_like(W)
        W_hat[:, self.inputs[name]] = columns
        return W, W_hat

    def noted(self, row: CompressedLayer) -> CompressedLayer:
        """The row of the report with what the layer was before."""
        if row.name not in self.before:
            return row
        linear = self.before[row.name]
        n, left = linear.out_features, self.outputs.get(row.name)
        if left is None:
            n, left = linear.in_features, self.inputs[row.name]
        note = f"{len(left)} of {n} hidden units"
        note = note if row.kind != "dense" else f"{note}; {row.reason}"
        return replace(row, n_params_before=linear.weight.numel(), reason=note)

    def mark(self, model: nn.Module) -> None:
        """Note at each layer how many features it had, so that `load` accepts the model that it was made from."""
        for name, linear in self.before.items():
            first = original_features(linear) or (linear.in_features, linear.out_features)
            note_original_features(model.get_submodule(name), first)


def narrow_mlps(
    model: Model,
    layers: Sequence[DenseLayer],
    statistics: Statistics,
    max_params: int,
    *,
    gauge: str = "free",
    fits: Callable[[str, nn.Linear], bool] = lambda name, linear: True,
    progress: Callable[[int, int], None] | None = None,
) -> Narrowed[Model] | None:
    """Remove hidden units where that costs the least predicted loss; None if no unit is removed.

    A unit's row of each layer before it and its column of the layer after it are removed together. The columns that are
    left are fitted again. How many units each MLP keeps is chosen by `allocate`, as if all matrices became low rank
    afterwards and had max_params parameters together.

    Args:
        layers: those that may be replaced; `check_matrix` accepts their weights.
        statistics: they must have gradients of a loss.
        gauge: the gauge of the low-rank layers.
        fits: function from a layer's name and an nn.Linear on the meta device to whether the layer may have its shape.
        progress: called with the number of MLPs done and that of all.
    Raises:
        ValueError: a metric of another size, with the name of the layer.
    Warns:
        UserWarning: the model has no hidden units that can be removed.
    """
    linears = {layer.name: layer.linear for layer in layers}
    if any(linear.weight.is_meta for linear in linears.values()):
        return None
    sharers = {layer.name: layer.sharers for layer in layers}

    def metric_of(name: str) -> Metric:
        try:
            return statistics.metric((name, *sharers[name]), "loss").on(linears[name].weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    groups = find_hidden_units(model, layers)
    if not groups:
        warnings.warn("`narrow` found no hidden units that can be removed", stacklevel=3)
        return None
    low_rank = Sizer(LowRankLinear, options={"gauge": gauge})
    grouped = {name for group in groups for name in (*group.inner, group.outer)}
    ladders = {
        name: low_rank.ladder(name, linear.weight.detach(), metric_of(name), True)
        for name, linear in linears.items()
        if name not in grouped
    }
    choices: dict[str, list[Tensor]] = {}
    for done, group in enumerate(groups):
        sizes = [size for size in _sizes(group.n) if size == group.n or _fit(group, linears, size, fits)]
        of_mlp = {name: metric_of(name) for name in (*group.inner, group.outer)}
        ladders[group.outer], choices[group.outer] = _ladder_of_mlp(group, linears, of_mlp, sizes, low_rank)
        if progress is not None:
            progress(done + 1, len(groups))
    try:
        rungs = allocate(ladders, max_params)
    except ValueError:  # low rank cannot be so small; another kind may
        return None
    chosen = [(group, choices[group.outer][rungs[group.outer].candidate]) for group in groups]
    chosen = [(group, left) for group, left in chosen if len(left) < group.n]
    if not chosen:
        return None
    # A copy of the modules alone.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    narrow = copy.deepcopy(model, {**copied_results(model), **shared})
    inputs, outputs, before = {}, {}, {}
    for group, left in chosen:
        for name in group.inner:
            narrow.set_submodule(name, with_outputs(linears[name], left))
            outputs[name] = left
        columns = refit(linears[group.outer].weight.detach(), metric_of(group.outer), left)
        narrow.set_submodule(group.outer, with_inputs(linears[group.outer], columns))
        inputs[group.outer] = left
        for name in (*group.inner, group.outer):
            before[name] = linears[name]
    return Narrowed(narrow, outputs, inputs, before)


def _sizes(n: int) -> list[int]:
    return [max(1, round(share * n)) for share in SHARES]


def _fit(
    group: HiddenUnits, linears: Mapping[str, nn.Linear], size: int, fits: Callable[[str, nn.Linear], bool]
) -> bool:
    """Whether all layers may have this number of hidden units."""
    shapes = {name: (size, linears[name].in_features) for name in group.inner}
    shapes[group.outer] = linears[group.outer].out_features, size
    return all(fits(name, nn.Linear(columns, rows, device="meta")) for name, (rows, columns) in shapes.items())


def _ladder_of_mlp(
    group: HiddenUnits,
    linears: Mapping[str, nn.Linear],
    metrics: Mapping[str, Metric],
    sizes: list[int],
    low_rank: Sizer,
) -> tuple[list[Rung], list[Tensor]]:
    """Sizes of the layers of an MLP together, with their predicted loss; and the units of each `Rung.candidate`."""
    W = {name: linears[name].weight.detach() for name in (*group.inner, group.outer)}
    outer, metric = W[group.outer], metrics[group.outer]
    rungs, units = [], []
    for left, error, weighted in eliminate(outer, metric, sizes).values():
        of_layers = [
            low_rank.ladder(name, W[name][left], metrics[name].restricted(outputs=left), True) for name in group.inner
        ]
        # A matrix that is weighted by its sensitivity has the errors of the matrix itself.
        inputs = Metric.of_checked(metric.restricted(inputs=left).gram, None)
        ladder = low_rank.ladder(group.outer, weighted, inputs, True)
        of_layers.append([replace(rung, bits=8 * outer.element_size()) for rung in ladder])
        rungs += [replace(rung, error=rung.error + error / 2, candidate=len(units)) for rung in together(of_layers)]
        units.append(left)
    return rungs, units
