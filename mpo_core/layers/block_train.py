"""BlockTrainLinear: a weight that is a block tensor train, a Monarch matrix of any depth."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from mpo_core.fitting.descent import MAX_STEPS, check_steps, descend
from mpo_core.fitting.ladders import Rung
from mpo_core.fitting.metric import Metric
from mpo_core.layers.structured import (
    StructuredLinear,
    check_error,
    check_init,
    check_one_cap,
    size_within,
)
from mpo_core.tensor_train.contraction import Product
from mpo_core.tensor_train.factorisation import Sizes, factorisations, factorise
from mpo_core.tensor_train.initialisation import normal_
from mpo_core.tensor_train.splitting import splitter
from mpo_core.values import check_matrix, norm, to_unit, with_equal_norms

Shapes = list[tuple[int, int, int, int, int, int]]
"""For each site (items before, items after, rank before, d_in, d_out, rank after)."""


class BlockTrainLinear(StructuredLinear, kind="block_train"):
    """y = x Wᵀ + b with W a block tensor train: an MPO whose cores also depend on the indices that they pass by.

    The input index j = (j_0, …) and the output index i = (i_0, …) have a part for each site. Step l sums over j_l and
    the rank before it, and makes i_l and the rank after it. Its core is another one for each value of i_0 … i_{l−1} and
    j_{l+1} …, whereas an MPO has one for all. So a block train of rank 1 may have full rank, and its FLOPs are two for
    each parameter. With two sites it is a Monarch matrix; each further site takes fewer parameters at rank 1.

    Args:
        rank, max_params: exactly one of them: one cap for all ranks, or the most parameters of W, which gives the
            largest rank. The attribute `ranks` has the actual ones, 1 at both ends, clipped to the largest useful ones.
        d_out, d_in: local sizes, one per site. Default: chosen by `factorise` with the method "balanced" and n_sites.
            If max_params is too small for those, the sizes of the most parameters that it allows at rank 1.
        n_sites: 1 to 6. Default: 3, or as many as d_out has.
        init: "variance": the variance of each core is 1 / (number of its own inputs).
        generator: source of the random cores. Default: torch's own, as for nn.Linear.
    Shapes:
        cores[l]: (items before, items after, d_out[l] · ranks[l+1], ranks[l] · d_in[l]), where "items before" is
            prod(d_out[:l]), and "items after" is prod(d_in[l+1:]).
    Raises:
        ValueError: not exactly one size, a rank below 1, sizes that do not multiply to the features, or max_params
            below the parameters of rank 1.
    Source: Qiu et al. 2024, Compute better spent: replacing dense layers with structured matrices.
    """

    size = "rank"
    compared_steps = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int | None = None,
        max_params: int | None = None,
        n_sites: int | None = None,
        d_out: Sequence[int] | None = None,
        d_in: Sequence[int] | None = None,
        bias: bool = True,
        init: str = "variance",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        n_sites = 3 if n_sites is None and d_out is None else n_sites
        self.d_out, self.d_in = splitter(out_features, in_features, n_sites=n_sites, d_out=d_out, d_in=d_in)(1)
        if d_out is None and isinstance(max_params, int) and _n_params(self.d_out, self.d_in, 1) > max_params:
            self.d_out, self.d_in = _smaller_split(out_features, in_features, len(self.d_out), max_params)
        largest = max(_ranks(out_features, self.d_out, self.d_in))
        self.rank = size_within("rank", rank, max_params, partial(_n_params, self.d_out, self.d_in), largest)
        self.ranks = _ranks(self.rank, self.d_out, self.d_in)
        self.shapes = _shapes(self.ranks, self.d_out, self.d_in)
        self.cores = nn.ParameterList(
            [torch.empty(before, after, o * s, r * i, device=device, dtype=dtype)
             for before, after, r, i, o, s in self.shapes]
        )  # fmt: skip
        self.draw_unless_meta(init, generator)

    @classmethod
    def from_matrix(
        cls,
        W: Tensor,
        bias: Tensor | None = None,
        *,
        rank: int | None = None,
        max_params: int | None = None,
        rel_error: float | None = None,
        metric: Metric | None = None,
        max_steps: int = MAX_STEPS,
        **options: Any,
    ) -> Self:
        """Return the layer near W (out_features, in_features): truncated SVDs of its blocks, site after site.

        The squared error is the sum of what the cuts discard. With two sites no layer of that rank is nearer. In a
        metric, the rows and columns of W are first weighted by its diagonals, which keeps the structure, and then all
        cores are fitted together by at most `max_steps` steps (`descend`). No step raises the error, but the result
        need not be the best.

        Args:
            rel_error: the largest ‖W − Ŵ‖_F / ‖W‖_F allowed; the smallest rank that meets it is taken.
        Raises:
            ValueError: as the constructor; a metric that does not fit W; `rel_error` together with a metric.
        """
        check_matrix(W)
        check_error(rel_error, metric)
        scaled, exponent = to_unit(W.double())
        if rel_error is not None:
            check_one_cap(rank=rank, max_params=max_params, rel_error=rel_error)
            rank = cls._rank_for(scaled, rel_error, options)
        layer = cls.empty_for(W, bias, rank=rank, max_params=max_params, **options)
        metric = (metric or Metric()).on(W)
        of_rows, of_columns = _weights(metric.sensitivity, W.shape[0]), _weights(metric.gram, W.shape[1])
        weighted = scaled * of_rows.to(scaled)[:, None] * of_columns.to(scaled)
        cores = _decomposed(weighted, layer.shapes)
        before, _, _, _, d_out, _ = layer.shapes[-1]
        cores[-1] = cores[-1] / of_rows.to(scaled).reshape(before, 1, d_out, 1)
        _, after, _, d_in, _, _ = layer.shapes[0]
        cores[0] = cores[0] / of_columns.to(scaled).reshape(d_in, after).T.reshape(1, after, 1, d_in)
        cores = with_equal_norms(cores, torch.zeros_like(exponent))  # steps of `descend` are better so
        if not metric.is_plain and max_steps != 0:
            dtype = torch.promote_types(W.dtype, torch.float32)
            cores = descend(
                lambda *cores: _matrix(cores, layer.shapes),
                [core.to(dtype) for core in cores],
                scaled.to(dtype),
                metric.to_unit().to(dtype=dtype),
                max_steps=max_steps,
            )
            cores = [core.double() for core in cores]
        for ours, core in zip(layer.cores, with_equal_norms(cores, exponent), strict=True):
            ours.data.copy_(core)
        return layer

    @classmethod
    def _rank_for(cls, W: Tensor, rel_error: float, options: dict[str, Any]) -> int:
        shape = cls(W.shape[1], W.shape[0], rank=W.shape[0], device="meta", **cls.of_constructor(options))

        def is_met(rank: int) -> bool:
            shapes = _shapes(_ranks(rank, shape.d_out, shape.d_in), shape.d_out, shape.d_in)
            return bool(norm(_matrix(_decomposed(W, shapes), shapes) - W) <= max(rel_error, 1e-12) * norm(W))

        return bisect_left(range(1, shape.rank), True, key=is_met) + 1  # at the largest rank it is exact

    @classmethod
    def rungs(cls, W: Tensor, metric: Metric | None = None, **options: Any) -> list[Rung]:
        """The errors before the steps; in a metric `corrected` by the errors after them at some sizes."""
        ladder = super().rungs(W, metric, **{"max_steps": 0, **options})
        return cls.corrected_rungs(W, metric, ladder, options)

    @classmethod
    def check_options(cls, options: dict[str, Any]) -> None:
        """Raise ValueError for a number of steps that the fit refuses."""
        check_steps(options.get("max_steps", MAX_STEPS))

    def draw(self, init: str, generator_for: Callable[[str], torch.Generator]) -> None:
        """Draw new values for the cores, each from the generator of its name; `init` is "variance".

        Raises:
            ValueError: any other init.
        """
        check_init(self, init)
        for site, core in enumerate(self.cores):
            normal_(core, core.shape[3] ** -0.5, generator_for(f"cores.{site}"))

    def to_matrix(self) -> Tensor:
        """W (out_features, in_features), differentiable, in the dtype of the parameters even under autocast."""
        with self.no_autocast(self.cores[0]):
            return _matrix(list(self.cores), self.shapes)

    @property
    def weight(self) -> Tensor:
        """`to_matrix()`, computed again at each access, for owners that read the weight of an nn.Linear."""
        return self.to_matrix()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), by the cores: W is not formed."""
        y = _applied(list(self.cores), self.shapes, x.reshape(math.prod(x.shape[:-1]), self.in_features))
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def products(self, n_tokens: int) -> list[Product]:
        """The matrix products of a forward pass over n_tokens tokens."""
        steps = []
        for before, after, r, i, o, s in self.shapes:
            step = Product(1, o * s, r * i, n_tokens, copied=n_tokens * (o * s + r * i))
            steps += [step] * (before * after)
        return steps

    def structure(self) -> str:
        """The cap, the local sizes and the ranks."""
        return f"rank={self.rank}, d_out={list(self.d_out)}, d_in={list(self.d_in)}, ranks={list(self.ranks)}"

    def options(self) -> dict[str, Any]:
        """The cap and the local sizes."""
        return {"rank": self.rank, "d_out": list(self.d_out), "d_in": list(self.d_in)}

    def fan_ins(self) -> dict[str, int]:
        """Core l sums over the rank before it and its inputs, ranks[l] · d_in[l]."""
        return {f"cores.{site}": core.shape[3] for site, core in enumerate(self.cores)}

    def matrix_shapes(self) -> dict[str, tuple[int, int, int]]:
        """One matrix for each block of each step, which is a product with a block-diagonal matrix."""
        return {
            f"cores.{site}": (core.shape[0] * core.shape[1], core.shape[2], core.shape[3])
            for site, core in enumerate(self.cores)
        }


