"""The state of one run, and its steps: pure PyTorch, no Ray, no MLflow. Several seeds as one model: `stacked`.

A seed's result depends on the trial's configuration, the corpus and the seed. Its rounding also depends on the kind of
machine, the number of threads and the version of PyTorch, which every result records. If these are equal, on a CPU, an
interrupted and resumed run ends bit-identical to an uninterrupted one: batches are drawn by step number, and a
checkpoint holds the rest of the state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mpo_core
from study.spec.protocol import evaluation_steps
from study.spec.trial import TrialSpec
from study.training.average import WeightAverage
from study.training.bonds import BondChanges, Moments, NotFinite
from study.training.calibration import calibration_batches
from study.training.captured import DeviceStep
from study.training.checkpoints import Checkpoints
from study.training.corpus import Corpus
from study.training.freed_memory import return_freed_memory
from study.training.healing import freeze_unhealed, is_distilled, training_loss
from study.training.model import build_model
from study.training.optimisers import Optimiser, kind_of_optimiser, set_learning_rate, why_alone
from study.training.precision import logits_in, products_in
from study.training.randomness import generator
from study.training.schedules import learning_rate_at
from study.training.sweeps import move_centres, train_one_core
from study.training.weights import load_weights, weights_of
from study.training.windows import Windows, consecutive_windows

EVALUATION_TOKENS = 8192
"""Tokens per batch of the full validation: small enough for any memory, the same on every machine."""
EVALUATION_LOGITS = 1 << 26
"""Most logits of such a batch, which may therefore have fewer tokens."""


def evaluation_tokens(vocab_size: int) -> int:
    """Tokens per batch of the full validation, if a sequence is no longer."""
    return min(EVALUATION_TOKENS, EVALUATION_LOGITS // vocab_size)


class Diverged(Exception):
    """The loss or its gradient is no longer finite."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} is not finite at step {step}")
        self.what, self.step = what, step


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    precision: str = "float32",
) -> tuple[float, float]:
    """Token-weighted mean cross-entropy in nats and token accuracy (paper, Eq. 11) over (inputs, targets)."""
    loss, correct, n_tokens = 0.0, 0, 0
    for inputs, targets in batches:
        inputs, targets = inputs.to(device), targets.to(device)
        logits = logits_in(precision, device, mpo_core.logits_of, model, inputs)
        loss += nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        correct += int((logits.argmax(dim=-1) == targets).sum())
        n_tokens += targets.numel()
    return loss / n_tokens, correct / n_tokens


