"""Text beside points and at the ends of lines, without overlaps. The same input gives the same places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis.figures.style import ink

_LED_TO = 16
"""Up to this number of labels, a line may lead to any of them; beyond it, only to an important one."""
_RADII = (4.5, 6.0, 8.0, 10.5, 14.0, 19.0, 25.0, 32.0, 40.0)
_NEAR = 8.0
"""Largest distance in points between a point and its label without a line between them."""
_ANGLES = np.deg2rad(np.arange(0, 360, 15) + 45)
_PADDING = 1.5
_LINE = {"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
_DOTS = (0, (1, 1.6))
"""The line from the end of a curve to its label is dotted, so that it is not mistaken for part of the curve."""
_BOX = {"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
"""Background of a label, so that lines under it do not cross its text."""

Boxes = NDArray[np.float64]
"""(n, 4): left, bottom, right, top in points from the lower left corner of the figure."""


@dataclass(frozen=True)
class Label:
    """Text that belongs to the point (x, y) in data coordinates. Of many, only important ones get lines."""

    x: float
    y: float
    text: str
    color: str
    important: bool = True
    key: str = ""
    """The text that the caption gives for a letter in its place."""


def figure_of(axes: Axes) -> Figure:
    """The figure that the axes are drawn in."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def points_of(axes: Axes, x: Sequence[float] | NDArray, y: Sequence[float] | NDArray) -> NDArray[np.float64]:
    """Positions (n, 2) in points (1/72 in) of data coordinates."""
    return axes.transData.transform(np.column_stack((x, y))) * 72 / figure_of(axes).dpi


def boxes_around(axes: Axes, x: Sequence[float] | NDArray, y: Sequence[float] | NDArray, half: float) -> Boxes:
    """Squares of 2 × `half` points around data coordinates."""
    centres = points_of(axes, x, y)
    return np.hstack((centres - half, centres + half))


def boxes_along(axes: Axes, start: NDArray, end: NDArray, half: float) -> Boxes:
    """Boxes around horizontal or vertical segments from `start` to `end`, each (n, 2) in data coordinates."""
    a, b = points_of(axes, start[:, 0], start[:, 1]), points_of(axes, end[:, 0], end[:, 1])
    return np.hstack((np.minimum(a, b) - half, np.maximum(a, b) + half))


def text_size(figure: Figure, text: str) -> NDArray[np.float64]:
    """(width, height), in points, of text in the default size."""
    probe = figure.text(0, 0, text)
    extent = probe.get_window_extent(cast(FigureCanvasAgg, figure.canvas).get_renderer())
    probe.remove()
    return np.array((extent.width, extent.height)) * 72 / figure.dpi


def told_apart(names: pd.Series, groups: pd.Series) -> list[str]:
    """Labels, preceded by the name of their group if another group has the same label: `low rank, as χ=16`.

    Those of controls always have it: `as χ=16` does not say what it is.
    """
    unclear = (groups.groupby(names, sort=False).transform("nunique") > 1) | names.str.startswith("as ")
    kinds = groups.str.removesuffix(" from scratch").str.removesuffix(" fine-tuned")
    both = groups.groupby(kinds, sort=False).transform("nunique") > 1
    kinds = kinds.where(~both, groups.str.removesuffix(" from scratch"))
    return names.where(~unclear, kinds + ", " + names).tolist()


def place_labels_or_letters(axes: Axes, labels: Sequence[Label], hard: Boxes, soft: Boxes) -> str:
    """As `place_labels`; if there is no room for all labels, letters take their places.

    Returns:
        The key of the letters as a sentence for the caption; empty if the labels are written in full.
    """
    before = len(axes.texts)
    if place_labels(axes, labels, hard, soft) == 0:
        return ""
    for text in list(axes.texts[before:]):
        text.remove()
    names = [chr(ord("A") + index) if index < 26 else f"A{index - 25}" for index in range(len(labels))]
    by_x = sorted(range(len(labels)), key=lambda index: labels[index].x)  # letters ascend from left to right
    letter_of = dict(zip(by_x, names, strict=True))
    left_out = place_labels(axes, [replace(label, text=letter_of[at]) for at, label in enumerate(labels)], hard, soft)
    missing = f" {left_out} of these letters left out for lack of room." if left_out else ""
    return "; ".join(f"{letter_of[at]}: {labels[at].key or labels[at].text}" for at in by_x) + "." + missing


