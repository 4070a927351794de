"""Changes of the bonds of a model's MPO layers while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

import mpo_core
from mpo_core.fitting.adapting import BondPrices, ChainDirections, Growth, choose_bonds
from mpo_core.tensor_train.bonds import clip_bonds, n_params
from study.spec.bonds import Bonds
from study.spec.trial import TrialSpec
from study.training.corpus import Corpus
from study.training.weights import set_bonds
from study.training.windows import Windows

Moments = dict[Tensor, dict[str, Tensor]]
"""State of an optimiser by parameter: the moments of `MOMENTS`, and numbers."""
MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}
"""The moments of AdamW by name: the power of the gradient of which each is a mean."""


class NotFinite(Exception):
    """A loss, a gradient or a core is not finite, or too large, so that no change can be measured."""


def chains_of(model: nn.Module) -> dict[str, mpo_core.MPOLinear]:
    """The MPO layers with a bond, each once, by name; a layer under several names has the first."""
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, mpo_core.MPOLinear)}
    return {name: layer for name, layer in found.items() if layer.n_sites > 1}


def check_chains(model: nn.Module, key: str) -> None:
    """Raise ValueError, with the key of the study file, if the gauge of the model's chains cannot change."""
    chains, known = chains_of(model), dict[int, str]()
    if not chains:
        raise ValueError(f"`{key}` needs MPO layers of at least two sites")
    for name, chain in chains.items():
        first = known.setdefault(id(chain.cores[0]), name)
        if first != name:
            raise ValueError(f"`{key}` is not possible: {first} and {name} share their cores")


def bonds_of(model: nn.Module) -> dict[str, list[int]]:
    """The bonds between the cores of each MPO layer."""
    return {name: list(layer.bonds[1:-1]) for name, layer in chains_of(model).items()}


def room_to_grow(model: nn.Module, max_params: int) -> int:
    """Parameters that the MPO layers may gain over those that they have; negative if they have to lose some.

    Raises:
        ValueError: they have more even with bonds of 1, or fewer even with the largest bonds.
    """
    chains = chains_of(model).values()
    least, most = (
        sum(n_params(clip_bonds(chi, chain.d_out, chain.d_in), chain.d_out, chain.d_in) for chain in chains)
        for chi in (1, None)
    )
    if not least <= max_params <= most:
        raise ValueError(
            f"`bonds.max_params` must be from {least:,} (bonds of 1) to {most:,} (the largest bonds), "
            f"but got {max_params:,}"
        )
    return max_params - sum(chain.n_params_matrix for chain in chains)


def change_bonds(
    model: nn.Module, bonds: Bonds, max_params: int, batches: Sequence[Tensor], moments: Moments
) -> Moments:
    """Change the bonds of the model's MPO layers in place (`check_chains` holds for them).

    Each direction has a price in nats: its part of the loss that a quadratic model of it predicts, with the Fisher
    information in Kronecker factors, over these batches (`mpo_core.fitting.adapting`). Directions change only where
    the model's outputs stay as they are, except for what is cut.

    Args:
        max_params: the most parameters of all these layers together.
        batches: tokens (B, T); at least two.
        moments: the optimiser's state of the model's parameters.
    Returns:
        The moments for the parameters as they are now. Cores are new parameters; their moments are carried over.
    Raises:
        NotFinite: the loss, or a gradient, is not finite. Nothing has changed then.
    """
    chains = chains_of(model)
    statistics, gradients = _measured(model, list(chains), batches)
    directions: dict[str, ChainDirections] = {}
    growths: dict[str, list[Growth]] = {}
    prices: dict[str, BondPrices] = {}
    for name, layer in chains.items():
        metric = statistics.metric(name, "loss") if statistics.why_not([name], "loss") is None else None
        found = directions[name] = ChainDirections([core.detach() for core in layer.cores], metric)
        most = max(layer.bonds)
        growths[name] = found.growth(*gradients[name], most) if metric is not None else []
        losses, gains = found.losses, [growth.gains for growth in growths[name]]
        if metric is None:  # nothing of this layer reaches the loss
            losses, gains = [[0.0] * len(each) for each in losses], [[] for _ in losses]
        prices[name] = BondPrices(layer.d_out, layer.d_in, losses, gains)
    most_cut, most_grown = bonds.prune * max_params, bonds.grow * max_params
    choose_bonds(prices, max_params, most_cut=most_cut, most_grown=most_grown)
    moments = dict(moments)
    for name, layer in chains.items():
        if tuple(prices[name].bonds) != layer.bonds:
            moments |= _changed(model, name, layer, directions[name], growths[name], prices[name], moments)
    return moments


