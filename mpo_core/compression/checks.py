"""Checks and defaults of the arguments of `compress`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from mpo_core.calibration.statistics import METRICS, Statistics
from mpo_core.compression.candidates import Layer
from mpo_core.compression.sizing import SPREADS
from mpo_core.models.dense_layers import DenseLayer
from mpo_core.tensor_train.bonds import check_fraction, check_whole


def check_size(layer: Layer, allow_growth: bool, narrow: bool, spread: str, **sizes: Any) -> None:
    if isinstance(layer, type):
        raise ValueError(f"`layer` must be the name of a kind, such as 'low_rank', but got the class {layer.__name__}")
    keep, max_params, rel_error = sizes["keep"], sizes["max_params"], sizes["rel_error"]
    given = [name for name, size in sizes.items() if size is not None]
    if len(given) != (0 if callable(layer) else 1):
        raise ValueError(
            "exactly one of `chi`, `rel_error`, `keep` and `max_params` must be given, and none with a function as "
            f"`layer`, but got {' and '.join(given) or 'none'}"
        )
    if isinstance(max_params, Mapping):
        check_whole(**{f"max_params[{name!r}]": size for name, size in max_params.items()})
    elif max_params is not None:
        check_whole(max_params=max_params)
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, Real) or not 0 < float(keep) <= 1):
        raise ValueError(f"`0 < keep <= 1` must hold, but got keep={keep!r}")
    has_budget = keep is not None or (max_params is not None and not isinstance(max_params, Mapping))
    if narrow and not (has_budget and spread == "loss"):
        raise ValueError("`narrow` needs `keep` or one number as `max_params`, and spread 'loss'")
    if allow_growth and sizes["chi"] is None:
        raise ValueError("`allow_growth` is allowed only with `chi`, because with the other sizes no layer grows")
    if rel_error is not None:
        check_fraction(rel_error=rel_error)


def check_names(max_params: Mapping[str, int], found: Sequence[DenseLayer]) -> None:
    for dense in found:
        for name in max_params.keys() & set(dense.sharers):
            raise ValueError(f"`max_params` names {name}, which shares the weight of {dense.name}: name {dense.name}")
    unknown = set(max_params) - {dense.name for dense in found}
    if unknown:
        raise ValueError(f"`max_params` names {', '.join(sorted(unknown))}, but no layer to be replaced has that name")


def check_init(init: str | None, statistics: object, has_size: bool) -> None:
    if init is None:
        return
    if not has_size:
        raise ValueError(f"init {init!r} needs `chi` or `max_params` by layer, because fresh parameters have no error")
    if statistics is not None:
        raise ValueError(f"init {init!r} draws fresh parameters, so `statistics` are not allowed with it")


def chosen_metric(metric: str | None, statistics: Statistics | None) -> str:
    if statistics is not None and not isinstance(statistics, Statistics):
        raise ValueError(f"`statistics` must be from collect_statistics or Statistics.load, but got {statistics!r}")
    if metric is None:
        return "weights" if statistics is None else "loss" if statistics.has_loss else "outputs"
    if metric not in METRICS:
        raise ValueError(f"`metric` must be one of {', '.join(METRICS)}, but got {metric!r}")
    if metric != "weights" and statistics is None:
        raise ValueError(f"metric {metric!r} needs `statistics`, from collect_statistics(model, batches)")
    if metric == "loss" and statistics is not None and not statistics.has_loss:
        raise ValueError("metric 'loss' needs statistics of a loss: collect_statistics(model, batches, loss=…)")
    return metric


def chosen_spread(
    spread: str | None, metric: str, keep: float | None, max_params: int | Mapping[str, int] | None
) -> str:
    if spread is None:
        return "loss" if metric == "loss" else "errors"
    if spread not in SPREADS:
        raise ValueError(f"`spread` must be one of {', '.join(SPREADS)}, but got {spread!r}")
    if spread == "loss" and metric != "loss":
        raise ValueError(f"spread 'loss' needs the metric 'loss', but the metric is {metric!r}")
    if keep is None and (max_params is None or isinstance(max_params, Mapping)):
        raise ValueError(f"spread {spread!r} goes with `keep` or one number as `max_params`")
    return spread