def _ranks(cap: int, d_out: Sequence[int], d_in: Sequence[int]) -> tuple[int, ...]:
    """1, the ranks between the sites, 1; each is at most the cap and the sides of the matrix that it cuts."""
    ranks = [1]
    for site in range(1, len(d_out)):
        ranks.append(min(cap, ranks[-1] * d_in[site - 1], math.prod(d_out[site:])))
    return (*ranks, 1)


def _shapes(ranks: Sequence[int], d_out: Sequence[int], d_in: Sequence[int]) -> Shapes:
    return [
        (math.prod(d_out[:site]), math.prod(d_in[site + 1 :]), ranks[site], d_in[site], d_out[site], ranks[site + 1])
        for site in range(len(d_out))
    ]


def _n_params(d_out: Sequence[int], d_in: Sequence[int], cap: int) -> int:
    return sum(math.prod(shape) for shape in _shapes(_ranks(cap, d_out, d_in), d_out, d_in))


@cache
def _smaller_split(out_features: int, in_features: int, n_sites: int, max_params: int) -> tuple[Sizes, Sizes]:
    """The split with the most parameters at rank 1 up to max_params; with the fewest if all have more."""

    def order(split: tuple[Sizes, Sizes]) -> tuple[bool, int, int]:
        count = _n_params(*split, 1)
        fits = count <= max_params
        return fits, count if fits else -count, -sum(map(sum, split))

    splits = factorisations(out_features, in_features, n_sites)
    return max(splits, key=order, default=factorise(out_features, in_features, n_sites=n_sites))