class BondChanges:
    """The changes of the bonds of one run."""

    bonds: dict[str, list[list[int]]]
    """By layer: [step, bonds between its cores] of the start and of each change."""

    def __init__(self, spec: TrialSpec, seed: int, corpus: Corpus, model: nn.Module) -> None:
        assert spec.bonds is not None
        protocol = spec.protocol
        self._spec = spec.bonds
        self._n_batches = protocol.calibration_batches
        self.steps = spec.bonds.steps(protocol.steps)
        """Steps before which the bonds change."""
        n_batches = len(self.steps) * self._n_batches
        self._windows = Windows(corpus.train, n_batches, protocol.batch_size, spec.model.context, seed, "bonds")
        own = sum(chain.n_params_matrix for chain in chains_of(model).values())
        self._max_params = spec.bonds.max_params or own
        self.bonds = {name: [[0, *bonds]] for name, bonds in bonds_of(model).items()}

    def change(self, model: nn.Module, step: int, moments: Moments, device: torch.device | str) -> Moments:
        """Change the bonds before this step, as `change_bonds` does, and note them."""
        first = self.steps.index(step) * self._n_batches
        batches = [self._windows.batch(first + index)[0].to(device) for index in range(self._n_batches)]
        moments = change_bonds(model, self._spec, self._max_params, batches, moments)
        for name, bonds in bonds_of(model).items():
            if self.bonds[name][-1][1:] != bonds:
                self.bonds[name].append([step, *bonds])
        return moments


def _measured(
    model: nn.Module, names: Sequence[str], batches: Sequence[Tensor]
) -> tuple[mpo_core.Statistics, dict[str, tuple[Tensor, Tensor]]]:
    """Statistics of the layers with the loss, and mean gradients by their matrices over two halves of the batches."""
    dense = mpo_core.decompress(model).eval()
    gradients = _Gradients(dense, names)
    of_halves = [(index % 2, tokens) for index, tokens in enumerate(batches)]
    try:
        statistics = mpo_core.collect_statistics(dense, of_halves, loss=gradients.losses, modules=names, held_out=0)
    except mpo_core.UnusableValues:
        raise NotFinite from None
    return statistics, gradients.means()


class _Gradients:
    """Gradients of the loss by the matrices of some layers, over two halves of the batches."""

    def __init__(self, dense: nn.Module, names: Sequence[str]) -> None:
        self._layers = {name: dense.get_submodule(name) for name in names}
        weights = {name: layer.get_parameter("weight") for name, layer in self._layers.items()}
        self._sums = [{name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2)]
        self._n_losses = [0, 0]

    def losses(self, dense: nn.Module, batch: tuple[int, Tensor]) -> Tensor:
        """The losses of the tokens of a batch; their backward pass adds to the sums of the batch's half."""
        half, tokens = batch
        hooks = [
            layer.register_forward_hook(partial(self._watch, self._sums[half][name]))
            for name, layer in self._layers.items()
        ]
        try:
            losses = mpo_core.next_token_losses(dense, tokens)
        finally:
            for hook in hooks:
                hook.remove()
        self._n_losses[half] += losses.numel()
        return losses

    @staticmethod
    def _watch(sum_: Tensor, _module: nn.Module, args: tuple[Tensor, ...], outputs: Tensor) -> None:
        inputs = args[0].detach().flatten(0, -2)

        def add(g: Tensor) -> None:
            sum_.addmm_(g.flatten(0, -2).T, inputs)

        outputs.register_hook(add)

    def means(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The mean gradient of each half, by layer.

        Raises:
            NotFinite: one is not finite.
        """
        first, second = ({name: total / n for name, total in sums.items()}
                         for sums, n in zip(self._sums, self._n_losses, strict=True))  # fmt: skip
        if not all(torch.isfinite(each).all() for each in (*first.values(), *second.values())):
            raise NotFinite
        return {name: (first[name], second[name]) for name in first}


def _changed(
    model: nn.Module,
    name: str,
    layer: mpo_core.MPOLinear,
    directions: ChainDirections,
    growths: Sequence[Growth],
    prices: BondPrices,
    moments: Moments,
) -> Moments:
    """Replace the layer by one with the chosen bonds; returns the moments of its cores."""
    new = set_bonds(model, name, prices.bonds)
    kept, grown = [None, *prices.kept, None], [0, *prices.grown, 0]

    def resized(site: int, core: Tensor, columns: Tensor | None, filled: float) -> Tensor:
        """The core without what is cut, and with new directions: columns at its right, `filled` at its left."""
        core = core[: kept[site], ..., : kept[site + 1]]
        if grown[site + 1]:
            shape = (*core.shape[:3], grown[site + 1])
            core = torch.cat([core, core.new_full(shape, filled) if columns is None else columns], dim=3)
        if grown[site]:
            core = torch.cat([core, core.new_full((grown[site], *core.shape[1:]), filled)])
        return core

    carried = {key: directions.change.carried([moments[core][key] for core in layer.cores], power)
               for key, power in MOMENTS.items() if layer.cores[0] in moments}  # fmt: skip
    of_cores: Moments = {}
    for site, (old, core) in enumerate(zip(layer.cores, new.cores, strict=True)):
        columns = growths[site].columns[: kept[site], ..., : grown[site + 1]] if grown[site + 1] else None
        core.data.copy_(resized(site, directions.cores[site], columns, 0.0))
        if old in moments:
            own = dict(moments[old])
            for key, tensors in carried.items():
                # A new direction steps like the others: its second moment is theirs, its first one zero.
                filled = 0.0 if key == "exp_avg" else float(tensors[site].mean())
                # In the order of the core's entries: a fused optimiser reads both as one run of memory.
                own[key] = resized(site, tensors[site], None, filled).to(old.dtype).contiguous()
            of_cores[core] = own
    return of_cores
