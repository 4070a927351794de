"""What a study will cost, before anything is trained."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import torch

from study.config import Model, StudyConfig
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
    rates: list[float]
    """FLOP/s that one unit reaches on this machine, for each kind of model in the study."""

    @property
    def unit_seconds(self) -> float:
        """Time of all listed units, one after another."""
        return self.n_seeds * sum(trial.seconds for trial in self.trials)


def plan(config: StudyConfig, corpus: Corpus) -> Plan:
    """Every listed trial with its parameters, FLOPs and time on this machine.

    Times come from the rate at which this machine trains a model of the same family and sizes, timed over a few
    optimiser steps.
    """
    corpus.check_context(config.model.context)
    rates: dict[tuple[str, Model], float] = {}
    trials = []
    for spec in listed_specs(config):
        shape = trial_shape(spec, len(corpus.vocabulary), len(corpus.validation), config.model)
        kind = (spec.family, spec.model)
        if kind not in rates:
            rates[kind] = _measured_rate(spec, shape, corpus, config.execution.cpus)
        trials.append(PlannedTrial(spec, shape, shape.flops / rates[kind]))
    return Plan(trials, config.budget.trials, len(config.seed_list), list(rates.values()))


def as_json(config: StudyConfig, planned: Plan, slots: int) -> str:
    """The plan for machines; `flops` and `seconds` of a trial are one seed's.

    Args:
        slots: runs at a time, by which `seconds` of the whole is what `run_seconds` is one after another.
    """
    plain = {
        "name": config.name,
        "n_seeds": planned.n_seeds,
        "n_runs_listed": len(planned.trials) * planned.n_seeds,
        "n_trials_searched": planned.n_searched,
        "run_seconds": planned.unit_seconds,
        "seconds": planned.unit_seconds / slots,
        "slots": slots,
        "trials": [
            {
                "arm": trial.spec.arm,
                "spec": trial.spec.model_dump(mode="json"),
                "n_params": trial.shape.n_params,
                "n_params_dense": trial.shape.n_params_dense,
                "flops": trial.shape.flops,
                "seconds": trial.seconds,
            }
            for trial in planned.trials
        ],
    }
    return json.dumps(plain, indent=2)


def _measured_rate(spec: TrialSpec, shape: TrialShape, corpus: Corpus, cpus: float) -> float:
    """FLOP/s of optimiser steps of this trial's model on this machine's CPU: the median of a few, after one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(cpus)))
    try:
        # Enough steps to time, however few the trial has, and none that diverges: the values are of no matter here.
        steps = spec.protocol.steps + 6
        harmless = {"steps": steps, "learning_rate": 1e-9, "embedding_learning_rate": None}
        protocol = spec.protocol.model_copy(update=harmless)
        training = Training(spec.model_copy(update={"teacher": None, "protocol": protocol}), 0, corpus)
        seconds = []
        begun = time.perf_counter()
        while len(seconds) < 6 and (len(seconds) < 2 or time.perf_counter() - begun < 5):
            start = time.perf_counter()
            training.optimiser_step()
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return shape.step_flops / sorted(seconds[1:])[len(seconds[1:]) // 2]
