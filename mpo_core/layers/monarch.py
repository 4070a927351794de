"""MonarchLinear: a weight of equal blocks of low rank, one of the layers an MPO must be compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from mpo_core.fitting.descent import MAX_STEPS, check_steps, descend
from mpo_core.fitting.ladders import Rung
from mpo_core.fitting.metric import Metric, root, solve_root
from mpo_core.layers.structured import (
    StructuredLinear,
    check_error,
    check_init,
    check_one_cap,
    n_needed,
    rounding,
    size_within,
)
from mpo_core.tensor_train.bonds import check_whole
from mpo_core.tensor_train.contraction import Product
from mpo_core.tensor_train.initialisation import normal_
from mpo_core.values import check_matrix, in_range, times_power, to_unit


class MonarchLinear(StructuredLinear, kind="monarch", label="Monarch"):
    """W as n_blocks[0] × n_blocks[1] equal blocks, each of rank r: a Monarch matrix, or block tensor-train of rank r.

    Block (l, k) is L[l, :, k, :] R[k, l, :, :], so that y = x Wᵀ is two batches of products. One block is a low-rank
    matrix. More blocks have a higher total rank, for r (n_blocks[0] + n_blocks[1]) sizes instead of r (1 + 1).

    Args:
        n_blocks: number of blocks down and across, divisors of out_features and in_features; an int stands for both.
            Default: the largest divisors up to the square roots. If max_params is too small for those, the most blocks
            that it allows.
        rank, max_params: exactly one of them. The attribute `rank` holds the actual rank, at most the smaller side of a
            block.
        init: "variance": the variance of each factor is 1 / (number of its own inputs).
        generator: source of the random factors. Default: torch's own, as for nn.Linear.
    Shapes:
        L (n_blocks[0], out_features / n_blocks[0], n_blocks[1], rank),
        R (n_blocks[1], n_blocks[0], rank, in_features / n_blocks[1]).
    Raises:
        ValueError: not exactly one size, a rank below 1, n_blocks that do not divide the features, or max_params below
            the parameters of rank 1.
    Source: Dao et al. 2022 (Monarch); Qiu et al. 2024 (block tensor-train).
    """

    size = "rank"
    compared_steps = 0  # on the matrices of a trained LLaMA, eight steps lower the error by 0 to 5 %

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int | None = None,
        max_params: int | None = None,
        n_blocks: int | tuple[int, int] | None = None,
        bias: bool = True,
        init: str = "variance",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if n_blocks is None:
            n_blocks = _most_blocks(out_features, in_features, max_params)
        if isinstance(n_blocks, tuple | list) and len(n_blocks) != 2:
            raise ValueError(f"`n_blocks` must be a whole number or two of them, but got {n_blocks}")
        down, across = n_blocks if isinstance(n_blocks, tuple | list) else (n_blocks, n_blocks)
        check_whole(**{"n_blocks[0]": down, "n_blocks[1]": across})
        if down < 1 or across < 1 or out_features % down or in_features % across:
            raise ValueError(
                f"`n_blocks` must divide out_features={out_features} and in_features={in_features}, "
                f"but got n_blocks={(down, across)}"
            )
        self.n_blocks = int(down), int(across)
        m, p = out_features // down, in_features // across
        self.rank = size_within("rank", rank, max_params, lambda rank: rank * down * across * (m + p), min(m, p))
        self.L = nn.Parameter(torch.empty(down, m, across, self.rank, device=device, dtype=dtype))
        self.R = nn.Parameter(torch.empty(across, down, self.rank, p, device=device, dtype=dtype))
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
        n_blocks: int | tuple[int, int] | None = None,
        max_steps: int = MAX_STEPS,
        **options: Any,
    ) -> Self:
        """Return the layer of the nearest such matrix: each block is a truncated SVD.

        In a metric, each block is first fitted in the blocks of the metric for its own inputs and outputs. Then all of
        L is fitted exactly to the outputs, given R, and both together by at most `max_steps` steps (`descend`).
        No step raises the error, but the result need not be the best.

        Raises:
            ValueError: as the constructor; a metric that does not fit W; `rel_error` together with a metric.
        """
        check_matrix(W)
        check_error(rel_error, metric)
        if rel_error is not None:
            check_one_cap(rank=rank, max_params=max_params, rel_error=rel_error)
            down, across = cls(W.shape[1], W.shape[0], rank=1, n_blocks=n_blocks, device="meta").n_blocks
            s = torch.linalg.svdvals(_blocks(in_range(W.double())[0], down, across))
            rank = max(1, n_needed(s.square().sum((0, 1)), rel_error, rounding(W)))
        layer = cls.empty_for(W, bias, rank=rank, max_params=max_params, n_blocks=n_blocks, **options)
        scaled, exponent = to_unit(W.double())  # by a power of two, which changes no digit of the fit
        blocks = _blocks(scaled, *layer.n_blocks)  # (down, across, m, p)
        m, p = blocks.shape[2:]
        metric = (metric or Metric()).on(W)
        weighted, of_rows = blocks, []
        if metric.sensitivity is not None:
            of_rows = [root(part) for part in _diagonal_blocks(metric.sensitivity, m)]
            weighted = torch.stack(of_rows).mT[:, None] @ blocks
        seen = weighted
        if metric.gram is not None:
            seen = weighted @ torch.stack([root(part) for part in _diagonal_blocks(metric.gram, p)])
        L = torch.linalg.svd(seen, full_matrices=False)[0][..., : layer.rank]  # (down, across, m, r)
        R = L.mT @ weighted  # (down, across, r, p)
        if of_rows:
            # The columns of all blocks side by side, because `solve_root` takes a matrix.
            solved = [solve_root(R, row.transpose(0, 1).reshape(m, -1)) for R, row in zip(of_rows, L, strict=True)]
            L = torch.stack([row.reshape(m, L.shape[1], -1).transpose(0, 1) for row in solved])
        if metric.gram is not None:
            L = _fit_left(scaled, R, metric.gram)
        L, R = _balanced(L, R)
        if not metric.is_plain and max_steps != 0:
            dtype = torch.promote_types(W.dtype, torch.float32)
            factors = [L.to(dtype), R.to(dtype)]
            unit = metric.to_unit().to(dtype=dtype)
            L, R = _balanced(*descend(_matrix, factors, scaled.to(dtype), unit, max_steps=max_steps))
        # Not by a root of the power, which can be odd.
        layer.L.data.copy_(times_power(L, exponent // 2).permute(0, 2, 1, 3))
        layer.R.data.copy_(times_power(R, exponent - exponent // 2).transpose(0, 1))
        return layer

    @classmethod
    def rungs(cls, W: Tensor, metric: Metric | None = None, **options: Any) -> list[Rung]:
        """The errors before the steps; in a metric `corrected` by the errors after them at some sizes."""
        ladder = super().rungs(W, metric, **{"max_steps": 0, **options})
        return cls.corrected_rungs(W, metric, ladder, options)

    @classmethod
    def check_options(cls, options: dict[str, Any]) -> None:
        """Raise ValueError for a number of steps that the fit refuses."""
        check_steps(options.get("max_steps", MAX_STEPS))

    @classmethod
    def options_to_try(cls, out_features: int, in_features: int) -> list[dict[str, Any]]:
        """Two blocks down and across, if the shape allows it."""
        return [] if out_features % 2 or in_features % 2 else [{"n_blocks": 2}]

    def draw(self, init: str, generator_for: Callable[[str], torch.Generator]) -> None:
        """Draw new values for the parameters of W, each from the generator of its name; `init` is "variance".

        Raises:
            ValueError: any other init.
        """
        check_init(self, init)
        across, _, rank, p = self.R.shape
        normal_(self.L, (across * rank) ** -0.5, generator_for("L"))
        normal_(self.R, p**-0.5, generator_for("R"))

    def to_matrix(self) -> Tensor:
        """W (out_features, in_features), differentiable, in the dtype of the parameters even under autocast."""
        with self.no_autocast(self.L):
            return _matrix(self.L.transpose(1, 2), self.R.transpose(0, 1))

    @property
    def weight(self) -> Tensor:
        """`to_matrix()`, computed again at each access, for owners that read the weight of an nn.Linear."""
        return self.to_matrix()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), by the factors: W is not formed."""
        down, m, across, rank = self.L.shape
        p = self.R.shape[3]
        n = math.prod(x.shape[:-1])
        z = x.reshape(n, across, p).transpose(0, 1) @ self.R.reshape(across, down * rank, p).mT  # (across, n, down·r)
        z = z.reshape(across, n, down, rank).permute(2, 1, 0, 3).reshape(down, n, across * rank)
        y = (z @ self.L.reshape(down, m, across * rank).mT).transpose(0, 1)  # (n, down, m)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def products(self, n_tokens: int) -> list[Product]:
        """The matrix products of a forward pass over n_tokens tokens."""
        down, m, across, rank = self.L.shape
        right = Product(1, down * rank, self.R.shape[3], n_tokens, copied=n_tokens * down * rank)
        return [right] * across + [Product(1, m, across * rank, n_tokens, copied=n_tokens * m)] * down

    def structure(self) -> str:
        """Short description of what fixes the shape of the parameters."""
        return f"n_blocks={self.n_blocks}, rank={self.rank}"

    def options(self) -> dict[str, Any]:
        """The numbers of blocks and the rank."""
        return {"n_blocks": list(self.n_blocks), "rank": self.rank}

    def fan_ins(self) -> dict[str, int]:
        """L sums over the blocks across and the rank, R over the inputs of a block."""
        across = self.n_blocks[1]
        return {"L": across * self.rank, "R": self.in_features // across}

    def matrix_shapes(self) -> dict[str, tuple[int, int, int]]:
        """One matrix for each block on the diagonal: L[l] is (m, across · rank), R[k] is (down · rank, p).

        y = x Wᵀ is a product with a block-diagonal matrix of the R[k], then with one of the L[l]. To orthogonalise a
        block-diagonal matrix is to orthogonalise each of its blocks.
        """
        down, across = self.n_blocks
        return {
            "L": (down, self.out_features // down, across * self.rank),
            "R": (across, down * self.rank, self.in_features // across),
        }


def _most_blocks(out_features: int, in_features: int, max_params: int | None) -> tuple[int, int]:
    def divisors(n: int) -> list[int]:
        return [divisor for divisor in range(1, math.isqrt(n) + 1) if n % divisor == 0]

    pairs = [(down, across) for down in divisors(out_features) for across in divisors(in_features)]

    def per_rank(pair: tuple[int, int]) -> int:
        return pair[1] * out_features + pair[0] * in_features

    fitting = [pair for pair in pairs if max_params is None or per_rank(pair) <= max_params]
    return max(fitting, key=lambda pair: (pair[0] * pair[1], -per_rank(pair)), default=(1, 1))


def _blocks(W: Tensor, down: int, across: int) -> Tensor:
    """(out_features, in_features) -> (down, across, m, p)."""
    return W.reshape(down, W.shape[0] // down, across, W.shape[1] // across).transpose(1, 2)


def _matrix(L: Tensor, R: Tensor) -> Tensor:
    """L (down, across, m, r), R (down, across, r, p) -> (out_features, in_features)."""
    blocks = (L @ R).transpose(1, 2)
    return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)


def _balanced(L: Tensor, R: Tensor) -> list[Tensor]:
    """The factors share each component's norm equally, which suits an optimiser."""
    norms = (torch.linalg.norm(R, dim=3, keepdim=True) / torch.linalg.norm(L, dim=2)[..., None]).sqrt()
    norms = torch.where(torch.isfinite(norms) & (norms > 0), norms, 1)
    return [L * norms.mT, R / norms]


def _diagonal_blocks(G: Tensor, p: int) -> list[Tensor]:
    return [G[start : start + p, start : start + p] for start in range(0, len(G), p)]


def _fit_left(W: Tensor, R: Tensor, G: Tensor) -> Tensor:
    """The L (down, across, m, r) with the least output error under G for these R (down, across, r, p)."""
    down, across, rank, _ = R.shape
    rows = W.reshape(down, -1, W.shape[1])
    fitted = []
    for index in range(down):
        Z = torch.block_diag(*R[index])  # (across·r, in_features)
        # A pseudo-inverse, because rows of Z may be linearly dependent under G.
        left = rows[index] @ G @ Z.T @ torch.linalg.pinv(Z @ G @ Z.T, hermitian=True)
        fitted.append(left.reshape(-1, across, rank).transpose(0, 1))
    return torch.stack(fitted)
