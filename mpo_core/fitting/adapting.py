"""Bonds of chains that change while the chains are trained: the price of each direction, and which to cut and to grow.

A direction of a bond is one value of its index, in a gauge in which the directions are the singular vectors of the
chain there. Cutting it changes W by one term; a new one, orthogonal to the others, adds a term. In the metric of a
layer both have a price in nats of the loss, so that directions of all layers can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpo_core.fitting.chain_fit import centred
from mpo_core.fitting.metric import Metric
from mpo_core.fitting.whitening import Whitened, on_cores, times_sites
from mpo_core.tensor_train.algebra import bonds_and_sizes, by_sites, orthogonalize
from mpo_core.tensor_train.bonds import n_params, site_sizes
from mpo_core.tensor_train.gauge_changes import GaugeChange

_LEAST = 1e-3
"""Singular values below this share of a bond's largest count as that share when the gauge is chosen: its inverse must
not be large, because moments of an optimiser are multiplied by its square."""


class ChainDirections:
    """A chain in a gauge in which the directions of each bond are those of its singular value decomposition.

    The decomposition is that of W in the coordinates of the metric (`Whitened`). The cores keep their Frobenius norms,
    up to one factor that they share.

    Args:
        cores: a chain of W (out_features, in_features); every bond is within its neighbours' reach.
        metric: the metric of W. Default: the Frobenius norm.
    """

    cores: list[Tensor]
    """The same W in this gauge, float64."""
    change: GaugeChange
    """The change from the given cores to these."""
    losses: list[list[float]]
    """For each bond between two cores: ½ ‖·‖² of each direction in the coordinates of the metric, descending. With the
    metric "loss", it is about the predicted rise of the loss if the direction is cut: exactly, if the metric's moments
    are Kronecker products over the sites."""

    @torch.no_grad()
    def __init__(self, cores: Sequence[Tensor], metric: Metric | None = None) -> None:
        _, self._d_out, self._d_in = bonds_and_sizes(cores)
        before = [core.double() for core in cores]
        n_sites = len(cores)
        device = cores[0].device
        self._whitened = Whitened.of((metric or Metric()).to(device=device), self._d_out, self._d_in)
        chain = on_cores(before, *self._whitened.roots)
        factors, values = centred(chain)
        # Isometries towards the last core, which carries the norm.
        self._isometries = [factor / value for factor, value in zip(factors, values, strict=False)] + [factors[-1]]
        self.losses = [(value.square() / 2).tolist() for value in values]
        one = torch.ones(1, dtype=torch.float64, device=device)
        self._halves = [one, *(value.clamp(min=_LEAST * float(value[0])).sqrt() for value in values), one]
        gauged = [
            core / self._halves[site][:, None, None, None] * self._halves[site + 1]
            for site, core in enumerate(self._isometries)
        ]
        gauged = on_cores(gauged, *self._whitened.inverse_roots)
        ratios = torch.stack(
            [
                torch.linalg.vector_norm(core) / torch.linalg.vector_norm(new)
                for core, new in zip(before, gauged, strict=True)
            ]
        )
        self._scales = ratios / ratios.log().mean().exp()
        self.cores = [core * scale for core, scale in zip(gauged, self._scales, strict=True)]
        self.change = GaugeChange(before, self.cores)
        self._chain, self._n_sites = chain, n_sites

    @torch.no_grad()
    def growth(self, gradient: Tensor, again: Tensor, most: int) -> list[Growth]:
        """The best new directions of each bond between two cores, for a gradient of the loss by W.

        They are the singular vectors of the gradient's two-site environment, whitened, and without what the cores at
        both sides span already: the residual that a two-site sweep (DMRG) would add.

        Args:
            gradient, again: means over different batches, (out_features, in_features). The directions are those of the
                first. Their gains are products of what both see, so that noise alone gains nothing in the mean.
            most: at most that many directions for each bond.
        """
        first, second = (self._environments(each) for each in (gradient, again))
        return [self._growth(site, first[site], second[site], most) for site in range(self._n_sites - 1)]

    def _growth(self, site: int, environment: Tensor, again: Tensor, most: int) -> Growth:
        a, o, i, b = self._isometries[site].shape
        U, s, Vh = torch.linalg.svd(environment, full_matrices=False)
        left, right = environment.shape
        n = max(0, min(most, min(left, right) - b))
        columns = U[:, :n]
        # ⟨gradient, u vᵀ⟩ by the first batches times that by the second; the square of the first alone is never small.
        seen = torch.einsum("mk,mn,kn->k", columns, again, Vh[:n])
        gains = s[:n] * seen / 2
        scale = self._halves[site + 1].median()
        new = columns.reshape(a, o, i, n) * scale / self._halves[site][:, None, None, None]
        roots = ([root[site]] if root is not None else None for root in self._whitened.inverse_roots)
        return Growth(gains.tolist(), on_cores([new], *roots)[0] * self._scales[site])

    def _environments(self, gradient: Tensor) -> list[Tensor]:
        """(bonds[l] · sizes of site l, sizes of site l+1 · bonds[l+2]) of the gradient at each bond, its own parts
        projected out."""
        of_out, of_in = self._whitened.inverse_roots
        M = gradient.double()
        M = M if of_in is None else times_sites(M, of_in)
        M = M if of_out is None else times_sites(M.T, of_out).T
        sizes = site_sizes(self._d_out, self._d_in)
        T = by_sites(M, self._d_out, self._d_in)
        found = []
        for site in range(self._n_sites - 1):
            swept = orthogonalize(self._chain, site)
            two = T.reshape(math.prod(sizes[:site]), sizes[site], sizes[site + 1], -1)
            two = torch.einsum(
                "xdey,xa,cy->adec", two, _left(self._isometries[:site], two), _right(swept[site + 2 :], two)
            )
            two = two.reshape(two.shape[0] * sizes[site], -1)
            columns = self._isometries[site].reshape(two.shape[0], -1)
            rows = swept[site + 1].reshape(-1, two.shape[1])
            two = two - columns @ (columns.T @ two)
            found.append(two - (two @ rows.T) @ rows)
        return found


@dataclass(frozen=True)
class Growth:
    """New directions of one bond.

    gains: the predicted fall of the loss by each, descending but for noise; below 0 if the batches disagree. columns:
    their entries in the core at the left, (bonds[l], d_out[l], d_in[l], n), in the gauge of `ChainDirections.cores`;
    those at the right are zero, so that W stays as it is.
    """

    gains: list[float]
    columns: Tensor


def _left(cores: Sequence[Tensor], like: Tensor) -> Tensor:
    """(sizes of these sites together, the bond at their right)."""
    product = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    for core in cores:
        product = (product @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[3])
    return product


def _right(cores: Sequence[Tensor], like: Tensor) -> Tensor:
    """(the bond at their left, sizes of these sites together)."""
    product = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    for core in reversed(cores):
        product = (core.reshape(-1, core.shape[3]) @ product).reshape(core.shape[0], -1)
    return product


# Which directions change ----------------------------------------------------------------------------------------------


@dataclass
class BondPrices:
    """The bonds of a chain, and what their directions cost and are worth.

    sizes: d_out[l] · d_in[l] of each site. losses, gains: for each bond between two cores, of its directions and of
    new ones, in nats, descending.
    """

    d_out: Sequence[int]
    d_in: Sequence[int]
    losses: list[list[float]]
    gains: list[list[float]]

    def __post_init__(self) -> None:
        self.sizes = site_sizes(self.d_out, self.d_in)
        self.kept = [len(losses) for losses in self.losses]
        self.grown = [0] * len(self.kept)

    @property
    def bonds(self) -> list[int]:
        """1, the bonds, 1."""
        return [1, *(kept + grown for kept, grown in zip(self.kept, self.grown, strict=True)), 1]

    @property
    def n_params(self) -> int:
        """Parameters of the chain with these bonds."""
        return n_params(self.bonds, self.d_out, self.d_in)

    def price(self, bond: int) -> int:
        """Parameters of one direction of a bond."""
        bonds = self.bonds
        return bonds[bond] * self.sizes[bond] + self.sizes[bond + 1] * bonds[bond + 2]

    def gain(self, bond: int) -> float:
        """The predicted fall of the loss by the next new direction; 0 if there is none, or it is out of reach."""
        bonds, at = self.bonds, self.grown[bond]
        reach = min(bonds[bond] * self.sizes[bond], self.sizes[bond + 1] * bonds[bond + 2])
        return self.gains[bond][at] if at < len(self.gains[bond]) and bonds[bond + 1] < reach else 0.0

    def loss(self, bond: int) -> float:
        """The predicted rise of the loss if the last direction is cut; infinite if it must stay."""
        bonds, kept = self.bonds, self.kept[bond]
        left = bonds[bond + 1] - 1
        in_reach = bonds[bond] <= self.sizes[bond] * left and bonds[bond + 2] <= left * self.sizes[bond + 1]
        return self.losses[bond][kept - 1] if kept > 1 and in_reach and not self.grown[bond] else math.inf


def choose_bonds(
    chains: Mapping[str, BondPrices], max_params: int, *, most_cut: float = math.inf, most_grown: float = math.inf
) -> None:
    """Cut and grow directions one by one, each time where a parameter is worth least and most; changes the prices.

    A direction grows while there is room within max_params. If there is none, the directions with the least loss for
    each parameter are cut, if they lose less together than the best new one gains; without a gain nothing is cut.

    Args:
        max_params: the most parameters of all chains together. Directions are cut until it holds, as far as their
            neighbours allow it.
        most_cut, most_grown: at most that many parameters are cut (but for max_params), and grown.
    """
    places = [(name, bond) for name, chain in chains.items() for bond in range(len(chain.kept))]
    cut = grown = 0
    for_growth: list[tuple[str, int]] = []  # cut for a direction that has not grown yet
    lost = 0.0  # by these
    while True:
        total = sum(chain.n_params for chain in chains.values())
        costs = {place: chains[place[0]].price(place[1]) for place in places}
        worst = min(
            (place for place in places if total > max_params or cut + costs[place] <= most_cut),
            key=lambda place: chains[place[0]].loss(place[1]) / costs[place],
            default=None,
        )
        loss = math.inf if worst is None else chains[worst[0]].loss(worst[1])
        if total > max_params and worst is not None and not math.isinf(loss):
            chains[worst[0]].kept[worst[1]] -= 1
            continue
        best = max(
            (place for place in places if grown + costs[place] <= most_grown),
            key=lambda place: chains[place[0]].gain(place[1]) / costs[place],
            default=None,
        )
        gain = 0.0 if best is None else chains[best[0]].gain(best[1])
        if best is not None and gain > lost and total + costs[best] <= max_params:
            chains[best[0]].grown[best[1]] += 1
            grown += costs[best]
            for_growth, lost = [], 0.0
        elif worst is not None and lost + loss < gain:
            chains[worst[0]].kept[worst[1]] -= 1
            cut += costs[worst]
            for_growth.append(worst)
            lost += loss
        else:
            break
    for name, bond in for_growth:
        chains[name].kept[bond] += 1
