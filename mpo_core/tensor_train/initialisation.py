"""Ways to fill the cores of an MPO, in place, from the generators given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mpo_core.tensor_train.algebra import balance_cores, bonds_and_sizes, tt_svd
from mpo_core.tensor_train.bonds import clip_bonds
from mpo_core.tensor_train.contraction import chain
from mpo_core.values import check_cores_finite, times_power, to_units

INITS = ("paper", "variance", "orthogonal", "spectral", "tt_svd_fresh")
"""Inits that draw cores; see `init_cores_`."""

SPECTRAL_TOLERANCE = 1e-4
"""Relative error of the spectral norm that "spectral" sets."""


@torch.no_grad()
def init_cores_(
    cores: Sequence[Tensor],
    init: str,
    generators: Sequence[torch.Generator],
    *,
    in_features: int,
    out_features: int,
    chi: int | None = None,
) -> None:
    """Draw cores in place, core l from generators[l].

    With padding, in_features and out_features are the true sizes; W below is the padded matrix unless stated otherwise.

    Args:
        init: "paper": entries N(0, `paper_std`²) with the requested χ; Var(W) = 1 / in_features only for L = 2.
            "variance": entries N(0, σ²) with Var(W) = 1 / in_features for any L and bonds (`variance_std`). Cores of a
            single entry are 1, because a random one would scale all of W.
            "orthogonal": Haar-random left-orthogonal cores, the last one right-orthogonal. They are scaled to equal
            norms, and W to the norm that entries of variance 1 / in_features have in the mean. Without padding that is
            exactly ‖W‖_F² = out_features.
            "spectral": normal entries of one variance. The matrix without padding rows and columns has the spectral
            norm √(out_features / in_features), to `SPECTRAL_TOLERANCE`. This is Condition 1 of Yang, Simon and
            Bernstein 2023, met by the product of the cores, not by each (as Qiu et al. 2024).
            "tt_svd_fresh": the TT-SVD of a dense W with entries N(0, 1 / in_features), all drawn from generators[0]. Ŵ
            has less variance than W, by the part that the bonds cut off.
        chi: the requested cap; "paper" needs it.
    Raises:
        ValueError: an unknown init, not exactly one generator per core, "paper" without chi, bonds out of their
            neighbours' reach, cores too small for the matrix, or as `bonds_and_sizes`.
    """
    bonds, d_out, d_in = bonds_and_sizes(cores)
    n_sites, padded_out, padded_in = len(d_out), math.prod(d_out), math.prod(d_in)
    if len(generators) != n_sites:
        raise ValueError(f"one generator per core must be given, but got {len(generators)} for {n_sites} cores")
    if not 1 <= out_features <= padded_out or not 1 <= in_features <= padded_in:
        raise ValueError(
            f"cores of a {padded_out}×{padded_in} matrix are too small for out_features={out_features}, "
            f"in_features={in_features}"
        )
    if clip_bonds(bonds, d_out, d_in) != bonds:
        raise ValueError(f"every bond must be within reach of its neighbours (`clip_bonds`), but got {list(bonds)}")
    if init == "paper":
        if chi is None:
            raise ValueError("init 'paper' needs `chi`, the requested cap, but got None")
        normal_cores_(cores, paper_std(in_features, chi, n_sites), generators)
    elif init == "variance":
        filled = [(core, generator) for core, generator in zip(cores, generators, strict=True) if core.numel() > 1]
        std = variance_std(in_features, bonds, n_drawn=len(filled))
        for core in cores:
            core.fill_(1)
        for core, generator in filled:
            normal_(core, std, generator)
    elif init == "orthogonal":
        drawn = _orthogonal_cores(cores, generators)
        # All cores but the last are left-orthogonal, so W has the norm of the last: the root of its number of rows.
        drawn[-1] *= math.sqrt(padded_out * padded_in / in_features / bonds[-2])
        _fill(cores, balance_cores(drawn))
    elif init == "spectral":
        drawn = [_normal(core, generator).double() for core, generator in zip(cores, generators, strict=True)]
        norm = spectral_norm(drawn, out_features, in_features, tolerance=SPECTRAL_TOLERANCE)
        scale = (math.sqrt(out_features / in_features) / norm) ** (1 / n_sites)
        _fill(cores, [core * scale for core in drawn])
    elif init == "tt_svd_fresh":
        dtype, device = torch.promote_types(cores[0].dtype, torch.float32), generators[0].device
        W = torch.empty(padded_out, padded_in, dtype=dtype, device=device)
        normal_(W, in_features**-0.5, generators[0])
        _fill(cores, tt_svd(W, d_out, d_in, bonds=bonds))
    else:
        raise ValueError(
            f"`init` of fresh cores must be one of {', '.join(INITS)}, but got {init!r}; "
            "to approximate a weight, use MPOLinear.from_linear"
        )


def paper_std(in_features: int, chi: int, n_sites: int) -> float:
    """Standard deviation of every core entry in the paper's init (section 3.3), with the requested χ, not clipped.

    Var(W) is then χ^(L-1) σ^(2L) = in_features^(-L/2) for unclipped bonds: 1 / in_features only for L = 2.
    """
    return in_features ** (-1 / 4) * chi ** (-(n_sites - 1) / (2 * n_sites))


def variance_std(in_features: int, bonds: Sequence[int], *, n_drawn: int | None = None) -> float:
    """Standard deviation of every core entry with which Var(W) = 1 / in_features, for any L and any bonds.

    An entry of W is a sum of prod(bonds) uncorrelated terms, each a product of n_drawn independent entries (None: L,
    one from each core).
    """
    n_drawn = len(bonds) - 1 if n_drawn is None else n_drawn
    return (in_features * math.prod(bonds)) ** (-1 / (2 * max(1, n_drawn)))


@torch.no_grad()
def normal_(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with normal numbers of mean 0, drawn on the generator's device, so that a GPU gets the CPU's numbers."""
    tensor.copy_(_normal(tensor, generator) * std)


