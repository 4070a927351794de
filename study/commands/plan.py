"""The cost of a study, before anything is trained."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from study.commands.memory import UnitMemory, machine_bytes
from study.search.telling import why_skipped
from study.spec.arms import Arm
from study.spec.comparable import not_compared, planned_gaps
from study.spec.config import StudyConfig
from study.spec.heal import Heal
from study.spec.models import Model
from study.spec.search_space import listed_specs, resolve, searched_arms
from study.spec.trial import TrialShape, TrialSpec
from study.spec.values import Choices, Range, options
from study.training.corpus import Corpus
from study.training.model import trial_shape
from study.training.randomness import generator
from study.training.train import Training


@dataclass(frozen=True)
class PlannedTrial:
    """One trial of the plan; `flops` and `seconds` are for one seed."""

    spec: TrialSpec
    shape: TrialShape
    seconds: float


@dataclass(frozen=True)
class PlannedSearch:
    """The sizes that the sampler may choose for one arm, from trials drawn over its whole space.

    rows: "least", "median" and "largest" by parameters, among draws within the limits of the search if there are any.
    larger_than_dense, beyond_limits: shares of the draws; a draw beyond the search's limits is never trained.
    seconds: time of one seed, the mean over the draws, with 0 for those beyond the limits.
    """

    arm: str
    rows: dict[str, PlannedTrial]
    larger_than_dense: float
    beyond_limits: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Listed trials one by one, and what a sampler may choose for each searched arm."""

    trials: list[PlannedTrial]
    searches: list[PlannedSearch]
    n_searched: int
    n_seeds: int
    rates: list[float]
    """FLOP/s of one unit on this machine, for each kind of model in the study."""
    n_different: float = math.inf
    """Number of different configurations in the searched space; a repeated one is not trained again."""

    @property
    def listed_seconds(self) -> float:
        """Time of all listed units, one after another."""
        return self.n_seeds * sum(trial.seconds for trial in self.trials)

    @property
    def searched_seconds(self) -> float:
        """Time of all searched units, one after another, if they are drawn at random."""
        if not self.searches:
            return 0.0
        n_trials = min(self.n_searched, self.n_different)
        return n_trials * self.n_seeds * statistics.fmean(search.seconds for search in self.searches)

    @property
    def unit_seconds(self) -> float:
        return self.listed_seconds + self.searched_seconds


def plan(config: StudyConfig, corpus: Corpus) -> Plan:
    """Every listed trial with its parameters, FLOPs and time on this machine, and what a search may cost.

    Times come from the rate at which this machine trains a model of the same family and sizes, timed over a few
    optimiser steps. A searched space is estimated from `N_DRAWS` draws, however large it is.
    """
    corpus.check_context(config.model.context)
    rates: dict[tuple[str, bool, Model, str, Heal | None, str | None], float] = {}

    def shape_of(spec: TrialSpec) -> TrialShape:
        return trial_shape(spec, corpus.vocab_size, len(corpus.validation), config.model, config.bits)

    def planned(spec: TrialSpec, shape: TrialShape) -> PlannedTrial:
        kind = (spec.family, spec.keep is None, spec.model, spec.protocol.optimiser, spec.heal, spec.options)
        if kind not in rates:
            rates[kind] = _measured_rate(spec, shape, corpus, config.execution.cpus)
        return PlannedTrial(spec, shape, shape.flops / rates[kind])

    trials = [planned(spec, shape_of(spec)) for spec in listed_specs(config)]
    arms = searched_arms(config)
    searches = [_search(config, arm, shape_of, planned) for arm in arms]
    n_different = sum(math.prod(map(_n_values, arm.values().values())) for arm in arms)
    return Plan(trials, searches, config.search.trials, len(config.seed_list), list(rates.values()), n_different)


def as_json(config: StudyConfig, planned: Plan, slots: int, memory: UnitMemory | None) -> str:
    """The plan as JSON; `flops` and `seconds` of a trial are for one seed.

    Args:
        slots: number of runs at a time. `run_seconds` is the time of all runs one after another; `seconds` of the whole
            plan is the time with this many at once.
        memory: that of the largest unit, in bytes; None if it is not known.
    """
    plain = {
        "name": config.name,
        "n_seeds": planned.n_seeds,
        "n_runs_listed": len(planned.trials) * planned.n_seeds,
        "n_trials_searched": planned.n_searched,
        "run_seconds_listed": planned.listed_seconds,
        "run_seconds_searched": planned.searched_seconds,
        "run_seconds": planned.unit_seconds,
        "seconds": planned.unit_seconds / slots,
        "slots": slots,
        "unit_bytes": None if memory is None else memory.n_bytes,
        "largest_unit": None if memory is None else memory.trial,
        "machine_bytes": machine_bytes(),
        "not_compared": not_compared(config),
        "gaps": [
            {"arm": gap.arm, "against": gap.against}
            | {"by_seeds": {n: resolved._asdict() for n, resolved in gap.by_seeds.items()}}
            for gap in planned_gaps(config)
        ],
        "trials": [_plain(trial) for trial in planned.trials],
        "searches": [
            {
                "arm": search.arm,
                "larger_than_dense": search.larger_than_dense,
                "beyond_limits": search.beyond_limits,
                "seconds": search.seconds,
            }
            | {name: _plain(trial) for name, trial in search.rows.items()}
            for search in planned.searches
        ],
    }
    return json.dumps(plain, indent=2)


