"""Fewer hidden units in the MLPs of a model, before matrices are compressed one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor, nn

from mpo_core.calibration.statistics import Statistics
from mpo_core.compression.allocation import allocate, together
from mpo_core.compression.report import CompressedLayer
from mpo_core.fitting.elimination import eliminate, refit
from mpo_core.fitting.ladders import Rung
from mpo_core.fitting.metric import Metric
from mpo_core.layers.low_rank import LowRankLinear
from mpo_core.models.dense_layers import DenseLayer, Model
from mpo_core.models.hidden_units import HiddenUnits, find_hidden_units, with_inputs, with_outputs

SHARES = tuple(eighths / 8 for eighths in range(8, 0, -1))
"""Shares of its hidden units that an MLP may keep."""


@dataclass(frozen=True)
class Narrowed(Generic[Model]):
    """A model with fewer hidden units, and statistics of its layers."""

    model: Model
    """It shares all tensors but those of the narrowed layers with the model that it was made from."""
    statistics: Statistics
    inputs: dict[str, Tensor]
    """By the name of a layer that reads hidden units: the indices of those that are left."""
    n_units: dict[str, tuple[int, int]]
    """By the name of a layer that computes or reads hidden units: their number before, and now."""
    linears: dict[str, nn.Linear]
    """These layers before, by name."""

    def layers(self, layers: Sequence[DenseLayer]) -> list[DenseLayer]:
        """The layers as they are now."""
        return [
            replace(layer, linear=self.model.get_submodule(layer.name)) if layer.name in self.n_units else layer
            for layer in layers
        ]

    def whole(self, name: str, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix of a layer in `inputs` before, and the one that these columns are now, with zeros for the rest."""
        W = self.linears[name].weight.detach()
        W_hat = torch.zeros_like(W)
        W_hat[:, self.inputs[name]] = columns
        return W, W_hat

    def noted(self, row: CompressedLayer) -> CompressedLayer:
        """The row of the report with what the layer was before."""
        if row.name not in self.n_units:
            return row
        before, now = self.n_units[row.name]
        note = f"{now} of {before} hidden units"
        note = note if row.kind != "dense" else f"{note}; {row.reason}"
        return replace(row, n_params_before=self.linears[row.name].weight.numel(), reason=note)

    def mark(self, model: nn.Module) -> None:
        """Note at each layer how many features it had, so that `load` accepts the model that it was made from."""
        for name, linear in self.linears.items():
            model.get_submodule(name).original_features = linear.in_features, linear.out_features


def narrow_mlps(
    model: Model,
    layers: Sequence[DenseLayer],
    statistics: Statistics,
    max_params: int,
    gauge: str,
    progress: Callable[[int, int], None] | None = None,
) -> Narrowed[Model] | None:
    """Remove hidden units where that costs the least predicted loss; None if the model has none to remove.

    Without a unit, its row of each layer before it and its column of the layer after it go at once. The columns that
    are left are fitted anew. How many units each MLP keeps is chosen by `allocate`, as if all matrices became low rank
    afterwards and had max_params parameters together.

    Args:
        layers: those that may be replaced.
        statistics: of a loss.
        progress: called with the number of MLPs done and that of all.
    Raises:
        ValueError: as `allocate`.
    """
    linears = {layer.name: layer.linear for layer in layers}
    groups = find_hidden_units(model, layers)
    grouped = {name for group in groups for name in (*group.inner, group.outer)}
    ladders = {
        layer.name: _ladder(
            layer.linear.weight.detach(), statistics.metric((layer.name, *layer.sharers), "loss"), gauge
        )
        for layer in layers
        if layer.name not in grouped
    }
    choices: dict[str, list[Tensor]] = {}
    for done, group in enumerate(groups):
        ladders[group.outer], choices[group.outer] = _ladder_of_mlp(group, linears, statistics, gauge)
        if progress is not None:
            progress(done + 1, len(groups))
    rungs = allocate(ladders, max_params)
    chosen = [(group, choices[group.outer][rungs[group.outer].candidate]) for group in groups]
    chosen = [(group, left) for group, left in chosen if len(left) < group.n]
    if not chosen:
        return None
    # A copy of the modules alone.
    narrow = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    inputs, outputs, units = {}, {}, {}
    for group, left in chosen:
        for name in group.inner:
            narrow.set_submodule(name, with_outputs(linears[name], left))
            outputs[name] = left
        outer = linears[group.outer]
        columns = refit(outer.weight.detach(), statistics.metric(group.outer, "loss"), left)
        narrow.set_submodule(group.outer, with_inputs(outer, columns))
        inputs[group.outer] = left
        units |= dict.fromkeys((*group.inner, group.outer), (group.n, len(left)))
    before = {name: linears[name] for name in units}
    return Narrowed(narrow, statistics.restricted(outputs, inputs), inputs, units, before)


def _ladder_of_mlp(
    group: HiddenUnits, linears: dict[str, nn.Linear], statistics: Statistics, gauge: str
) -> tuple[list[Rung], list[Tensor]]:
    """Sizes of the layers of an MLP together, with their predicted loss; and the units of each `Rung.candidate`."""
    names = *group.inner, group.outer
    metrics = {name: statistics.metric(name, "loss") for name in names}
    W = {name: linears[name].weight.detach() for name in names}
    sizes = [max(1, round(share * group.n)) for share in SHARES]
    found = eliminate(W[group.outer], metrics[group.outer], sizes)
    rungs, units = [], []
    for left, error in found.values():
        of_layers = [_ladder(W[name][left], metrics[name].restricted(outputs=left), gauge) for name in group.inner]
        columns = refit(W[group.outer], metrics[group.outer], left)
        of_layers.append(_ladder(columns, metrics[group.outer].restricted(inputs=left), gauge))
        rungs += [
            Rung(rung.n_params, rung.error + error / 2, rung.n_index_bits, rung.bits, len(units))
            for rung in together(of_layers)
        ]
        units.append(left)
    return rungs, units


def _ladder(W: Tensor, metric: Metric, gauge: str) -> list[Rung]:
    """The predicted loss of the matrix at each rank, and as it is."""
    unit, bits = metric.on(W).norm(W) ** 2 / 2, 8 * W.element_size()
    rungs = LowRankLinear.rungs(W, metric, gauge=gauge)
    return [Rung(rung.n_params, rung.error * unit, rung.n_index_bits, bits) for rung in rungs] + [Rung(W.numel(), 0.0)]
