"""MPOLinear: a drop-in for nn.Linear whose weight is a chain of cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from mpo_core.factorisation import factorise
from mpo_core.initialisation import INITS, normal_cores_, paper_std, tt_svd_cores_, variance_std
from mpo_core.tensor_train import check_sizes, clip_bonds, contract

FRESH_INITS = tuple(init for init in INITS if init != "tt_svd")


class MPOLinear(nn.Module):
    """y = x Wᵀ + b with W the contraction of `cores`; W is reconstructed in every forward (paper, Eq. 6).

    Args:
        chi: cap on every bond, >= 1; `bonds` holds the actual ones, clipped to the largest useful.
        d_out, d_in: local sizes, one per site. None: chosen by `factorise` with the method `factorisation` and n_sites.
        init: "variance" or "paper" (see `mpo_core.initialisation`); the bias starts at zero.
        generator: what the cores are drawn from, one after the other. Needed on every device but "meta": the global
            generator is never used.
    Shapes:
        x: (..., in_features); y: (..., out_features).
        cores[l]: (bonds[l], d_out[l], d_in[l], bonds[l+1]); bias: (out_features,) or None.
    Raises:
        ValueError: chi < 1, sizes that do not multiply to the features, an unknown init or factorisation, no generator.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        chi: int,
        n_sites: int | None = None,
        d_out: Sequence[int] | None = None,
        d_in: Sequence[int] | None = None,
        factorisation: str = "balanced",
        bias: bool = True,
        init: str = "variance",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (d_out is None) != (d_in is None):
            raise ValueError(f"`d_out` and `d_in` must be given together, but got d_out={d_out}, d_in={d_in}")
        if d_out is None or d_in is None:
            d_out, d_in = factorise(out_features, in_features, method=factorisation, n_sites=n_sites)
        check_sizes(out_features, in_features, d_out, d_in)
        if n_sites not in (None, len(d_out)):
            raise ValueError(f"`n_sites == len(d_out)` must hold, but got n_sites={n_sites}, d_out={list(d_out)}")
        self.in_features = in_features
        self.out_features = out_features
        self.chi = chi
        self.d_out = tuple(d_out)
        self.d_in = tuple(d_in)
        self.n_sites = len(self.d_out)
        self.bonds = clip_bonds(chi, self.d_out, self.d_in)
        shapes = zip(self.bonds[:-1], self.d_out, self.d_in, self.bonds[1:], strict=True)
        self.cores = nn.ParameterList([torch.empty(shape, device=device, dtype=dtype) for shape in shapes])
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        if not self.cores[0].is_meta:
            if generator is None:
                raise ValueError("MPOLinear draws its cores from `generator`, but got None; pass a torch.Generator")
            self.init_cores(init, [generator] * self.n_sites)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        chi: int,
        n_sites: int | None = None,
        d_out: Sequence[int] | None = None,
        d_in: Sequence[int] | None = None,
        factorisation: str = "balanced",
    ) -> Self:
        """The layer whose cores are the TT-SVD of linear.weight; bias, dtype, device and training mode carried over.

        Raises:
            ValueError: as the constructor and `tt_svd`; or the weight is on the meta device and so has no values.
        """
        if linear.weight.is_meta:
            raise ValueError("a weight on the meta device has no values to decompose by TT-SVD")
        layer = cls.empty_like(linear, chi=chi, n_sites=n_sites, d_out=d_out, d_in=d_in, factorisation=factorisation)
        tt_svd_cores_(list(layer.cores), linear.weight, chi)
        return layer

    @classmethod
    def empty_like(
        cls,
        linear: nn.Linear,
        *,
        chi: int,
        n_sites: int | None = None,
        d_out: Sequence[int] | None = None,
        d_in: Sequence[int] | None = None,
        factorisation: str = "balanced",
    ) -> Self:
        """A layer in the place of `linear`, its cores still to be filled; all but the weight carried over."""
        weight, bias = linear.weight, linear.bias
        layer = cls(
            linear.in_features,
            linear.out_features,
            chi=chi,
            n_sites=n_sites,
            d_out=d_out,
            d_in=d_in,
            factorisation=factorisation,
            bias=bias is not None,
            device="meta",
            dtype=weight.dtype,
        ).to_empty(device=weight.device)
        layer.cores.requires_grad_(weight.requires_grad)
        if layer.bias is not None:
            layer.bias.data.copy_(bias)
            layer.bias.requires_grad_(bias.requires_grad)
        return layer.train(linear.training)

    def init_cores(self, init: str, generators: Sequence[torch.Generator]) -> None:
        """Draw the cores afresh, core l from generators[l]; `init` is "paper" or "variance"."""
        if init == "paper":
            std = paper_std(self.in_features, self.chi, self.n_sites)
        elif init == "variance":
            std = variance_std(self.in_features, self.bonds)
        else:
            raise ValueError(
                f"`init` of fresh cores must be one of {', '.join(FRESH_INITS)}, but got {init!r}; "
                "for tt_svd use MPOLinear.from_linear"
            )
        normal_cores_(self.cores, std, generators)

    def to_matrix(self) -> Tensor:
        """W (out_features, in_features), in the dtype of the cores even under autocast."""
        device_type = self.cores[0].device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return contract(list(self.cores))
        return contract(list(self.cores))

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        return nn.functional.linear(x, self.to_matrix(), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, chi={self.chi}, "
            f"d_out={list(self.d_out)}, d_in={list(self.d_in)}, bonds={list(self.bonds)}, bias={self.bias is not None}"
        )
