"""The rows of the report of `compress`: sizes, costs and errors of each layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor

from mpo_core.compression.report import CompressedLayer
from mpo_core.fitting.metric import Metric
from mpo_core.layers.mpo import MPOLinear
from mpo_core.layers.structured import StructuredLinear
from mpo_core.models.dense_layers import DenseLayer
from mpo_core.tensor_train.algebra import rel_error as relative_error
from mpo_core.values import error_ratio

PARTED = 1.5
"""Ratio of held-out to fitted predicted loss from which `compress` warns of too little calibration."""


def row_of(dense: DenseLayer, new: StructuredLinear | None, reason: str | None, n_tokens: int) -> CompressedLayer:
    W = dense.linear.weight
    out_features, in_features = W.shape
    chain = new if isinstance(new, MPOLinear) else None
    flops, n_bytes = 2 * W.numel() * n_tokens, (W.numel() + n_tokens * sum(W.shape)) * W.element_size()
    if new is not None:
        flops, n_bytes = new.flops(n_tokens), new.bytes(n_tokens)
    return CompressedLayer(
        name=dense.name,
        kind="dense" if new is None else new.kind,
        out_features=out_features,
        in_features=in_features,
        d_out=() if chain is None else chain.d_out,
        d_in=() if chain is None else chain.d_in,
        bonds=() if chain is None else chain.bonds,
        structure="dense" if new is None else new.structure(),
        n_params_before=W.numel(),
        n_params_after=W.numel() if new is None else new.n_params_matrix,
        n_counted=W.numel() if new is None else new.n_params_matrix + -(-new.n_index_bits // (8 * W.element_size())),
        flops_per_token=flops / n_tokens,
        bytes_per_token=n_bytes / n_tokens,
        reason=reason,
    )


def errors_of(
    W: Tensor, W_hat: Tensor | None, metric: str, fitted: Metric | None, held_out: Metric | None
) -> dict[str, float | None]:
    """Errors of a layer in the report, by field; W_hat is None for a layer that stays as it is."""
    if W_hat is None:
        none = dict.fromkeys(("error", "held_out_error"), 0.0) if metric != "weights" else {}
        losses = dict.fromkeys(("predicted_loss", "held_out_loss"), 0.0) if metric == "loss" else {}
        return {"rel_error": 0.0, **none, **losses}
    errors: dict[str, float | None] = {"rel_error": relative_error(W, W_hat)}
    for name, loss, one in (("error", "predicted_loss", fitted), ("held_out_error", "held_out_loss", held_out)):
        if one is None:
            continue
        one = one.on(W)
        change = one.norm(W.double() - W_hat.double())
        errors[name] = error_ratio(change, one.norm(W))
        if metric == "loss":
            errors[loss] = change**2 / 2
    return errors


def warn_where_parted(rows: Iterable[CompressedLayer]) -> None:
    measured = [(row.predicted_loss, row.held_out_loss) for row in rows if row.n_params_before]
    fitted, held_out = (sum(loss for loss in losses if loss is not None) for losses in zip(*measured, strict=True))
    if held_out > PARTED * fitted > 0:
        warnings.warn(
            f"the predicted loss is {held_out:.3g} nats on held-out batches, but {fitted:.3g} on the fitted ones: "
            "more calibration batches would fit the layers better",
            stacklevel=3,
        )