def _plain(trial: PlannedTrial) -> dict[str, Any]:
    return {
        "arm": trial.spec.arm,
        "spec": trial.spec.model_dump(mode="json"),
        "n_params": trial.shape.n_params,
        "n_params_dense": trial.shape.n_params_dense,
        "flops": trial.shape.flops,
        "seconds": trial.seconds,
    }


# Searches -------------------------------------------------------------------------------------------------------------

N_DRAWS = 64
"""Number of trials that are drawn for each searched arm."""
_SIZING = ("d_model", "chi", "keep", "spread", "n_sites", "factorisation", "gauge", "forward")
"""Fields of an arm on which its parameters and FLOPs depend."""


def _search(
    config: StudyConfig,
    arm: Arm,
    shape_of: Callable[[TrialSpec], TrialShape],
    planned: Callable[[TrialSpec, TrialShape], PlannedTrial],
) -> PlannedSearch:
    shapes: dict[tuple[Any, ...], TrialShape] = {}

    def sized(chosen: Mapping[str, Any]) -> tuple[TrialSpec, TrialShape]:
        key, spec = tuple(chosen.get(name) for name in _SIZING), resolve(config, arm, dict(chosen))
        if key not in shapes:
            shapes[key] = shape_of(spec)
        return spec, shapes[key]

    draws = [sized(chosen) for chosen in _draws(arm)]
    may_train = [draw for draw in draws if why_skipped(config.search, draw[1]) is None]
    ends = [sized(chosen) for chosen in _extremes(arm)]
    ends = [end for end in ends if not may_train or why_skipped(config.search, end[1]) is None]
    by_size = sorted(may_train or draws, key=_n_params)
    rows = {
        "least": min([*by_size, *ends], key=_n_params),
        "median": by_size[(len(by_size) - 1) // 2],
        "largest": max([*by_size, *ends], key=_n_params),
    }
    timed = {name: planned(*draw) for name, draw in rows.items()}

    def seconds(shape: TrialShape) -> float:
        # Use the rate of the row nearest in FLOPs: timing every size would take minutes.
        near = min(timed.values(), key=lambda trial: abs(math.log(trial.shape.step_flops / shape.step_flops)))
        return near.seconds * shape.flops / near.shape.flops

    return PlannedSearch(
        arm.name,
        timed,
        larger_than_dense=statistics.fmean(shape.n_params > shape.n_params_dense for _, shape in draws),
        beyond_limits=1 - len(may_train) / len(draws),
        seconds=sum(seconds(shape) for _, shape in may_train) / len(draws),
    )


def _n_params(draw: tuple[TrialSpec, TrialShape]) -> int:
    return draw[1].n_params


def _draws(arm: Arm) -> Iterator[dict[str, Any]]:
    """Values of an arm as the random sampler may draw them; the same in every call.

    Every part of a value's range is drawn equally often (a Latin hypercube).
    """
    columns = {}
    for key, value in arm.values().items():
        places = torch.randperm(N_DRAWS, generator=generator(0, "plan", key)).tolist()
        columns[key] = [_quantile(value, (place + 0.5) / N_DRAWS) for place in places]
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def _quantile(value: Any, share: float) -> Any:
    """The value below which this share of a sampler's random draws lies."""
    if isinstance(value, Choices):
        return value.choices[int(share * len(value.choices))]
    if not isinstance(value, Range):
        return value
    is_whole = isinstance(value.low, int) and isinstance(value.high, int)
    low, high = (value.low - 0.5, value.high + 0.5) if is_whole else (value.low, value.high)
    at = low ** (1 - share) * high**share if value.log else low + share * (high - low)
    return min(max(round(at), value.low), value.high) if is_whole else at


def _extremes(arm: Arm) -> Iterator[dict[str, Any]]:
    """The corners of the space of values that an arm's size depends on, if there are few."""
    values = {key: _ends(value) if key in _SIZING else _ends(value)[:1] for key, value in arm.values().items()}
    if math.prod(map(len, values.values())) <= N_DRAWS:
        for corner in product(*values.values()):
            yield dict(zip(values, corner, strict=True))


def _ends(value: Any) -> tuple[Any, ...]:
    return (value.low, value.high) if isinstance(value, Range) else options(value)


def _n_values(value: Any) -> float:
    if not isinstance(value, Range):
        return len(options(value))
    return value.high - value.low + 1 if isinstance(value.low, int) and isinstance(value.high, int) else math.inf


# Time -----------------------------------------------------------------------------------------------------------------


def _measured_rate(spec: TrialSpec, shape: TrialShape, corpus: Corpus, cpus: float) -> float:
    """FLOP/s of optimiser steps of this trial's model on this machine's CPU: the median of a few, after a warm-up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(cpus)))
    try:
        # Enough steps to time, even for a short trial, at a rate that cannot diverge; the weights are not used.
        steps = spec.protocol.steps + 6
        harmless = {"steps": steps, "learning_rate": 1e-9, "embedding_learning_rate": None}
        protocol = spec.protocol.model_copy(update=harmless)
        changes: dict[str, Any] = {"start": None, "refinement": None, "protocol": protocol}
        if spec.keep is not None:  # its layers need trained weights and a fit, which takes minutes
            changes |= {"family": "dense", "keep": None, "metric": None, "heal": None}
        training = Training(spec.model_copy(update=changes), 0, corpus)
        seconds = []
        begun = time.perf_counter()
        while len(seconds) < 6 and (len(seconds) < 2 or time.perf_counter() - begun < 5):
            start = time.perf_counter()
            training.optimiser_step()
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return shape.step_flops / sorted(seconds[1:])[len(seconds[1:]) // 2]
