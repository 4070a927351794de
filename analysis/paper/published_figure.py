"""The paper's models as published and as measured here: loss and accuracy against parameters (its Figure 4, right)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures import labels, style
from analysis.paper.drawn import MEASURED, PUBLISHED, draw_measured, measured_here
from analysis.results.numbers import format_count
from analysis.run_schema import MIN_SEEDS

_PANELS = (("validation loss", "Validation loss (nats)"), ("validation accuracy", "Validation token accuracy (%)"))
_OURS = ("published", "ours", "low", "high", "n")


def published_points(comparison: pd.DataFrame) -> pd.DataFrame:
    """Points of the figure, from `paper_comparison`: one row per model and quantity.

    Columns: model, quantity, n_params_published, n_params, published, measured, low, high (95 % t interval), n_seeds.
    """
    table = comparison[comparison["place"] == "Table 4"]
    sizes = comparison[(comparison["place"] == "Table 3") & (comparison["quantity"] == "parameters")].set_index("row")
    rows = []
    for quantity, _ in _PANELS:
        for row in table[table["quantity"] == quantity].to_dict("records"):
            size = sizes.loc[row["row"]]
            rows.append((row["row"], quantity, size["published"], size["ours"], *(row[key] for key in _OURS)))
    columns = ["model", "quantity", "n_params_published", "n_params", "published", "measured", "low", "high", "n_seeds"]
    return pd.DataFrame(rows, columns=columns)


def published_figure(points: pd.DataFrame, note: str = "") -> Figure:
    """Published points hollow, measured ones filled with their 95 % t intervals; each at its own parameter count.

    Args:
        points: `published_points`; a model without a measured value has only its published point.
        note: sentence added under the figure.
    """
    counts = points.loc[points["n_seeds"] > 0, "n_seeds"]
    text = style.caption(
        "Hollow: as published, of one seed, uncertainty not reported, at the published number of parameters.",
        *measured_here(
            counts, "Filled: measured here at the final step over the whole validation split", "bars",
            "at the parameters that the definitions give",
        ),
        note,
    )  # fmt: skip
    with style.context():
        figure = style.new_figure(2.7)
        height = figure.get_figheight()
        width = (style.WIDTH - 2 * 0.55 - 0.25) / 2
        for column, (quantity, title) in enumerate(_PANELS):
            left = 0.55 + column * (width + 0.55 + 0.1)
            axes = style.add_axes(figure, left, 0.42, width, 1.95)
            _draw(axes, points[points["quantity"] == quantity])
            axes.set_ylabel(title)
        handles = [
            Line2D([], [], color=PUBLISHED, marker="s", markerfacecolor="white", linestyle=":", label="as published"),
        ]
        if len(counts):
            color, line = (MEASURED, "-") if counts.max() >= MIN_SEEDS else (style.GREY, "")
            handles.append(Line2D([], [], color=color, marker="o", linestyle=line, label="measured"))
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.55 / style.WIDTH, 1 - 0.02 / height), ncols=2
        )
        figure.set_label(text)
    return figure


def _draw(axes: Axes, points: pd.DataFrame) -> None:
    sizes = pd.concat([points["n_params_published"], points["n_params"]])
    low, high = sizes.min() / 1.4, sizes.max() * 1.4
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    style.set_log_ticks(axes.xaxis, low, high, format_count)
    axes.set_xlabel("Trainable parameters")
    published = points.sort_values("n_params_published")
    axes.plot(
        published["n_params_published"], published["published"], color=PUBLISHED, linestyle=":", marker="s",
        markersize=4.2, markerfacecolor="white", zorder=3,
    )  # fmt: skip
    measured = points.dropna(subset="measured").sort_values("n_params")
    enough = measured["n_seeds"] >= MIN_SEEDS
    for own, color, line in ((measured[enough], MEASURED, "-"), (measured[~enough], style.GREY, "")):
        draw_measured(axes, own, "n_params", color=color, linestyle=line, marker="o", markersize=3.6, zorder=4)
    axes.margins(y=0.16)
    axes.set_ylim(axes.get_ylim())
    texts, marks, lines = [], [], []
    for frame, size, value, color in (
        (published, "n_params_published", "published", PUBLISHED),
        (measured, "n_params", "measured", MEASURED),
    ):
        marks.append(labels.boxes_around(axes, frame[size].to_numpy(), frame[value].to_numpy(), 3.0))
        lines.append(_boxes_along(axes, frame[size].to_numpy(), frame[value].to_numpy()))
        for row in frame.to_dict("records"):
            is_few = color == MEASURED and row["n_seeds"] < MIN_SEEDS
            text = row["model"].removeprefix("MPO ")
            texts.append(labels.Label(row[size], row[value], text, style.GREY if is_few else color))
    labels.place_labels(axes, texts, np.vstack(marks), np.vstack(lines))


def _boxes_along(axes: Axes, x: np.ndarray, y: np.ndarray) -> labels.Boxes:
    """Small boxes along the lines between points, straight on the page; labels avoid them."""
    share = np.linspace(0, 1, 12)
    steps = [np.column_stack((a * (b / a) ** share, c + (d - c) * share))
             for a, b, c, d in zip(x[:-1], x[1:], y[:-1], y[1:], strict=True)]  # fmt: skip
    along = np.vstack((np.empty((0, 2)), *steps))
    return labels.boxes_around(axes, along[:, 0], along[:, 1], 1.0)
