"""Optuna's samplers over a study's space: each trial gets a fresh one with its own seed."""

from __future__ import annotations

import hashlib
from typing import Any

import optuna
from optuna.distributions import BaseDistribution

from study.spec.config import StudyConfig
from study.spec.search_space import space


def make_sampler(config: StudyConfig, trial_number: int) -> optuna.samplers.BaseSampler:
    """A fresh sampler for one trial, seeded by (sampler seed, trial number): resuming does not repeat earlier draws."""
    digest = hashlib.blake2b(f"{config.search.seed}/{trial_number}".encode(), digest_size=4).digest()
    seed, population_size = int.from_bytes(digest, "big"), config.search.population_size
    match config.search.sampler:
        case "grid" | "random":
            return optuna.samplers.RandomSampler(seed=seed)
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        case "nsga2":
            return _NSGAII(space(config), seed=seed, population_size=population_size)
        case "nsga3":
            return _NSGAIII(space(config), seed=seed, population_size=population_size)
        case "gp":
            return _GP(space(config), seed=seed, warn_independent_sampling=False)


class _OverKnownSpace:
    """A sampler over the study file's space.

    Optuna's own samplers intersect the parameters of all completed trials. A listed trial has no parameters, so it
    would make that space empty.
    """

    def __init__(self, space: dict[str, BaseDistribution], **options: Any) -> None:
        super().__init__(**options)
        self._known_space = {name: distribution for name, distribution in space.items() if not distribution.single()}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._known_space


class _NSGAII(_OverKnownSpace, optuna.samplers.NSGAIISampler):
    pass


class _NSGAIII(_OverKnownSpace, optuna.samplers.NSGAIIISampler):
    pass


class _GP(_OverKnownSpace, optuna.samplers.GPSampler):
    """Fits the Gaussian processes without listed trials, which have no point in the space."""

    def _sample_relative_impl(
        self,
        study: optuna.Study,
        completed_trials: list[optuna.trial.FrozenTrial],
        running_trials: list[optuna.trial.FrozenTrial],
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        in_space = [trial for trial in completed_trials if search_space.keys() <= trial.params.keys()]
        if len(in_space) < self._n_startup_trials:
            return {}
        return super()._sample_relative_impl(study, in_space, running_trials, search_space)
