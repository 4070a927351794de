"""Train one seed of a trial, or several as one model, from their checkpoints to their results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import mpo_core
from analysis import run_schema as schema
from study.spec.trial import SeedResult, TrialSpec, now
from study.training.checkpoints import Checkpoints
from study.training.corpus import Corpus
from study.training.model import dense_model
from study.training.precision import device_name, products_in
from study.training.program import this_program
from study.training.stacked import StackedTraining
from study.training.timing import times
from study.training.train import Diverged, Training
from study.training.weights import weights_of


@products_in("float32")
def train_seed(
    spec: TrialSpec,
    seed: int,
    corpus: Corpus,
    *,
    trial: int = 0,
    device: torch.device | str = "cpu",
    start_weights: dict[str, Tensor] | None = None,
    start_tokens: int = 0,
    rel_error_chis: Sequence[int] = (),
    checkpoints: Checkpoints | None = None,
    checkpoint_seconds: float = math.inf,
    capture: bool = True,
    timing: bool = False,
    on_evaluation: Callable[[dict[str, float]], None] = lambda row: None,
    until: int | None = None,
) -> tuple[SeedResult, dict[str, Tensor]]:
    """Train one seed of a trial from the start, or from its newest checkpoint.

    Before and after the training, and in decompositions of layers, all products are float32.

    Args:
        start_weights, start_tokens: weights and training tokens of the dense model that a spec with a start
            starts from.
        rel_error_chis: caps at which a dense model's layers are decomposed, before and after training.
        capture: replay the step on a GPU from CUDA graphs (`study.training.captured`).
        timing: whether the time of decoding and prefill is measured at the end (`study.training.timing`).
        on_evaluation: called with every row of the learning curve.
        until: the step at which the run pauses, which is an evaluation; None: it trains to the end.
    Returns:
        The result and the trained weights; a run that diverges gives a failed result, with its curve up to that step.
    """

    def begin() -> SeedRun:
        return SeedRun(
            spec,
            seed,
            corpus,
            trial=trial,
            device=device,
            start_weights=start_weights,
            start_tokens=start_tokens,
            rel_error_chis=rel_error_chis,
            capture=capture,
            timing=timing,
        )

    run = begin()
    checkpoint = checkpoints.load() if checkpoints is not None else None
    if checkpoint is not None:
        try:
            run.training.restore(*checkpoint)
        except RuntimeError:
            if spec.keep is None:
                raise
            run = begin()  # under other conditions of rounding the fit may give layers of other sizes
    try:
        run.training.run(checkpoints, checkpoint_seconds, on_evaluation, until)
    except Diverged as error:
        run.training.failure = error
    return run.result(device, 1), weights_of(run.training.model)


class SeedRun:
    """A training, with the other data of its result; for the arguments see `train_seed`."""

    def __init__(
        self,
        spec: TrialSpec,
        seed: int,
        corpus: Corpus,
        *,
        trial: int,
        device: torch.device | str,
        start_weights: dict[str, Tensor] | None,
        start_tokens: int,
        rel_error_chis: Sequence[int],
        capture: bool,
        timing: bool,
    ) -> None:
        self.trial, self.seed, self.started = trial, seed, now()
        self._start_tokens, self._rel_error_chis, self._timing = start_tokens, rel_error_chis, timing
        self.training = Training(spec, seed, corpus, device=device, start_weights=start_weights, capture=capture)
        self._rel_errors = _rel_errors(self.training, rel_error_chis, "init")

    def result(self, device: torch.device | str, n_stacked: int) -> SeedResult:
        """The run's result, on this device and in a stack of `n_stacked` seeds."""
        training, failure = self.training, self.training.failure
        result = SeedResult(
            trial=self.trial,
            seed=self.seed,
            state="complete" if failure is None else "failed",
            started=self.started,
            ended=now(),
            curve=training.curve,
            rel_errors=self._rel_errors,
            ran_on=_ran_on(device, n_stacked),
            bonds=training.bonds,
        )
        if failure is not None:
            return replace(result, failure=f"diverged: {failure}", failure_step=failure.step)
        if training.step < training.spec.protocol.steps:
            return replace(result, state="paused", final=_final_metrics(training, self._start_tokens))
        trained = _rel_errors(training, self._rel_error_chis, "trained")
        final = _final_metrics(training, self._start_tokens)
        if self._timing:
            training.release()  # the dense model takes its place
            final |= _times(training, device)
        return replace(result, final=final, rel_errors=self._rel_errors | trained)


def _ran_on(device: torch.device | str, n_stacked: int) -> dict[str, str]:
    """Everything except spec and seed that results depend on, with the keys of `run_schema.RAN_ON`."""
    return {
        schema.DEVICE: device_name(device),
        schema.THREADS: str(torch.get_num_threads()),
        schema.TORCH: torch.__version__,
        schema.STACKED: str(n_stacked),
        schema.PROGRAM: this_program()["fingerprint"],
    }


def _final_metrics(training: Training, start_tokens: int) -> dict[str, float]:
    curve, last = training.curve, training.curve[-1]
    final = {
        "best/step": min(curve, key=lambda row: row["val_loss"])["step"],
        "train_seconds": training.seconds,
        "train_tokens": training.spec.train_tokens,
        "total_tokens": training.spec.train_tokens + start_tokens,
    }
    if training.spec.keep is not None and training.compression is not None:
        final |= _of_compression(training.compression)
    if training.spec.bonds is not None:
        final["n_params_end"] = mpo_core.n_params(training.model)
    for metric in schema.METRICS:
        if "last" in metric.recorded and metric.name in last:  # without steps there is no training loss
            final[f"final/{metric.name}"] = last[metric.name]
        # A run that an older version began has rows without a newer metric, so its best value is not known.
        if "best" in metric.recorded and all(metric.name in row for row in curve):
            best_of = min if metric.direction == "minimize" else max
            final[f"best/{metric.name}"] = best_of(row[metric.name] for row in curve)
    return final


