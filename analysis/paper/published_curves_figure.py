"""The paper's Figures 3 and 4 (left) beside this study: our learning curves, and the published ends of the paper's."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from analysis.figures import style
from analysis.paper import published
from analysis.paper.drawn import measured_here
from analysis.paper.trials import PaperTrials
from analysis.run_schema import MIN_SEEDS
from analysis.statistics.intervals import mean_interval

_PANELS = (
    ("train_loss", 1.0, "Training loss (nats)"),
    ("val_loss", 1.0, "Validation loss (nats)"),
    ("val_acc", 100.0, "Validation accuracy (%)"),
)
_COLUMNS = ("model", "quantity", "step", "n_seeds", "mean", "half_width", "published")
_MARKERS = ("D", "v", "o", "s", "^")
_COLORS = ("#000000", "#e69f00", "#0072b2", "#d55e00", "#007a5a")
_BETWEEN, _RIGHT, _PANEL_HEIGHT = 0.52, 0.06, 1.95
_SHOWN_FROM = 0.1
"""Share of the steps that is ignored for the axis: it would set the scale, and hide where the curves end."""
_LAST = published.PROTOCOL["steps"]


def published_curves(curves: pd.DataFrame, trials: PaperTrials) -> pd.DataFrame:
    """Points of the figure: means over the seeds at each evaluation that all seeds have, and the published ends.

    Args:
        curves: `load_curves` of `trials.from_scratch` with the keys train_loss, val_loss and val_acc.
    Returns:
        Columns: model; quantity: train_loss, val_loss (nats) or val_acc (per cent); step; n_seeds; mean, with
        half_width of its 95 % t interval; published: from Table 4, at the last step only. Step 0 is left out.
    """
    rows = []
    for model in published.MODELS:
        trial = trials.of(model.chi)
        own = curves[(curves["trial"] == trial) & (curves["step"] > 0)] if trial is not None else curves.iloc[:0]
        ends = {"val_loss": model.val_loss, "val_acc": model.val_acc}
        for quantity, scale, _ in _PANELS:
            by_step = own.pivot(index="step", columns="seed", values=quantity).astype("float64").dropna() * scale
            interval = mean_interval(by_step.to_numpy())
            for step, mean, half in zip(by_step.index, interval.mean, interval.half_width, strict=True):
                half = half if interval.n >= MIN_SEEDS else math.nan
                rows.append((model.name, quantity, int(step), interval.n, mean, half, math.nan))
            if quantity in ends:
                rows.append((model.name, quantity, int(_LAST), 0, math.nan, math.nan, ends[quantity]))
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def published_curves_figure(points: pd.DataFrame, note: str = "") -> Figure:
    """Training loss, validation loss and accuracy against the step; hollow points at the right are the published ends.

    Args:
        points: `published_curves`; a model without runs has only its published points.
        note: sentence added under the figure.
    """
    counts = points.loc[points["n_seeds"] > 0, "n_seeds"]
    text = style.caption(
        f"Hollow, right of step {_LAST:,.0f}: Table 4 as published, of one seed, uncertainty not reported; no number "
        "is published for other steps or for the training loss.",
        *measured_here(
            counts, "Lines: means over the seeds of this study, validation over the whole split", "bands",
            "the axes leave out the start",
        ),
        note,
    )  # fmt: skip
    panels = [panel for panel in _PANELS if (points["quantity"] == panel[0]).any()]
    with style.context():
        figure = style.new_figure(_PANEL_HEIGHT + 0.75)
        height = figure.get_figheight()
        width = min(2.4, (style.WIDTH - len(panels) * _BETWEEN - _RIGHT) / len(panels))
        for column, (quantity, _, title) in enumerate(panels):
            left = _BETWEEN + column * (width + _BETWEEN)
            axes = style.add_axes(figure, left, 0.42, width, _PANEL_HEIGHT)
            _draw_panel(axes, points[points["quantity"] == quantity])
            axes.set_ylabel(title)
        models = [model.name for model in published.MODELS if model.name in set(points["model"])]
        handles = [
            Line2D([], [], color=_style_of(name)[0], marker=_style_of(name)[1], markersize=3.6, label=name)
            for name in models
        ]
        handles.append(
            Line2D([], [], color=style.GREY, marker="o", markerfacecolor="white", linestyle="", label="as published")
        )
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.3 / style.WIDTH, 1 - 0.02 / height),
            ncols=len(handles), columnspacing=1.2, handlelength=1.8, handletextpad=0.5,
        )  # fmt: skip
        figure.set_label(text)
    return figure


def _style_of(model: str) -> tuple[str, str]:
    index = [known.name for known in published.MODELS].index(model)
    return _COLORS[index], _MARKERS[index]


def _draw_panel(axes: Axes, points: pd.DataFrame) -> None:
    ends = points.dropna(subset="published")
    axes.axvline(_LAST, color="#bbbbbb", linewidth=0.6, zorder=1)
    for index, model in enumerate(points["model"].unique()):
        color, marker = _style_of(model)
        line = points[(points["model"] == model) & (points["n_seeds"] > 0)].sort_values("step")
        if len(line):
            is_few = line["n_seeds"].min() < MIN_SEEDS
            half = np.nan_to_num(line["half_width"].to_numpy())
            low, high = line["mean"] - half, line["mean"] + half
            axes.fill_between(line["step"], low, high, color=style.tint(color, 0.7), linewidth=0, zorder=2)
            every = max(1, len(line) // 5)
            axes.plot(
                line["step"], line["mean"], color=style.GREY if is_few else color, linewidth=1.0,
                linestyle="--" if is_few else "-", marker=marker, markersize=3.2,
                markevery=(min(index, len(line) - 1) % every, every), zorder=3,
            )  # fmt: skip
        for number in ends.loc[ends["model"] == model, "published"]:
            axes.plot(
                [_LAST * (1.06 + 0.065 * index)], [number], color=color, linestyle="", marker=marker, markersize=4.4,
                markerfacecolor="white", zorder=4,
            )  # fmt: skip
    axes.set_xlim(0, _LAST * (1.38 if len(ends) else 1.02))
    axes.xaxis.set_major_locator(FixedLocator([0, _LAST / 2, _LAST]))
    axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:,.0f}")
    axes.set_xlabel("Step")
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(lambda tick, _: f"{tick:.3g}")
    shown = points[points["step"] >= _SHOWN_FROM * _LAST]
    half = shown["half_width"].fillna(0)
    drawn = pd.concat((shown["mean"] - half, shown["mean"] + half, shown["published"]))
    low, high = drawn.min(), drawn.max()
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
