"""Train several seeds of a trial as one model whose parameters have a first dimension of seeds.

The models of a study are far too small to fill a GPU one at a time. In a stack every seed keeps its own initial values,
data order, gradient clipping, moments, learning curve and divergence. Its result equals, up to rounding, the one it has
alone: a batched matrix product may add the same terms in another order.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from study.training.captured import DeviceStep
from study.training.checkpoints import Checkpoints
from study.training.optimisers import kind_of_optimiser, set_learning_rate, why_alone
from study.training.precision import logits_in, products_in
from study.training.schedules import learning_rate_at
from study.training.seeds_as_batch import SeedsAsBatch
from study.training.train import Diverged, Training
from study.training.windows import StackedWindows


class StackedTraining:
    """Trainings of the same spec at the same step, trained together.

    Each keeps its own step, curve, sums and failure. Parameters and moments are in the stack; they are copied back to a
    training when it is checkpointed or over.

    Args:
        trainings: by seed; on the CPU, whatever the device of the stack. `optimisers.why_alone` must find no
            reason against a stack.
        checkpoints: by seed, for all seeds or for none.
        capture: replay the step on a GPU from CUDA graphs (`study.training.captured`).
    Raises:
        ValueError: the model or the optimiser cannot train several seeds as one model.
    """

    def __init__(
        self,
        trainings: Mapping[int, Training],
        device: torch.device | str,
        checkpoints: Mapping[int, Checkpoints],
        capture: bool = True,
    ) -> None:
        self._trainings = dict(trainings)
        self._device, self._checkpoints = device, checkpoints
        self._is_captured = capture and torch.device(device).type == "cuda"
        self._has_diverged = False
        if (alone := why_alone(self._first.spec)) is not None:
            raise ValueError(f"seeds cannot be trained as one model with {alone}")
        self._model = copy.deepcopy(self._first.model).to("meta")
        self._build()

    @property
    def _first(self) -> Training:
        """One of the trainings still in the stack: all have the same spec and step."""
        return next(iter(self._trainings.values()))

    def _build(self) -> None:
        """Stack the current parameters, moments and data of the trainings."""
        every = list(self._trainings.values())
        members = [(_parameters(t), dict(t.model.named_buffers()), _moments(t)) for t in every]
        self._parameters: dict[str, Tensor] = {}
        for name, parameter in members[0][0].items():
            stacked = self._stack(parameters[name].detach() for parameters, _, _ in members)
            self._parameters[name] = stacked.requires_grad_(parameter.requires_grad)
        self._buffers = {name: self._stack(buffers[name] for _, buffers, _ in members) for name in members[0][1]}
        names = {id(parameter): name for name, parameter in members[0][0].items()}
        self._optimiser = kind_of_optimiser(every[0].spec).make(
            (
                group | {"params": [self._parameters[names[id(parameter)]] for parameter in group["params"]]}
                for group in every[0].optimiser.param_groups
            ),
            self._device,
        )
        self._device_step = DeviceStep(self._is_captured)
        for name, stacked in self._parameters.items():
            moments = [state[parameters[name]] for parameters, _, state in members if parameters[name] in state]
            if moments:
                self._optimiser.state[stacked] = {
                    key: value.to(self._device, copy=True)
                    if key == "step"
                    else self._stack(each[key] for each in moments)
                    for key, value in moments[0].items()
                }
        self._training_windows = StackedWindows([training.training_windows for training in every], self._device)
        self._sampled_windows = StackedWindows([training.sampled_windows for training in every], self._device)

    def _stack(self, tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(tensors)).to(self._device)

    # Training -----------------------------------------------------------------------------------------------------

    def run(
        self,
        checkpoint_seconds: float,
        on_evaluation: Callable[[int, dict[str, float]], None],
        until: int | None = None,
    ) -> None:
        """Train as `Training.run` does; a seed that diverges leaves the stack and keeps its failure."""
        with products_in(self._first.spec.protocol.precision):
            self._run(checkpoint_seconds, on_evaluation, until)

    def _run(
        self, checkpoint_seconds: float, on_evaluation: Callable[[int, dict[str, float]], None], until: int | None
    ) -> None:
        clock = saved = time.monotonic()
        while self._trainings:
            if self._first.evaluation_is_due:
                self._evaluate(on_evaluation)
            elapsed, clock = time.monotonic() - clock, time.monotonic()
            for training in self._trainings.values():
                training.seconds += elapsed / len(self._trainings)
            if not self._trainings or self._first.step == self._first.spec.protocol.steps:
                break
            # Save also if a seed has just left, so that the others continue without it after an interruption, as here.
            pauses = until is not None and self._first.step >= until
            if pauses or self._has_diverged or time.monotonic() - saved >= checkpoint_seconds:
                self._save()
                saved = time.monotonic()
            if pauses:
                break
            self.optimiser_step()
        for row, training in enumerate(self._trainings.values()):
            self._write_back(row, training)

    def optimiser_step(self) -> None:
        """Draw each seed's batch and update its parameters once."""
        protocol, step = self._first.spec.protocol, self._first.step
        failures = {}
        values = self._device_step.gradients(self._gradients, *self._training_windows.batch(step)).tolist()
        for seed, loss, norm in zip(self._trainings, *values, strict=True):
            try:
                self._trainings[seed].note_step(loss, norm)
            except Diverged as failure:
                failures[seed] = failure
        self._remove(failures)
        if self._trainings:
            set_learning_rate(self._optimiser, learning_rate_at(step, protocol))
            self._device_step.update(self._optimiser.step)

    def _gradients(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Losses and gradient norms, (2, seeds); leaves clipped gradients in the parameters. Never waits for a GPU."""
        protocol = self._first.spec.protocol
        n_parts = protocol.gradient_accumulation
        self._optimiser.zero_grad()
        parts = []
        for tokens, following in zip(inputs.chunk(n_parts, dim=1), targets.chunk(n_parts, dim=1), strict=True):
            losses = _cross_entropy(self._logits(tokens, 0), following).mean(dim=1) / n_parts
            losses.sum().backward()  # no seed's loss depends on another's parameters
            parts.append(losses.detach())
        norms = clip_grads_(list(self._parameters.values()), protocol.grad_clip)
        return torch.stack([torch.stack(parts).sum(dim=0), norms])

    def _logits(self, tokens: Tensor, tokens_dim: int | None) -> Tensor:
        """Logits (seeds, B, T, V) for tokens (seeds, B, T), or (B, T) if tokens_dim is None."""

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], tokens: Tensor) -> Tensor:
            return functional_call(self._model, (parameters, buffers), (tokens,))

        all_of_them = vmap(one, in_dims=(0, 0, tokens_dim))
        with SeedsAsBatch():
            precision = self._first.spec.protocol.precision
            return logits_in(precision, self._device, all_of_them, self._parameters, self._buffers, tokens)

    def _remove(self, failures: Mapping[int, Diverged]) -> None:
        """Remove diverged seeds from the stack; the other seeds keep their gradients and moments."""
        if not failures:
            return
        for row, (seed, training) in enumerate(self._trainings.items()):
            self._write_back(row, training)
            if seed in failures:
                training.failure = failures[seed]
                if seed in self._checkpoints:  # resumed alone, it might diverge at another step
                    self._checkpoints[seed].save(training.step, *training.state())
        self._has_diverged = True
        kept = [row for row, seed in enumerate(self._trainings) if seed not in failures]
        self._trainings = {seed: training for seed, training in self._trainings.items() if seed not in failures}
        if kept:
            grads = {name: stacked.grad for name, stacked in self._parameters.items()}
            self._build()
            for name, grad in grads.items():
                self._parameters[name].grad = None if grad is None else grad[kept]

    # Evaluation ---------------------------------------------------------------------------------------------------

    def _evaluate(self, on_evaluation: Callable[[int, dict[str, float]], None]) -> None:
        """Add a row to every learning curve."""
        first = self._first
        self._model.eval()
        full = self._loss_and_accuracy(first.validation_batches(), None)
        sampled = self._loss_and_accuracy(map(self._sampled_windows.batch, first.sampled_batches()), 0)
        self._model.train()
        failures = {}
        for (seed, training), *measured in zip(self._trainings.items(), full, sampled, strict=True):
            try:
                training.curve.append(training.row(*measured))
            except Diverged as failure:
                failures[seed] = failure
            else:
                on_evaluation(seed, training.curve[-1])
        self._remove(failures)

    @torch.no_grad()
    def _loss_and_accuracy(
        self, batches: Iterable[tuple[Tensor, Tensor]], tokens_dim: int | None
    ) -> list[tuple[float, float]]:
        """As `study.training.train.evaluate`, for each seed; tokens_dim is None if all see the same batches."""
        n_seeds, n_tokens = len(self._trainings), 0
        loss = torch.zeros(n_seeds, dtype=torch.float64, device=self._device)
        n_correct = torch.zeros(n_seeds, dtype=torch.int64, device=self._device)
        for inputs, targets in batches:
            logits = self._logits(inputs.to(self._device), tokens_dim)
            targets = targets.to(self._device).expand(logits.shape[:-1])
            loss += _cross_entropy(logits, targets).sum(dim=1)
            n_correct += (logits.argmax(dim=-1) == targets).flatten(1).sum(dim=1)
            n_tokens += targets[0].numel()
        return [(a / n_tokens, b / n_tokens) for a, b in zip(loss.tolist(), n_correct.tolist(), strict=True)]

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self._has_diverged = False
        for row, (seed, training) in enumerate(self._trainings.items()):
            if seed in self._checkpoints:
                self._write_back(row, training)
                self._checkpoints[seed].save(training.step, *training.state())

    @torch.no_grad()
    def _write_back(self, row: int, training: Training) -> None:
        """Copy a training's parameters and moments back to it, as if it had been trained alone."""
        for name, parameter in _parameters(training).items():
            stacked = self._parameters[name]
            parameter.copy_(stacked[row])
            if stacked in self._optimiser.state:
                _moments(training)[parameter] = {
                    key: (value if key == "step" else value[row]).to(parameter.device, copy=True)
                    for key, value in self._optimiser.state[stacked].items()
                }


def clip_grads_(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, applied separately to each entry of the first dimension.

    Returns:
        Norms before clipping, (n,).
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.linalg.vector_norm(torch.cat([grad.flatten(1) for grad in grads], dim=1), dim=1)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factors.view(-1, *[1] * (grad.ndim - 1)))
    return norms


def _parameters(training: Training) -> dict[str, nn.Parameter]:
    return dict(training.model.named_parameters())


def _moments(training: Training) -> dict[Tensor, dict[str, Tensor]]:
    """State of a training's optimiser, by parameter."""
    assert isinstance(training.optimiser, torch.optim.Optimizer)
    return training.optimiser.state


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (seeds, B · T) of logits (seeds, B, T, V) and targets (seeds, B, T)."""
    losses = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(logits), -1)
