"""Gram matrices of a layer's inputs, accumulated over calibration batches, and the error that they define."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpo_core.evaluating import evaluating
from mpo_core.values import error_ratio, in_range

SQUARABLE = (1e-140, 1e140)
"""Range that the largest input must be in, so that sums of squares neither overflow nor underflow."""


class Gram:
    """The second moment of a layer's inputs, G = mean of x xᵀ, accumulated batch by batch in float64.

    Shapes: x: (..., in_features); G: (in_features, in_features).
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self._total = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self._largest = 0.0
        self.n_samples = 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add the inputs x; all leading axes count as samples.

        Raises:
            ValueError: the last axis is not in_features, or an entry is infinite, NaN or too large to be squared.
        """
        in_features = self._total.shape[0]
        if x.ndim == 0 or x.shape[-1] != in_features:
            raise ValueError(f"`x` must have shape (..., {in_features}), but got {tuple(x.shape)}")
        if not torch.isfinite(x).all():
            raise ValueError(
                f"calibration inputs must be finite, but {int((~torch.isfinite(x)).sum())} entries are not"
            )
        samples = x.reshape(-1, in_features).to(self._total)
        if samples.numel():
            self._largest = max(self._largest, float(samples.abs().amax()))
        if self._largest > SQUARABLE[1]:
            raise ValueError(f"calibration inputs must be at most {SQUARABLE[1]:g}, but got one of {self._largest:.3g}")
        self._total.addmm_(samples.T, samples)
        self.n_samples += samples.shape[0]

    def matrix(self, ridge: float = 1e-6) -> Tensor:
        """G + ridge · (mean of G's diagonal) · 1, float64; the ridge makes it definite if inputs span a subspace.

        Raises:
            ValueError: no samples, only zeros or inputs too small to be squared, or a negative ridge.
        """
        if ridge < 0:
            raise ValueError(f"`ridge >= 0` must hold, but got ridge={ridge}")
        if self.n_samples == 0:
            raise ValueError("a Gram matrix needs at least one sample, but the calibration data is empty")
        if self._largest == 0:
            raise ValueError(f"a Gram matrix needs inputs other than zero, but all {self.n_samples} samples are zero")
        if self._largest < SQUARABLE[0]:
            raise ValueError(
                f"a Gram matrix needs inputs of at least {SQUARABLE[0]:g}, but the largest is {self._largest:.3g}"
            )
        G = self._total / self.n_samples
        scale = float(G.diagonal().mean())
        G.diagonal().add_(ridge * scale)
        return G


def collect_grams(
    model: nn.Module,
    layer_names: Sequence[str],
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    ridge: float = 1e-6,
) -> dict[str, Tensor]:
    """Run the model over the batches and return, for each named layer, the Gram matrix of its inputs.

    The model runs in evaluation mode without gradients, and is put back as it was. Padding tokens count like any other,
    unless a `forward` leaves them out.

    Args:
        layer_names: names of modules that are called with one tensor (..., in_features) as their first argument.
        batches: per call of the model, a tensor or sequence of arguments, or a mapping of keyword arguments.
        forward: called as forward(model, batch) instead of the model itself.
        ridge: see `Gram.matrix`.
    Returns:
        {name: (in_features, in_features) float64}, on the device of the inputs.
    Raises:
        ValueError: no batches; or a layer, given by name, is never called or gets inputs that are not finite.
        AttributeError: a name that the model does not have.
    """
    grams: dict[str, Gram] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            try:
                grams.setdefault(name, Gram(x.shape[-1], x.device)).update(x)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

        return hook

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True) for name in layer_names
    ]
    n_batches = 0
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                (forward or _call)(model, batch)
                n_batches += 1
    finally:
        for hook in hooks:
            hook.remove()
    if n_batches == 0:
        raise ValueError("calibration needs at least one batch, but got none")
    silent = [name for name in layer_names if name not in grams]
    if silent:
        raise ValueError(f"no calibration batch reached {', '.join(silent)}")
    matrices = {}
    for name in layer_names:
        try:
            matrices[name] = grams[name].matrix(ridge)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return matrices


def output_error(W: Tensor, W_hat: Tensor, gram: Tensor) -> float:
    """√(E‖(W − Ŵ) x‖² / E‖W x‖²) for inputs of second moment `gram`; computed in float64.

    For W x = 0 it is 0 when Ŵ x = 0 as well, and infinite otherwise.

    Args:
        W, W_hat: (out_features, in_features). gram: (in_features, in_features), positive semi-definite.
    """
    G = check_gram(gram, W.shape[1]).to(W.device)
    W, scale = in_range(W.detach().double())
    W_hat = W_hat.detach().double() / scale
    return error_ratio(weighted_norm(W - W_hat, G), weighted_norm(W, G))


def weighted_norm(W: Tensor, G: Tensor) -> float:
    """√tr(W G Wᵀ) = ‖W G^{1/2}‖_F; a square below zero by rounding counts as zero."""
    W, scale = in_range(W)
    return scale * math.sqrt(max(float(torch.sum((W @ G) * W)), 0.0))  # in this order NaN stays NaN


def check_gram(gram: Tensor, in_features: int) -> Tensor:
    """Return `gram` in float64, divided by its largest entry if that is beyond the range in which products hold.

    Raises:
        ValueError: it is not (in_features, in_features), finite, symmetric, non-zero and positive semi-definite.
    """
    if tuple(gram.shape) != (in_features, in_features):
        raise ValueError(f"`gram` must have shape ({in_features}, {in_features}), but got {tuple(gram.shape)}")
    G = gram.detach().double()
    if not torch.isfinite(G).all():
        raise ValueError(f"`gram` must be finite, but {int((~torch.isfinite(G)).sum())} entries are not")
    largest = float(G.abs().max())
    if largest == 0:
        raise ValueError("`gram` must not be zero, but all of its entries are")
    if not 1e-60 < largest < 1e60:  # its products would over- or underflow; only ratios of errors are ever used
        G, largest = G / largest, 1.0
    if float((G - G.T).abs().max()) > 1e-5 * largest or float(G.diagonal().min()) < 0:
        raise ValueError("`gram` must be symmetric with no negative entry on its diagonal, as Σ x xᵀ is")
    G = (G + G.T) / 2
    # Eigenvalues below zero that float32 rounding can cause are accepted.
    shift = 1e-6 * float(G.diagonal().sum()) + 1e-6 * largest
    if torch.linalg.cholesky_ex(G + shift * torch.eye(in_features, dtype=G.dtype, device=G.device))[1]:
        raise ValueError("`gram` must be positive semi-definite, as Σ x xᵀ is, but has a negative eigenvalue")
    return G


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch)