def place_labels(axes: Axes, labels: Sequence[Label], hard: Boxes, soft: Boxes) -> int:
    """Write each label near its point, in the given order; return the number of labels without room.

    A label never touches a box of `hard`, another label or the edge of the axes. It touches as few boxes of `soft` as
    possible. The limits of the axes and the figure's layout must be final.
    """
    frame = _frame(axes)
    taken, left_out, few = hard, 0, len(labels) <= _LED_TO
    for label in labels:
        size = text_size(figure_of(axes), label.text)
        anchor = points_of(axes, [label.x], [label.y])[0]
        radii = [radius for radius in _RADII if label.important or few or radius <= _NEAR]
        place = _best_place(anchor, size, radii, frame, taken, soft)
        if place is None:
            left_out += 1
            continue
        centre, radius = place
        taken = np.vstack((taken, _box(anchor + centre, size)))
        # The line starts at the point of the text that is nearest to the anchor.
        nearest = np.clip((size / 2 - centre) / size, 0, 1)
        axes.annotate(
            label.text, (label.x, label.y), xytext=(centre[0], centre[1]), textcoords="offset points", ha="center",
            va="center", color=ink(label.color), bbox=_BOX, zorder=6, annotation_clip=False,
            arrowprops=None if radius <= _NEAR else {**_LINE, "color": label.color, "relpos": tuple(nearest)},
        )  # fmt: skip
    return left_out


def label_line_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Write labels to the right of the axes at the height of their points, moved apart where they would overlap."""
    if not labels:
        return
    heights = points_of(axes, [label.x for label in labels], [label.y for label in labels])[:, 1]
    line = max(text_size(figure_of(axes), label.text)[1] for label in labels) + 0.5
    _, bottom, right, top = _frame(axes)
    for label, height, moved in zip(labels, heights, spread(heights, line, bottom, top), strict=True):
        end = points_of(axes, [label.x], [label.y])[0, 0]
        axes.annotate(
            label.text, (label.x, label.y), xytext=(right - end + 7, moved - height), textcoords="offset points",
            ha="left", va="center", color=ink(label.color), annotation_clip=False,
            arrowprops={**_LINE, "color": label.color, "linestyle": _DOTS, "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(positions: NDArray, gap: float, low: float, high: float) -> NDArray[np.float64]:
    """Move positions on a line apart to at least `gap`, in their order, between low and high, as little as possible.

    Neighbours that are too close are joined into one stack centred on their mean, until no stacks touch.
    """
    order = np.argsort(positions, kind="stable")
    stacks: list[list[float]] = []
    for position in np.asarray(positions, dtype=np.float64)[order]:
        stacks.append([position])
        while len(stacks) > 1 and _bounds(stacks[-2], gap, low, high)[1] + gap > _bounds(stacks[-1], gap, low, high)[0]:
            last = stacks.pop()
            stacks[-1] += last
    moved = np.empty(len(order))
    moved[order] = np.concatenate(
        [_bounds(stack, gap, low, high)[0] + gap * np.arange(len(stack)) for stack in stacks] or [np.empty(0)]
    )
    return moved


def _frame(axes: Axes) -> NDArray[np.float64]:
    """(left, bottom, right, top) of the axes in points."""
    return np.asarray(axes.get_window_extent().extents) * 72 / figure_of(axes).dpi


def _bounds(stack: list[float], gap: float, low: float, high: float) -> tuple[float, float]:
    length = gap * (len(stack) - 1)
    bottom = max(low, min(float(np.mean(stack)) - length / 2, high - length))
    return bottom, bottom + length


def _best_place(
    anchor: NDArray, size: NDArray, radii: Sequence[float], frame: NDArray, hard: Boxes, soft: Boxes
) -> tuple[NDArray[np.float64], float] | None:
    """Offset of the label's centre from its anchor, and the gap between them; None if no place is free."""
    best, lowest = None, np.inf
    for radius in radii:
        for angle in _ANGLES:
            # A square, not a circle: a wide label then keeps its distance at every angle.
            direction = np.clip(np.sqrt(2) * np.array((np.cos(angle), np.sin(angle))), -1, 1)
            centre = (radius + size / 2) * direction
            box = _box(anchor + centre, size)
            inside = (box[:2] >= frame[:2]).all() and (box[2:] <= frame[2:]).all()
            if not inside or _touched(box, hard):
                continue
            # Places beside, above or below are easier to read than corners, and so are lines that cross nothing.
            cost = _touched(box, soft) + radius / 10 + 0.5 * abs(np.sin(2 * angle))
            if radius > _NEAR:
                cost += _crossed(anchor, np.clip(anchor, box[:2], box[2:]), hard)
            if cost < lowest:
                best, lowest = (centre, radius), cost
    return best


def _box(centre: NDArray, size: NDArray) -> NDArray[np.float64]:
    return np.concatenate((centre - size / 2 - _PADDING, centre + size / 2 + _PADDING))


def _crossed(start: NDArray, end: NDArray, boxes: Boxes) -> int:
    """Number of boxes that a line from a point crosses, except those that contain the point."""
    others = boxes[~((boxes[:, :2] <= start) & (start <= boxes[:, 2:])).all(axis=1)]
    along = start + np.linspace(0, 1, 20)[:, None] * (end - start)
    inside = (others[:, None, :2] <= along).all(axis=2) & (along <= others[:, None, 2:]).all(axis=2)
    return int(inside.any(axis=-1).sum())


def _touched(box: NDArray, boxes: Boxes) -> int:
    apart = (box[2:] <= boxes[:, :2]).any(axis=1) | (boxes[:, 2:] <= box[:2]).any(axis=1)
    return int((~apart).sum())
