"""A trial: its resolved configuration, its results, and decisions about it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field, FiniteFloat, field_validator

from study.spec.arms import PRETRAINED
from study.spec.bonds import Bonds
from study.spec.config import StudyConfig
from study.spec.heal import Heal, is_plain
from study.spec.models import Model
from study.spec.protocol import Protocol
from study.spec.sweep import Sweep
from study.spec.values import Name, Strict


class TrialSpec(Strict):
    """One configuration without open values; together with the corpus and a seed it determines a training run."""

    arm: str
    family: Name
    model: Model
    protocol: Protocol
    chi: int | None = None
    as_chi: int | None = None
    n_sites: int | None = None
    factorisation: Literal["paper", "balanced", "min_params", "auto"] | None = None
    init: Name | None = None
    start: str | None = None
    """The arm whose trained checkpoint of the same seed the trial begins from; None means from scratch."""
    refinement: Literal["tt_svd", "whitened", "als", "weights", "outputs"] | None = None
    lr_rule: Literal["uniform", "mup"] | None = None
    decay: Literal["parameter", "matrix"] | None = None
    forward: Literal["reconstruct", "chain"] | None = None
    """None means `reconstruct`."""
    gauge: Literal["free", "fixed"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """None means `free`, and is not written: a spec and its hash are then what they were before there were gauges."""
    resized: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Settings of the study's model that a dense arm changes, as text."""
    layers: tuple[str, ...] | None = Field(default=None, exclude_if=lambda value: value is None)
    """Patterns of the layers that are replaced; None means the model's usual ones."""
    options: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Options of the kind of layer, as JSON; `kind_options` has them."""
    keep: float | None = Field(default=None, exclude_if=lambda value: value is None)
    metric: Literal["weights", "outputs", "loss"] | None = Field(default=None, exclude_if=lambda value: value is None)
    spread: Literal["loss", "errors", "even"] | None = Field(default=None, exclude_if=lambda value: value is None)
    narrow: bool | None = Field(default=None, exclude_if=lambda value: value is None)
    """These four are those of an arm with `keep`; None in other arms."""
    heal: Heal | None = Field(default=None, exclude_if=lambda value: value is None)
    """None means all layers, by cross-entropy, and is not written, like `gauge`."""
    bonds: Bonds | None = Field(default=None, exclude_if=lambda value: value is None)
    """How bonds change; None means that they stay, and is not written."""
    sweep: Sweep | None = Field(default=None, exclude_if=lambda value: value is None)
    """None means that all cores are trained at once, and is not written."""

    @field_validator("heal")
    @classmethod
    def _one_form(cls, heal: Heal | None) -> Heal | None:
        return None if is_plain(heal) else heal

    @property
    def start_arm(self) -> str | None:
        """The arm that this trial waits for."""
        return None if self.start == PRETRAINED else self.start

    @property
    def kind_options(self) -> dict[str, Any]:
        """The options of the kind of layer, by name."""
        return json.loads(self.options) if self.options else {}

    @property
    def options_shown(self) -> str | None:
        """Those options in words, such as "n_sites=6"; None without any."""
        return ", ".join(f"{key}={value}" for key, value in self.kind_options.items()) or None

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings that runs record in words, by the names of their params."""
        return {
            "start": self.start or "scratch",
            "heal": None if self.heal is None else self.heal.shown,
            "options": self.options_shown,
            "bonds": None if self.bonds is None else self.bonds.shown,
            "sweep": None if self.sweep is None else self.sweep.every,
        }

    @property
    def size(self) -> str | None:
        """The size of the layers in words, as the arm gives it; None for a dense model."""
        if self.keep is not None:
            return f"keep {self.keep:g}"
        return f"χ={self.chi or self.as_chi}" if self.chi or self.as_chi else None

    @property
    def train_tokens(self) -> int:
        """Tokens that this trial's optimiser sees, excluding those of its start."""
        return self.protocol.steps * self.protocol.batch_size * self.model.context


@dataclass(frozen=True)
class SeedResult:
    """Everything known about a finished run (one trial × one seed).

    `curve` has one row per evaluation (keys of `run_schema.CURVES`, and "step"). `final` has the keys of
    `run_schema.FINALS`, `rel_errors` those of `run_schema.rel_error_key`, and `ran_on` those of `run_schema.RAN_ON`.
    If bonds change, `bonds` has for each layer [step, bond, bond, …] at the start and after each change.
    Times are UTC, ISO 8601.
    """

    trial: int
    seed: int
    state: Literal["complete", "failed", "paused"]
    """A run is paused at a rung of successive halving; `final` then has the metrics of that step."""
    started: str
    ended: str
    final: dict[str, FiniteFloat] = field(default_factory=dict)
    curve: list[dict[str, FiniteFloat]] = field(default_factory=list)
    rel_errors: dict[str, FiniteFloat] = field(default_factory=dict)
    ran_on: dict[str, str] = field(default_factory=dict)
    bonds: dict[str, list[list[int]]] = field(default_factory=dict)
    weights: str | None = None
    failure: str | None = None
    failure_step: int | None = None


def now() -> str:
    return datetime.now(UTC).isoformat()


def milliseconds(time: str) -> int:
    """Milliseconds since 1970 of a time in ISO 8601."""
    return int(datetime.fromisoformat(time).timestamp() * 1000)


