"""The metric in which a layer is fitted: how much a change of its matrix matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mpo_core.values import error_ratio, in_range, to_unit

EXTREME = (1e-60, 1e60)
"""A moment whose largest entry is not between these is scaled to about 1: its products would be out of range."""


class Metric:
    """‖E‖² = tr(S E G Eᵀ) for a change E (out_features, in_features) of a layer's matrix.

    With neither moment it is the squared Frobenius norm. With G alone it is the mean square of the change of the
    outputs. With G and S, ‖E‖² / 2 predicts the rise of the loss: the Fisher information of the matrix, with its
    Kronecker factors (K-FAC).

    Args:
        gram: G = E[x xᵀ] (in_features, in_features) of the layer's inputs x. Default: the identity.
        sensitivity: S = E[g gᵀ] (out_features, out_features), with g the gradient of the loss at the layer's output.
            Default: the identity.
    Raises:
        ValueError: a moment is not square, finite, symmetric, non-zero and positive semi-definite.
    Source: Martens & Grosse 2015.
    """

    def __init__(self, gram: Tensor | None = None, sensitivity: Tensor | None = None) -> None:
        self.gram = None if gram is None else _checked("gram", gram)
        self.sensitivity = None if sensitivity is None else _checked("sensitivity", sensitivity)

    @property
    def is_plain(self) -> bool:
        """Whether it is the Frobenius norm."""
        return self.gram is None and self.sensitivity is None

    def on(self, W: Tensor) -> Metric:
        """The metric on W's device.

        Raises:
            ValueError: it is not one for W (out_features, in_features).
        """
        for name, moment, size in (("gram", self.gram, W.shape[1]), ("sensitivity", self.sensitivity, W.shape[0])):
            if moment is not None and len(moment) != size:
                raise ValueError(f"`{name}` must have shape ({size}, {size}), but got {tuple(moment.shape)}")
        if all(moment is None or moment.device == W.device for moment in (self.gram, self.sensitivity)):
            return self
        return self.to(device=W.device)

    def to(self, **where: Any) -> Metric:
        """The metric with its moments on another device or of another dtype."""
        gram, sensitivity = (None if moment is None else moment.to(**where) for moment in (self.gram, self.sensitivity))
        return Metric.of_checked(gram, sensitivity)

    def to_unit(self) -> Metric:
        """The metric with its moments scaled by powers of two to largest entries from 1/2 to 1."""
        gram, sensitivity = (None if moment is None else to_unit(moment)[0] for moment in (self.gram, self.sensitivity))
        return Metric.of_checked(gram, sensitivity)

    @classmethod
    def of_checked(cls, gram: Tensor | None, sensitivity: Tensor | None) -> Metric:
        """The metric of moments that are known to be sound: means of x xᵀ in float64, or what follows from checked
        ones."""
        metric = object.__new__(cls)
        metric.gram, metric.sensitivity = gram, sensitivity
        return metric

    def padded(self, shape: Sequence[int], out_features: int, in_features: int) -> Metric:
        """The metric of a matrix of that shape after padding to (out_features, in_features); what is added does not
        count. The Frobenius norm stays one: it has to count the padding."""
        if self.is_plain or tuple(shape) == (out_features, in_features):
            return self
        device = next(moment.device for moment in (self.gram, self.sensitivity) if moment is not None)
        return Metric.of_checked(
            _padded(self.gram, shape[1], in_features, device), _padded(self.sensitivity, shape[0], out_features, device)
        )

    def restricted(self, outputs: Tensor | None = None, inputs: Tensor | None = None) -> Metric:
        """The metric of the rows and columns of these indices. Default: all."""
        gram, sensitivity = self.gram, self.sensitivity
        if gram is not None and inputs is not None:
            inputs = inputs.to(gram.device)
            gram = gram[inputs][:, inputs]
        if sensitivity is not None and outputs is not None:
            outputs = outputs.to(sensitivity.device)
            sensitivity = sensitivity[outputs][:, outputs]
        return Metric.of_checked(gram, sensitivity)

    @cached_property
    def input_root(self) -> Tensor | None:
        """R with R Rᵀ = G."""
        return None if self.gram is None else root(self.gram)

    @cached_property
    def output_root(self) -> Tensor | None:
        """R with R Rᵀ = S."""
        return None if self.sensitivity is None else root(self.sensitivity)

    def weighted(self, W: Tensor) -> Tensor:
        """M with ‖M‖_F = ‖W‖, of W's shape, float64."""
        M = self.outputs_weighted(W.double())
        return M if self.input_root is None else M @ self.input_root

    def outputs_weighted(self, W: Tensor) -> Tensor:
        """Rᵀ W with R Rᵀ = S."""
        R = self.output_root
        return W if R is None else R.T @ W

    def outputs_unweighted(self, M: Tensor) -> Tensor:
        """The smallest W with Rᵀ W = M."""
        return M if self.output_root is None else solve_root(self.output_root, M)

    def gradient(self, E: Tensor) -> Tensor:
        """S E G, half the gradient of ‖E‖², for E in the dtype of the moments."""
        E = E if self.gram is None else E @ self.gram
        return E if self.sensitivity is None else self.sensitivity @ E

    def norm(self, E: Tensor) -> float:
        """‖E‖, computed in float64; a square below zero by rounding counts as zero."""
        E, scale = in_range(E.detach().double())
        return scale * math.sqrt(max(float(torch.sum(self.gradient(E) * E)), 0.0))  # in this order NaN stays NaN

    def norm_of_weight(self, W: Tensor) -> float:
        """‖W‖; that of the last W is kept, because the errors of many fits are shares of it."""
        W = W.detach().double()
        kept: tuple[Tensor, float] | None = self.__dict__.get("_norm_of_weight")
        if kept is None or not torch.equal(kept[0], W):
            kept = self.__dict__["_norm_of_weight"] = W.clone(), self.norm(W)
        return kept[1]

    def error(self, W: Tensor, W_hat: Tensor) -> float:
        """‖W − Ŵ‖ / ‖W‖. If ‖W‖ is zero: 0 for a zero error, infinity otherwise."""
        metric = self.on(W)
        W, scale = in_range(W.detach().double())
        return error_ratio(metric.norm(W - W_hat.detach().double() / scale), metric.norm_of_weight(W))

    def diagonal(self, W: Tensor) -> Tensor:
        """The metric's diagonal at the square root, in W's shape: √(S_ii G_jj), float64."""
        weights = torch.ones_like(W, dtype=torch.float64)
        if self.gram is not None:
            weights = weights * self.gram.diagonal().sqrt()
        return weights if self.sensitivity is None else weights * self.sensitivity.diagonal().sqrt()[:, None]


