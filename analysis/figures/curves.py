"""Learning curves: validation loss against training tokens."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures import labels, style
from analysis.results.numbers import format_count
from analysis.results.summary import group_order, interval_statement, n_statement

_SHOWN_FROM = 0.2
"""The loss axis covers every mean after this share of a run's tokens; the earlier fall would flatten the rest."""
_LEFT, _PANEL_HEIGHT, _LEAST_PANEL = 0.6, 1.75, 2.2


def learning_curves_figure(
    means: pd.DataFrame,
    curves: pd.DataFrame,
    note: str = "",
    *,
    width: float = style.WIDTH,
    look: style.Look = "screen",
) -> Figure:
    """Validation loss against the tokens of the run, one panel per family; a dashed line is the final mean of dense.

    Args:
        means: `data.curve_means`; at least one row.
        curves: the seeds' curves with trial, seed, tokens, val_loss.
        note: sentence added under the figure.
        width: in inches.
    """
    panels = group_order(means["panel"])
    shown = means[means["tokens"] >= _SHOWN_FROM * means.groupby("trial")["tokens"].transform("max")]
    low, high = (shown["mean"] - shown["half_width"].fillna(0)).min(), shown["mean"].max()
    margin = 0.06 * (high - low) or 0.1
    final = means[means["is_reference"]].groupby("trial")["mean"].last()
    text = style.caption(
        f"Means over complete seeds, {n_statement(means['n_seeds'])}; {interval_statement('bands', means['n_seeds'])}; "
        "thin lines: seeds.",
        "Dashed: dense at its last step." if len(final) else "",
        "Tokens are each run's own, without those of its start; the loss axis leaves out the first steps.",
        note,
    )
    with style.context(look):
        probe = style.new_figure(1)
        beside = {
            panel: (max(labels.text_size(probe, text)[0] for text in own["label"].unique()) + 14) / 72
            for panel, own in means.groupby("panel")
        }
        most = 3 if max(beside.values()) < 1 and len(panels) != 4 else 2
        n_columns = min(len(panels), most, max(1, int(width / _LEAST_PANEL)))
        n_rows = -(-len(panels) // n_columns)
        row_height = _PANEL_HEIGHT + 0.68
        figure = style.new_figure(row_height * n_rows, width, look)
        for index, panel in enumerate(panels):
            row, column = divmod(index, n_columns)
            in_row = panels[row * n_columns : (row + 1) * n_columns]
            # Panels of a column line up, so each column leaves room for the longest label in it.
            columns = [max(beside[name] for name in panels[other::n_columns]) for other in range(n_columns)]
            wide = (width - _LEFT - sum(columns) - 0.12 * (n_columns - 1)) / n_columns
            left = _LEFT + sum(columns[:column]) + column * (wide + 0.12)
            bottom = 0.42 + row_height * (n_rows - 1 - row)
            axes = style.add_axes(figure, left, bottom, wide, _PANEL_HEIGHT)
            axes.set_ylim(low - margin, high + margin)
            for loss in final:
                axes.axhline(loss, color="#444444", linewidth=0.8, linestyle=(0, (5, 3)), zorder=1)
            _draw_panel(axes, panel, means, curves)
            axes.tick_params(labelleft=column == 0)
            if panel == in_row[0]:
                axes.set_ylabel("Validation loss (nats)")
        figure.set_label(text)
    return figure


def _is_wide(axes: Axes) -> bool:
    return axes.get_position().width * labels.figure_of(axes).get_figwidth() > 1.3


def _draw_panel(axes: Axes, panel: str, means: pd.DataFrame, curves: pd.DataFrame) -> None:
    own = means[means["panel"] == panel]
    styles = style.group_styles(means["group"])
    axes.set_title(panel, loc="left")
    axes.set_xlim(0, own["tokens"].max())
    axes.xaxis.set_major_locator(MaxNLocator(4 if _is_wide(axes) else 2, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda tick, _: format_count(float(f"{tick:.3g}")))
    axes.set_xlabel("Training tokens of this run")
    ends = []
    trials = own.sort_values(["n_params", "trial"])["trial"].unique()
    for index, trial in enumerate(trials):
        curve = own[own["trial"] == trial]
        base = styles[curve["group"].iloc[0]].color
        color = style.tint(base, 0.5 * (1 - (index + 1) / len(trials)))
        for _, seed in curves[curves["trial"] == trial].groupby("seed"):
            axes.plot(seed["tokens"], seed["val_loss"], color=style.tint(color, 0.5), linewidth=0.4, zorder=2)
        axes.fill_between(
            curve["tokens"],
            curve["mean"] - curve["half_width"],
            curve["mean"] + curve["half_width"],
            color=style.tint(color, 0.6),
            linewidth=0,
            zorder=1.5,
        )
        axes.plot(curve["tokens"], curve["mean"], color=color, linewidth=1.1, zorder=3)
        last = curve.iloc[-1]
        ends.append(labels.Label(last["tokens"], last["mean"], last["label"], base))
    labels.label_line_ends(axes, ends)
