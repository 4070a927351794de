"""Numbers as text: means with intervals, counts, shares and ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd


def with_interval(mean: float, half_width: float, decimals: int) -> str:
    """`1.6543 ± 0.0083`; without the interval if there is none, a dash if there is no mean."""
    if math.isnan(mean):
        return "–"
    shown = digits(mean, decimals)
    return shown if math.isnan(half_width) else f"{shown} ± {digits(half_width, decimals)}"


def signed(difference: float, half_width: float, decimals: int) -> str:
    """`+0.031 ± 0.008`, as `with_interval`."""
    shown = with_interval(difference, half_width, decimals)
    return f"+{shown}" if difference > 0 else shown


def difference_shown(row: Mapping[Any, Any]) -> str:
    """Difference of a row of `comparisons.compare`, with the digits that are meaningful by its own interval."""
    return signed(row["difference"], row["half_width"], decimals_for(pd.Series([row["half_width"]])))


def counted(n: int, noun: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def percent(share: float) -> str:
    """Whole per cent; 100 or 0 only if the share is exactly that."""
    whole = round(100 * share)
    return "<1 %" if whole == 0 and share > 0 else ">99 %" if whole == 100 and share < 1 else f"{whole} %"


def decimals_for(half_widths: pd.Series) -> int:
    """Decimals, 0 to 6, that give the typical interval of a column two digits; 3 if none has an interval."""
    typical = half_widths.median()
    return min(6, max(0, 1 - math.floor(math.log10(typical)))) if typical > 0 else 3


def range_shown(values: pd.Series) -> str:
    """`1,000 to 2,000`; one number if all are equal, a dash if there is none."""
    known = values.dropna()
    if known.empty:
        return "–"
    low, high = count_shown(known.min()), count_shown(known.max())
    return low if low == high else f"{low} to {high}"


def digits(value: float, decimals: int) -> str:
    """`−0.12`, with a true minus sign."""
    return f"{value:.{decimals}f}".replace("-", "−")


def count_shown(value: float) -> str:
    """`1,000`; a dash if there is none."""
    return "–" if pd.isna(value) else f"{int(value):,}"


def format_count(value: float) -> str:
    """`40k`, `1.5M`: a round number of parameters or tokens for an axis."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"
