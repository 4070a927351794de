"""Rows of text with panels of marks beside them: the layout of a forest and of a dot plot."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator

from analysis.figures import labels, style

_LINE, _GAP = 0.122, 0.068
"""Height in inches of a line of text, and of the gap between rows."""
_BASELINE = 0.037
"""Inches from the middle of a line of text down to its baseline."""
_PANEL = 1.3
"""Minimum width of a panel in inches; row texts that leave less are wrapped."""
_EDGE, _BETWEEN, _INDENT = 0.08, 0.13, 0.14
_HEAD, _AXIS, _LEGEND_LINE = 0.46, 0.46, 0.165


@dataclass(frozen=True)
class Row:
    """One row: its text, the cells of the columns next to it, and the text to the right of each panel.

    A heading has no marks of its own; `look` is drawn before its text.
    """

    text: str
    cells: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    heading: bool = False
    look: style.GroupStyle | None = None


class Sheet(NamedTuple):
    """A figure of rows. y: position of each row in the data coordinates of every panel, growing downwards."""

    figure: Figure
    panels: list[Axes]
    y: list[float]


def lay_out(
    rows: Sequence[Row], titles: Sequence[str], subtitles: Sequence[tuple[str, str]], axis_labels: Sequence[str],
    heads: Sequence[str], beside_head: str, legend: Sequence[Line2D], caption: str,
) -> Sheet:  # fmt: skip
    """Rows of text with one empty panel per title; only the x limits are left for `set_limits`.

    Args:
        rows: rows from the top; each has as many cells as `heads`, or none.
        titles, subtitles, axis_labels: one per panel; a subtitle names the left and the right end of the axis.
        heads: headings of the columns of cells.
        beside_head: heading of the texts to the right of the panels; "" for none.
        legend: legend handles.
        caption: text of `style.caption`.
    """
    figure = style.new_figure(1)

    def width(text: str) -> float:
        return float(labels.text_size(figure, text)[0]) / 72 if text else 0.0

    def widest(texts: Sequence[str]) -> float:
        return max((width(text) for text in texts), default=0.0)

    cells = [
        widest([head, *(row.cells[column] for row in rows if row.cells)]) + _BETWEEN
        for column, head in enumerate(heads)
    ]
    besides = [
        widest([beside_head, *(row.beside[panel] for row in rows if row.beside)]) + 2 * _BETWEEN
        for panel in range(len(titles))
    ]
    fixed = 2 * _EDGE + _BETWEEN + sum(cells) + sum(besides)
    room = style.WIDTH - fixed - len(titles) * _PANEL - _INDENT
    # The text of a row whose cells are all empty may extend over the columns.
    spare = [0.0 if any(row.cells) else sum(cells) for row in rows]
    texts = [_wrapped(row.text, room + more, width) for row, more in zip(rows, spare, strict=True)]
    text_width = _INDENT + max(width(text) - more for text, more in zip(texts, spare, strict=True))
    panel = (style.WIDTH - fixed - text_width) / len(titles)
    y, bottom = [], 0.0
    for row, text in zip(rows, texts, strict=True):
        bottom += _GAP if row.heading and bottom else 0
        tall = _LINE * (text.count("\n") + 1) + _GAP
        y.append(bottom + tall / 2)
        bottom += tall
    columns = min(2, len(legend)) or 1
    below = _AXIS + _LEGEND_LINE * -(-len(legend) // columns)
    height = _HEAD + bottom + below
    figure.set_size_inches(style.WIDTH, height)

    def write(x: float, down: float, text: str, **settings) -> None:
        lines = text.split("\n")
        for index, line in enumerate(lines):
            baseline = down + _BASELINE + _LINE * (index - (len(lines) - 1) / 2)
            figure.text(x / style.WIDTH, 1 - baseline / height, line, **settings)

    for row, text, middle in zip(rows, texts, y, strict=True):
        down = _HEAD + middle
        write(_EDGE + (_INDENT if not row.heading or row.look else 0), down, text)
        if row.look:
            figure.add_artist(
                Line2D(
                    [(_EDGE + 0.05) / style.WIDTH], [1 - down / height], marker=row.look.marker, markersize=4.6,
                    color=row.look.color, linestyle="none",
                )
            )  # fmt: skip
    panels, left = [], _EDGE + text_width
    for column, head in enumerate(heads):
        left += cells[column]
        write(left, _HEAD - 0.09, head, ha="right", color=style.GREY)
        for row, middle in zip(rows, y, strict=True):
            if row.cells:
                write(left, _HEAD + middle, row.cells[column], ha="right")
    left += _BETWEEN
    for index, title in enumerate(titles):
        axes = style.add_axes(figure, left, below, panel, bottom)
        axes.set_ylim(bottom, 0)
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)
        axes.grid(False)
        for row, middle in zip(rows, y, strict=True):
            if not row.heading:
                axes.axhline(middle, color="#eeeeee", linewidth=0.6, zorder=0)
        axes.set_xlabel(axis_labels[index])
        write(left, _HEAD - 0.29, title, fontsize=8)
        write(left, _HEAD - 0.09, subtitles[index][0], color=style.GREY)
        write(left + panel, _HEAD - 0.09, subtitles[index][1], ha="right", color=style.GREY)
        left += panel + besides[index]
        if beside_head:
            start = left - besides[index] + _BETWEEN
            write(start, _HEAD - 0.09, beside_head, color=style.GREY)
            for row, middle in zip(rows, y, strict=True):
                if row.beside:
                    write(start, _HEAD + middle, row.beside[index])
        panels.append(axes)
    if legend:
        figure.legend(
            handles=legend, loc="upper left", ncols=columns, borderaxespad=0, columnspacing=1.6, handlelength=1.8,
            labelspacing=0.35, bbox_to_anchor=(_EDGE / style.WIDTH, (below - _AXIS + 0.05) / height), borderpad=0,
        )  # fmt: skip
    figure.set_label(caption)
    return Sheet(figure, panels, y)


def set_limits(axes: Axes, low: float, high: float) -> None:
    """Set the x limits of a panel, with at most six round ticks: as many as their labels leave room for."""
    axes.set_xlim(low, high)
    inches = axes.get_window_extent().width / labels.figure_of(axes).dpi
    for bins in (5, 4, 3, 2, 1):
        ticks = np.asarray(MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        texts = [f"{tick:.6g}".replace("-", "−") for tick in ticks]
        widths = np.array([labels.text_size(labels.figure_of(axes), text)[0] / 72 for text in texts])
        if (np.diff(ticks) / (high - low) * inches > (widths[1:] + widths[:-1]) / 2 + 0.08).all():
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
    axes.xaxis.set_major_formatter(FixedFormatter(texts))


def _wrapped(text: str, room: float, width) -> str:
    """The text, wrapped between words to a width of at most `room` inches; a long word may be wider."""
    for characters in range(len(text), 11, -1):
        lines = "\n".join(textwrap.wrap(text, characters, break_long_words=False)) or text
        if width(lines) <= room:
            return lines
    return "\n".join(textwrap.wrap(text, 12)) or text
