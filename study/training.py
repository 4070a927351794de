"""Train one trial × one seed: pure PyTorch, no Ray, no MLflow.

What a seed's result is depends on the trial's configuration, the corpus and the seed; to rounding, also on the kind of
machine, the number of threads and the version of PyTorch, which every result names. With these equal, on a CPU, an
interrupted and resumed run ends bit-identical to an undisturbed one: batches are drawn by step number, and a checkpoint
holds all the rest.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mpo_core
from analysis import run_schema as schema
from study.config import Protocol
from study.corpus import Corpus, Windows, consecutive_windows
from study.randomness import generator
from study.storage import Checkpoints
from study.trial import SeedResult, TrialSpec, build_model, evaluation_steps, now

EVALUATION_TOKENS = 8192
"""Tokens in one batch of the full validation: small enough for any memory, the same on every machine."""


class Diverged(Exception):
    """The loss or its gradient is no longer finite."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} is not finite at step {step}")
        self.step = step


def learning_rate_at(step: int, protocol: Protocol) -> float:
    """Linear warm-up to the peak, then a cosine that reaches 0 at the last step (paper, section 4.2)."""
    if step < protocol.warmup_steps:
        return protocol.learning_rate * (step + 1) / protocol.warmup_steps
    progress = (step - protocol.warmup_steps) / (protocol.steps - protocol.warmup_steps)
    return protocol.learning_rate * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Token-weighted mean cross-entropy in nats and token accuracy (paper, Eq. 11) over (inputs, targets)."""
    loss, correct, n_tokens = 0.0, 0, 0
    for inputs, targets in batches:
        inputs, targets = inputs.to(device), targets.to(device)
        logits = model(inputs)
        loss += nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        correct += int((logits.argmax(dim=-1) == targets).sum())
        n_tokens += targets.numel()
    return loss / n_tokens, correct / n_tokens


class Training:
    """One run's state: model, optimiser, step, learning curve, and the sums since the last evaluation."""

    def __init__(
        self,
        spec: TrialSpec,
        seed: int,
        corpus: Corpus,
        *,
        device: torch.device | str = "cpu",
        teacher_weights: dict[str, Tensor] | None = None,
    ) -> None:
        protocol, context = spec.protocol, spec.model.context
        self.spec, self.corpus, self.device = spec, corpus, device
        calibration = []
        if spec.refinement in ("whitened", "als"):
            windows = Windows(
                corpus.train, protocol.calibration_batches, protocol.batch_size, context, seed, "calibration"
            )
            calibration = [windows.batch(index)[0] for index in range(protocol.calibration_batches)]
        model, self.compression = build_model(
            spec, len(corpus.vocabulary), partial(generator, seed, "init"), teacher_weights, calibration
        )
        self.model = model.to(device)
        self.parameters = list(self.model.parameters())
        groups = mpo_core.param_groups(
            self.model,
            protocol.learning_rate,
            rule=spec.lr_rule or "uniform",
            weight_decay=protocol.weight_decay,
            decay=spec.decay or "parameter",
        )
        self.optimiser = torch.optim.AdamW(groups, betas=protocol.betas, fused=True)
        purpose = "data" if spec.teacher is None else "fine-tune data"
        self._train = Windows(corpus.train, protocol.steps, protocol.batch_size, context, seed, purpose)
        self._evaluation_steps = evaluation_steps(protocol)
        self._sampled = Windows(
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
        self._loss_sum, self._loss_count = 0.0, 0

    def run(
        self,
        checkpoints: Checkpoints | None = None,
        checkpoint_seconds: float = math.inf,
        on_evaluation: Callable[[dict[str, float]], None] = lambda row: None,
    ) -> None:
        """Train from where the state stands to the last step.

        Raises:
            Diverged: the loss or the gradient is not finite.
        """
        begun, saved = time.monotonic() - self.seconds, time.monotonic()
        while True:
            if self.step in self._evaluation_steps and (not self.curve or self.curve[-1]["step"] < self.step):
                self.curve.append(self._evaluation())
                on_evaluation(self.curve[-1])
            self.seconds = time.monotonic() - begun
            if self.step == self.spec.protocol.steps:
                return
            if checkpoints is not None and time.monotonic() - saved >= checkpoint_seconds:
                checkpoints.save(self.step, *self.state())
                saved = time.monotonic()
            self.optimiser_step()

    def optimiser_step(self) -> None:
        """Draw the step's batch, and update the parameters once."""
        inputs, targets = self._train.batch(self.step)
        logits = self.model(inputs.to(self.device))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.to(self.device).flatten())
        self.optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.spec.protocol.grad_clip)
        for what, value in (("the training loss", loss), ("the gradient's norm", norm)):
            if not math.isfinite(value.item()):
                raise Diverged(what, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = group["lr_mult"] * learning_rate_at(self.step, self.spec.protocol)
        self.optimiser.step()
        self._loss_sum += loss.item()
        self._loss_count += 1
        self.step += 1

    def _evaluation(self) -> dict[str, float]:
        """One row of the learning curve; keys are those of `run_schema.CURVES`, and "step"."""
        self.model.eval()
        protocol, context = self.spec.protocol, self.spec.model.context
        windows = consecutive_windows(self.corpus.validation, context, max(1, EVALUATION_TOKENS // context))
        val_loss, val_acc = evaluate(self.model, windows, self.device)
        first = self._evaluation_steps.index(self.step) * protocol.sampled_eval_batches
        sampled = map(self._sampled.batch, range(first, first + protocol.sampled_eval_batches))
        sampled_loss, sampled_acc = evaluate(self.model, sampled, self.device)
        self.model.train()
        if not (math.isfinite(val_loss) and math.isfinite(sampled_loss)):
            raise Diverged("the validation loss", self.step)
        row = {
            "step": self.step,
            "val_loss": val_loss,
            "val_acc": val_acc,
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
        """Tensors and plain content from which `restore` continues bit for bit."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": tensor for name, tensor in moments.items()}
        names = ("step", "curve", "seconds", "_loss_sum", "_loss_count")
        return tensors, {name: getattr(self, name) for name in names}

    def restore(self, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        self.model.load_state_dict(model)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
        optimiser = self.optimiser.state_dict()
        self.optimiser.load_state_dict({"state": moments, "param_groups": optimiser["param_groups"]})
        for name, value in content.items():
            setattr(self, name, value)


def train_seed(
    spec: TrialSpec,
    seed: int,
    corpus: Corpus,
    *,
    trial: int = 0,
    device: torch.device | str = "cpu",
    teacher_weights: dict[str, Tensor] | None = None,
    teacher_tokens: int = 0,
    rel_error_chis: Sequence[int] = (),
    checkpoints: Checkpoints | None = None,
    checkpoint_seconds: float = math.inf,
    on_evaluation: Callable[[dict[str, float]], None] = lambda row: None,
) -> tuple[SeedResult, dict[str, Tensor]]:
    """Train one seed of a trial from the start, or from its newest checkpoint.

    Args:
        teacher_weights, teacher_tokens: of the trained dense model that a spec with a teacher starts from.
        rel_error_chis: caps at which a dense model's layers are decomposed, before and after training.
        on_evaluation: called with every row of the learning curve.
    Returns:
        The result and the trained weights; a run that diverges gives a failed result, with the curve up to there.
    """
    started = now()
    training = Training(spec, seed, corpus, device=device, teacher_weights=teacher_weights)
    rel_errors = _rel_errors(training, rel_error_chis, "init")
    checkpoint = checkpoints.load() if checkpoints is not None else None
    if checkpoint is not None:
        training.restore(*checkpoint)
    failure: Diverged | None = None
    try:
        training.run(checkpoints, checkpoint_seconds, on_evaluation)
    except Diverged as error:
        failure = error
    result = SeedResult(
        trial=trial,
        seed=seed,
        state="complete" if failure is None else "failed",
        started=started,
        ended=now(),
        final=_final_metrics(training, teacher_tokens) if failure is None else {},
        curve=training.curve,
        rel_errors=rel_errors | _rel_errors(training, rel_error_chis, "trained") if failure is None else rel_errors,
        failure=None if failure is None else f"diverged: {failure}",
        failure_step=None if failure is None else failure.step,
        ran_on=_ran_on(device),
    )
    return result, training.model.state_dict()


def _ran_on(device: torch.device | str) -> dict[str, str]:
    """What results depend on to rounding; the keys of `run_schema.RAN_ON`."""
    kind = torch.device(device).type
    return {
        schema.DEVICE: torch.cuda.get_device_name(device) if kind == "cuda" else platform.machine() or kind,
        schema.THREADS: str(torch.get_num_threads()),
        schema.TORCH: torch.__version__,
    }


def _final_metrics(training: Training, teacher_tokens: int) -> dict[str, float]:
    curve, last = training.curve, training.curve[-1]
    best = min(curve, key=lambda row: row["val_loss"])
    names = ("val_loss", "val_acc", "val_loss_sampled", "val_acc_sampled", "train_loss")
    return {f"final/{name}": last[name] for name in names} | {
        "best/val_loss": best["val_loss"],
        "best/val_acc": max(row["val_acc"] for row in curve),
        "best/step": best["step"],
        "train_seconds": training.seconds,
        "train_tokens": training.spec.train_tokens,
        "total_tokens": training.spec.train_tokens + teacher_tokens,
    }


def _rel_errors(training: Training, chis: Sequence[int], when: str) -> dict[str, float]:
    if training.spec.family == "dense":
        errors = mpo_core.rel_errors(training.model, chis) if chis else {}
        return {schema.rel_error_key(when, chi, layer): error for (chi, layer), error in errors.items()}
    if when == "init" and training.spec.teacher is not None and training.compression is not None:
        assert training.spec.chi is not None
        return {
            schema.rel_error_key("compressed", training.spec.chi, row.name): row.rel_error
            for row in training.compression.rows
            if row.rel_error is not None
        }
    return {}
