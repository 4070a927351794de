"""PrunedLinear: a sparse weight with a fixed mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from mpo_core.fitting.ladders import Rung
from mpo_core.fitting.metric import Metric
from mpo_core.layers.structured import StructuredLinear, check_error, check_init, check_one_cap, n_needed
from mpo_core.tensor_train.bonds import check_fraction, check_whole
from mpo_core.tensor_train.contraction import Product, dense_product
from mpo_core.tensor_train.initialisation import normal_
from mpo_core.values import check_matrix, in_range


class PrunedLinear(StructuredLinear, kind="pruned"):
    """A dense weight with a mask: only entries under `mask` count, and the mask never changes by itself.

    W is `weight` where the mask is true and 0 elsewhere. The gradient elsewhere is therefore exactly 0, and W stays 0
    there under any optimiser. `weight` itself stays 0 there under optimisers that act on each entry, weight decay
    included. The FLOPs are those of a dense layer: zeros without a pattern save nothing.

    Args:
        sparsity, max_params: exactly one of them: the fraction of zeros in [0, 1), or the most entries that are kept.
        init: "variance": entries are kept at random places, with a variance that makes Var(W) = 1 / in_features over
            all entries.
        generator: source of the random places and entries. Default: torch's own, as for nn.Linear.
    Shapes:
        weight (out_features, in_features); mask, a buffer of the same shape.
    Raises:
        ValueError: not exactly one size, sparsity outside [0, 1), or max_params below 1.
    """

    other_sizes = ("sparsity",)
    n_sizes = 64
    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float | None = None,
        max_params: int | None = None,
        bias: bool = True,
        init: str = "variance",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        check_one_cap(sparsity=sparsity, max_params=max_params)
        total = out_features * in_features
        if sparsity is not None:
            check_fraction(sparsity=sparsity)
            max_params = max(1, total - round(sparsity * total))
        check_whole(max_params=max_params)
        assert max_params is not None
        if max_params < 1:
            raise ValueError(f"`max_params >= 1` must hold, but got max_params={max_params}")
        self._n_kept = min(int(max_params), total)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_buffer("mask", torch.ones(out_features, in_features, device=device, dtype=torch.bool))
        self.draw_unless_meta(init, generator)

    @classmethod
    def from_matrix(
        cls,
        W: Tensor,
        bias: Tensor | None = None,
        *,
        sparsity: float | None = None,
        max_params: int | None = None,
        rel_error: float | None = None,
        metric: Metric | None = None,
        **options: Any,
    ) -> Self:
        """Return W with its largest entries kept; in a metric, those with the largest |W_ij| (S_ii G_jj)^{1/2}.

        With G alone that is Wanda (Sun et al. 2024), but over the whole matrix; with S it is the diagonal of the Fisher
        information (LeCun et al. 1989). In a tie, the first entries in row-major order are kept.

        Raises:
            ValueError: as the constructor; a metric that does not fit W; `rel_error` together with a metric.
        """
        check_matrix(W)
        check_error(rel_error, metric)
        scaled = in_range(W.double())[0]
        score = scaled.abs()
        if metric is not None:
            score = score * metric.on(W).diagonal(W)
        order = torch.sort(score.flatten(), descending=True, stable=True).indices
        if rel_error is not None:
            check_one_cap(sparsity=sparsity, max_params=max_params, rel_error=rel_error)
            max_params = max(1, n_needed(scaled.flatten()[order].square(), rel_error))
        layer = cls.empty_for(W, bias, sparsity=sparsity, max_params=max_params, **options)
        layer._set_mask(order)
        layer.weight.data.copy_(torch.where(layer.mask, W, 0))
        return layer

    @classmethod
    def rungs(cls, W: Tensor, metric: Metric | None = None, **options: Any) -> list[Rung]:
        """The share of the score's square that is dropped: exact in a metric with diagonal moments."""
        metric = (metric or Metric()).on(W)
        scaled = in_range(W.double())[0]
        kept = torch.sort((scaled * metric.diagonal(W)).square().flatten(), descending=True).values.cumsum(0)
        total = metric.norm(scaled) ** 2 or 1.0
        return [Rung(size, float(kept[-1] - kept[size - 1]) / total, W.numel()) for size in cls.sizes(W, **options)]

    @property
    def n_params_matrix(self) -> int:
        """Number of entries of W that are kept; on the meta device, the requested number."""
        return self._n_kept if self.mask.is_meta else int(self.mask.sum())

    @property
    def n_index_bits(self) -> int:
        """The mask: a bit for each entry of W."""
        return self.weight.numel()

    def draw(self, init: str, generator_for: Callable[[str], torch.Generator]) -> None:
        """Draw new values for the parameters of W, each from the generator of its name; `init` is "variance".

        Raises:
            ValueError: any other init.
        """
        check_init(self, init)
        generator = generator_for("weight")
        order = torch.randperm(self.weight.numel(), generator=generator, device=generator.device)
        self._set_mask(order.to(self.mask.device))
        normal_(self.weight, (self.out_features / self._n_kept) ** 0.5, generator)
        self.weight.data.mul_(self.mask)

    def to_matrix(self) -> Tensor:
        """W (out_features, in_features), differentiable, in the dtype of the parameters even under autocast."""
        return torch.where(self.mask, self.weight, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), with the masked weight."""
        return nn.functional.linear(x, self.to_matrix(), self.bias)

    def products(self, n_tokens: int) -> list[Product]:
        """The matrix products of a forward pass over n_tokens tokens."""
        return [dense_product(self.out_features, self.in_features, n_tokens)]

    def structure(self) -> str:
        """Short description of what fixes the shape of the parameters."""
        return f"kept={self.n_params_matrix}"

    def options(self) -> dict[str, Any]:
        """The requested number of entries; `mask` shows which ones are kept."""
        return {"max_params": self._n_kept}

    def fan_ins(self) -> dict[str, int]:
        """All inputs, as for a dense weight."""
        return {"weight": self.in_features}

    def _set_mask(self, order: Tensor) -> None:
        self.mask.fill_(False)
        self.mask.view(-1)[order[: self._n_kept]] = True
