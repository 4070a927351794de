"""The study file: one strict, frozen tree of models, read from YAML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from textwrap import shorten
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from study.arms import BY_SIZE_FIELDS, Arm, DenseArm, MPOArm
from study.errors import did_you_mean
from study.values import Choices, Name, PositiveFloat, PositiveInt, Range, Seeds, Steps, Strict, WideInt, Width

MAX_PARAMS = 1_000_000_000
"""Of a dense model without its vocabulary: with its gradients and moments it takes 16 GB."""
MAX_SEQUENCES = 500_000_000
"""Of all steps of a run: where each begins in the text is drawn beforehand, 8 bytes for each."""
MAX_BATCH_TOKENS = 10_000_000
LEAST_SHARE = 0.0001
"""Of a core or a GPU; Ray takes no less."""


class Corpus(Strict):
    """The text. Tiny Shakespeare unless a path is given."""

    path: str | None = Field(
        default=None,
        description="A UTF-8 text file of at most 1 GB, relative to the study file. A byte order mark at its beginning "
        "is dropped; line ends stay as they are.",
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        default=None, description="The checksum the file must have."
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="Share of the text, from its end, that is held out for validation."
    )


class Model(Strict):
    """PicoGPT's sizes; the vocabulary comes from the corpus."""

    d_model: Width = Field(default=128, description="Embedding dimension.")
    n_heads: PositiveInt = Field(default=4, description="Attention heads; must divide d_model.")
    n_layers: Annotated[int, Field(ge=1, le=1000)] = Field(default=4, description="Transformer blocks.")
    context: WideInt = Field(default=256, description="Context length in tokens.")
    d_ff: WideInt | None = Field(default=None, description="Feed-forward dimension; 4 × d_model unless given.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Model:
        if self.d_model % self.n_heads:
            raise ValueError(f"`n_heads` must divide `d_model`, but got d_model={self.d_model}, n_heads={self.n_heads}")
        d_ff = self.d_ff or 4 * self.d_model
        n_params = self.n_layers * (4 * self.d_model**2 + 2 * self.d_model * d_ff) + self.context * self.d_model
        if n_params > MAX_PARAMS:
            raise ValueError(f"a dense model has at most {MAX_PARAMS:,} parameters, but this one has {n_params:,}")
        return self


class Protocol(Strict):
    """How a model is trained and evaluated; an arm may override steps, warm-up and learning rates."""

    steps: Steps = Field(default=2000, description="Optimiser steps.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=100, description="Steps of linear warm-up.")
    batch_size: WideInt = Field(default=32, description="Sequences per step.")
    learning_rate: PositiveFloat = Field(
        default=3e-4, description="Peak learning rate; cosine decay to 0 at the last step."
    )
    embedding_learning_rate: PositiveFloat | None = Field(
        default=None,
        description="Peak learning rate of the embeddings; that of all else unless given.",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="AdamW's β₁, β₂."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.1, description="AdamW's decay, on every parameter.")
    grad_clip: PositiveFloat = Field(default=1.0, description="Largest norm of the gradient.")
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        default="float32",
        description="Of matrix products. `tf32`: those of float32 on a GPU in TF32; refused without one. `bfloat16`: "
        "forward passes under autocast, in training and evaluation; parameters, moments and loss stay float32.",
    )
    eval_every: PositiveInt = Field(
        default=100, description="Steps between evaluations; the first and last step always are."
    )
    sampled_eval_batches: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=20, description="Random batches of the paper's own validation estimate, recorded beside the full one."
    )
    sampled_eval_batch_size: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=8, description="Sequences in each of those batches."
    )
    calibration_batches: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=8, description="Training batches over which `refinement: whitened` and `als` fit a layer's outputs."
    )

    @model_validator(mode="after")
    def _warmup_within_steps(self) -> Protocol:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"`warmup_steps < steps` must hold, but got warmup_steps={self.warmup_steps}, steps={self.steps}"
            )
        if self.steps * self.batch_size > MAX_SEQUENCES:
            raise ValueError(
                f"`steps` × `batch_size` must be at most {MAX_SEQUENCES:,}, but got {self.steps:,} × "
                f"{self.batch_size:,}"
            )
        return self


