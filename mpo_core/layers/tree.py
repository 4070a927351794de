"""TreeLinear: a weight that is a binary tree of small tensors."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from mpo_core.fitting.descent import MAX_STEPS, check_steps, descend
from mpo_core.fitting.ladders import Rung
from mpo_core.fitting.metric import Metric
from mpo_core.fitting.tree_fit import centred, on_leaves, squared_tails
from mpo_core.fitting.whitening import Whitened
from mpo_core.layers.structured import (
    StructuredLinear,
    check_error,
    check_init,
    check_one_cap,
    size_within,
)
from mpo_core.tensor_train.bonds import site_sizes
from mpo_core.tensor_train.contraction import Product, chain, chain_products, contract_products, dense_product
from mpo_core.tensor_train.initialisation import normal_, variance_std
from mpo_core.tensor_train.splitting import splitter
from mpo_core.tensor_train.tree import (
    chain_of,
    clip_ranks,
    hierarchical_svd,
    left_half,
    merge_products,
    n_params,
    nodes_of,
    shapes_of,
    to_matrix,
)
from mpo_core.values import check_matrix, to_unit, with_equal_norms

FORWARD_MODES = ("reconstruct", "chain")
STEP = 1.05
"""Smallest ratio between the sizes at which a tree is tried."""


class TreeLinear(StructuredLinear, kind="tree"):
    """y = x Wᵀ + b with W a binary tree of tensors over the sites of an MPO (`tensor_train.tree`).

    A leaf has the indices of one site, and an inner node joins two parts. So parts that are far from each other in a
    chain are near in a tree. The parameters are 2 L − 2 tensors for L sites; with two sites W is an MPO.

    Args:
        chi, max_params: exactly one of them: one cap for the ranks of all edges, or the most parameters of W, which
            gives the largest χ. The attribute `ranks` has the actual ranks, clipped to the largest useful ones.
        d_out, d_in: local sizes, one per site. Default: chosen by `factorise` with the method `factorisation` and
            n_sites.
        n_sites: 1 to 6. Default: 4, or as many as d_out has.
        forward: "reconstruct": W is formed in every forward. "chain": the two halves of the tree are formed, and
            applied one after the other; W is never formed.
        init: "variance": normal entries of one variance, with Var(W) = 1 / in_features. A tensor of a single entry
            is 1.
        generator: source of the random tensors. Default: torch's own, as for nn.Linear.
    Shapes:
        nodes[k]: `tensor_train.tree.shapes_of` the ranks.
    Raises:
        ValueError: not exactly one size, a cap below 1, sizes that do not multiply to the features, an unknown
            factorisation or forward mode, or max_params that χ = 1 exceeds.
    Source: Shi, Duan & Vidal 2006 (trees of tensors); Grasedyck 2010 (hierarchical Tucker format).
    """

    size = "chi"
    compared_steps = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        chi: int | None = None,
        max_params: int | None = None,
        n_sites: int | None = None,
        d_out: Sequence[int] | None = None,
        d_in: Sequence[int] | None = None,
        factorisation: str = "balanced",
        forward: str = "reconstruct",
        bias: bool = True,
        init: str = "variance",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if forward not in FORWARD_MODES:
            raise ValueError(f"`forward` must be one of {', '.join(FORWARD_MODES)}, but got {forward!r}")
        if factorisation == "min_params":
            raise ValueError("`factorisation` must be one of paper, balanced, but got 'min_params'")
        how = {"d_out": d_out, "d_in": d_in, "factorisation": factorisation}
        n_sites = 4 if n_sites is None and d_out is None and factorisation != "paper" else n_sites
        self.d_out, self.d_in = splitter(out_features, in_features, n_sites=n_sites, **how)(1)
        sizes = site_sizes(self.d_out, self.d_in)
        largest = max(clip_ranks(math.prod(sizes), self.d_out, self.d_in))
        count = partial(n_params, d_out=self.d_out, d_in=self.d_in)
        self.chi = size_within("chi", chi, max_params, count, largest)
        self.ranks = clip_ranks(self.chi, self.d_out, self.d_in)
        self.forward_mode = forward
        self._tree = nodes_of(len(self.d_out))
        shapes = shapes_of(self.ranks, self.d_out, self.d_in)
        self.nodes = nn.ParameterList([torch.empty(shape, device=device, dtype=dtype) for shape in shapes])
        self.draw_unless_meta(init, generator)

    @classmethod
    def from_matrix(
        cls,
        W: Tensor,
        bias: Tensor | None = None,
        *,
        chi: int | None = None,
        max_params: int | None = None,
        rel_error: float | None = None,
        metric: Metric | None = None,
        max_steps: int = MAX_STEPS,
        **options: Any,
    ) -> Self:
        """Return the layer near W (out_features, in_features): the `hierarchical_svd`.

        In a metric, it is that of the `Whitened` W, and then all tensors are fitted together by at most `max_steps`
        steps (`descend`). No step raises the error, but the result need not be the best.

        Args:
            rel_error: the largest ‖W − Ŵ‖_F / ‖W‖_F allowed; the smallest χ found to meet it is taken.
        Raises:
            ValueError: as the constructor; a metric that does not fit W; `rel_error` together with a metric.
        """
        check_matrix(W)
        check_error(rel_error, metric)
        if rel_error is not None:
            check_one_cap(chi=chi, max_params=max_params, rel_error=rel_error)
            chi = cls._chi_for(W, rel_error, options)
        layer = cls.empty_for(W, bias, chi=chi, max_params=max_params, **options)
        sizes, nodes = (layer.d_out, layer.d_in), layer._tree
        metric = (metric or Metric()).on(W)
        if metric.is_plain:
            scaled, exponent = to_unit(W.double())
            tensors = hierarchical_svd(scaled, *sizes, layer.chi)
        else:
            whitened = Whitened.of(metric, *sizes)
            target, exponent = to_unit(whitened.matrix(W.double()))
            factors, values = centred(hierarchical_svd(target, *sizes, layer.chi), nodes)

            def matrix(*factors: Tensor) -> Tensor:
                return to_matrix([factor / weight for factor, weight in zip(factors, weights, strict=True)], nodes)

            precision = torch.promote_types(W.dtype, torch.float32)
            weights = [value.to(precision) for value in values]
            factors = descend(
                matrix,
                [factor.to(precision) for factor in factors],
                target.to(precision),
                whitened.metric.to(dtype=precision),
                max_steps=max_steps,
            )
            tensors = [factor.double() / value for factor, value in zip(factors, values, strict=True)]
            tensors = on_leaves(tensors, nodes, *whitened.inverse_roots)
        for node, tensor in zip(layer.nodes, with_equal_norms(tensors, exponent), strict=True):
            node.data.copy_(tensor)
        return layer

    @classmethod
    def _chi_for(cls, W: Tensor, rel_error: float, options: dict[str, Any]) -> int:
        sizes = cls._sizes_of(W, options)
        nodes = nodes_of(len(sizes[0]))
        scaled = to_unit(W.double())[0]
        norm = float(torch.linalg.vector_norm(scaled))

        def is_met(chi: int) -> bool:
            error = torch.linalg.vector_norm(to_matrix(hierarchical_svd(scaled, *sizes, chi), nodes) - scaled)
            return float(error) <= max(rel_error, 1e-12) * norm

        caps = range(1, max(clip_ranks(W.numel(), *sizes)))  # at the largest rank the tree is exact
        return bisect_left(caps, True, key=is_met) + 1

    @classmethod
    def _sizes_of(cls, W: Tensor, options: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """d_out and d_in of the layers with these options."""
        layer = cls(W.shape[1], W.shape[0], chi=1, device="meta", **cls.of_constructor(options))
        return layer.d_out, layer.d_in

    @classmethod
    def sizes(cls, W: Tensor, **options: Any) -> list[int]:
        """The parameters of the caps χ = 1, 2, … with fewer than W, in steps of at least `STEP`."""
        return [size for size, _ in cls._caps(W, options)]

    @classmethod
    def _caps(cls, W: Tensor, options: dict[str, Any]) -> list[tuple[int, int]]:
        """(parameters, χ) of each of `sizes`."""
        of, found = cls._sizes_of(W, options), list[tuple[int, int]]()
        for chi in range(1, max(clip_ranks(W.numel(), *of)) + 1):
            size = n_params(chi, *of)
            if size >= W.numel():
                break
            if not found or size >= STEP * found[-1][0]:
                found.append((size, chi))
        return found

    @classmethod
    def rungs(cls, W: Tensor, metric: Metric | None = None, **options: Any) -> list[Rung]:
        """A bound on the error at each size (`hierarchical_svd`); in a metric `corrected` by fits at some of them."""
        of = cls._sizes_of(W, options)
        M = W.double()
        if metric is not None and not metric.is_plain:
            M = Whitened.of(metric.on(W), *of).matrix(M)
        tails = squared_tails(M, *of)
        ladder = []
        for size, chi in cls._caps(W, options):
            ranks = clip_ranks(chi, *of)
            cut = sum(tail[rank] for tail, rank in zip(tails, ranks[:-1], strict=True))
            ladder.append(Rung(size, min(1.0, cut)))
        return cls.corrected_rungs(W, metric, ladder, options)

    @classmethod
    def check_options(cls, options: dict[str, Any]) -> None:
        """Raise ValueError for a number of steps that the fit refuses."""
        check_steps(options.get("max_steps", MAX_STEPS))

    def draw(self, init: str, generator_for: Callable[[str], torch.Generator]) -> None:
        """Draw new values for the tensors, each from the generator of its name; `init` is "variance".

        Raises:
            ValueError: any other init.
        """
        check_init(self, init)
        # An entry of W sums over the ranks of all edges; the two halves share one.
        edges = [rank for number, rank in enumerate(self.ranks) if number != left_half(len(self.d_out))]
        drawn = [number for number, node in enumerate(self.nodes) if node.numel() > 1]
        std = variance_std(self.in_features, edges, n_drawn=len(drawn))
        for number, node in enumerate(self.nodes):
            if number in drawn:
                normal_(node, std, generator_for(f"nodes.{number}"))
            else:
                generator_for(f"nodes.{number}")
                nn.init.ones_(node)

    def to_matrix(self) -> Tensor:
        """W (out_features, in_features), differentiable, in the dtype of the parameters even under autocast."""
        with self.no_autocast(self.nodes[0]):
            return to_matrix(list(self.nodes), self._tree)

    @property
    def weight(self) -> Tensor:
        """`to_matrix()`, computed again at each access, for owners that read the weight of an nn.Linear."""
        return self.to_matrix()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.forward_mode == "reconstruct":
            return nn.functional.linear(x, self.to_matrix(), self.bias)
        with self.no_autocast(self.nodes[0]):
            halves = chain_of(list(self.nodes), self._tree)
        y = chain(halves, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def products(self, n_tokens: int) -> list[Product]:
        """The matrix products of a forward pass over n_tokens tokens."""
        formed = merge_products(self.ranks, self.d_out, self.d_in)
        bonds, d_out, d_in = self._halves()
        if self.forward_mode == "chain":
            return [*formed, *chain_products(bonds, d_out, d_in, n_tokens)]
        dense = dense_product(self.out_features, self.in_features, n_tokens)
        return [*formed, *contract_products(bonds, d_out, d_in), dense]

    def _halves(self) -> tuple[list[int], list[int], list[int]]:
        """(bonds, d_out, d_in) of `chain_of` the tree."""
        middle = self._tree[-1].first
        parts = [slice(0, middle), slice(middle, None)] if middle else [slice(None)]
        bonds = [1, self.ranks[-1], 1] if middle else [1, 1]
        return (
            bonds,
            [math.prod(self.d_out[part]) for part in parts],
            [math.prod(self.d_in[part]) for part in parts],
        )

    def structure(self) -> str:
        """The cap, the local sizes and the ranks."""
        return f"chi={self.chi}, d_out={list(self.d_out)}, d_in={list(self.d_in)}, ranks={list(self.ranks)}"

    def options(self) -> dict[str, Any]:
        """The cap, the local sizes and the forward mode."""
        return {"chi": self.chi, "d_out": list(self.d_out), "d_in": list(self.d_in), "forward": self.forward_mode}

    def fan_ins(self) -> dict[str, int]:
        """A leaf sums over its inputs, an inner node over the ranks below it, the right half over its edge too."""
        sums = [
            self.d_in[node.first] if node.below is None else self.ranks[node.below[0]] * self.ranks[node.below[1]]
            for node in self._tree
        ]
        sums[-1] *= self.ranks[-1]
        return {f"nodes.{number}": fan_in for number, fan_in in enumerate(sums)}

    def matrix_shapes(self) -> dict[str, tuple[int, int, int]]:
        """A leaf is the matrix (d_out, d_in · rank), an inner node (rank · rank of the parts below it, rank)."""
        shapes = {}
        for number, (node, tensor) in enumerate(zip(self._tree, self.nodes, strict=True)):
            a, b, c = tensor.shape
            shapes[f"nodes.{number}"] = (1, a, b * c) if node.below is None else (1, a * b, c)
        return shapes
