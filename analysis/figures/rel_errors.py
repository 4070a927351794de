"""Reconstruction error of TT-SVD against the cap χ, for each kind of layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import labels, style
from analysis.figures.data import EXACT
from analysis.results.summary import interval_statement, n_statement

_TITLES = {"init": "Dense weights at initialisation", "trained": "Dense weights after training"}


def rel_error_figure(means: pd.DataFrame) -> Figure:
    """Relative Frobenius error of each kind of layer against χ, before and after training.

    Args:
        means: `data.rel_error_means`; at least one row. Errors below EXACT are not drawn.
    """
    panels = [when for when in _TITLES if when in set(means["when"])]
    drawn = means[means["mean"] > EXACT]
    low, high = drawn["mean"].min() / 1.15, drawn["mean"].max() * 1.15
    kinds = sorted(drawn["kind"].unique())  # each kind has its colour, whatever its errors
    colors = {kind: style.LINE_COLORS[index % len(style.LINE_COLORS)] for index, kind in enumerate(kinds)}
    text = style.caption(
        f"TT-SVD of the dense model's layers, means over its blocks and seeds; {n_statement(means['n_seeds'])}; "
        f"{interval_statement('bars', means['n_seeds'])}.",
    )
    with style.context():
        figure = style.new_figure(2.75)
        beside = (max(labels.text_size(figure, kind)[0] for kind in kinds) + 16) / 72
        width = (style.WIDTH - 0.55 - 0.12 * (len(panels) - 1)) / len(panels) - beside
        for column, when in enumerate(panels):
            left = 0.55 + column * (width + beside + 0.12)
            axes = style.add_axes(figure, left, 0.42, width, 2.08)
            axes.set_yscale("log")
            axes.set_ylim(low, high)
            style.set_log_ticks(axes.yaxis, low, high, lambda tick: f"{tick:g}")
            _draw_panel(axes, drawn[drawn["when"] == when], colors)
            axes.set_title(_TITLES[when], loc="left")
            axes.tick_params(labelleft=column == 0)
            if column == 0:
                axes.set_ylabel("Relative error ‖W − Ŵ‖ / ‖W‖")
        figure.set_label(text)
    return figure


def _draw_panel(axes: Axes, means: pd.DataFrame, colors: dict[str, str]) -> None:
    style.set_chi_axis(axes, means["chi"].unique(), room=1.15)
    ends = []
    for index, (kind, color) in enumerate(colors.items()):
        line = means[means["kind"] == kind].sort_values("chi")
        if line.empty:
            continue
        axes.errorbar(
            line["chi"],
            line["mean"],
            yerr=line["half_width"].fillna(0),
            color=color,
            linewidth=1.0,
            marker="osD^vPX"[index % 7],
            markersize=3.2,
            capsize=1.5,
            elinewidth=0.8,
            zorder=3,
        )
        last = line.iloc[-1]
        ends.append(labels.Label(last["chi"], last["mean"], kind, color))
    labels.label_line_ends(axes, ends)
