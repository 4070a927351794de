"""Collect the second moments of a model's layers over calibration batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpo_core.calibration.block_chain import Blocks, autocast_modes
from mpo_core.calibration.block_statistics import BlockCollection
from mpo_core.calibration.collection_folder import CollectionFolder, digest_of_model
from mpo_core.calibration.moments import Part
from mpo_core.calibration.recording import NO_BATCHES, backward, call, is_held_out, recorded
from mpo_core.calibration.statistics import Statistics
from mpo_core.models.dense_layers import replaceable_layers
from mpo_core.models.evaluating import evaluating


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
    blocks: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Run the model over the batches and sum, for each layer, the second moments that the metrics need.

    The model runs in evaluation mode, and is put back as it was. Padding tokens count like any other, unless a
    `forward` leaves them out.

    With `blocks` and `folder`, memory holds the model, the moments of one block, and what one block computes of one
    batch; the folder gets the rest. Each block is computed twice, and the statistics are the same. A run that was
    interrupted goes on if it is started again with the same arguments. It is for models that consist of something
    before the blocks, the blocks one after the other, and something after them. It is refused if a gradient would be
    lost: if a measured layer comes before the blocks, or if the loss depends on a block other than by the next one.

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
        blocks: name of the nn.ModuleList or nn.Sequential that holds the blocks, such as "model.layers". Default: the
            moments of all layers are collected at once.
        folder: where the statistics are written block by block; `Statistics.load(folder)` opens them again. Until the
            end it also holds the inputs of all blocks for all batches, in the model's dtype.
        progress: called after each batch with the number of batches that are done. With `blocks`, a batch is done once
            for the whole model and once for each block: n_batches · (n_blocks + 1) in the end.
    Raises:
        ValueError: no batches; inputs or gradients that are not finite, with the layer's name; a loss that is not one
            tensor of losses; or `held_out` is not from 0 to below 1.
        ValueError: `blocks` without `folder`, or a model that cannot be done block by block; a folder of other
            arguments, batches or weights, or one that holds other files.
        AttributeError: a name that the model does not have.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"`0 <= held_out < 1` must hold, but got held_out={held_out}")
    if isinstance(batches, Tensor):
        raise ValueError("`batches` must be a sequence of batches, but got one tensor; put it in a list")
    names = _replaceable(model) if modules is None else list(modules)
    # A module under two names is called once.
    names = list({id(model.get_submodule(name)): name for name in reversed(names)}.values())[::-1]
    if (blocks is None) != (folder is None):
        raise ValueError("`blocks` and `folder` go together, but one of them is missing")

    def run(batch: Any, part: Part) -> None:
        if loss is None:
            (forward or call)(model, batch)
        else:
            backward(loss(model, batch), part)

    with evaluating(model), torch.set_grad_enabled(loss is not None), _without_gradients(model):
        if blocks is not None and folder is not None:
            found = Blocks(model, blocks, names)
            arguments = {
                "blocks": blocks,
                "modules": names,
                "held_out": held_out,
                "loss": _name_of(loss),
                "forward": _name_of(forward),
                "autocast": autocast_modes(),
                "model": digest_of_model(model),
            }
            begun = CollectionFolder(Path(folder), arguments, len(found.modules))
            progress = progress or (lambda n_batches: None)
            try:
                return BlockCollection(model, found, begun, run, loss is not None, held_out, progress).collect(batches)
            finally:
                begun.release()
        statistics = Statistics(Part(), Part())
        n_batches = 0
        for batch in batches:
            part = statistics.part(held_out=is_held_out(n_batches, held_out))
            with recorded(model, names, part, loss is not None):
                run(batch, part)
            n_batches += 1
            if progress is not None:
                progress(n_batches)
    if n_batches == 0:
        raise ValueError(NO_BATCHES)
    return statistics


def _name_of(function: Callable[..., object] | None) -> str | None:
    return None if function is None else getattr(function, "__qualname__", type(function).__qualname__)


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
    return [name for dense in replaceable_layers(model) for name in (dense.name, *dense.sharers)]
