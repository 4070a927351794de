"""The paper's models as published and as measured here: loss and accuracy against parameters."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import style

_PANELS = (("validation loss", "Validation loss (nats)"), ("validation accuracy", "Validation token accuracy (%)"))
_PUBLISHED, _MEASURED = "#d55e00", "#0072b2"


def published_points(comparison: pd.DataFrame) -> pd.DataFrame:
    """Of `paper_comparison`, what the figure shows: one row per model and quantity.

    Columns: model, quantity, n_params_published, n_params, published, measured, half_width, n_seeds.
    """
    sizes = comparison[comparison["quantity"] == "parameters"].set_index("row")
    rows = []
    for quantity, _ in _PANELS:
        for row in comparison[comparison["quantity"] == quantity].to_dict("records"):
            size = sizes.loc[row["row"]]
            rows.append(
                {
                    "model": row["row"],
                    "quantity": quantity,
                    "n_params_published": size["published"],
                    "n_params": size["ours"],
                    "published": row["published"],
                    "measured": row["ours"],
                    "half_width": row["half_width"],
                    "n_seeds": row["n"],
                }
            )
    return pd.DataFrame(rows)


def published_figure(points: pd.DataFrame, note: str = "") -> Figure:
    """Published points hollow, measured ones filled with their 95 % t intervals; each at its own parameter count.

    Args:
        points: `published_points`; models without a measured value are drawn as published alone.
        note: sentence added under the figure.
    """
    counts = points.loc[points["n_seeds"] > 0, "n_seeds"]
    seeds = f"n = {counts.min()}" + (f" to {counts.max()}" if counts.nunique() > 1 else "") if len(counts) else ""
    text = style.footer(
        "Hollow: as published, of one seed, uncertainty not reported, at the published number of parameters.",
        f"Filled: measured here at the final step over the whole validation split, {seeds}, bars: 95 % t intervals, at "
        "the parameters that the definitions give."
        if seeds
        else "Nothing of this study is measured under the paper's protocol.",
        note,
    )
    with style.context():
        foot = style.footer_height(text)
        figure = style.new_figure(foot + 2.7)
        height = figure.get_figheight()
        width = (style.WIDTH - 2 * 0.55 - 0.25) / 2
        for column, (quantity, title) in enumerate(_PANELS):
            left = 0.55 + column * (width + 0.55 + 0.1)
            axes = figure.add_axes((left / style.WIDTH, (foot + 0.42) / height, width / style.WIDTH, 1.95 / height))
            _draw(axes, points[points["quantity"] == quantity])
            axes.set_ylabel(title)
        handles = [
            Line2D([], [], color=_PUBLISHED, marker="s", markerfacecolor="white", linestyle=":", label="as published"),
            Line2D([], [], color=_MEASURED, marker="o", linestyle="-", label="measured"),
        ]
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.55 / style.WIDTH, 1 - 0.02 / height), ncols=2
        )
        style.add_footer(figure, text)
    return figure


def _draw(axes: Axes, points: pd.DataFrame) -> None:
    sizes = pd.concat([points["n_params_published"], points["n_params"]])
    low, high = sizes.min() / 1.3, sizes.max() * 1.3
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    style.set_log_ticks(axes.xaxis, low, high, style.format_count)
    axes.set_xlabel("Trainable parameters")
    published = points.sort_values("n_params_published")
    axes.plot(
        published["n_params_published"],
        published["published"],
        color=_PUBLISHED,
        linestyle=":",
        marker="s",
        markersize=4.2,
        markerfacecolor="white",
        zorder=3,
    )
    measured = points.dropna(subset="measured").sort_values("n_params")
    axes.errorbar(
        measured["n_params"],
        measured["measured"],
        yerr=measured["half_width"].fillna(0),
        color=_MEASURED,
        linestyle="-",
        linewidth=0.8,
        marker="o",
        markersize=3.6,
        capsize=2,
        elinewidth=0.9,
        zorder=4,
    )
    for frame, size, value, color in (
        (published, "n_params_published", "published", _PUBLISHED),
        (measured, "n_params", "measured", _MEASURED),
    ):
        for row in frame.to_dict("records"):
            above = (color == _PUBLISHED) == (points["published"].mean() < points["measured"].mean())
            axes.annotate(
                row["model"].removeprefix("MPO "),
                (row[size], row[value]),
                (0, -6 if above else 6),
                textcoords="offset points",
                ha="center",
                va="top" if above else "bottom",
                fontsize=6.5,
                color=style.ink(color),
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
                zorder=5,
            )
    axes.margins(y=0.18)