Objective = Literal["val_loss", "val_acc", "n_params"]


class Sampler(Strict):
    """Who chooses the searched values: one of Optuna's samplers, or `grid`, which has nothing to choose."""

    name: Literal["grid", "random", "tpe", "nsga2", "nsga3", "gp"] = Field(
        default="grid",
        description="`grid`: all is listed. `random` and `tpe` search any space; `nsga2`, `nsga3` and `gp` one arm, "
        "since the values of several depend on which arm is chosen. `tpe` and `gp` draw their first ten at random.",
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Sampler's own seed.")
    population_size: Annotated[int, Field(ge=2)] = Field(
        default=20, description="Trials in a generation of nsga2 and nsga3; the first generation is drawn at random."
    )


class Budget(Strict):
    """How much is searched. Listed trials come on top, and no limit is one for them."""

    trials: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=0, description="Number of searched trials, those that need no training included."
    )
    max_params: PositiveFloat | None = Field(
        default=None,
        description="Most trainable parameters of a searched trial; up to 1, a fraction of the dense model's. One that "
        "has more is never trained, and the sampler learns that it is too large.",
    )
    min_params: PositiveFloat | None = Field(default=None, description="As max_params, the fewest.")
    max_repeats: PositiveInt | None = Field(
        default=None,
        description="The search ends when so many of its trials have repeated another, which answers them without "
        "training. No limit but `trials` unless given. It may be changed under a study.",
    )


class EarlyStopping(Strict):
    """When a searched MPO trial is given up. The study then depends on the order in which its trials ended."""

    margin: PositiveFloat = Field(
        description="In the unit of `metric` (nats, or a fraction). A rival that has no more parameters, is as long "
        "trained from the same start and is better by so much on every seed that both have ends a trial."
    )
    metric: Literal["val_loss", "val_acc"] = Field(
        default="val_loss", description="At the last step; must be one of the objectives."
    )
    min_seeds: Annotated[int, Field(ge=2)] = Field(default=2, description="Fewest seeds that both must have.")


class Margins(Strict):
    """How much worse is still no loss, at the last step."""

    val_loss: PositiveFloat = Field(default=0.02, description="In nats.")
    val_acc: PositiveFloat = Field(default=0.005, description="As a fraction: 0.005 is half a point.")


class Contrast(Strict):
    """Each trial of an arm against its counterpart in another one, on the seeds that both have."""

    arm: Name = Field(description="An arm of the study.")
    against: Name = Field(
        description="Another arm. Of several trials in it, that of the same χ (`as_chi` counts) is the counterpart."
    )


class Claims(Strict):
    """What the study is to decide, fixed before it runs; the analysis tests this, and calls all else exploration."""

    margins: Margins = Margins()
    contrasts: tuple[Contrast, ...] = Field(
        default=(),
        max_length=10_000,
        description="Comparisons that are claimed, tested as one family. Arms of different budgets are compared only "
        "where it is declared here.",
    )


def _seeds_per_unit(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and value >= 1):
        raise ValueError(f"must be auto or a whole number of at least 1, but got {value!r}")
    return value


class Execution(Strict):
    """Where and how units run; may change between two runs of a study."""

    cpus: Annotated[float, Field(ge=LEAST_SHARE, le=10_000)] = Field(
        default=1, description="CPU cores, and threads, of one unit."
    )
    gpus: Annotated[float, Field(ge=0, le=10_000)] = Field(
        default=0, description="GPUs of one unit; a fraction shares one."
    )
    seeds_per_unit: Annotated[Literal["auto"] | PositiveInt, BeforeValidator(_seeds_per_unit)] = Field(
        default="auto",
        description="Seeds of a trial that are trained as one model: `auto` is one on a CPU, all it lacks on a GPU.",
    )
    capture: bool = Field(
        default=True,
        description="Replay each optimiser step on a GPU from CUDA graphs, after a few steps without: the same kernels "
        "with no time between them. On a CPU it means nothing.",
    )
    max_units: PositiveInt | None = Field(
        default=None,
        description="Most units at once on a cluster that grows with demand; unless given, as many as fit on its nodes "
        "when the run starts.",
    )
    checkpoint_seconds: Annotated[float, Field(ge=0)] = Field(
        default=30, description="Least time between two checkpoints."
    )
    backup_seconds: Annotated[float, Field(ge=0, le=1_000_000_000)] = Field(
        default=60, description="Least time between two copies of the databases in a storage that is a URL."
    )
    unit_timeout: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Seconds without an evaluation after which a worker is ended and its unit tried again, as one that "
        "died. Default: no limit. Only Ray's workers can be ended; one that is starting has at least ten minutes.",
    )
    keep_weights: bool = Field(
        default=False, description="Keep every trained model, as safetensors, in storage and MLflow."
    )