class Training:
    """State of one run: model, optimiser, step, learning curve, and the sums since the last evaluation."""

    def __init__(
        self,
        spec: TrialSpec,
        seed: int,
        corpus: Corpus,
        *,
        device: torch.device | str = "cpu",
        start_weights: dict[str, Tensor] | None = None,
        capture: bool = True,
    ) -> None:
        protocol, context = spec.protocol, spec.model.context
        self.spec, self.corpus, self.device = spec, corpus, device
        generator_for = partial(generator, seed, "init")
        model, self.compression = build_model(
            spec, corpus.vocab_size, generator_for, start_weights, calibration_batches(spec, seed, corpus), device
        )
        if spec.keep is not None:
            return_freed_memory()  # the statistics, and what the compression took
        freeze_unhealed(model, spec)
        if protocol.recompute:
            mpo_core.recompute_blocks(model)
        self.model = model.to(device)
        self._teacher: nn.Module | None = None
        if is_distilled(spec):  # built again for every process, so it is in no checkpoint
            uncompressed = spec.model_copy(update={"family": "dense"})
            teacher, _ = build_model(uncompressed, corpus.vocab_size, generator_for, start_weights)
            self._teacher = teacher.to(device).eval().requires_grad_(False)
        self._is_captured = capture and why_alone(spec) is None and torch.device(device).type == "cuda"
        self._begin_optimiser()
        purpose = "data" if spec.start is None else "fine-tune data"
        self.training_windows = Windows(corpus.train, protocol.steps, protocol.batch_size, context, seed, purpose)
        self._evaluation_steps = evaluation_steps(protocol)
        n_predicted = len(corpus.validation) - 1
        self._bits_per_byte_of_loss = n_predicted / (math.log(2) * corpus.n_predicted_bytes)
        self.sampled_windows = Windows(
            corpus.validation,
            len(self._evaluation_steps) * protocol.sampled_eval_batches,
            protocol.sampled_eval_batch_size,
            context,
            seed,
            "sampled evaluation",
        )
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0
        self.failure: Diverged | None = None
        self._loss_sum, self._loss_count = 0.0, 0
        self._bond_changes = None if spec.bonds is None else BondChanges(spec, seed, corpus, self.model)
        self._average = None if protocol.ema is None else WeightAverage(self.parameters, protocol.ema)

    def run(
        self,
        checkpoints: Checkpoints | None = None,
        checkpoint_seconds: float = math.inf,
        on_evaluation: Callable[[dict[str, float]], None] = lambda row: None,
        until: int | None = None,
    ) -> None:
        """Train from the current step to the last step, or to step `until`, whose checkpoint is kept.

        Raises:
            Diverged: the loss or the gradient is not finite.
        """
        if self.failure is not None:
            raise self.failure  # recorded in a checkpoint
        with products_in(self.spec.protocol.precision):
            self._run(checkpoints, checkpoint_seconds, on_evaluation, until)

    def _run(
        self,
        checkpoints: Checkpoints | None,
        checkpoint_seconds: float,
        on_evaluation: Callable[[dict[str, float]], None],
        until: int | None,
    ) -> None:
        begun, saved = time.monotonic() - self.seconds, time.monotonic()
        while True:
            if self.evaluation_is_due:
                self.curve.append(self._evaluation())
                on_evaluation(self.curve[-1])
            self.seconds = time.monotonic() - begun
            if self.step == self.spec.protocol.steps:
                return
            pauses = until is not None and self.step >= until  # a checkpoint may be ahead of an older ledger
            if checkpoints is not None and (pauses or time.monotonic() - saved >= checkpoint_seconds):
                checkpoints.save(self.step, *self.state())
                saved = time.monotonic()
            if pauses:
                return
            self.optimiser_step()

    def _begin_optimiser(self, moments: Moments | None = None) -> None:
        """Make the optimiser of the model as it is now, with these moments of its parameters."""
        kind = kind_of_optimiser(self.spec)
        self.parameters = list(self.model.parameters())
        self.optimiser: Optimiser = kind.make(kind.groups(self.model, self.spec), self.device)
        if moments:
            begun = self.optimiser.state_dict()
            state = {at: moments[each] for at, each in enumerate(self._in_order()) if each in moments}
            self.optimiser.load_state_dict({"state": state, "param_groups": begun["param_groups"]})
        self._device_step = DeviceStep(self._is_captured)

    def _in_order(self) -> list[Tensor]:
        """The parameters in the order of the optimiser's numbers."""
        return [parameter for group in self.optimiser.param_groups for parameter in group["params"]]

    def _moments(self) -> Moments:
        """The optimiser's state of each parameter that it has one of; the tensors are its own."""
        state = self.optimiser.state_dict()["state"]
        return {each: state[at] for at, each in enumerate(self._in_order()) if at in state}

    @property
    def bonds(self) -> dict[str, list[list[int]]]:
        """For each layer whose bonds change, [step, bonds between its cores] of the start and of each change."""
        return {} if self._bond_changes is None else self._bond_changes.bonds

    @property
    def evaluation_is_due(self) -> bool:
        """Whether the model is to be evaluated at this step and has not been yet."""
        return self.step in self._evaluation_steps and (not self.curve or self.curve[-1]["step"] < self.step)

    def optimiser_step(self) -> None:
        """Draw the step's batch and update the parameters once; before it, change bonds or cores whose turn it is.

        Raises:
            Diverged: the loss, the gradient or a core is not finite.
        """
        if self._bond_changes is not None and self.step in self._bond_changes.steps:
            try:
                moments = self._bond_changes.change(self.model, self.step, self._moments(), self.device)
            except NotFinite:
                raise Diverged("the loss, or a value behind it,", self.step) from None
            self._begin_optimiser(moments)
        if (sweep := self.spec.sweep) is not None:
            if self.step % sweep.every == 0:
                try:
                    move_centres(self.model, sweep, self.step, self._moments())
                except NotFinite:
                    raise Diverged("a core", self.step) from None
            train_one_core(self.model, sweep, self.step)
        inputs, targets = self.training_windows.batch(self.step)
        values = self._device_step.gradients(self._gradients, inputs.to(self.device), targets.to(self.device))
        set_learning_rate(self.optimiser, learning_rate_at(self.step, self.spec.protocol))
        self.note_step(*values.tolist())
        self._device_step.update(self.optimiser.step)
        if self._average is not None:
            self._average.update(self.step)

    def release(self) -> None:
        """Free what only further steps need: gradients, moments, captured steps and the teacher."""
        for parameter in self.parameters:
            parameter.grad = None
        del self.optimiser, self._device_step, self._teacher

    def _gradients(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Loss and gradient norm, (2,); leaves the clipped gradient in the parameters. Never waits for a GPU."""
        protocol = self.spec.protocol
        n_parts = protocol.gradient_accumulation
        self.optimiser.zero_grad()
        losses = []
        for tokens, following in zip(inputs.chunk(n_parts), targets.chunk(n_parts), strict=True):
            loss = training_loss(self.spec, self.model, self._teacher, tokens, following, self.device) / n_parts
            loss.backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.parameters, protocol.grad_clip)
        return torch.stack([torch.stack(losses).sum(), norm])

    def note_step(self, loss: float, norm: float) -> None:
        """Count the optimiser step that follows from this loss and gradient norm.

        Raises:
            Diverged: one of them is not finite, so there is no step.
        """
        for what, value in (("the training loss", loss), ("the gradient's norm", norm)):
            if not math.isfinite(value):
                raise Diverged(what, self.step)
        self._loss_sum += loss
        self._loss_count += 1
        self.step += 1

    def _evaluation(self) -> dict[str, float]:
        self.model.eval()
        how = self.device, self.spec.protocol.precision
        full = evaluate(self.model, self.validation_batches(), *how)
        sampled = evaluate(self.model, map(self.sampled_windows.batch, self.sampled_batches()), *how)
        of_average = {}
        if self._average is not None:
            with self._average.in_the_model():
                loss, accuracy = evaluate(self.model, self.validation_batches(), *how)
            of_average = {"ema_val_loss": loss, "ema_val_acc": accuracy}
        self.model.train()
        return self.row(full, sampled) | of_average

    def validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole validation split."""
        context = self.spec.model.context
        n_sequences = max(1, evaluation_tokens(self.corpus.vocab_size) // context)
        return consecutive_windows(self.corpus.validation, context, n_sequences)

    def sampled_batches(self) -> range:
        """Indices of this step's batches in `sampled_windows`."""
        n_batches = self.spec.protocol.sampled_eval_batches
        first = self._evaluation_steps.index(self.step) * n_batches
        return range(first, first + n_batches)

    def row(self, full: tuple[float, float], sampled: tuple[float, float]) -> dict[str, float]:
        """A row of the learning curve, from (loss, accuracy) pairs; with the names of `run_schema.METRICS` and "step".

        Raises:
            Diverged: a loss is not finite.
        """
        (val_loss, val_acc), (sampled_loss, sampled_acc) = full, sampled
        protocol, context = self.spec.protocol, self.spec.model.context
        if not (math.isfinite(val_loss) and math.isfinite(sampled_loss)):
            raise Diverged("the validation loss", self.step)
        row = {
            "step": self.step,
            "val_loss": val_loss,
            "val_acc": val_acc,
            "bits_per_byte": val_loss * self._bits_per_byte_of_loss,
            "val_loss_sampled": sampled_loss,
            "val_acc_sampled": sampled_acc,
            "learning_rate": learning_rate_at(self.step, protocol),
            "tokens": self.step * protocol.batch_size * context,
        }
        if self._loss_count:  # before the first step there is no training loss
            row["train_loss"] = self._loss_sum / self._loss_count
        self._loss_sum, self._loss_count = 0.0, 0
        return row

    # Checkpoints --------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain content from which `restore` continues bit-identically."""
        tensors = {f"model.{name}": tensor for name, tensor in weights_of(self.model).items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": tensor for name, tensor in moments.items()}
        if self._average is not None:
            tensors |= {f"average.{index}": value for index, value in enumerate(self._average.values)}
        names = ("step", "curve", "seconds", "_loss_sum", "_loss_count")
        content = {name: getattr(self, name) for name in names} | ({"bonds": self.bonds} if self.bonds else {})
        return tensors, content | {"failure": self.failure and [self.failure.what, self.failure.step]}

    def restore(self, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        load_weights(self.model, model, bonds_differ=self._bond_changes is not None)
        if self._bond_changes is not None:
            self._bond_changes.bonds = content["bonds"]
            self._begin_optimiser()  # the parameters are others
        if self._average is not None:
            for index, value in enumerate(self._average.values):
                value.copy_(tensors[f"average.{index}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
        optimiser = self.optimiser.state_dict()
        self.optimiser.load_state_dict({"state": moments, "param_groups": optimiser["param_groups"]})
        self._device_step = DeviceStep(self._is_captured)  # moments and rates are new tensors
        for name, value in content.items():
            if name != "bonds":
                setattr(self, name, Diverged(*value) if name == "failure" and value else value)