@dataclass(frozen=True)
class TrialShape:
    """Counts and identity of a spec, computed from its shapes alone.

    FLOPs are floating-point operations; a multiply-add counts as two. `step_flops` are those of one optimiser step;
    `flops` are those of all training and evaluation of one seed.
    """

    n_params: int
    n_params_compressed: int
    n_params_dense: int
    bonds: dict[str, tuple[int, ...]]
    label: str
    """Name of the family in figures and tables."""
    identity: str
    step_flops: FiniteFloat
    flops: FiniteFloat
    vocab_size: int = 1
    """Vocabulary size of the corpus: a uniform guess has a loss of its logarithm."""
    bytes: int | None = None
    """Size of the stored model, with parameters of the study's `bits`, masks and indices; None in an older ledger."""
    flops_per_token: FiniteFloat | None = None
    """FLOPs of a forward pass over the whole context, for each token; None in an older ledger."""


@dataclass(frozen=True)
class Skipped:
    """Why a trial is never trained, and when that was decided (UTC, ISO 8601)."""

    reason: str
    when: str


@dataclass(frozen=True)
class Stop:
    """The decision to stop a trial because a rival is better, with its evidence.

    seeds, own, rivals: the seeds that both trials had, and the final `metric` of each on them, in its unit. after: the
    result (trial and seed) that completed the evidence.
    """

    trial: int
    rival: int
    metric: str
    margin: float
    seeds: tuple[int, ...]
    own: tuple[float, ...]
    rivals: tuple[float, ...]
    after: tuple[int, int]
    when: str

    @property
    def reason(self) -> str:
        """The reason in one line."""
        pairs = ", ".join(
            f"seed {seed}: {rival:.4f} against {own:.4f}"
            for seed, own, rival in zip(self.seeds, self.own, self.rivals, strict=True)
        )
        return f"trial {self.rival} is better in {self.metric} by {self.margin:g} or more on every seed shared: {pairs}"


@dataclass(frozen=True)
class RungStop:
    """The decision to stop a trial at a rung of successive halving, with its evidence.

    seeds: those that decided. diverged: those of them that diverged before that step; one is enough to stop.
    means: the mean of each objective over the seeds. place: the trial's place among the n_there trials that had reached
    the rung, itself included. after: the result (trial and seed) that completed the evidence.
    """

    trial: int
    step: int
    seeds: tuple[int, ...]
    diverged: tuple[int, ...]
    means: dict[str, float]
    place: int
    n_there: int
    after: tuple[int, int]
    when: str

    @property
    def reason(self) -> str:
        """The reason in one line."""
        if self.diverged:
            return f"seed {', '.join(map(str, self.diverged))} diverged before step {self.step}, a rung"
        means = ", ".join(f"{name} {mean:.6g}" for name, mean in self.means.items())
        seeds = ", ".join(map(str, self.seeds))
        return (
            f"number {self.place} of {self.n_there} trials at step {self.step}, a rung ({means}; mean of seeds {seeds})"
        )


@dataclass(frozen=True)
class Trial:
    """One configuration, its number in Optuna, and the counts that its shapes give.

    skipped: the trial breaks a limit of the search, and is never trained. stop: the trial, or the one it repeats, was
    stopped.
    """

    number: int
    spec: TrialSpec
    shape: TrialShape
    budget_hash: str
    tuning_trials: int
    duplicate_of: int | None = None
    skipped: Skipped | None = None
    stop: Stop | RungStop | None = None

    @property
    def source(self) -> int:
        """Number of the trial whose results this one shares: its own number, or that of the trial it repeats."""
        return self.number if self.duplicate_of is None else self.duplicate_of


def budget_hash(spec: TrialSpec, config: StudyConfig, corpus_sha256: str, start: TrialSpec | None) -> str:
    """Hash, equal for trials that may be compared.

    It covers corpus, evaluation, tokens, schedule shape, tuning trials and precision. It leaves out how the tokens are
    used: kind of layer, optimiser, and `heal`, whose effect at equal tokens is what a study measures. (A step of
    distillation takes more FLOPs; `plan` shows them.)

    Args:
        start: the trial that the spec starts from; None from scratch.
    """
    protocol = spec.protocol
    return json_hash(
        {
            "corpus": corpus_sha256,
            "split": config.corpus.validation_fraction,
            "evaluation": [spec.model.context, protocol.sampled_eval_batches, protocol.sampled_eval_batch_size],
            "batch": [protocol.batch_size, spec.model.context],
            "steps": _schedule(protocol),
            "start": None if start is None else _schedule(start.protocol),
            "tuning_trials": tuning_trials(spec.arm, config),
            "precision": protocol.precision,
        }
    )[:12]


def _schedule(protocol: Protocol) -> list[Any]:
    """All that determines the learning rate's course; for `cosine` without its name: it was the only one at first."""
    length = [protocol.steps, protocol.warmup_steps]
    return length if protocol.schedule == "cosine" else [*length, protocol.schedule, protocol.decay_share]


TUNED_FIELDS = ("init", "optimiser", "learning_rate", "embedding_learning_rate", "lr_rule", "decay")


def tuning_trials(arm: str, config: StudyConfig) -> int:
    """Number of trials among which this arm's tuned values (`TUNED_FIELDS`) are chosen.

    A searched arm counts all trials of the search. If the arm's values were chosen among trials of another study, the
    number is multiplied by the number of those trials.
    """
    own = config.arm(arm)
    listed = [len(value) for key, value in own.values().items() if key in TUNED_FIELDS and isinstance(value, tuple)]
    return (own.tuned_among or 1) * (config.search.trials if own.is_searched else math.prod(listed))


def json_hash(data: Any) -> str:
    """SHA-256 of data as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
