"""A study in Optuna's tables, the memory of its sampler."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from study.ledger.database import close_optuna, open_optuna
from study.ledger.trials import TRIAL, read_frozen, to_attribute
from study.search.telling import Told
from study.spec.trial import Trial


class OptunaStudy:
    """Open or create a study.

    Args:
        url: SQLAlchemy URL of the ledger.
        name: see `optuna.create_study`.
        objectives: direction of each objective, by its name.
    """

    def __init__(self, url: str, name: str, objectives: Mapping[str, Literal["minimize", "maximize"]]) -> None:
        self._database = open_optuna(url)
        # One cache for all calls: without it, the database searches all trials for a trial's number.
        self._storage = optuna.storages.get_storage(self._database)
        self._study = optuna.create_study(
            storage=self._storage, study_name=name, directions=list(objectives.values()), load_if_exists=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if self._study.metric_names is None:
                self._study.set_metric_names(list(objectives))
        self._id = self._storage.get_study_id_from_name(name)

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All trials, see `read_frozen`."""
        return read_frozen(self._study)

    def refresh(self) -> None:
        """Forget a connection that was lost."""
        self._database.remove_session()

    def new_trial(self) -> int:
        """Number of a new trial without parameters.

        Optuna's `ask` would first search all trials for a waiting one, and its sampler has nothing to choose here.
        """
        return self._storage.get_trial_number_from_id(self._storage.create_new_trial(self._id))

    def ask(self, sampler: optuna.samplers.BaseSampler) -> optuna.Trial:
        """A new trial whose parameters a sampler will choose."""
        self._study.sampler = sampler
        return self._study.ask()

    def write(self, trial: Trial) -> None:
        """Store our content of a new trial, which is then completely written."""
        self._storage.set_trial_user_attr(self._trial_id(trial.number), TRIAL, to_attribute(trial))

    def fail(self, number: int) -> None:
        """End a trial from which nothing can be learnt."""
        self._study.tell(number, state=TrialState.FAIL)

    def tell(self, number: int, told: Told) -> None:
        """Tell what the sampler is to learn; no effect on a trial that was told before, whose answer was lost.

        The constraints are set as by Optuna's `Trial.set_constraint`, which needs a trial asked in this process.
        """
        if told.constraints:
            trial_id = self._trial_id(number)
            with suppress(UpdateFinishedTrialError):
                for name, value in told.constraints.items():
                    self._storage.set_trial_system_attr(trial_id, f"constraints:{name}", value)
        self._study.tell(number, told.values, TrialState.FAIL if told.values is None else None, skip_if_finished=True)

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)

    def close(self) -> None:
        close_optuna(self._database)
