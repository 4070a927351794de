"""Where the texts of a drawn figure stand, and what every figure must hold to."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text

from analysis.figures import style


class Drawn:
    """A figure after drawing, and where its visible texts stand, in points."""

    def __init__(self, figure: Figure):
        with style.context():
            self._draw(figure)

    def _draw(self, figure: Figure) -> None:
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        self.figure = figure
        self.placed: list[tuple[Text, np.ndarray]] = []
        self.others: list[tuple[Text, np.ndarray]] = []
        undrawn = _undrawn_ticks(figure)
        for text in figure.findobj(Text):
            if text.get_visible() and text.get_text() and id(text) not in undrawn:
                extent = Text.get_window_extent(text, renderer).extents * 72 / figure.dpi
                (self.placed if isinstance(text, Annotation) else self.others).append((text, extent))


def _undrawn_ticks(figure) -> set[int]:
    """Matplotlib keeps ticks beyond the limits, switched off or of a hidden axis, without drawing them."""
    kept, drawn = set(), set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            ticks = axis._update_ticks() if axis.get_visible() else []
            drawn |= {id(label) for tick in ticks for label in (tick.label1, tick.label2) if label.get_visible()}
            kept |= {id(label) for tick in (*axis.majorTicks, *axis.minorTicks) for label in (tick.label1, tick.label2)}
    return kept - drawn


def apart(a, b) -> bool:
    return bool((a[2:] <= b[:2] + 0.01).any() or (b[2:] <= a[:2] + 0.01).any())


def check_texts(figure: Figure) -> None:
    """All text is at least 7 points high, inside the figure, and touches no other text."""
    one = Drawn(figure)
    width, height = figure.get_size_inches() * 72
    texts = one.placed + one.others
    assert width == pytest.approx(72 * style.WIDTH)
    for text, (left, bottom, right, top) in texts:
        assert text.get_fontsize() >= 7
        assert left >= 0, text
        assert bottom >= 0, text
        assert right <= width, text
        assert top <= height, text
    for (a, box_a), (b, box_b) in itertools.combinations(texts, 2):
        assert apart(box_a, box_b), (a, b)


def check_same_bytes(draw: Callable[[], Figure], folder: Path) -> None:
    """Two drawings of the same frames are saved as the same bytes."""
    once, again = (style.save(draw(), folder / name) for name in ("once", "again"))
    assert len(once) == len(style.FORMATS)
    for first, second in zip(once, again, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.suffix


def artists(axes: Axes, gid: str) -> list[Line2D]:
    """What a figure drew under that name."""
    return [line for line in axes.lines if line.get_gid() == gid]


def caption_of(figure: Figure) -> str:
    return str(figure.get_label())
