"""Perplexity of a language model, and its standard error over documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpo_core.calibration.collecting import next_token_losses
from mpo_core.models.evaluating import evaluating


class Perplexity(NamedTuple):
    """exp of the mean loss of a token, its standard error, and for each document its loss and its predicted tokens."""

    value: float
    standard_error: float
    nats: Tensor
    n_tokens: Tensor


@torch.no_grad()
def perplexity(
    model: nn.Module,
    documents: Sequence[Tensor],
    *,
    window: int = 1024,
    first: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity over all predicted tokens of the documents, in evaluation mode, and its standard error.

    A document is cut into windows of at most `window` tokens; the first token of a window is not predicted.

    Args:
        model: returns logits as in `next_token_losses`.
        documents: token ids of each, shape (n,).
        first: token put before every window, as some models expect it; then all tokens of a window are predicted.
        progress: called with the number of windows done and that of all that predict a token.
    Raises:
        ValueError: no token is predicted.
    """
    device = next(model.parameters()).device
    before = torch.tensor([] if first is None else [first], dtype=torch.int64, device=device)
    cut = [
        [ids for ids in document.to(device).split(window) if len(before) + len(ids) > 1]  # others predict nothing
        for document in documents
    ]
    n_windows, done = sum(map(len, cut)), 0
    nats, n_tokens = [], []
    with evaluating(model):
        for windows in cut:
            total, n = 0.0, 0
            for ids in windows:
                losses = next_token_losses(model, torch.cat([before, ids])[None])
                total, n, done = total + float(losses.double().sum()), n + losses.numel(), done + 1
                if progress is not None:
                    progress(done, n_windows)
            nats.append(total)
            n_tokens.append(n)
    if not any(n_tokens):
        raise ValueError("perplexity needs documents with at least one predicted token")
    losses, sizes = torch.tensor(nats, dtype=torch.float64), torch.tensor(n_tokens)
    mean, error = _ratio(losses, sizes)
    value = math.inf if mean > 700 else math.exp(mean)
    return Perplexity(value, value * error, losses, sizes)


def paired_difference(one: Perplexity, other: Perplexity) -> tuple[float, float]:
    """Log-perplexity of `one` minus that of `other` in nats, and its standard error, over the same documents.

    Raises:
        ValueError: they are not of the same documents.
    """
    if not torch.equal(one.n_tokens, other.n_tokens):
        raise ValueError("the two perplexities are not of the same documents")
    return _ratio(one.nats - other.nats, one.n_tokens)


def _ratio(totals: Tensor, sizes: Tensor) -> tuple[float, float]:
    """Σ totals / Σ sizes, and the standard error of this ratio estimator over documents; NaN for one document.

    The variance is n / (n − 1) Σ (totalᵢ − ratio · sizeᵢ)² / (Σ sizes)² (Cochran, Sampling Techniques, chapter 6).
    """
    totals, sizes = totals[sizes > 0], sizes[sizes > 0]  # a document without predicted tokens says nothing
    n = len(totals)
    ratio = float(totals.sum() / sizes.sum())
    deviations = (totals - ratio * sizes).square().sum()
    return ratio, float((n / (n - 1) * deviations).sqrt() / sizes.sum()) if n > 1 else math.nan
