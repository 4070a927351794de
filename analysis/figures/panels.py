"""Panels with parameters on a logarithmic axis, the legend under them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis.figures import labels, style
from analysis.results.numbers import format_count, percent

_HEIGHT, _ABOVE = 2.6, 0.1
_LEFT, _RIGHT, _LINE = 0.62, 0.15, 0.165
_APART, _EACH_BESIDE, _MOST_BESIDE = 7.0, 16, 20
"""Points between neighbouring configurations; maximum number of them placed one by one; maximum number of places."""


def new_panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels side by side, of their final size; `settle` it once its legend is known."""
    figure = style.new_figure(1)
    axes = [figure.add_axes((0, 0, 1, 1)) for _ in range(count)]
    _place(figure, axes, 1)
    return figure, axes


def settle(figure: Figure, axes: list[Axes], legend: Sequence[Artist], caption: str, columns: int = 3) -> None:
    """Write the legend under the panels, which keep their size, so that labels keep their places."""
    below = 0.46 + _LINE * -(-len(legend) // columns)
    _place(figure, axes, below)
    figure.legend(
        handles=list(legend), loc="upper left", ncols=columns, borderaxespad=0, columnspacing=1.8, handlelength=1.8,
        labelspacing=0.35, bbox_to_anchor=(0.55 / style.WIDTH, (below - 0.38) / figure.get_figheight()),
    )  # fmt: skip
    figure.set_label(caption)


def _place(figure: Figure, axes: list[Axes], below: float) -> None:
    height = _ABOVE + _HEIGHT + below
    figure.set_size_inches(style.WIDTH, height)
    each = style.WIDTH / len(axes)
    for index, panel in enumerate(axes):
        left, width = index * each + _LEFT, each - _LEFT - _RIGHT
        panel.set_position((left / style.WIDTH, below / height, width / style.WIDTH, _HEIGHT / height))


def scale_sizes(axes: Axes, sizes: pd.Series) -> None:
    """A logarithmic axis of parameters with room on either side."""
    low, high = float(sizes.min()) / 1.3, float(sizes.max()) * 1.3
    if high / low < 4:
        middle = np.sqrt(low * high)
        low, high = middle / 2, middle * 2
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    shown = _apart(axes, style.log_ticks(low, high)[0])
    style.set_log_ticks(axes.xaxis, low, high, lambda tick: format_count(tick) if tick in shown else "")
    axes.set_xlabel("Trainable parameters")


def _apart(axes: Axes, ticks: list[float]) -> set[float]:
    """The ticks whose labels do not touch, those of steps 1-2-5 first."""
    shown: dict[float, tuple[float, float]] = {}
    for tick in sorted(ticks, key=lambda tick: f"{tick:e}"[0] not in "125"):
        at = labels.points_of(axes, [tick], [0])[0, 0]
        half = labels.text_size(labels.figure_of(axes), format_count(tick))[0] / 2
        if all(abs(at - other) > half + other_half + 2 for other, other_half in shown.values()):
            shown[tick] = (at, half)
    return set(shown)


def scale_values(axes: Axes, values: pd.Series) -> None:
    margin = 0.08 * (values.max() - values.min()) or 0.05 * abs(values.max()) or 1.0
    axes.set_ylim(values.min() - margin, values.max() + margin)


def moved_statement(drawn: pd.DataFrame) -> str:
    """A sentence on how far `side_by_side` moved the points; `n_params` is their size, and `x` where they are drawn."""
    away = float(np.abs(np.log(drawn["x"].astype("float64") / drawn["n_params"].astype("float64"))).max())
    if away == 0:
        return ""
    return f"Configurations of about one size are drawn side by side, moved by up to {percent(np.expm1(away))}."


def side_by_side(axes: Axes, sizes: pd.Series, groups: pd.Series) -> NDArray[np.float64]:
    """x positions of configurations of these sizes: beside each other, in their order, moved as little as possible.

    If there are many configurations, those of one group and size stay together; if very many, each stays at its size.
    """
    x = sizes.to_numpy(dtype=np.float64)
    at = labels.points_of(axes, x, np.zeros(len(x)))[:, 0]
    alone = np.arange(len(x)) if len(x) <= _EACH_BESIDE else np.zeros(len(x))
    places = pd.MultiIndex.from_arrays([at, groups, alone])
    unique = places.unique()
    if len(unique) > _MOST_BESIDE:
        return x
    left, right = np.array(axes.get_window_extent().intervalx) * 72 / labels.figure_of(axes).dpi
    spread = labels.spread(unique.get_level_values(0).to_numpy(), _APART, left, right)
    moved = spread[unique.get_indexer(places)] - at
    start, end = np.log(axes.get_xlim())
    return x * np.exp(moved * (end - start) / (right - left))
