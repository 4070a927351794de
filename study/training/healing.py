"""Training after compression (`study.spec.heal.Heal`): which parameters are trained, and the loss of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mpo_core
from study.spec.trial import TrialSpec
from study.training.precision import logits_in


def is_distilled(spec: TrialSpec) -> bool:
    """Whether a teacher gives the loss of this spec's training."""
    return spec.heal is not None and spec.heal.loss == "distillation"


def freeze_unhealed(model: nn.Module, spec: TrialSpec) -> None:
    """Let gradients reach only what `heal.layers` trains; a frozen parameter has neither moments nor weight decay.

    Raises:
        ValueError: `structured`, but no layer is replaced, so nothing would be trained.
    """
    if spec.heal is None or spec.heal.layers == "all":
        return
    layers = [module for module in model.modules() if isinstance(module, mpo_core.StructuredLinear)]
    if not layers:
        raise ValueError("`heal.layers: structured` trains nothing: every layer stays dense")
    model.requires_grad_(False)
    for layer in layers:
        layer.requires_grad_(True)


def training_loss(
    spec: TrialSpec,
    model: Callable[..., Any],
    teacher: Callable[..., Any] | None,
    tokens: Tensor,
    following: Tensor,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Loss of a batch in nats per token, a scalar with a gradient for the model alone.

    Args:
        model, teacher: as `mpo_core.logits_of` calls them; None without distillation.
        tokens, following: inputs and targets (B, T).
    """
    precision = spec.protocol.precision
    if teacher is None:
        logits = logits_in(precision, device, mpo_core.logits_of, model, tokens)
        return nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())
    assert spec.heal is not None
    with torch.no_grad():
        expected = logits_in(precision, device, mpo_core.logits_of, teacher, tokens)
    logits = logits_in(precision, device, mpo_core.logits_of, model, tokens)
    return distillation_loss(logits, expected, spec.heal.temperature)


def distillation_loss(logits: Tensor, expected: Tensor, temperature: float) -> Tensor:
    """τ² · KL(softmax(expected / τ) ‖ softmax(logits / τ)) in nats, the mean over tokens.

    The factor τ² keeps the size of the gradient, which the temperature τ divides twice.

    Args:
        logits, expected: of the model and of its teacher, (B, T, V).
    Source: Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network, section 2.
    """
    ours, theirs = (nn.functional.log_softmax(each.flatten(0, 1) / temperature, dim=-1) for each in (logits, expected))
    return temperature**2 * nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
