"""Where the texts of a figure stand once it is drawn."""

from __future__ import annotations

import itertools

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text


def visible_texts(figure: Figure) -> list[tuple[str, float, np.ndarray]]:
    """(text, font size, box in points) of every text that is drawn."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    drawn = []
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text():
            box = Text.get_window_extent(text, renderer).extents * 72 / figure.dpi
            drawn.append((text.get_text(), text.get_fontsize(), box))
    return drawn


def faults(figure: Figure) -> list[str]:
    """Texts that are too small, outside the figure, or over one another."""
    texts = visible_texts(figure)
    assert texts
    width, height = figure.get_size_inches() * 72
    found = []
    for text, size, (left, bottom, right, top) in texts:
        if size < 7:
            found.append(f"{text!r} is small")
        if left < 0 or bottom < 0 or right > width or top > height:
            found.append(f"{text!r} leaves the figure")
    for (a, _, box_a), (b, _, box_b) in itertools.combinations(texts, 2):
        if not ((box_a[2:] <= box_b[:2] + 0.01).any() or (box_b[2:] <= box_a[:2] + 0.01).any()):
            found.append(f"{a!r} and {b!r} overlap")
    return found
