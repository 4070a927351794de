"""Values in a study file: fixed, listed, searched or, for a learning rate, by the trial's size.

A *listed* value (`chi: [4, 8]`) gives one trial for each of its elements, whatever the sampler. A *searched* value
(`chi: {choices: [4, 8]}`, `learning_rate: {low: 1e-4, high: 1e-2, log: true}`) is chosen by the sampler.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic.dataclasses import dataclass


class Strict(BaseModel):
    """No unknown keys, no conversions, no changes after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


T = TypeVar("T")


_SEARCHED = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=_SEARCHED)  # not a model: a model's alias does not pass T on
class Choices(Generic[T]):
    """One of these, chosen by the sampler."""

    choices: Annotated[tuple[T, ...], Field(min_length=1, max_length=10_000)]


@dataclass(frozen=True, config=_SEARCHED)
class Range(Generic[T]):
    """A number between `low` and `high`, both included, chosen by the sampler."""

    low: T
    high: T
    log: Annotated[bool, Field(description="Uniform in the logarithm.")] = False

    @model_validator(mode="after")
    def _ordered(self) -> Range[T]:
        if not self.low < self.high:  # type: ignore[operator]
            raise ValueError(f"`low < high` must hold, but got low={self.low}, high={self.high}")
        if self.log and self.low <= 0:  # type: ignore[operator]
            raise ValueError(f"`low` must be positive where `log` is true, but got low={self.low}")
        return self


VALUE_KINDS = ("fixed", "listed", "choices", "range", "by_size")


def _kind_of_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "listed"
    if isinstance(value, Choices) or (isinstance(value, dict) and "choices" in value):
        return "choices"
    if isinstance(value, dict) and value and all(str(key).isdecimal() for key in value):
        return "by_size"
    if isinstance(value, Range | dict):
        return "range"
    return "fixed"


Listed = Annotated[tuple[T, ...], Field(min_length=1, max_length=100_000), Tag("listed")]
Value = Annotated[
    Annotated[T, Tag("fixed")] | Listed[T] | Annotated[Choices[T], Tag("choices")], Discriminator(_kind_of_value)
]
"""A fixed value, a list of them, or `{choices: [...]}`."""
Number = Annotated[
    Annotated[T, Tag("fixed")] | Listed[T] | Annotated[Choices[T], Tag("choices")] | Annotated[Range[T], Tag("range")],
    Discriminator(_kind_of_value),
]
"""A `Value` that may also be `{low: ..., high: ..., log: ...}`."""

NumberBySize = Annotated[
    Annotated[T, Tag("fixed")]
    | Listed[T]
    | Annotated[Choices[T], Tag("choices")]
    | Annotated[Range[T], Tag("range")]
    | Annotated[dict[int, T], Tag("by_size")],
    Discriminator(_kind_of_value),
]
"""A `Number` that may also be `{8: ..., 16: ...}`: one value for each size that a trial of the arm may have."""

FixedOrBySize = Annotated[
    Annotated[T, Tag("fixed")] | Annotated[dict[int, T], Tag("by_size")], Discriminator(_kind_of_value)
]
"""A fixed value, or one for each size that a trial of the arm may have."""

FixedOrListed = Annotated[Annotated[T, Tag("fixed")] | Listed[T], Discriminator(_kind_of_value)]
"""A fixed value, or a list of them."""

Seeds = Annotated[
    Annotated[int, Field(ge=1, le=10_000), Tag("fixed")] | Listed[Annotated[int, Field(ge=0, lt=2**31)]],
    Discriminator(_kind_of_value),
]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
Steps = Annotated[int, Field(ge=0, le=10_000_000)]
Width = Annotated[int, Field(ge=1, le=65_536)]
"""An embedding dimension."""
WideInt = Annotated[int, Field(ge=1, le=1_000_000)]
"""A feed-forward dimension, a context or a batch."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Sites = Annotated[int, Field(ge=1, le=6)]
Share = Annotated[float, Field(gt=0, le=1)]
DecayFraction = Share
OptimiserName = Literal["adamw", "muon"]
"""Optimisers of `study.training.optimisers`, by name."""
ScheduleName = Literal["cosine", "wsd"]
"""Schedules of `study.training.schedules`, by name."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


def options(value: Any) -> tuple[Any, ...]:
    """The fixed values that a `Value` may take."""
    return value if isinstance(value, tuple) else value.choices if isinstance(value, Choices) else (value,)
