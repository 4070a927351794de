"""Points with their intervals, drawn alike in every figure, and their legend entries."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from analysis.figures import labels, style
from analysis.run_schema import MIN_SEEDS

SIZE = 4.6
"""Points across a marker."""
THICK = 2.4
"""Points across an interval that has a longer one beside it."""


def point(
    axes: Axes, xy: tuple[float, float], ends: tuple[float, float], look: style.GroupStyle, n: int, *,
    along: Literal["x", "y"] = "y", filled: bool = True, thick: bool = False,
) -> None:  # fmt: skip
    """A mean with the ends of its interval in the direction `along`.

    Below MIN_SEEDS it is grey, hollow and without interval. If an end is NaN, the interval is left out. `thick` is for
    an interval on a longer, thin one.
    """
    enough = n >= MIN_SEEDS
    color = look.color if enough else style.FEW
    if enough and not np.isnan(ends).any():
        x, y = (ends, (xy[1], xy[1])) if along == "x" else ((xy[0], xy[0]), ends)
        cap = {} if thick else {"marker": "|" if along == "x" else "_", "markersize": 3.6, "markeredgewidth": 0.9}
        width = THICK if thick else 1.0
        axes.plot(x, y, color=color, linewidth=width, zorder=3, solid_capstyle="butt", gid="interval", **cap)
    axes.plot(
        *([value] for value in xy), linestyle="none", marker=look.marker, markersize=SIZE, markeredgewidth=1.0,
        markeredgecolor=color, markerfacecolor=color if enough and filled else "white", zorder=5, gid="mean",
    )  # fmt: skip


def legend_point(look: style.GroupStyle, label: str, filled: bool = True) -> Line2D:
    return Line2D(
        [], [], linestyle="none", marker=look.marker, markersize=SIZE, markeredgecolor=look.color,
        markerfacecolor=look.color if filled else "white", label=label,
    )  # fmt: skip


def few_point() -> Line2D:
    """Legend of a point without interval."""
    return legend_point(style.GroupStyle(style.FEW, "o"), f"grey: fewer than {MIN_SEEDS} seeds", filled=False)


def failed_point() -> Line2D:
    """Legend of a point that `point` drew hollow because some of its seeds failed."""
    return legend_point(style.GroupStyle(style.GREY, "o"), "hollow: some seeds failed", filled=False)


def group_points(points: pd.DataFrame, n_key: str) -> list[Line2D]:
    """Legend of the groups of points; grey and hollow if no point of a group has MIN_SEEDS in column `n_key`."""
    enough = points.groupby("group")[n_key].max() >= MIN_SEEDS
    return [
        legend_point(look if enough[group] else style.GroupStyle(style.FEW, look.marker), group, bool(enough[group]))
        for group, look in style.group_styles(points["group"]).items()
    ]


def obstacles(axes: Axes, x: NDArray, y: NDArray, low: NDArray, high: NDArray) -> labels.Boxes:
    """Boxes that labels must not touch: points at (x, y) and their intervals from low to high (NaN: no interval)."""
    low, high = np.where(np.isnan(low), y, low), np.where(np.isnan(high), y, high)
    bars = labels.boxes_along(axes, np.column_stack((x, low)), np.column_stack((x, high)), 2.0)
    return np.vstack((labels.boxes_around(axes, x, y, 0.6 * SIZE), bars))
