"""One number of ours beside a published one: a row of the comparison, and the conclusion it allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from analysis.run_schema import MIN_SEEDS
from analysis.statistics.intervals import mean_interval, ratio_interval

COLUMNS = (
    *("place", "row", "quantity", "unit", "published", "said", "ours", "low", "high", "n", "difference", "kind"),
    *("follows", "why"),
)

YES, NO, OPEN, UNPUBLISHED = "yes", "no", "cannot be told", "nothing published"
PRINTED, DERIVED, READ_OFF, BELOW = "printed", "from printed numbers", "read off a plot", "in words, below"
NOT_SAID = ""


@dataclass(frozen=True)
class Value:
    """One number of ours. low, high: limits of its 95 % interval over n seeds; NaN if it has none, as for a computed
    number (n = 0)."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0

    @property
    def kind(self) -> str:
        return "not measured" if math.isnan(self.value) else "measured" if self.n else "computed"

    @property
    def spread(self) -> float:
        """Half the width of the 95 % prediction interval of one more seed, if the interval is a t interval."""
        return (self.high - self.low) / 2 * math.sqrt(self.n + 1)


def over_seeds(values: ArrayLike) -> Value:
    """Mean of one value per seed and its own t interval; empty without seeds, no interval below MIN_SEEDS."""
    interval = mean_interval(values)
    if not interval.n:
        return Value()
    mean = float(interval.mean)
    half_width = float(interval.half_width) if interval.n >= MIN_SEEDS else math.nan
    return Value(mean, mean - half_width, mean + half_width, interval.n)


def ratio_over_seeds(values: ArrayLike, reference: ArrayLike, scale: float = 1.0) -> Value:
    """Ratio of means, paired by seed, with Fieller's interval; empty without seeds."""
    if not np.size(values):
        return Value()
    interval = ratio_interval(values, reference)
    return Value(scale * float(interval.ratio), scale * float(interval.low), scale * float(interval.high), interval.n)


def row(
    place: str,
    name: str,
    quantity: str,
    number: float,
    ours: Value,
    conclusion: tuple[str, str],
    unit: str = "",
    said: str = PRINTED,
) -> dict[str, object]:
    """A row of the comparison.

    Args:
        place: table, figure or part of the paper.
        name: model or layer.
        number: the published number, in `unit`; NaN if none is published.
        conclusion: whether the number can follow from its own definition, and the reason.
        said: how it is published; for a bound in words no difference is computed.
    """
    if math.isnan(number):
        said = NOT_SAID
    return {
        "place": place,
        "row": name,
        "quantity": quantity,
        "unit": unit,
        "published": number,
        "said": said,
        "ours": ours.value,
        "low": ours.low,
        "high": ours.high,
        "n": ours.n,
        "difference": math.nan if said == BELOW else ours.value - number,
        "kind": ours.kind,
        "follows": conclusion[0],
        "why": conclusion[1],
    }


def too_few(ours: Value) -> str | None:
    """The reason why a measured value allows no conclusion; None if it allows one."""
    if math.isnan(ours.value):
        return "this study has no such run"
    return "this study has fewer than three seeds of it" if ours.n < MIN_SEEDS else None


def one_more_seed(number: float, ours: Value, rounding: float, says: str, digits: int = 3) -> tuple[str, str]:
    """Decide whether a number whose definition leaves only the seed open can be the published one.

    It can if it is within the 95 % prediction interval of one more seed. A mean of many seeds says more than one draw.
    """
    lacking = too_few(ours)
    if lacking:
        return OPEN, lacking
    near = abs(number - ours.value) <= ours.spread + rounding
    text = f"{says} {ours.value:.{digits}f}"
    return (YES, text) if near else (NO, f"{text} ± {ours.spread:.1g} each")
