"""Activation checkpointing: save memory by computing the activations of a block again in the backward pass."""

from __future__ import annotations

from typing import Any

from torch import nn

from mpo_core.models.picogpt import PicoGPT

# Nothing in a model draws random numbers, so the state of the generators need not be kept.
CHECKPOINT = {"use_reentrant": False, "preserve_rng_state": False}
"""Options of `torch.utils.checkpoint.checkpoint`."""
METHODS = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
"""Names of a model's own method that takes such options; Hugging Face has both, the second until its version 6."""


def recompute_blocks(model: nn.Module) -> None:
    """From now on keep only the inputs of each block for the backward pass, which computes the block again.

    Values and gradients stay the same. In exchange for a further forward pass, activations take the memory of one block
    and of all blocks' inputs, instead of that of all blocks. Passes without gradients do not change.

    Args:
        model: a PicoGPT; or a model with one of the `METHODS`, as those of Hugging Face and perhaps a user's own.
    Raises:
        ValueError: another model, or one of Hugging Face that cannot do it.
    Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost.
    """
    if isinstance(model, PicoGPT):
        model.checkpoint_options = CHECKPOINT
        return
    enable: Any = next(filter(None, (getattr(model, name, None) for name in METHODS)), None)
    if enable is None:
        raise ValueError(
            f"{type(model).__name__} cannot compute its activations again: it has no method `{METHODS[0]}(options)`"
        )
    enable(dict(CHECKPOINT))