def _of_compression(report: mpo_core.CompressionReport) -> dict[str, float]:
    """The share of the parameters that is left, and the predicted rise of the loss in nats per token, if fitted."""
    losses = {name: report.total(name) for name in ("predicted_loss", "held_out_loss")}
    return {"kept": report.kept} | {name: loss for name, loss in losses.items() if loss is not None}


def _times(training: Training, device: torch.device | str) -> dict[str, float]:
    spec, vocab_size = training.spec, training.corpus.vocab_size
    dense = dense_model(spec.model, vocab_size)
    for parameter in dense.parameters():
        torch.nn.init.constant_(parameter, 0.01)  # times do not depend on the values
    with products_in(spec.protocol.precision):
        where = spec.model.context, device, spec.protocol.precision
        return times(training.model.to(device), dense.to(device), vocab_size, *where)


def _rel_errors(training: Training, chis: Sequence[int], when: str) -> dict[str, float]:
    if training.spec.family == "dense":
        errors = mpo_core.rel_errors(training.model, chis, factorisation="paper") if chis else {}
        return {schema.rel_error_key(when, chi, layer): error for (chi, layer), error in errors.items()}
    if when == "init" and training.spec.start is not None and training.compression is not None:
        chi = training.spec.chi or training.spec.as_chi
        if chi is None:
            return {}  # the layers of a trial with `keep` have sizes of their own
        return {
            schema.rel_error_key("compressed", chi, row.name): row.rel_error
            for row in training.compression.rows
            if row.rel_error is not None
        }
    return {}


# Several seeds as one model -------------------------------------------------------------------------------------------


@products_in("float32")
def train_seeds(
    spec: TrialSpec,
    seeds: Sequence[int],
    corpus: Corpus,
    *,
    trial: int = 0,
    device: torch.device | str = "cpu",
    start_weights: Mapping[int, dict[str, Tensor]] | None = None,
    start_tokens: int = 0,
    rel_error_chis: Sequence[int] = (),
    checkpoints: Mapping[int, Checkpoints] | None = None,
    checkpoint_seconds: float = math.inf,
    capture: bool = True,
    timing: bool = False,
    on_evaluation: Callable[[int, dict[str, float]], None] = lambda seed, row: None,
    until: int | None = None,
) -> list[tuple[SeedResult, dict[str, Tensor]]]:
    """Train seeds of a trial as one model; seeds whose checkpoints are at different steps get one model for each step.

    Args:
        start_weights, checkpoints: by seed; for these and all others see `train_seed`.
        on_evaluation: called with the seed and every row of its learning curve.
    Returns:
        The return value of `train_seed` for each seed, in the order of the seeds.
    """

    def begin(seed: int) -> SeedRun:
        return SeedRun(
            spec,
            seed,
            corpus,
            trial=trial,
            device="cpu",
            start_weights=start_weights[seed] if start_weights is not None else None,
            start_tokens=start_tokens,
            rel_error_chis=rel_error_chis,
            capture=False,
            timing=timing,
        )

    runs = {seed: begin(seed) for seed in seeds}
    if checkpoints is not None:
        _restore(runs, begin, checkpoints)
    groups: dict[tuple[int, bool], dict[int, Training]] = {}
    for seed, run in runs.items():
        if run.training.failure is None:
            groups.setdefault(_place(run.training), {})[seed] = run.training
    n_stacked = dict.fromkeys(seeds, len(seeds))
    for group in groups.values():
        n_stacked |= dict.fromkeys(group, len(group))
        StackedTraining(group, device, checkpoints or {}, capture).run(checkpoint_seconds, on_evaluation, until)
    return [(run.result(device, n_stacked[seed]), weights_of(run.training.model)) for seed, run in runs.items()]


def _restore(runs: dict[int, SeedRun], begin: Callable[[int], SeedRun], checkpoints: Mapping[int, Checkpoints]) -> None:
    """Restore every seed to its newest checkpoint; if these differ, all seeds to the newest step they have in common.

    If a process ends while it writes the checkpoints of a stack, some seeds are one checkpoint ahead.
    """
    for seed, run in runs.items():
        newest = checkpoints[seed].load()
        if newest is not None:
            run.training.restore(*newest)
    going_on = [seed for seed, run in runs.items() if run.training.failure is None]
    if len({_place(runs[seed].training) for seed in going_on}) < 2:
        return
    steps = {seed: checkpoints[seed].steps() for seed in going_on}
    for step in sorted(set.intersection(*map(set, steps.values())), reverse=True):
        loaded = ((seed, checkpoints[seed].load(step)) for seed in going_on)
        older = {seed: checkpoint for seed, checkpoint in loaded if checkpoint is not None}
        if older.keys() == set(going_on):
            for seed, checkpoint in older.items():
                runs[seed].training.restore(*checkpoint)
            return
    if all(len(kept) < 2 for kept in steps.values()):  # they have only just begun
        runs |= {seed: begin(seed) for seed in going_on}


def _place(training: Training) -> tuple[int, bool]:
    """State of a training that must be equal for trainings to be stacked."""
    return training.step, training.evaluation_is_due
