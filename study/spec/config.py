"""The study file: one strict, frozen tree of models, read from YAML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from textwrap import shorten
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from analysis.run_schema import LEVEL, MARGINS, MIN_SEEDS, OBJECTIVES
from study.errors import did_you_mean
from study.spec.arms import BY_SIZE_FIELDS, PRETRAINED, Arm, DenseArm, MPOArm
from study.spec.bonds import Bonds
from study.spec.corpus import MODEL_TOKENIZER, Corpus
from study.spec.models import HuggingFaceModel, Model, OwnModel, PicoGPTModel
from study.spec.protocol import Protocol
from study.spec.search import Halving, Objective, Search
from study.spec.values import (
    Choices,
    Name,
    PositiveFloat,
    PositiveInt,
    Range,
    Seeds,
    Strict,
    options,
)

BITS = 32
"""Bits of a parameter as it is trained."""
MAX_BATCH_TOKENS = 10_000_000
LEAST_SHARE = 0.0001
"""Smallest share of a core or a GPU that Ray accepts."""
RESERVED = ("scratch", PRETRAINED)
"""Names of starts that are not arms; no arm may have one of these names."""


class Margins(Strict):
    """The largest difference that still counts as equal, at the last step."""

    val_loss: PositiveFloat = Field(default=MARGINS["val_loss"], description="In nats.")
    val_acc: PositiveFloat = Field(default=MARGINS["val_acc"], description="As a fraction: 0.005 is half a point.")


class Contrast(Strict):
    """Compare each trial of an arm with its counterpart in another arm."""

    arm: Name = Field(description="An arm of the study.")
    against: Name = Field(
        description="Another arm. If it has several trials, the counterpart is the one with the same χ, `as_chi` or "
        "`keep`."
    )


def _looks(value: Any) -> Any:
    """The looks in order; a key of JSON is text."""
    if not isinstance(value, dict):
        raise ValueError(f"must give a level for each number of seeds, such as {{3: 0.01, 5: 0.04}}, but got {value!r}")
    numbers = [
        int(key) for key in value if type(key) is int or (isinstance(key, str) and key.isdecimal())
    ]  # as in JSON
    if len(numbers) < len(value):
        raise ValueError(f"the numbers of seeds must be whole, but are {', '.join(map(str, value))}")
    looks = dict(sorted(zip(numbers, value.values(), strict=True)))
    if looks and min(looks) < MIN_SEEDS:
        raise ValueError(f"the numbers of seeds must be at least {MIN_SEEDS}, but one is {min(looks)}")
    if all(isinstance(level, (int, float)) for level in looks.values()) and sum(looks.values()) > LEVEL * (1 + 1e-9):
        raise ValueError(f"the levels must add up to at most {LEVEL:g}, but their sum is {sum(looks.values()):.3g}")
    return looks


class Claims(Strict):
    """The claims that the study decides, fixed before it runs. The analysis tests them; all else is exploration."""

    margins: Margins = Margins()
    contrasts: tuple[Contrast, ...] = Field(
        default=(),
        max_length=10_000,
        description="Comparisons that are claimed, tested as one family. Arms with different budgets are compared only "
        "if they are declared here.",
    )
    looks: Annotated[dict[int, PositiveFloat], BeforeValidator(_looks)] = Field(
        default={},
        description="When the contrasts are tested, if seeds are added until they are decided (`mpo-study refine --on "
        "contrasts`): numbers of seeds, each with the level of its test. For example `{3: 0.005, 5: 0.015, 8: 0.03}`. "
        "The numbers are at least 3, the levels together at most 0.05, and `seeds` is one of the numbers. Looks are "
        "fixed when the study begins. Default: one test at level 0.05, on the seeds planned for every trial. If seeds "
        "are added after results are known, the chance of a false claim stays within 0.05 only with looks.",
        exclude_if=lambda value: not value,
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
    timing: bool = Field(
        default=False,
        description="Measure `decode_ms` and `prefill_ms` of every trained model on its worker, in turns with the "
        "dense model. The times depend on the machine and on what else runs on it. They are measured in any case if "
        "they are objectives.",
        exclude_if=lambda value: not value,
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
    seeds: Seeds = Field(default=5, description="How many seeds (0, 1, ...), or a list of them.")
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = Field(
        default=("n_params", "val_loss"), description="What the sampler optimises: means over seeds at the last step."
    )
    search: Search = Search()
    claims: Claims = Claims()
    bits: Literal[4, 8, 16, 32] = Field(
        default=BITS,
        description="Bits in which a parameter is counted in `bytes`, the size of the stored model. Nothing is "
        "rounded, so the loss is that of float32.",
        exclude_if=lambda value: value == BITS,
    )
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
    def is_timed(self) -> bool:
        """Whether decoding and prefill of the trained models are measured."""
        return self.execution.timing or bool({"decode_ms", "prefill_ms"} & {*self.objectives})

    @property
    def has_pretrained(self) -> bool:
        """Whether the model has pretrained weights."""
        return isinstance(self.model, HuggingFaceModel) and self.model.pretrained is not None

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
        """Values that do not go together, one line each."""
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
            n_steps = self.protocol.steps if arm.steps is None else arm.steps
            if arm.start is None and n_steps == 0:
                yield f"arms[{arm.name}]: `steps` must be at least 1 without a `start`"
            if isinstance(arm, DenseArm) and arm.model is not None:
                yield from self._problems_of_own_sizes(arm, arm.model)
            if arm.heal is not None and n_steps == 0:
                yield f"arms[{arm.name}]: `heal` needs `steps` of at least 1: without steps nothing is trained"
            if isinstance(arm, MPOArm):
                for key in ("bonds", "sweep"):
                    if getattr(arm, key) is None:
                        continue
                    if "muon" in options(arm.optimiser or self.protocol.optimiser):
                        yield f"arms[{arm.name}]: `{key}` needs `optimiser: adamw`, whose moments can be carried over"
                    if self.protocol.ema is not None:
                        yield f"arms[{arm.name}]: `{key}` changes the gauge, so `protocol.ema` cannot average its cores"
                if arm.sweep is not None and arm.sweep.every >= n_steps:
                    yield (
                        f"arms[{arm.name}]: `sweep.every` must be below {n_steps}, the arm's steps, but is "
                        f"{arm.sweep.every}: only the first core would be trained"
                    )
                if arm.bonds is not None:
                    yield from self._problems_of_bonds(arm, arm.bonds, n_steps)
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
        if "decode_ms" in self.objectives and (isinstance(self.model, OwnModel) or self.model.context < 2):
            why = "a module of your own has none" if isinstance(self.model, OwnModel) else "`model.context` is 1"
            yield f"objective decode_ms needs a model with a cache of keys and values for earlier tokens, but {why}"
        yield from self._problems_of_contrasts(names)
        if 0 < self.execution.gpus < LEAST_SHARE:
            yield f"`execution.gpus` must be 0 or at least {LEAST_SHARE}, but got {self.execution.gpus}"
        for objective in self.objectives:
            if objective.startswith("ema_") and self.protocol.ema is None:
                yield f"objective {objective} needs `protocol.ema`, the decay of the average"
        if self.protocol.rate_width is not None and self.model.width is None:
            yield f"`protocol.rate_width` is PicoGPT's, but the study's model is {self.model.named}"
        optimisers = {self.protocol.optimiser, *(each for arm in self.arms for each in options(arm.optimiser))}
        if self.protocol.rate_width is not None and "muon" in optimisers:
            yield "`protocol.rate_width` is a rule for adamw, but the study has muon"
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

    def _problems_of_own_sizes(self, arm: DenseArm, changes: Mapping[str, Any]) -> Iterator[str]:
        where = f"arms[{arm.name}].model"
        if self.model.width is not None or self.has_pretrained:
            yield f"{where}: is for a model from scratch that is not PicoGPT; the study's model is {self.model.named}"
        for key in changes:
            if key in type(self.model).model_fields:
                yield f"{where}.{key}: cannot change; only settings such as `hidden_size` can"

    def _problems_of_contrasts(self, arms: list[str]) -> Iterator[str]:
        pairs = [(contrast.arm, contrast.against) for contrast in self.claims.contrasts]
        for arm in dict.fromkeys(name for pair in pairs for name in pair):
            if arm not in arms:
                meant = did_you_mean(arm, arms)
                yield f"`claims.contrasts` names arm {arm}, which the study lacks{meant}; it has {', '.join(arms)}"
        yield from _repeats("claims.contrasts", [f"{arm} against {against}" for arm, against in pairs])
        for arm in dict.fromkeys(arm for arm, against in pairs if arm == against):
            yield f"`claims.contrasts` sets arm {arm} against itself"
        looks = self.claims.looks
        if looks and not pairs:
            yield "`claims.looks` needs `claims.contrasts`: nothing else is tested at looks"
        if looks and len(self.seed_list) not in looks:
            numbers = ", ".join(map(str, looks))
            yield f"`seeds` must be as many as one of `claims.looks` ({numbers}), but are {len(self.seed_list)}"

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
        stopping, halving = self.search.early_stopping, self.search.halving
        if halving is not None:
            yield from self._problems_of_halving(halving, stopping is not None)
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

    def _problems_of_halving(self, halving: Halving, has_other: bool) -> Iterator[str]:
        if has_other:
            yield "`search.halving` and `search.early_stopping` are not allowed together"
        if not any(arm.is_searched for arm in self.arms):
            yield "`search.halving` has no meaning: no arm has a searched value"
        if halving.seeds > len(self.seed_list):
            yield (
                f"`search.halving.seeds` must be at most the number of seeds, but got {halving.seeds} and "
                f"{len(self.seed_list)}"
            )
        for name in self.objectives:
            if not {"curve", "count"} & {*OBJECTIVES[name].recorded}:
                yield f"`search.halving` needs objectives that every evaluation measures, but {name} is not one"

    def _problems_of_bonds(self, arm: MPOArm, bonds: Bonds, n_steps: int) -> Iterator[str]:
        if not bonds.steps(n_steps):
            last = min(round(bonds.until * n_steps), n_steps - 1)
            yield (
                f"arms[{arm.name}]: `bonds.every` must be at most {last} (`bonds.until` of {n_steps} steps), but is "
                f"{bonds.every}: the bonds would never change"
            )
        if self.protocol.recompute:
            yield f"arms[{arm.name}]: `bonds` is not allowed with `protocol.recompute`"
        if self.protocol.calibration_batches < 2:
            yield f"arms[{arm.name}]: `bonds` needs `protocol.calibration_batches` of at least 2"

    def _problems_of_start(self, arm: Arm) -> Iterator[str]:
        candidates = [
            other.name
            for other in self.arms
            if isinstance(other, DenseArm)
            and other.start is None
            and not any(isinstance(value, tuple | Choices | Range) for value in other.values().values())
            and other.model is None
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
