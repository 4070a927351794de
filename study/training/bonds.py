"""Changes of the bonds of a model's MPO layers while it is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import mpo_core
from mpo_core.fitting.adapting import BondPrices, ChainDirections, Growth, choose_bonds
from mpo_core.tensor_train.bonds import clip_bonds, n_params
from study.spec.bonds import Bonds
from study.training.weights import set_bonds

Moments = dict[Tensor, dict[str, Tensor]]
"""State of an optimiser by parameter: the moments of `MOMENTS`, and numbers."""
MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}
"""The moments of AdamW by name: the power of the gradient of which each is a mean."""


class NotFinite(Exception):
    """A loss, a gradient or a core is not finite, so that no change can be measured."""


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


def _measured(
    model: nn.Module, names: Sequence[str], batches: Sequence[Tensor]
) -> tuple[mpo_core.Statistics, dict[str, tuple[Tensor, Tensor]]]:
    """Statistics of the layers with the loss, and mean gradients by their matrices over two halves of the batches."""
    dense = mpo_core.decompress(model).eval()
    weights = [dense.get_parameter(f"{name}.weight") for name in names]
    halves: list[list[Tensor]] = []
    with torch.enable_grad():
        for half in (batches[0::2], batches[1::2]):
            total = [torch.zeros_like(weight) for weight in weights]
            for tokens in half:
                loss = mpo_core.next_token_losses(dense, tokens).mean()
                gradients = torch.autograd.grad(loss, weights)
                if not all(torch.isfinite(each).all() for each in (loss, *gradients)):
                    raise NotFinite
                for sum_, gradient in zip(total, gradients, strict=True):
                    sum_ += gradient / len(half)
            halves.append(total)
    statistics = mpo_core.collect_statistics(dense, batches, loss=mpo_core.next_token_losses, modules=names, held_out=0)
    return statistics, {name: (one, other) for name, one, other in zip(names, *halves, strict=True)}


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