class StudyConfig(Strict):
    """A whole study file."""

    name: Name = Field(description="Names the MLflow experiment and the default folder.")
    description: str = Field(default="", max_length=5000, description="One line for the report.")
    corpus: Corpus = Corpus()
    model: Model = Model()
    protocol: Protocol = Protocol()
    seeds: Seeds = Field(default=3, description="How many seeds (0, 1, ...), or a list of them.")
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = Field(
        default=("n_params", "val_loss"), description="What the sampler optimises: means over seeds at the last step."
    )
    sampler: Sampler = Sampler()
    budget: Budget = Budget()
    early_stopping: EarlyStopping | None = Field(
        default=None, description="Off unless given; never of dense or listed trials."
    )
    claims: Claims = Claims()
    rel_error_chi: tuple[PositiveInt, ...] = Field(
        default=(),
        max_length=1000,
        description="χ, beside those of its arms, at which the layers of every dense model from scratch are "
        "decomposed, untrained and trained, and their relative errors recorded.",
    )
    execution: Execution = Execution()
    arms: Annotated[tuple[Arm, ...], Field(min_length=1, max_length=1000)] = Field(
        description="What is compared; each gives one trial or more."
    )

    @property
    def seed_list(self) -> tuple[int, ...]:
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """What does not go together, one line each."""
        if isinstance(self.seeds, tuple):
            yield from _repeats("seeds", self.seeds)
        yield from _repeats("objectives", self.objectives)
        names = [arm.name for arm in self.arms]
        yield from _repeats("arms", names)
        for arm in self.arms:
            if arm.teacher is not None:
                yield from self._problems_of_teacher(arm)
            for key in BY_SIZE_FIELDS:
                if isinstance(given := getattr(arm, key, None), dict):
                    sizes = arm.sizes or (self.model.d_model,)
                    yield from _problems_of_sizes(f"arms[{arm.name}]: `{key}`", given, sizes)
        yield from self._problems_of_contrasts(names)
        if 0 < self.execution.gpus < LEAST_SHARE:
            yield f"`execution.gpus` must be 0 or at least {LEAST_SHARE}, but got {self.execution.gpus}"
        if self.protocol.precision == "tf32" and self.execution.gpus == 0:
            yield "`protocol.precision: tf32` needs `execution.gpus`: only a GPU has that format"
        for key in ("batch_size", "sampled_eval_batch_size"):
            size, context = getattr(self.protocol, key), self.model.context
            if size * context > MAX_BATCH_TOKENS:
                yield (
                    f"`protocol.{key}` × `model.context` must be at most {MAX_BATCH_TOKENS:,} tokens, but got "
                    f"{size:,} × {context:,}"
                )
        searched = [arm.name for arm in self.arms if arm.is_searched]
        yield from self._problems_of_sampler(searched)
        yield from self._problems_of_limits(searched)

    def _problems_of_contrasts(self, arms: list[str]) -> Iterator[str]:
        pairs = [(contrast.arm, contrast.against) for contrast in self.claims.contrasts]
        for arm in dict.fromkeys(name for pair in pairs for name in pair):
            if arm not in arms:
                meant = did_you_mean(arm, arms)
                yield f"`claims.contrasts` names arm {arm}, which the study lacks{meant}; it has {', '.join(arms)}"
        yield from _repeats("claims.contrasts", [f"{arm} against {against}" for arm, against in pairs])
        for arm in dict.fromkeys(arm for arm, against in pairs if arm == against):
            yield f"`claims.contrasts` sets arm {arm} against itself"

    def _problems_of_sampler(self, searched: list[str]) -> Iterator[str]:
        name, n_trials = self.sampler.name, self.budget.trials
        if searched and name == "grid":
            yield (
                f"arm {searched[0]} has searched values, which sampler grid cannot choose; list them as [...], "
                "or use another sampler"
            )
        if name != "grid" and not searched:
            yield f"sampler {name} has nothing to choose: no arm has a searched value"
        if searched and n_trials == 0:
            yield f"`budget.trials` must be at least 1, since arm {searched[0]} has searched values"
        if not searched and n_trials:
            yield "`budget.trials` must be 0 (or absent): no arm has a searched value"
        if name in ("nsga2", "nsga3", "gp") and len(searched) > 1:
            yield (
                f"sampler {name} cannot search several arms ({', '.join(searched)}), whose values depend on the arm; "
                "use tpe or random"
            )
        if name in ("nsga2", "nsga3") and 0 < n_trials <= self.sampler.population_size:
            yield (
                f"`budget.trials` must exceed `sampler.population_size`, or {name} draws all at random, but got "
                f"{n_trials} and {self.sampler.population_size}"
            )

    def _problems_of_limits(self, searched: list[str]) -> Iterator[str]:
        budget, stopping = self.budget, self.early_stopping
        given = [key for key in ("max_params", "min_params", "max_repeats") if getattr(budget, key) is not None]
        if given and not searched:
            yield f"`budget.{given[0]}` has no meaning: no arm has a searched value"
        if budget.min_params is not None and budget.max_params is not None:
            same_kind = (budget.min_params <= 1) == (budget.max_params <= 1)
            if same_kind and budget.min_params > budget.max_params:
                yield (
                    f"`budget.min_params <= budget.max_params` must hold, but got min_params={budget.min_params:g}, "
                    f"max_params={budget.max_params:g}"
                )
        if stopping is None:
            return
        if not any(isinstance(arm, MPOArm) and arm.is_searched for arm in self.arms):
            yield "`early_stopping` has no meaning: no MPO arm has a searched value, and no other is stopped"
        if stopping.metric not in self.objectives:
            yield f"`early_stopping.metric` must be one of the objectives, but got {stopping.metric}"
        if stopping.min_seeds >= len(self.seed_list):
            yield (
                f"`early_stopping.min_seeds` must be below the number of seeds, or there is none to spare, but got "
                f"{stopping.min_seeds} and {len(self.seed_list)}"
            )

    def _problems_of_teacher(self, arm: Arm) -> Iterator[str]:
        candidates = [
            other.name
            for other in self.arms
            if isinstance(other, DenseArm)
            and other.teacher is None
            and not any(isinstance(value, tuple | Choices | Range) for value in other.values().values())
            and other.d_model in (None, self.model.d_model)
            and other.d_ff in (None, self.model.d_ff or 4 * self.model.d_model)
        ]
        if arm.teacher not in candidates:
            yield (
                f"arms[{arm.name}]: `teacher` must name a dense arm from scratch of the study's own model, with fixed "
                f"values ({', '.join(candidates) or 'there is none'}), but got {arm.teacher}"
                + did_you_mean(arm.teacher, candidates)
            )


def _problems_of_sizes(what: str, given: Mapping[int, float], sizes: Sequence[int]) -> Iterator[str]:
    has, needs = (shorten(", ".join(map(str, each)), 200, placeholder=" ...") for each in (given, sizes))
    if set(given) != set(sizes):
        yield f"{what} must name the sizes of the arm's trials ({needs}), but got {has}"


def _repeats(what: str, items: Sequence[Any]) -> Iterator[str]:
    repeated = [str(item) for item, count in Counter(items).items() if count > 1]
    if repeated:
        yield f"`{what}` names {shorten(', '.join(repeated), 200, placeholder=' ...')} more than once"
