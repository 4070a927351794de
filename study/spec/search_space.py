"""From the study file to trials: listed ones are enumerated, searched ones are suggested by an Optuna sampler."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from analysis import run_schema
from study.errors import StudyError
from study.spec.arms import (
    AUTO,
    PROTOCOL_VALUES,
    SIZE_FIELDS,
    Arm,
    CompressedArm,
    ControlArm,
    DenseArm,
    KeptArm,
    MPOArm,
)
from study.spec.config import StudyConfig
from study.spec.search import rung_steps
from study.spec.trial import TrialSpec
from study.spec.values import Choices, Range, options

ARM = "arm"
"""Name of the Optuna parameter that chooses between several searched arms."""

MAX_LISTED, MAX_RUNS = 100_000, 10_000_000
"""Limits of a study: listed trials; runs (trial × seed), including those of searched trials."""


def directions(config: StudyConfig) -> list[run_schema.Direction]:
    """Optuna's direction for each of the study's objectives."""
    return [run_schema.direction_of(objective) for objective in config.objectives]


# Listed trials --------------------------------------------------------------------------------------------------------


def listed_specs(config: StudyConfig) -> list[TrialSpec]:
    """Every trial of the arms that leave no value to the sampler, in the order of the file.

    Raises:
        StudyError: two trials have the same configuration, or there are too many.
    """
    _check_number(config)
    specs: list[TrialSpec] = []
    for arm in config.arms:
        if not arm.is_searched:
            specs.extend(_grid(config, arm))
    seen: dict[TrialSpec, str] = {}
    for spec in specs:
        anonymous = spec.model_copy(update={"arm": ""})
        if anonymous in seen:
            raise StudyError(f"arms[{spec.arm}]: repeats a trial of arm {seen[anonymous]}; every trial must differ")
        seen[anonymous] = spec.arm
    return specs


def _check_number(config: StudyConfig) -> None:
    """Raise a StudyError if the study has too many trials or runs to hold in memory."""
    n_listed = 0
    for arm in config.arms:
        if not arm.is_searched:
            n_listed += math.prod(len(options(value)) for value in arm.values().values())
    if n_listed > MAX_LISTED:
        raise StudyError(
            f"`arms` list {n_listed:,} trials, but at most {MAX_LISTED:,} are allowed; let a sampler choose among them "
            "(`{choices: [...]}`)"
        )
    n_runs = (n_listed + config.search.trials) * len(config.seed_list)
    if n_runs > MAX_RUNS:
        raise StudyError(f"{n_runs:,} runs (trials × `seeds`), but at most {MAX_RUNS:,} are allowed")


def check_trials(config: StudyConfig) -> None:
    """Raise a StudyError if values that a trial of the study may get are incompatible."""
    listed_specs(config)
    for arm in searched_arms(config):
        # Vary one value at a time: values of an arm do not depend on each other, and all combinations may be too many.
        examples = {key: _examples(value) for key, value in arm.values().items()}
        first = {key: values[0] for key, values in examples.items()}
        for key, values in examples.items():
            for value in values:
                resolve(config, arm, first | {key: value})
        halving, protocol = config.search.halving, resolve(config, arm, first).protocol
        has_rungs = halving is None or rung_steps(halving.rungs, protocol.steps, protocol.eval_every)
        if protocol.steps and not has_rungs:  # an arm without steps trains nothing that could be stopped
            raise StudyError(
                f"arms[{arm.name}]: no evaluation comes between a rung of `search.halving` and the last step; lower "
                "`eval_every`"
            )


def _examples(value: Any) -> tuple[Any, ...]:
    match value:
        case Range(low=int(low), high=high):
            return low, low + 1, high  # low and low + 1 cannot both be valid if some integers are not
        case Range(low=low, high=high):
            return low, high
        case _:
            return options(value)


def _grid(config: StudyConfig, arm: Arm) -> Iterator[TrialSpec]:
    values = arm.values()
    for chosen in product(*map(options, values.values())):
        yield resolve(config, arm, dict(zip(values, chosen, strict=True)))


def resolve(config: StudyConfig, arm: Arm, chosen: dict[str, Any]) -> TrialSpec:
    """The trial of an arm with these values for the fields that may be listed or searched.

    Raises:
        StudyError: the values are incompatible.
    """
    data: dict[str, Any] = {"arm": arm.name, "family": arm.family, "start": arm.start, "heal": arm.heal}
    data |= {key: value for key, value in chosen.items() if key not in (*PROTOCOL_VALUES, "d_model")}
    if isinstance(arm, CompressedArm):
        data.setdefault("lr_rule", "uniform")
        data.setdefault("decay", "parameter")
        data |= {"layers": arm.layers, "options": json.dumps(arm.options, sort_keys=True) if arm.options else None}
    if isinstance(arm, MPOArm):
        data |= {"bonds": arm.bonds, "sweep": arm.sweep}
    if isinstance(arm, KeptArm):
        data.setdefault("spread", "loss" if chosen["metric"] == "loss" else "errors")
        if arm.family == "mpo":
            data.setdefault("factorisation", "balanced")
        if AUTO in (arm.family, data.get("factorisation")):
            data["forward"] = "chain"
    elif isinstance(arm, CompressedArm):
        plain = "weights" if isinstance(arm, ControlArm) else "tt_svd"
        data.setdefault(*(("init", "variance") if arm.start is None else ("refinement", plain)))
    elif arm.start is None and config.model.width is not None:
        data.setdefault("init", "paper")
    size = next((chosen[key] for key in SIZE_FIELDS if key in chosen), config.model.width)
    fixed = ("steps", "warmup_steps", "schedule", "decay_fraction", "eval_every")
    overrides = {key: getattr(arm, key) for key in fixed} | {
        key: _of_size(chosen.get(key), size) for key in PROTOCOL_VALUES
    }
    protocol = config.protocol.model_dump() | {key: value for key, value in overrides.items() if value is not None}
    if arm.schedule == "cosine" and arm.decay_fraction is None:
        protocol.pop("decay_fraction", None)  # of the protocol's own schedule
    model = config.model.model_dump()
    if chosen.get("d_model", config.model.width) != config.model.width:
        model |= {"d_model": chosen["d_model"], "d_ff": None}
    if isinstance(arm, DenseArm) and arm.d_ff is not None:
        model["d_ff"] = _of_size(arm.d_ff, size)
    if isinstance(arm, DenseArm) and arm.model is not None:
        model |= arm.model
        data["resized"] = ", ".join(f"{key}={value}" for key, value in sorted(arm.model.items()))
    try:
        return TrialSpec.model_validate(data | {"model": model, "protocol": protocol})
    except ValueError as error:
        reason = str(error.errors()[0]["msg"]) if hasattr(error, "errors") else str(error)  # type: ignore[attr-defined]
        raise StudyError(f"arms[{arm.name}]: {reason.removeprefix('Value error, ')}") from None


def _of_size(value: Any, size: int | None) -> Any:
    return value[size] if isinstance(value, dict) else value


def example(config: StudyConfig, arm: Arm) -> TrialSpec:
    """A trial of an arm, with the first value of each field that is listed or searched."""
    return resolve(config, arm, {key: _examples(value)[0] for key, value in arm.values().items()})


def extreme(config: StudyConfig, arm: Arm, end: Callable[[Any], Any]) -> TrialSpec:
    """The trial of an arm with the smallest or the largest of all numbers, and the first of all words.

    Args:
        end: `min` or `max`.
    """

    def chosen(value: Any) -> Any:
        given = (value.low, value.high) if isinstance(value, Range) else options(value)
        return given[0] if isinstance(given[0], str) else end(given)

    return resolve(config, arm, {key: chosen(value) for key, value in arm.values().items()})


def start_spec(config: StudyConfig, spec: TrialSpec) -> TrialSpec | None:
    """The trial whose trained weights a spec starts from; None if it starts from scratch."""
    if spec.start_arm is None:
        return None
    arm = config.arm(spec.start_arm)
    return resolve(config, arm, arm.values())  # such an arm has no open values


# Searched trials ------------------------------------------------------------------------------------------------------


def suggest(config: StudyConfig, trial: optuna.Trial) -> TrialSpec:
    """Let the trial's sampler choose an arm, if several are searched, and the arm's open values."""
    arms = searched_arms(config)
    name = trial.suggest_categorical(ARM, [arm.name for arm in arms]) if len(arms) > 1 else arms[0].name
    arm = config.arm(name)
    chosen = {
        key: _suggest(trial, _parameter(arm, key), value) if _is_open(value) else value
        for key, value in arm.values().items()
    }
    return resolve(config, arm, chosen)


def _suggest(trial: optuna.Trial, parameter: str, value: Choices[Any] | Range[Any]) -> Any:
    match _distribution(value):
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(parameter, choices)
        case IntDistribution(low=low, high=high, log=log):
            return trial.suggest_int(parameter, low, high, log=log)
        case FloatDistribution(low=low, high=high, log=log):
            return trial.suggest_float(parameter, low, high, log=log)


def space(config: StudyConfig) -> dict[str, BaseDistribution]:
    """Distributions of the open values of the only searched arm, by parameter name."""
    arm = searched_arms(config)[0]
    return {_parameter(arm, key): _distribution(value) for key, value in arm.values().items() if _is_open(value)}


def searched_arms(config: StudyConfig) -> list[Arm]:
    """Arms that leave values to the sampler."""
    return [arm for arm in config.arms if arm.is_searched]


def _parameter(arm: Arm, key: str) -> str:
    # Two arms may search the same key in different ranges, which Optuna forbids under one name.
    return f"{arm.name}.{key}"


def _is_open(value: Any) -> bool:
    return isinstance(value, Choices | Range)


def _distribution(value: Choices[Any] | Range[Any]) -> BaseDistribution:
    if isinstance(value, Choices):
        return CategoricalDistribution(value.choices)
    if isinstance(value.low, int) and isinstance(value.high, int):
        return IntDistribution(value.low, value.high, log=value.log)
    return FloatDistribution(value.low, value.high, log=value.log)