def normal_cores_(cores: Iterable[Tensor], std: float, generators: Iterable[torch.Generator]) -> None:
    """Fill every core with normal numbers, each from the generator at its place."""
    for core, generator in zip(cores, generators, strict=True):
        normal_(core, std, generator)


@torch.no_grad()
def spectral_norm(
    cores: Sequence[Tensor],
    out_features: int | None = None,
    in_features: int | None = None,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 300,
) -> float:
    """‖W‖_2, the largest singular value of the cores' matrix, which is never formed.

    Power iteration on WᵀW that keeps its history and takes the largest Ritz value over the whole Krylov space. This is
    the Lanczos method with full reorthogonalisation. It starts from a fixed vector, so it draws no random numbers.

    Args:
        out_features, in_features: the number of rows and columns that count, from the first. Default: all.
        tolerance: the iteration stops when the residual of the Ritz pair bounds the relative error of ‖W‖_2² by this.
    Raises:
        RuntimeError: the tolerance is not met after `max_iterations`.
        ValueError: as `bonds_and_sizes`; or a core has an infinite or NaN entry.
    Source: Golub and Van Loan 2013, section 10.1.
    """
    _, d_out, d_in = bonds_and_sizes(cores)
    check_cores_finite(cores)
    rows, columns = out_features or math.prod(d_out), in_features or math.prod(d_in)
    cores, exponent = to_units([core.double() for core in cores])
    transposed = [core.transpose(1, 2) for core in cores]

    def gram(x: Tensor) -> Tensor:  # (columns,) -> WᵀW x
        padded = torch.nn.functional.pad(x, (0, math.prod(d_in) - columns))
        y = chain(cores, padded)
        y[rows:] = 0
        return chain(transposed, y)[:columns]

    # The generator is used only here. Any start with a component along the leading singular vector would do.
    start = torch.randn(columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(cores[0].device)
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    while True:
        x = gram(basis[-1])
        diagonal.append(float(x @ basis[-1]))
        Q = torch.stack(basis)
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            x = x - Q.T @ (Q @ x)
        residual = float(x.norm())
        T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if off_diagonal:
            side = torch.tensor(off_diagonal, dtype=torch.float64)
            T = T + torch.diag(side, 1) + torch.diag(side, -1)
        values, vectors = torch.linalg.eigh(T)
        largest = max(0.0, float(values[-1]))
        if residual * abs(float(vectors[-1, -1])) <= tolerance * largest or len(basis) == columns:
            return float(times_power(values.new_tensor(math.sqrt(largest)), exponent))
        if len(basis) == max_iterations:
            raise RuntimeError(f"the spectral norm did not reach tolerance={tolerance} in {max_iterations} iterations")
        off_diagonal.append(residual)
        basis.append(x / residual)


def _orthogonal_cores(cores: Sequence[Tensor], generators: Sequence[torch.Generator]) -> list[Tensor]:
    """Haar-random float64 cores: the last right-orthogonal, the others left-orthogonal."""
    drawn = []
    for site, (core, generator) in enumerate(zip(cores, generators, strict=True)):
        last = site == len(cores) - 1
        M = _normal(core, generator).double().reshape((core.shape[0], -1) if last else (-1, core.shape[3]))
        Q, R = torch.linalg.qr(M.mT if last else M)
        # Without the signs the QR's own convention would show in Q's distribution (Mezzadri 2007).
        Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
        drawn.append((Q.mT if last else Q).reshape(core.shape))
    return drawn


def _normal(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the tensor's shape on the generator's device, in float32, or float64 as the tensor."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.randn(tensor.shape, generator=generator, dtype=dtype, device=generator.device)


def _fill(cores: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for core, value in zip(cores, values, strict=True):
        core.copy_(value)
