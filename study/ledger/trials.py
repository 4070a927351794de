"""A trial as the ledger has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna

from study.early_stopping import Stop
from study.errors import StudyError
from study.telling import Pruned
from study.trial import TrialShape, TrialSpec

TRIAL = "trial"
"""Optuna's user attribute that holds a trial of ours: one, so that it is written whole or not at all."""


@dataclass(frozen=True)
class Trial:
    """One configuration, its place in Optuna's numbering, and the counts that its shapes give.

    pruned: it breaks a limit of the budget, and is never trained. stop: it, or the trial it repeats, was given up.
    """

    number: int
    spec: TrialSpec
    shape: TrialShape
    budget_hash: str
    tuning_trials: int
    duplicate_of: int | None = None
    pruned: Pruned | None = None
    stop: Stop | None = None

    @property
    def source(self) -> int:
        """Number of the trial whose results are this one's: its own, or that of the trial it repeats."""
        return self.number if self.duplicate_of is None else self.duplicate_of


def to_attribute(trial: Trial) -> dict[str, Any]:
    """What Optuna keeps of a trial; its stop has a table of its own."""
    return {
        "spec": trial.spec.model_dump(mode="json"),
        "shape": trial.shape.__dict__,
        "budget_hash": trial.budget_hash,
        "tuning_trials": trial.tuning_trials,
        "duplicate_of": trial.duplicate_of,
        "pruned": asdict(trial.pruned) if trial.pruned is not None else None,
    }


def from_attribute(frozen: optuna.trial.FrozenTrial, stops: Mapping[int, Stop]) -> Trial:
    """The trial that Optuna kept.

    Raises:
        StudyError: it is damaged.
    """
    content = frozen.user_attrs[TRIAL]
    try:
        shape = content["shape"] | {"bonds": {name: tuple(b) for name, b in content["shape"]["bonds"].items()}}
        trial = Trial(
            number=frozen.number,
            spec=TrialSpec.model_validate_json(json.dumps(content["spec"])),
            shape=TrialShape(**shape),
            budget_hash=content["budget_hash"],
            tuning_trials=content["tuning_trials"],
            duplicate_of=content["duplicate_of"],
            pruned=Pruned(**content["pruned"]) if content.get("pruned") is not None else None,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise StudyError(f"trial {frozen.number} in the ledger is damaged: {error}".splitlines()[0]) from None
    return replace(trial, stop=stops.get(trial.source))