def root(G: Tensor) -> Tensor:
    """R with R Rᵀ = G, for G symmetric and positive semi-definite.

    The Cholesky factor if G is definite. Otherwise the symmetric root from the eigenvalues, of which those at rounding
    level become 0.
    """
    lower, failed = torch.linalg.cholesky_ex(G)
    if not failed and float(lower.diagonal().min()) > 1e-6 * float(lower.diagonal().max()):
        return lower
    values, vectors = torch.linalg.eigh(G)
    negligible = 1e-14 * len(values) * float(values[-1])
    return vectors * torch.where(values > negligible, values, 0).sqrt() @ vectors.T


def solve_root(R: Tensor, M: Tensor) -> Tensor:
    """The smallest X with Rᵀ X = M, for an R of `root`."""
    if not R.triu(1).any() and R.diagonal().all():
        return torch.linalg.solve_triangular(R.T, M, upper=True)
    return torch.linalg.pinv(R, hermitian=True, rtol=1e-9) @ M


def _checked(name: str, moment: Tensor) -> Tensor:
    """The moment in float64, exactly symmetric."""
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"`{name}` must be a square matrix, but got shape {tuple(moment.shape)}")
    G = moment.detach().double()
    if not torch.isfinite(G).all():
        raise ValueError(f"`{name}` must be finite, but {int((~torch.isfinite(G)).sum())} entries are not")
    largest = float(G.abs().max())
    if largest == 0:
        raise ValueError(f"`{name}` must not be zero, but all of its entries are")
    if not EXTREME[0] < largest < EXTREME[1]:
        # A power of two changes no digit; in two steps, because the power alone may be out of range.
        half = math.frexp(largest)[1] // 2
        G = G / 2.0**half / 2.0 ** (math.frexp(largest)[1] - half)
        largest = float(G.abs().max())
    if float((G - G.T).abs().max()) > 1e-5 * largest or float(G.diagonal().min()) < 0:
        raise ValueError(f"`{name}` must be symmetric with no negative entry on its diagonal, as Σ x xᵀ is")
    G = (G + G.T) / 2
    # Eigenvalues below zero that float32 rounding can cause are accepted.
    shift = 1e-6 * float(G.diagonal().sum()) + 1e-6 * largest
    if torch.linalg.cholesky_ex(G + shift * torch.eye(len(G), dtype=G.dtype, device=G.device))[1]:
        raise ValueError(f"`{name}` must be positive semi-definite, as Σ x xᵀ is, but has a negative eigenvalue")
    return G


def _padded(moment: Tensor | None, size: int, padded: int, device: torch.device) -> Tensor | None:
    """With zeros for what is added; None stays the identity if nothing is."""
    if size == padded:
        return moment
    moment = torch.eye(size, dtype=torch.float64, device=device) if moment is None else moment
    return torch.nn.functional.pad(moment, (0, padded - size, 0, padded - size))
