"""The search of a study file: what is optimised, and how values are chosen."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from analysis.run_schema import OBJECTIVES
from study.errors import did_you_mean
from study.spec.values import PositiveFloat, PositiveInt, Strict


def _objective(value: str) -> str:
    if value not in OBJECTIVES:
        meant = did_you_mean(value, OBJECTIVES)
        raise ValueError(f"must be one of {', '.join(OBJECTIVES)}, but got {json.dumps(value)[:60]}{meant}")
    return value


Objective = Annotated[str, AfterValidator(_objective), WithJsonSchema({"type": "string", "enum": [*OBJECTIVES]})]
"""The name of a metric of `analysis.run_schema` that has a direction."""


class EarlyStopping(Strict):
    """When a searched MPO trial is stopped early. The result then depends on the order in which trials end."""

    margin: PositiveFloat = Field(
        description="In the unit of `metric` (nats, bits, or a fraction). A trial stops when a rival is better by this "
        "margin on every seed that both have. The rival has at most as many parameters and the same training."
    )
    metric: Objective = Field(
        default="val_loss", description="Metric at the last step, of each seed. It must be one of the objectives."
    )
    min_seeds: Annotated[int, Field(ge=2)] = Field(
        default=2, description="Smallest number of seeds that both must have."
    )


def _rungs(value: tuple[float, ...]) -> tuple[float, ...]:
    if not value or list(value) != sorted(set(value)) or not (value[0] > 0 and value[-1] < 1):
        raise ValueError(f"must be rising shares between 0 and 1, but got {list(value)}")
    return value


class Halving(Strict):
    """When searched trials end part of the way. The result then depends on the order in which trials get there."""

    rungs: Annotated[tuple[float, ...], AfterValidator(_rungs)] = Field(
        default=(0.25, 0.5),
        description="Shares of a trial's steps. A trial is judged at the first evaluation from each share on; shares "
        "with the same evaluation are one rung.",
    )
    keep: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5,
        description="A trial goes on if it is among this best share of the trials that have reached the rung so far. "
        "They are ordered by the number of trials that dominate them: no worse in any objective and better in one.",
    )
    seeds: Annotated[int, Field(ge=2)] = Field(
        default=2,
        description="The number of seeds whose mean decides. The other seeds start when these are past all rungs.",
    )


@lru_cache(maxsize=256)
def rung_steps(rungs: tuple[float, ...], n_steps: int, eval_every: int) -> list[int]:
    """The steps of the rungs: the first evaluation from each share on, before the last step.

    They are fewer than the rungs if evaluations are rare.
    """
    rounding = 1e-9 * n_steps  # .55 × 100 is a little above 55
    found = {math.ceil((rung * n_steps - rounding) / eval_every) * eval_every for rung in rungs}
    return sorted(step for step in found if 0 < step < n_steps)


class Search(Strict):
    """How searched values are chosen, and how many trials are searched. Listed trials always run and do not count."""

    sampler: Literal["grid", "random", "tpe", "nsga2", "nsga3", "gp"] = Field(
        default="grid",
        description="One of Optuna's samplers. `grid`: all trials are listed. `random` and `tpe` search any number of "
        "arms; `nsga2`, `nsga3` and `gp` search one arm. `tpe` and `gp` draw their first ten trials at random.",
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Random seed of the sampler.")
    population_size: Annotated[int, Field(ge=2)] = Field(
        default=20, description="Trials in a generation of nsga2 and nsga3; the first generation is drawn at random."
    )
    trials: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=0, description="Number of searched trials. Trials that repeat another count too."
    )
    max_params: PositiveFloat | None = Field(
        default=None,
        description="Largest number of trainable parameters of a searched trial. A value of at most 1 is a fraction of "
        "the dense model's. A larger trial is not trained; the sampler learns that it is too large.",
    )
    min_params: PositiveFloat | None = Field(
        default=None, description="Smallest number of trainable parameters; otherwise as `max_params`."
    )
    max_repeats: PositiveInt | None = Field(
        default=None,
        description="End the search after this many trials that repeat another one, which need no training. "
        "Default: no limit. It may change during a study.",
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="Default: off. Dense and listed trials are never stopped early."
    )
    halving: Halving | None = Field(
        default=None,
        description="Successive halving. Default: off. Listed trials are never stopped early. "
        "Not with `early_stopping`.",
        exclude_if=lambda value: value is None,
    )
