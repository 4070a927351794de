"""The study file: one strict, frozen tree of models, read from YAML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from textwrap import shorten
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from analysis.run_schema import MARGINS, OBJECTIVES
from study.errors import did_you_mean
from study.spec.arms import BY_SIZE_FIELDS, PRETRAINED, Arm, DenseArm, MPOArm
from study.spec.models import Model, PicoGPTModel
from study.spec.values import (
    Choices,
    DecayFraction,
    FixedOrListed,
    Name,
    OptimiserName,
    PositiveFloat,
    PositiveInt,
    Range,
    ScheduleName,
    Seeds,
    Steps,
    Strict,
    WideInt,
)

MAX_SEQUENCES = 500_000_000
"""Largest number of sequences in a run; the place of each in the text is drawn before training and takes 8 bytes."""
MAX_BATCH_TOKENS = 10_000_000
LEAST_SHARE = 0.0001
"""Smallest share of a core or a GPU that Ray accepts."""
DECAY_FRACTION = 0.2
"""Default of `protocol.decay_fraction` (Hägele et al. 2024, section 3)."""
CHARACTERS, BYTES = "characters", "bytes"
"""Tokenizers that need no folder."""
MODEL_TOKENIZER = "model"
"""The tokenizer in the folder of the pretrained model."""
RESERVED = ("scratch", PRETRAINED)
"""Names of starts that are not arms; no arm may have one of these names."""


class Corpus(Strict):
    """The text and its tokens. Default: Tiny Shakespeare, one token per character."""

    path: FixedOrListed[str] | None = Field(
        default=None,
        description="A file or a list of files, relative to the study file: UTF-8 text, JSON lines (`.jsonl`, "
        "`.jsonl.gz`) or Parquet (`.parquet`). A byte order mark at a text's beginning is dropped; line ends stay as "
        "they are.",
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        default=None, description="The checksum that the file, the text or the recorded corpus must have."
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="Share of the text, from its end, that is held out for validation."
    )
    tokenizer: str = Field(
        default=CHARACTERS,
        exclude_if=lambda value: value == CHARACTERS,
        description="`characters`, `bytes`, `model` (that of the pretrained model), or a folder with a Hugging Face "
        "tokenizer, relative to the study file.",
    )
    text_column: str = Field(
        default="text",
        exclude_if=lambda value: value == "text",
        description="The column with the text in JSON lines and Parquet.",
    )

    @property
    def paths(self) -> tuple[str, ...]:
        """The files; empty for the default text."""
        return () if self.path is None else (self.path,) if isinstance(self.path, str) else self.path

    @property
    def tokenizer_folder(self) -> str | None:
        """The folder of the tokenizer, if it has one."""
        return None if self.tokenizer in (CHARACTERS, BYTES) else self.tokenizer


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
    calibration_batches: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=8, description="Training batches over which `refinement: whitened` and `als` fit a layer's outputs."
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


def _objective(value: str) -> str:
    if value not in OBJECTIVES:
        meant = did_you_mean(value, OBJECTIVES)
        raise ValueError(f"must be one of {', '.join(OBJECTIVES)}, but got {json.dumps(value)[:60]}{meant}")
    return value


Objective = Annotated[str, AfterValidator(_objective), WithJsonSchema({"type": "string", "enum": [*OBJECTIVES]})]
"""The name of a metric of `analysis.run_schema` that has a direction."""


class EarlyStopping(Strict):
    """When a searched MPO trial is stopped early. The result then depends on the order in which trials end."""

    margin: PositiveFloat = Field(
        description="In the unit of `metric` (nats, bits, or a fraction). A trial stops when a rival is better by this "
        "margin on every seed that both have. The rival has at most as many parameters and the same training."
    )
    metric: Objective = Field(
        default="val_loss", description="Metric at the last step, of each seed. It must be one of the objectives."
    )
    min_seeds: Annotated[int, Field(ge=2)] = Field(
        default=2, description="Smallest number of seeds that both must have."
    )


class Search(Strict):
    """How searched values are chosen, and how many trials are searched. Listed trials always run and do not count."""

    sampler: Literal["grid", "random", "tpe", "nsga2", "nsga3", "gp"] = Field(
        default="grid",
        description="One of Optuna's samplers. `grid`: all trials are listed. `random` and `tpe` search any number of "
        "arms; `nsga2`, `nsga3` and `gp` search one arm. `tpe` and `gp` draw their first ten trials at random.",
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Random seed of the sampler.")
    population_size: Annotated[int, Field(ge=2)] = Field(
        default=20, description="Trials in a generation of nsga2 and nsga3; the first generation is drawn at random."
    )
    trials: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=0, description="Number of searched trials. Trials that repeat another count too."
    )
    max_params: PositiveFloat | None = Field(
        default=None,
        description="Largest number of trainable parameters of a searched trial. A value of at most 1 is a fraction of "
        "the dense model's. A larger trial is not trained; the sampler learns that it is too large.",
    )
    min_params: PositiveFloat | None = Field(
        default=None, description="Smallest number of trainable parameters; otherwise as `max_params`."
    )
    max_repeats: PositiveInt | None = Field(
        default=None,
        description="End the search after this many trials that repeat another one, which need no training. "
        "Default: no limit. It may change during a study.",
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="Default: off. Dense and listed trials are never stopped early."
    )


class Margins(Strict):
    """The largest difference that still counts as equal, at the last step."""

    val_loss: PositiveFloat = Field(default=MARGINS["val_loss"], description="In nats.")
    val_acc: PositiveFloat = Field(default=MARGINS["val_acc"], description="As a fraction: 0.005 is half a point.")


class Contrast(Strict):
    """Compare each trial of an arm with its counterpart in another arm, on the seeds that both have."""

    arm: Name = Field(description="An arm of the study.")
    against: Name = Field(
        description="Another arm. If it has several trials, the counterpart is the one with the same χ or `as_chi`."
    )


class Claims(Strict):
    """What the study decides, fixed before it runs. The analysis tests these claims; all else is exploration."""

    margins: Margins = Margins()
    contrasts: tuple[Contrast, ...] = Field(
        default=(),
        max_length=10_000,
        description="Comparisons that are claimed, tested as one family. Arms with different budgets are compared only "
        "if they are declared here.",
    )


def _seeds_per_unit(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and value >= 1):
        raise ValueError(f"must be auto or a whole number of at least 1, but got {value!r}")
    return value


class Execution(Strict):
    """Where and how units run. It may change during a study."""

    cpus: Annotated[float, Field(ge=LEAST_SHARE, le=10_000)] = Field(
        default=1, description="CPU cores and threads of one unit."
    )
    gpus: Annotated[float, Field(ge=0, le=10_000)] = Field(
        default=0, description="GPUs of one unit; a fraction shares one."
    )
    seeds_per_unit: Annotated[Literal["auto"] | PositiveInt, BeforeValidator(_seeds_per_unit)] = Field(
        default="auto",
        description="Seeds of a trial that are trained together as one model. `auto`: one on a CPU, all on a GPU. "
        "Only seeds of PicoGPT under AdamW can be trained together.",
    )
    capture: bool = Field(
        default=True,
        description="Replay optimiser steps from CUDA graphs on a GPU: the same kernels without time between them. It "
        "has no effect on a CPU.",
    )
    max_units: PositiveInt | None = Field(
        default=None,
        description="Largest number of units at once on a cluster that grows with demand. Default: as many as fit on "
        "the nodes when the run starts.",
    )
    checkpoint_seconds: Annotated[float, Field(ge=0)] = Field(
        default=30, description="Smallest time between two checkpoints, in seconds."
    )
    backup_seconds: Annotated[float, Field(ge=0, le=1_000_000_000)] = Field(
        default=60, description="Smallest time between two backups of the databases, in seconds, if storage is a URL."
    )
    unit_timeout: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="End a worker after this many seconds without an evaluation, and try its unit again. Default: no "
        "limit. Only Ray's workers can be ended; one that is starting has at least ten minutes.",
    )
    keep_weights: bool = Field(
        default=False, description="Keep every trained model as safetensors, in storage and in MLflow."
    )


class StudyConfig(Strict):
    """A whole study file."""

    name: Name = Field(description="Name of the MLflow experiment and of the default folder.")
    description: str = Field(default="", max_length=5000, description="One line for the report.")
    corpus: Corpus = Corpus()
    model: Model = Field(default=PicoGPTModel(), description="The language model.")
    protocol: Protocol = Protocol()
    seeds: Seeds = Field(default=3, description="How many seeds (0, 1, ...), or a list of them.")
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = Field(
        default=("n_params", "val_loss"), description="What the sampler optimises: means over seeds at the last step."
    )
    search: Search = Search()
    claims: Claims = Claims()
    rel_error_chi: tuple[PositiveInt, ...] = Field(
        default=(),
        max_length=1000,
        description="Further χ at which relative errors are recorded. The layers of each dense model from scratch are "
        "decomposed before and after training, at these χ and at those of the arms.",
    )
    execution: Execution = Execution()
    arms: Annotated[tuple[Arm, ...], Field(min_length=1, max_length=1000)] = Field(
        description="What is compared. Each arm gives at least one trial."
    )

    @property
    def has_pretrained(self) -> bool:
        """Whether the model has pretrained weights."""
        return "pretrained" in self.model.settings

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
        yield from _repeats("corpus.path", self.corpus.paths)  # a document could be in both splits
        names = [arm.name for arm in self.arms]
        yield from _repeats("arms", names)
        for name in RESERVED:
            if name in names:
                yield f"`arms` has an arm named {name}, a word for what trials start from; give it another name"
        for arm in self.arms:
            if arm.start == PRETRAINED:
                if not self.has_pretrained:
                    yield f"arms[{arm.name}]: `start: pretrained` needs `model.pretrained`, the folder of its weights"
            elif arm.start is not None:
                yield from self._problems_of_start(arm)
            if arm.start is None and (self.protocol.steps if arm.steps is None else arm.steps) == 0:
                yield f"arms[{arm.name}]: `steps` must be at least 1 without a `start`"
            if isinstance(arm, DenseArm) and self.model.width is None:
                for key in ("d_model", "d_ff", "init"):
                    if getattr(arm, key) is not None:
                        yield f"arms[{arm.name}]: `{key}` is PicoGPT's, but the study's model is {self.model.named}"
            for key in BY_SIZE_FIELDS:
                if isinstance(given := getattr(arm, key, None), dict):
                    sizes = arm.sizes or ((self.model.width,) if self.model.width else ())
                    yield from _problems_of_sizes(f"arms[{arm.name}]: `{key}`", given, sizes)
        if self.corpus.tokenizer == MODEL_TOKENIZER and not self.has_pretrained:
            yield "`corpus.tokenizer: model` needs `model.pretrained`, the folder of the tokenizer"
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
        yield from self._problems_of_stopping()

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
        name, n_trials = self.search.sampler, self.search.trials
        if searched and name == "grid":
            yield (
                f"arm {searched[0]} has searched values, which sampler grid cannot choose; list them as [...], "
                "or use another sampler"
            )
        if name != "grid" and not searched:
            yield f"sampler {name} has nothing to choose: no arm has a searched value"
        if searched and n_trials == 0:
            yield f"`search.trials` must be at least 1, since arm {searched[0]} has searched values"
        if not searched and n_trials:
            yield "`search.trials` must be 0 (or absent): no arm has a searched value"
        if name in ("nsga2", "nsga3", "gp") and len(searched) > 1:
            yield (
                f"sampler {name} cannot search several arms ({', '.join(searched)}), whose values depend on the arm; "
                "use tpe or random"
            )
        if name in ("nsga2", "nsga3") and 0 < n_trials <= self.search.population_size:
            yield (
                f"`search.trials` must exceed `search.population_size`, otherwise {name} draws all at random, but got "
                f"{n_trials} and {self.search.population_size}"
            )

    def _problems_of_limits(self, searched: list[str]) -> Iterator[str]:
        search = self.search
        given = [key for key in ("max_params", "min_params", "max_repeats") if getattr(search, key) is not None]
        if given and not searched:
            yield f"`search.{given[0]}` has no meaning: no arm has a searched value"
        if search.min_params is not None and search.max_params is not None:
            same_kind = (search.min_params <= 1) == (search.max_params <= 1)
            if same_kind and search.min_params > search.max_params:
                yield (
                    f"`search.min_params <= search.max_params` must hold, but got min_params={search.min_params:g}, "
                    f"max_params={search.max_params:g}"
                )

    def _problems_of_stopping(self) -> Iterator[str]:
        stopping = self.search.early_stopping
        if stopping is None:
            return
        if not any(isinstance(arm, MPOArm) and arm.is_searched for arm in self.arms):
            yield "`search.early_stopping` has no meaning: no MPO arm has a searched value, and no other is stopped"
        if stopping.metric not in self.objectives:
            yield f"`search.early_stopping.metric` must be one of the objectives, but got {stopping.metric}"
        if "count" in OBJECTIVES[stopping.metric].recorded:
            yield f"`search.early_stopping.metric` must be a metric of each seed, but got {stopping.metric}"
        if stopping.min_seeds >= len(self.seed_list):
            yield (
                "`search.early_stopping.min_seeds` must be below the number of seeds, otherwise no seed is saved, "
                f"but got {stopping.min_seeds} and {len(self.seed_list)}"
            )

    def _problems_of_start(self, arm: Arm) -> Iterator[str]:
        candidates = [
            other.name
            for other in self.arms
            if isinstance(other, DenseArm)
            and other.start is None
            and not any(isinstance(value, tuple | Choices | Range) for value in other.values().values())
            and other.d_model in (None, self.model.width)
            and other.d_ff in (None, self.model.recorded.get("d_ff"))
        ]
        if arm.start not in candidates:
            yield (
                f"arms[{arm.name}]: `start` must name a dense arm from scratch of the study's own model, with fixed "
                f"values ({', '.join(candidates) or 'there is none'}), but got {arm.start}"
                + did_you_mean(arm.start, candidates)
            )


def _problems_of_sizes(what: str, given: Mapping[int, float], sizes: Sequence[int]) -> Iterator[str]:
    has, needs = (shorten(", ".join(map(str, each)), 200, placeholder=" ...") for each in (given, sizes))
    if set(given) != set(sizes):
        yield f"{what} must name the sizes of the arm's trials ({needs}), but got {has}"


def _repeats(what: str, items: Sequence[Any]) -> Iterator[str]:
    repeated = [str(item) for item, count in Counter(items).items() if count > 1]
    if repeated:
        yield f"`{what}` names {shorten(', '.join(repeated), 200, placeholder=' ...')} more than once"
