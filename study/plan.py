"""What a study will cost, before anything is trained."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from study.config import StudyConfig
from study.corpus import Corpus
from study.search_space import listed_specs
from study.training import Training
from study.trial import TrialShape, TrialSpec, trial_shape


@dataclass(frozen=True)
class PlannedTrial:
    """One trial of the plan; `flops` and `seconds` are one seed's."""

    spec: TrialSpec
    shape: TrialShape
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Listed trials one by one; searched ones are known in number alone until the sampler has chosen."""

    trials: list[PlannedTrial]
    n_searched: int
    n_seeds: int
    rate: float
    """FLOP/s that one unit reaches on this machine."""

    @property
    def unit_seconds(self) -> float:
        """Time of all listed units, one after another."""
        return self.n_seeds * sum(trial.seconds for trial in self.trials)


def plan(config: StudyConfig, corpus: Corpus) -> Plan:
    """Every listed trial with its parameters, FLOPs and time on this machine.

    Times come from the rate at which this machine trains the largest of the models, timed over a few optimiser steps.
    """
    corpus.check_context(config.model.context)
    specs = listed_specs(config)
    shapes = [trial_shape(spec, len(corpus.vocabulary), len(corpus.validation), config.model) for spec in specs]
    if not specs:
        return Plan([], config.budget.trials, len(config.seed_list), float("nan"))
    largest = max(range(len(specs)), key=lambda index: shapes[index].n_params)
    rate = _measured_rate(specs[largest], shapes[largest], corpus, config.execution.cpus)
    trials = [PlannedTrial(spec, shape, shape.flops / rate) for spec, shape in zip(specs, shapes, strict=True)]
    return Plan(trials, config.budget.trials, len(config.seed_list), rate)


def _measured_rate(spec: TrialSpec, shape: TrialShape, corpus: Corpus, cpus: float) -> float:
    """FLOP/s of optimiser steps of this trial's model on this machine's CPU: the median of a few, after one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(cpus)))
    try:
        training = Training(spec.model_copy(update={"teacher": None}), 0, corpus)
        seconds = []
        begun = time.perf_counter()
        while len(seconds) < 6 and (len(seconds) < 2 or time.perf_counter() - begun < 5):
            start = time.perf_counter()
            training.optimiser_step()
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return shape.step_flops / sorted(seconds[1:])[len(seconds[1:]) // 2]