def _applied(cores: Sequence[Tensor], shapes: Shapes, x: Tensor) -> Tensor:
    """x (n, in_features) times Wᵀ, (n, out_features)."""
    n = x.shape[0]
    for core, (before, after, r, i, o, s) in zip(cores, shapes, strict=True):
        # (n, i_0 … i_{l−1}, rank, j_l, j_{l+1} …), then one product for each item before and after.
        x = x.reshape(n, before, r * i, after).permute(1, 3, 0, 2) @ core.mT
        x = x.reshape(before, after, n, o, s).permute(2, 0, 3, 4, 1).reshape(n, before * o, s * after)
    return x.reshape(n, x.shape[1] * x.shape[2])


def _matrix(cores: Sequence[Tensor], shapes: Shapes) -> Tensor:
    """W (out_features, in_features)."""
    n_in = math.prod(shape[3] for shape in shapes)
    return _applied(cores, shapes, torch.eye(n_in, dtype=cores[0].dtype, device=cores[0].device)).T


def _decomposed(W: Tensor, shapes: Shapes) -> list[Tensor]:
    """Cores near W: at each site, every block of what is left is cut to the rank after that site."""
    n_out, n_in = W.shape
    rest = W.T.reshape(1, 1, n_in, n_out)  # (items before, rank, inputs to come, outputs to come)
    cores = []
    for before, after, r, i, o, s in shapes:
        left = rest.shape[3] // o
        # (before, after, r · j_l, i_l, outputs after i_l): one matrix for each item and each value of i_l.
        T = rest.reshape(before, r * i, after, o, left).permute(0, 2, 3, 1, 4)
        if left == 1:
            cores.append(T[..., 0])  # (before, after, o, r · i), and s = 1
            break
        U, S, Vh = torch.linalg.svd(T, full_matrices=False)
        U, S, Vh = U[..., :s], S[..., :s], Vh[..., :s, :]
        cores.append(U.permute(0, 1, 2, 4, 3).reshape(before, after, o * s, r * i))
        rest = (S[..., None] * Vh).permute(0, 2, 3, 1, 4).reshape(before * o, s, after, left)
    return cores


def _weights(moment: Tensor | None, n: int) -> Tensor:
    """Root of the diagonal, with a floor so that it can be undone."""
    if moment is None:
        return torch.ones(n)
    diagonal = moment.diagonal().double()
    return diagonal.clamp(min=1e-12 * float(diagonal.max()) or 1.0).sqrt()
