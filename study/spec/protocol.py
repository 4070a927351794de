"""The protocol of a study file: how a model is trained and evaluated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from study.spec.values import (
    DecayFraction,
    OptimiserName,
    PositiveFloat,
    PositiveInt,
    ScheduleName,
    Steps,
    Strict,
    WideInt,
)

MAX_SEQUENCES = 500_000_000
"""Largest number of sequences in a run; the place of each in the text is drawn before training and takes 8 bytes."""
DECAY_FRACTION = 0.2
"""Default of `protocol.decay_fraction` (Hägele et al. 2024, section 3)."""


class Protocol(Strict):
    """How a model is trained and evaluated; an arm may override steps, schedule, optimiser and learning rates."""

    steps: Steps = Field(default=2000, description="Optimiser steps. 0: the start is compressed and evaluated.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=100, description="Steps of linear warm-up.")
    schedule: ScheduleName = Field(
        default="cosine",
        description="Learning rate after the warm-up: `cosine` falls to 0 at the last step; `wsd` stays at the peak, "
        "then falls linearly to 0.",
        exclude_if=lambda value: value == "cosine",  # a file without it is recorded as before there was a choice
    )
    decay_fraction: DecayFraction | None = Field(
        default=None,
        description="Share of the steps, at the end, in which the rate of `wsd` falls. The fall never begins before "
        f"the warm-up ends. Default: {DECAY_FRACTION}. Not allowed with `schedule: cosine`.",
        exclude_if=lambda value: value is None,
    )
    batch_size: WideInt = Field(default=32, description="Sequences per step.")
    gradient_accumulation: PositiveInt = Field(
        default=1,
        description="Number of equal parts in which the gradient of a batch is computed, one after another, to save "
        "memory. It must divide `batch_size`. The step is the same up to rounding.",
        exclude_if=lambda value: value == 1,
    )
    recompute: bool = Field(
        default=False,
        description="Keep only the inputs of every block for the backward pass, which computes its activations again, "
        "to save memory. Results stay the same, bit for bit on a CPU; a step takes about a third longer. A module of "
        "your own needs a method for it, see [Extending](extending.md#a-model).",
        exclude_if=lambda value: not value,
    )
    optimiser: OptimiserName = Field(
        default="adamw",
        description="`adamw` updates every parameter. `muon` updates the matrices, except the head's, and AdamW all "
        "other parameters; see [below](#optimisers).",
        exclude_if=lambda value: value == "adamw",
    )
    learning_rate: PositiveFloat = Field(
        default=3e-4, description="Peak learning rate; it falls to 0 at the last step."
    )
    embedding_learning_rate: PositiveFloat | None = Field(
        default=None,
        description="Peak learning rate of the embeddings; under `muon`, of all parameters that AdamW updates. "
        "Default: `learning_rate`.",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="AdamW's β₁, β₂. They do not affect Muon, whose momentum is 0.95."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.1, description="Weight decay of every parameter.")
    grad_clip: PositiveFloat = Field(default=1.0, description="Largest norm of the gradient.")
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        default="float32",
        description="Number format of matrix products. `tf32` needs a GPU. `bfloat16` runs forward passes under "
        "autocast, in training and evaluation; parameters, moments and loss stay float32.",
    )
    eval_every: PositiveInt = Field(
        default=100, description="Steps between evaluations. The first and the last step are always evaluated."
    )
    sampled_eval_batches: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=20,
        description="Random batches in the paper's validation estimate, which is recorded beside the full one.",
    )
    sampled_eval_batch_size: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=8, description="Sequences in each of those batches."
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Decay of an exponential moving average of the weights, such as 0.99: after each step a weight "
        "counts this much of what it counted before. The average is evaluated beside the last weights, as "
        "`ema_val_loss` and `ema_val_acc`, so evaluations take up to twice as long. Seeds are trained one by one. "
        "Default: no average.",
        exclude_if=lambda value: value is None,
    )
    rate_width: PositiveInt | None = Field(
        default=None,
        description="The `d_model` at which the learning rates hold. In a PicoGPT of another width, those of all "
        "matrices but the embeddings are multiplied by `rate_width` / `d_model`, so that rates tuned on a small model "
        "suit a wide one (µP; for compressed layers together with `lr_rule: mup`). Only for adamw. Default: rates are "
        "used as they are.",
        exclude_if=lambda value: value is None,
    )
    calibration_batches: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=8,
        description="Training batches over which `refinement: whitened` and `als` fit a layer's outputs, on which "
        "statistics for `keep` are collected, and on which each change of `bonds` is measured.",
    )

    @model_validator(mode="after")
    def _warmup_within_steps(self) -> Protocol:
        if self.warmup_steps >= self.steps > 0:
            raise ValueError(
                f"`warmup_steps < steps` must hold, but got warmup_steps={self.warmup_steps}, steps={self.steps}"
            )
        if self.steps * self.batch_size > MAX_SEQUENCES:
            raise ValueError(
                f"`steps` × `batch_size` must be at most {MAX_SEQUENCES:,}, but got {self.steps:,} × "
                f"{self.batch_size:,}"
            )
        return self

    @model_validator(mode="after")
    def _schedule_and_parts(self) -> Protocol:
        if self.schedule == "cosine" and self.decay_fraction is not None:
            raise ValueError("`decay_fraction` is not allowed with `schedule: cosine`, which falls from its peak on")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"`gradient_accumulation` must divide `batch_size`, but got batch_size={self.batch_size}, "
                f"gradient_accumulation={self.gradient_accumulation}"
            )
        return self

    @property
    def decay_share(self) -> float | None:
        """Share of the steps, at the end, in which the rate of `wsd` falls; None with another schedule."""
        return (self.decay_fraction or DECAY_FRACTION) if self.schedule == "wsd" else None


def evaluation_steps(protocol: Protocol) -> list[int]:
    """Steps before which the model is evaluated, including the first (0) and the last (after all steps)."""
    return sorted({*range(0, protocol.steps, protocol.eval_every), protocol.steps})
