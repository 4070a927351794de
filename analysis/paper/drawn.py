"""How published and measured values are drawn beside each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.results.summary import interval_statement, n_statement
from analysis.run_schema import MIN_SEEDS

PUBLISHED, MEASURED = "#d55e00", "#0072b2"
"""Their colours."""


def measured_here(n_seeds: pd.Series, what: str, drawn_as: str, further: str = "") -> list[str]:
    """Sentences about the values of this study, for a caption; n_seeds is the number of seeds of each point."""
    counts = n_seeds[n_seeds > 0]
    if counts.empty:
        return ["Nothing of this study is measured under the paper's protocol."]
    parts = [f"{what}, {n_statement(counts)}", interval_statement(drawn_as, counts), further]
    few = ["Grey: fewer than three seeds."] if counts.min() < MIN_SEEDS else []
    return ["; ".join(filter(None, parts)) + ".", *few]


def draw_measured(axes: Axes, points: pd.DataFrame, x: str, **look: Any) -> None:
    """A line through the values in the column `measured`, with their intervals."""
    around = np.vstack((points["measured"] - points["low"], points["high"] - points["measured"]))
    settings: dict[str, Any] = {"linewidth": 1.0, "capsize": 1.5, "elinewidth": 0.8} | look
    axes.errorbar(points[x], points["measured"], yerr=np.nan_to_num(around), **settings)
