"""A dot with its interval in each row, a name at its left and a text at its right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures import labels, style

_LINE, _BETWEEN = 0.125, 0.04
"""Inches of a line of a name, and between rows."""


@dataclass(frozen=True)
class Dot:
    """A row: its name, the ends of its interval and the value between them, and the text at its right."""

    name: str
    low: float
    value: float
    high: float
    beside: str
    look: style.GroupStyle
    filled: bool = True


def dots_figure(
    dots: Sequence[Dot], title: str, beside_head: str, caption: str, legend: Sequence[Line2D] = ()
) -> tuple[Figure, Axes]:
    """The figure and its axes; the limits and the label of x are still to be set.

    Args:
        beside_head: heading of the texts at the right.
        caption: text of `style.caption`.
        legend: handles above the rows, four in a line.
    """
    figure = style.new_figure(1)
    left = max(labels.text_size(figure, dot.name)[0] for dot in dots) / 72 + 0.24
    beside = [*(dot.beside for dot in dots), beside_head]
    right = max(labels.text_size(figure, text)[0] for text in beside if text) / 72 + 0.28
    above, below = 0.27 + 0.155 * -(-len(legend) // 4), 0.42
    row_height = _LINE * max(dot.name.count("\n") + 1 for dot in dots) + _BETWEEN
    height = above + below + row_height * (len(dots) + 0.2)
    figure.set_size_inches(style.WIDTH, height)
    axes = style.add_axes(figure, left, below, style.WIDTH - left - right, height - above - below)
    axes.set_ylim(len(dots) - 0.4, -0.6)
    axes.grid(axis="x", visible=True)
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(dots)), [dot.name for dot in dots])
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, loc="left")
    for y, dot in enumerate(dots):
        color = dot.look.color
        axes.plot([dot.low, dot.high], [y, y], color=color, linewidth=1.2, zorder=3)
        axes.plot(
            dot.value, y, linestyle="none", marker=dot.look.marker, color=color, markersize=4.6, zorder=4,
            markerfacecolor=color if dot.filled else "white",
        )  # fmt: skip
        axes.annotate(
            dot.beside, (1, y), xycoords=axes.get_yaxis_transform(), xytext=(right * 72 - 8, 0), ha="right",
            textcoords="offset points", va="center_baseline", color="#333333", annotation_clip=False,
        )  # fmt: skip
    figure.text(1 - 8 / 72 / style.WIDTH, 1 - (above - 0.05) / height, beside_head, ha="right", color="#333333")
    if legend:
        figure.legend(
            handles=list(legend), loc="upper left", ncols=4, borderaxespad=0, columnspacing=1.6, handlelength=1.8,
            labelspacing=0.35, bbox_to_anchor=(0.1 / style.WIDTH, 1 - 0.04 / height),
        )  # fmt: skip
    figure.set_label(caption)
    return figure, axes
