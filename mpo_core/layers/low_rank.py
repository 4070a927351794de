"""LowRankLinear: a weight that is the product of two factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from mpo_core.fitting.fit import low_rank_svd
from mpo_core.fitting.ladders import Rung, low_rank_ladder
from mpo_core.fitting.metric import Metric
from mpo_core.layers.structured import (
    StructuredLinear,
    check_error,
    check_init,
    check_one_cap,
    n_needed,
    rounding,
    size_within,
)
from mpo_core.tensor_train.contraction import Product, dense_product
from mpo_core.tensor_train.initialisation import normal_
from mpo_core.values import check_matrix, in_range


class LowRankLinear(StructuredLinear, kind="low_rank"):
    """y = x (A B)ᵀ + b with A (out_features, rank) and B (rank, in_features).

    Args:
        rank, max_params: exactly one of them. The attribute `rank` holds the actual rank, at most min(in_features,
            out_features).
        init: "variance": Var(B) = 1 / in_features and Var(A) = 1 / rank, so that Var(W) = 1 / in_features. All of W's
            norm then lies in a few directions. "svd_fresh": the truncated SVD of a dense W with entries
            N(0, 1 / in_features). W has the spectral norm of a dense draw, and less variance (Khodak et al. 2021).
        generator: source of the random factors. Default: torch's own, as for nn.Linear.
    Raises:
        ValueError: not exactly one size, a rank below 1, or max_params below the parameters of rank 1.
    """

    size = "rank"
    inits = ("variance", "svd_fresh")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int | None = None,
        max_params: int | None = None,
        bias: bool = True,
        init: str = "variance",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        largest = min(in_features, out_features)
        self.rank = size_within("rank", rank, max_params, in_features + out_features, largest)
        self.A = nn.Parameter(torch.empty(out_features, self.rank, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(self.rank, in_features, device=device, dtype=dtype))
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
        **options: Any,
    ) -> Self:
        """Return the nearest product of that rank in the metric (`low_rank_svd`).

        Raises:
            ValueError: as the constructor and `low_rank_svd`; `rel_error` together with a metric.
        """
        check_matrix(W)
        check_error(rel_error, metric)
        if rel_error is not None:
            check_one_cap(rank=rank, max_params=max_params, rel_error=rel_error)
            s = torch.linalg.svdvals(in_range(W.double())[0])
            rank = max(1, n_needed(s.square(), rel_error, rounding(W)))
        layer = cls.empty_for(W, bias, rank=rank, max_params=max_params, **options)
        A, B = low_rank_svd(W, layer.rank, metric)
        layer.A.data.copy_(A)
        layer.B.data.copy_(B)
        return layer

    @classmethod
    def sizes(cls, W: Tensor, **options: Any) -> list[int]:
        """The parameters of every rank that has fewer than W."""
        per_rank = sum(W.shape)
        return [per_rank * rank for rank in range(1, (W.numel() - 1) // per_rank + 1)]

    @classmethod
    def rungs(cls, W: Tensor, metric: Metric | None = None, **options: Any) -> list[Rung]:
        """`low_rank_ladder`: the exact error of every rank."""
        return low_rank_ladder(W, metric or Metric())

    def draw(self, init: str, generator_for: Callable[[str], torch.Generator]) -> None:
        """Draw new values for the parameters of W, each from the generator of its name.

        With init "svd_fresh" all are drawn from A's generator.

        Raises:
            ValueError: an init that is neither "variance" nor "svd_fresh".
        """
        check_init(self, init)
        if init == "svd_fresh":
            generator = generator_for("A")
            W = torch.empty(self.out_features, self.in_features, dtype=self.A.dtype, device=generator.device)
            normal_(W, self.in_features**-0.5, generator)
            for factor, values in zip((self.A, self.B), low_rank_svd(W, self.rank), strict=True):
                factor.data.copy_(values)
            return
        normal_(self.A, self.rank**-0.5, generator_for("A"))
        normal_(self.B, self.in_features**-0.5, generator_for("B"))

    def to_matrix(self) -> Tensor:
        """W (out_features, in_features), differentiable, in the dtype of the parameters even under autocast."""
        with self.no_autocast(self.A):
            return self.A @ self.B

    @property
    def weight(self) -> Tensor:
        """`to_matrix()`, computed again at each access, for owners that read the weight of an nn.Linear."""
        return self.to_matrix()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), by the factors: W is not formed."""
        return nn.functional.linear(nn.functional.linear(x, self.B), self.A, self.bias)

    def products(self, n_tokens: int) -> list[Product]:
        """The matrix products of a forward pass over n_tokens tokens."""
        return [
            dense_product(self.rank, self.in_features, n_tokens),
            dense_product(self.out_features, self.rank, n_tokens),
        ]

    def structure(self) -> str:
        """Short description of what fixes the shape of the parameters."""
        return f"rank={self.rank}"

    def options(self) -> dict[str, Any]:
        """The rank."""
        return {"rank": self.rank}

    def fan_ins(self) -> dict[str, int]:
        """A sums over the rank, B over the inputs."""
        return {"A": self.rank, "B": self.in_features}
