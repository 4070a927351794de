"""Collect the second moments of a model's layers over calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpo_core.compression.dense_layers import find_dense_layers
from mpo_core.compression.recording import backward, call, recorded
from mpo_core.compression.statistics import Part, Statistics
from mpo_core.evaluating import evaluating


def next_token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats of every next token, (B, T - 1), for tokens (B, T).

    The model returns logits (B, T, V), or an object with the attribute `logits` as those of Hugging Face do.
    """
    outputs = model(tokens)
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model must return logits, or an object with `logits`, but got {type(outputs).__name__}")
    logits = logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return losses.reshape(tokens.shape[0], -1)


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    modules: Sequence[str] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    held_out: float = 0.2,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Run the model over the batches and sum, for each layer, the second moments that the metrics need.

    The model runs in evaluation mode, and is put back as it was. Padding tokens count like any other, unless a
    `forward` leaves them out.

    Args:
        batches: per call of the model, a tensor or sequence of arguments, or a mapping of keyword arguments.
        loss: called as loss(model, batch) instead of the model; returns one loss per predicted token, of any shape,
            such as `next_token_losses`. Its gradients at the outputs of the layers give S. Default: G alone.
        modules: names of modules that are called with one tensor (..., in_features) as their first argument. Default:
            every layer that `compress` can replace. Gradients take out_features² numbers for each layer, so leave out
            large ones that stay dense.
        forward: called as forward(model, batch) instead of the model itself, if there is no loss.
        held_out: share of the batches that no layer is fitted to, and on which errors are measured as well: of ten
            batches and 0.2 the fifth and the tenth. The first batch is never one.
        progress: called after each batch with the number of batches that are done.
    Raises:
        ValueError: no batches; inputs or gradients that are not finite, with the layer's name; a loss that is not one
            tensor of losses; or `held_out` is not from 0 to below 1.
        AttributeError: a name that the model does not have.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"`0 <= held_out < 1` must hold, but got held_out={held_out}")
    if isinstance(batches, Tensor):
        raise ValueError("`batches` must be a sequence of batches, but got one tensor; put it in a list")
    names = _replaceable(model) if modules is None else list(modules)
    # A module under two names is called once.
    names = list({id(model.get_submodule(name)): name for name in reversed(names)}.values())[::-1]
    parts = Part(), Part()
    n_batches = 0
    with evaluating(model), torch.set_grad_enabled(loss is not None), _without_gradients(model):
        for batch in batches:
            is_held_out = n_batches > 0 and int((n_batches + 1) * held_out + 1e-9) > int(n_batches * held_out + 1e-9)
            part = parts[is_held_out]
            with recorded(model, names, part, loss is not None):
                if loss is None:
                    (forward or call)(model, batch)
                else:
                    backward(loss(model, batch), part)
            n_batches += 1
            if progress is not None:
                progress(n_batches)
    if n_batches == 0:
        raise ValueError("calibration needs at least one batch, but got none")
    return Statistics(*parts)


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient inside: only those at the outputs of layers are needed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _replaceable(model: nn.Module) -> list[str]:
    found = [dense for dense in find_dense_layers(model, "*", ()) if dense.reason is None]
    return [name for dense in found for name in (dense.name, *dense.sharers)]
