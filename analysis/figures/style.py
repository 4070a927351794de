"""The look of every figure, and how it is saved: one width, one set of colours, the same bytes each time."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

from analysis.results.summary import (
    DENSE,
    DENSE_TUNED,
    LARGER_DENSE,
    SMALLER_DENSE,
    group_order,
)

WIDTH = 6.75
"""Width of a figure in inches: the text width of a paper with two columns."""
Look = Literal["screen", "paper"]
_OF_PAPER: dict[Any, Any] = {
    "font.family": "STIXGeneral", "font.size": 8, "axes.labelsize": 8.5, "axes.titlesize": 8.5,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
}  # fmt: skip
"""The look of a figure beside text in a serif font."""
GREY = "#6b6b6b"
BAND = "#d9d9d9"
FEW = "#8c8c8c"
"""Colour of values with too few seeds."""
FORMATS = ("svg", "pdf", "png")
LIGHT_FORMATS = ("svg",)

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    # With hinting, text is 8 % narrower when it is measured, at 100 dpi, than in the saved files.
    "text.hinting": "no_hinting",
    "text.parse_math": False,  # names are free text
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 220,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "mpo-study",
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "axes.grid": True,
    "grid.color": "#eeeeee",
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class GroupStyle:
    """Colour and marker shape of a group. A kind of layer has one colour everywhere, and a marker for each origin."""

    color: str
    marker: str


_DENSE = {
    DENSE: GroupStyle("#000000", "D"),
    SMALLER_DENSE: GroupStyle("#007a5a", "^"),
    LARGER_DENSE: GroupStyle("#007a5a", "v"),
    DENSE_TUNED: GroupStyle("#000000", "d"),
}
_KINDS = {  # Okabe and Ito, Color universal design, 2008; and two darker ones.
    "MPO": ("#0072b2", "osp"),
    "low rank": ("#cc79a7", "<>8"),
    "Monarch": ("#56b4e9", "PhH"),
    "pruned": ("#e69f00", "X*s"),
    "tree": ("#882255", "p8s"),
    "block train": ("#7a7a00", "Hv^"),
    "auto": ("#d55e00", "d^o"),
}
"""Colour of each kind of layer, and its markers from scratch, fine-tuned and compressed."""
_ORIGINS = (" from scratch", " fine-tuned", " compressed")
_KNOWN = _DENSE | {
    kind + origin: GroupStyle(color, marker)
    for kind, (color, markers) in _KINDS.items()
    for origin, marker in zip(_ORIGINS, markers, strict=True)
}
_OTHERS = [
    GroupStyle(color, markers[index])
    for index in range(4)
    for color, markers in (("#cc79a7", "vpdH"), ("#56b4e9", "pdv8"), ("#e69f00", "dvpH"))
]
LINE_COLORS = ("#0072b2", "#d55e00", "#007a5a", "#cc79a7", "#000000", "#e69f00", "#56b4e9")


def group_styles(groups: Iterable[str]) -> dict[str, GroupStyle]:
    """A style for each group, in reading order; more than 12 groups beyond the known ones share styles in turn."""
    others = 0
    styles = {}
    for group in group_order(groups):
        if group in _KNOWN:
            styles[group] = _KNOWN[group]
        else:
            styles[group] = _OTHERS[others % len(_OTHERS)]
            others += 1
    return styles


def tint(color: str, amount: float) -> str:
    """`color` mixed with white; amount 0 leaves it, 1 makes it white."""
    red, green, blue = (channel + (1 - channel) * amount for channel in to_rgb(color))
    return to_hex((red, green, blue))


def ink(color: str) -> str:
    """`color` darkened for text on white."""
    red, green, blue = (0.7 * channel for channel in to_rgb(color))
    return to_hex((red, green, blue))


@contextmanager
def context(look: Look = "screen") -> Iterator[None]:
    """Apply the settings under which every figure is made and saved; the caller's own are restored afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC | (_OF_PAPER if look == "paper" else {}))
        yield


class StyledFigure(Figure):
    """A figure that is saved with the settings that it was made with, whoever saves it."""

    look: Look = "screen"

    def savefig(self, *args: Any, **options: Any) -> None:
        with context(self.look):
            super().savefig(*args, **options)


def new_figure(height: float, width: float = WIDTH, look: Look = "screen") -> Figure:
    """An empty figure with a canvas that can measure text; in inches."""
    figure = StyledFigure(figsize=(width, height))
    figure.look = look
    FigureCanvasAgg(figure)
    return figure


def add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches."""
    wide, tall = figure.get_size_inches()
    return figure.add_axes((left / wide, bottom / tall, width / wide, height / tall))


def save(figure: Figure, stem: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write `stem`.svg, .pdf and .png without dates, so that equal figures give equal bytes.

    The caption goes to `stem`.txt. The figure does not show it: a paper has its own.
    """
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    paths = [stem.with_name(f"{stem.name}.{form}") for form in formats]
    for path, form in zip(paths, formats, strict=True):
        figure.savefig(path, format=form, metadata=undated[form])
    stem.with_name(f"{stem.name}.txt").write_text(textwrap.fill(str(figure.get_label()), 100) + "\n", encoding="utf-8")
    return paths


def log_ticks(low: float, high: float) -> tuple[list[float], list[float]]:
    """Major and minor ticks of a logarithmic axis: 1-2-5 steps, or every digit if these are fewer than three."""
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    digits = [float(f"{decade * digit:.6g}") for decade in decades for digit in range(1, 10)]
    inside = [tick for tick in digits if low <= tick <= high]
    major = [tick for tick in inside if f"{tick:e}"[0] in "125"]
    return (major, inside) if len(major) >= 3 else (inside, inside)


def set_log_ticks(axis: Axis, low: float, high: float, text: Callable[[float], str], room: float | None = None) -> None:
    """Give a logarithmic axis the ticks of `log_ticks`; `text` formats the major ones.

    Args:
        room: length of a horizontal axis in points; major ticks whose texts would overlap become minor ones.
    """
    major, minor = log_ticks(low, high)
    if room is not None:
        major = _apart(major, {tick: room * np.log(tick / low) / np.log(high / low) for tick in major}, text)
    axis.set_major_locator(FixedLocator(major))
    axis.set_major_formatter(FixedFormatter([text(tick) for tick in major]))
    axis.set_minor_locator(FixedLocator(minor))
    axis.set_minor_formatter(NullFormatter())


def _apart(ticks: Sequence[float], places: dict[float, float], text: Callable[[float], str]) -> list[float]:
    """The ticks whose texts fit beside each other: powers of ten first, then 5, 2, and the other digits."""
    size = float(matplotlib.rcParams["xtick.labelsize"])
    half = {tick: 0.5 * (0.62 * len(text(tick)) + 0.5) * size for tick in ticks}
    kept: list[float] = []
    for tick in sorted(ticks, key=lambda tick: ("1524367890".index(f"{tick:e}"[0]), tick)):
        if all(abs(places[tick] - places[other]) >= half[tick] + half[other] for other in kept):
            kept.append(tick)
    return sorted(kept)


def set_chi_axis(axes: Axes, chis: Iterable[int], room: float) -> None:
    """Make the x axis logarithmic, with a tick at each cap χ; `room`: factor left free at either end."""
    ticks = sorted(chis)
    axes.set_xscale("log", base=2)
    axes.set_xlim(ticks[0] / room, ticks[-1] * room)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([str(tick) for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Bond-dimension cap χ")


def caption(*sentences: str) -> str:
    """The caption of a figure, so that it explains itself without the report. It is the label of the `Figure`."""
    return " ".join(sentence for sentence in sentences if sentence)
