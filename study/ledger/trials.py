"""Trials in Optuna's tables: writing and reading them."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import optuna
from pydantic import TypeAdapter, ValidationError

from study.ledger.checksums import SUM, Damaged, checksum
from study.spec.trial import RungStop, Stop, Trial

TRIAL = "trial"
"""Optuna's user attribute that holds one of our trials: a single one, so that a trial is written atomically."""


def to_attribute(trial: Trial) -> dict[str, Any]:
    """The part of a trial that Optuna stores; its stop is in a separate table."""
    content = {
        "spec": trial.spec.model_dump(mode="json"),
        "shape": trial.shape.__dict__,
        "budget_hash": trial.budget_hash,
        "tuning_trials": trial.tuning_trials,
        "duplicate_of": trial.duplicate_of,
        "skipped": asdict(trial.skipped) if trial.skipped is not None else None,
    }
    return signed(content, trial.number)


def signed(content: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The content of a trial with its checksum."""
    return {**content, SUM: checksum(f"trial {number}", content)}


def read_frozen(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Optuna's trials, in the order of their numbers.

    Raises:
        Damaged: the tables contain something that Optuna did not write.
    """
    try:
        found = study.get_trials(deepcopy=False)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise Damaged(f"a trial in Optuna's tables: {first_defect(error)}") from None
    if [frozen.number for frozen in found] != list(range(len(found))):
        raise Damaged("the trials in Optuna's tables are not numbered one after another")
    if not all(isinstance(value, float | int) for frozen in found for value in frozen.values or ()):
        raise Damaged("a value in Optuna's tables is not a number")
    return found


_TRIAL = TypeAdapter(Trial)


def from_attribute(frozen: optuna.trial.FrozenTrial, stops: Mapping[int, Stop | RungStop]) -> Trial:
    """The trial stored by Optuna.

    Raises:
        Damaged: the trial differs from what was written.
    """
    content = frozen.user_attrs[TRIAL]
    try:
        if content.get(SUM) != signed(content, frozen.number)[SUM]:
            raise ValueError("its checksum is wrong")
        trial = _TRIAL.validate_json(json.dumps({**content, "number": frozen.number, "stop": None}), strict=True)
    except (AttributeError, ValueError, TypeError) as error:
        raise Damaged(f"trial {frozen.number}: {first_defect(error)}") from None
    return replace(trial, stop=stops.get(trial.source))


def check_trials(trials: Mapping[int, Trial], arms: Container[str], stops: Iterable[int]) -> None:
    """Raise a Damaged if a trial has an unknown arm or repeats an unknown trial, or if a stopped trial is unknown."""
    for trial in trials.values():
        original = trials.get(trial.source)
        if trial.spec.arm not in arms or original is None or original.source != original.number:
            raise Damaged(f"trial {trial.number} has an unknown arm, or repeats an unknown trial")
    unknown = next((number for number in stops if number not in trials), None)
    if unknown is not None:
        raise Damaged(f"it has a decision to stop trial {unknown}, but the trial is missing")


def first_defect(error: Exception) -> str:
    """Description of the first defect in one line, without the content itself."""
    if isinstance(error, ValidationError):
        defect = error.errors(include_input=False, include_url=False)[0]
        return f"{'.'.join(map(str, defect['loc']))}: {defect['msg']}"
    return f"{type(error).__name__}: {error}".splitlines()[0]
