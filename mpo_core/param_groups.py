"""Learning rates and weight decay for the parameters of a structured weight, as groups of an optimiser."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from mpo_core.layers.structured import StructuredLinear

RULES = ("uniform", "mup")
DECAYS = ("parameter", "matrix")


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    rule: str = "uniform",
    weight_decay: float = 0.0,
    decay: str = "parameter",
    embedding_lr: float | None = None,
    matrix_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups of all trainable parameters, for torch.optim.AdamW and others whose decay is decoupled.

    Args:
        lr: learning rate of all parameters that are not factors of a structured weight, and under "uniform" also of the
            factors.
        rule: "mup": a factor's rate is lr · (in_features / fan_in) / n_factors. Here fan_in is the number of inputs
            that one of its outputs sums over: bonds[l] · d_in[l] for core l. A dense layer's rate is unchanged.
        weight_decay: λ; one step of AdamW multiplies a parameter by 1 − lr · λ.
        decay: what λ applies to. "parameter": each parameter. A product of L factors then shrinks by (1 − lr · λ)^L per
            step, L times as fast as a dense weight. "matrix": W. Each factor then decays by λ / (L · its multiplier),
            so that W shrinks as a dense weight would, to first order in lr · λ. L counts only the factors that W is
            proportional to; other factors, as all but the last in the fixed gauge, do not decay.
        embedding_lr: learning rate of the weights of every nn.Embedding, including learned positions and weights tied
            to them (a head). Default: `lr`.
        matrix_scale: multiplies the rates of the weights of linear layers, dense or structured, except those tied to an
            embedding. With `lr` tuned at another width, it is that width divided by this one, so that the changes of
            the outputs of a layer keep their size under Adam; those of structured layers with rule "mup".
    Returns:
        One dict per combination, in the order of the model: "params", "lr", "weight_decay", and "lr_mult", the factor
        by which a schedule's rate has to be multiplied.
    Raises:
        ValueError: an unknown rule or decay, a negative rate or weight decay, a `matrix_scale` that is not above 0, or
            an embedding_lr with an `lr` of 0.
    Source: Qiu et al. 2024, section 4 (rates of structured layers under Adam); Yang et al. 2022 (rates over widths).
    """
    if rule not in RULES:
        raise ValueError(f"`rule` must be one of {', '.join(RULES)}, but got {rule!r}")
    if decay not in DECAYS:
        raise ValueError(f"`decay` must be one of {', '.join(DECAYS)}, but got {decay!r}")
    if lr < 0 or weight_decay < 0:
        raise ValueError(f"`lr` and `weight_decay` must be at least 0, but got lr={lr}, weight_decay={weight_decay}")
    if not matrix_scale > 0:
        raise ValueError(f"`matrix_scale` must be above 0, but got {matrix_scale}")
    if embedding_lr is not None and not (embedding_lr >= 0 and lr > 0):
        raise ValueError(
            "`embedding_lr` must be at least 0, and needs an `lr` above 0, "
            f"but got embedding_lr={embedding_lr}, lr={lr}"
        )
    embedded = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding)}
    multiplier: dict[int, float] = {}
    share: dict[int, float] = {}
    for layer in model.modules():
        if isinstance(layer, StructuredLinear):
            fan_ins, proportional = layer.fan_ins(), layer.proportional_to()
            for name, fan_in in fan_ins.items():
                key = id(layer.get_parameter(name))
                multiplier[key] = layer.in_features / fan_in / len(fan_ins) if rule == "mup" else 1.0
                share[key] = len(proportional) * multiplier[key] if name in proportional else math.inf
                multiplier[key] *= matrix_scale
        elif isinstance(layer, nn.Linear) and id(layer.weight) not in embedded:
            multiplier[id(layer.weight)] = matrix_scale
        elif isinstance(layer, nn.Embedding) and embedding_lr is not None:
            multiplier[id(layer.weight)] = embedding_lr / lr

    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        key = id(parameter)
        lr_mult = multiplier.get(key, 1.0)
        divisor = share.get(key, 1.0) if decay == "matrix" else 1.0
        group = {"params": [], "lr": lr * lr_mult, "weight_decay": weight_decay / divisor, "lr_mult": lr_mult}
        groups.setdefault((lr_mult, divisor), group)["params"].append(parameter)
    return list(groups.values())
