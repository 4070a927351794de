"""Share of the differences between MPO trials that is due to each factor."""

from __future__ import annotations

import textwrap

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import labels, style
from analysis.results.importance import FANOVA, INTERACTIONS
from analysis.results.summary import Measure

_LINE, _BETWEEN = 0.125, 0.05
_LONGEST_LINE = 36
_COLOR = "#0072b2"


def importance_figure(shares: pd.DataFrame, measure: Measure, note: str = "") -> Figure:
    """A dot for each factor, with the range of the redraws; below them a hollow dot for the interactions.

    Args:
        shares: `importance.factor_importance` of the measure; at least one row.
        note: sentence added under the figure.
    """
    first = shares.iloc[0]
    forest = first["evaluator"] == FANOVA
    rest = "interactions and what the forest smooths away" if forest else INTERACTIONS
    seeds = f"{first['n_seeds']} {'shared seeds' if first['n_seeds'].isdecimal() else 'seeds'}"
    text = style.footer(
        f"Means of {first['n_trials']} MPO trials over n = {seeds}, {measure.title.lower()} at "
        "the last step over the whole validation split; dots: shares of their variance by main effect; hollow: "
        f"{rest}; bars: 2.5 to 97.5 % of the shares over redrawn means, with the noise pooled over trials.",
        "The noise of the seeds is taken out of every share"
        + (
            ", and a forest's bars hold the range without this too; it gives small effects less than theirs."
            if forest
            else "."
        ),
        first["left_out"],
        note,
    )
    with style.context():
        probe = style.new_figure(1)
        names = [_name(row) for row in shares.to_dict("records")]
        values = [_percent(row) for row in shares.to_dict("records")]
        left = max(labels.text_size(probe, name)[0] for name in names) / 72 + 0.24
        right = max(labels.text_size(probe, value)[0] for value in values) / 72 + 0.28
        below, above = style.footer_height(text) + 0.42, 0.27
        row_height = _LINE * max(name.count("\n") + 1 for name in names) + _BETWEEN
        height = above + below + row_height * (len(shares) + 0.2)
        figure = style.new_figure(height)
        axes = figure.add_axes(
            (left / style.WIDTH, below / height, 1 - (left + right) / style.WIDTH, 1 - (above + below) / height)
        )
        axes.set_ylim(len(shares) - 0.4, -0.6)
        axes.set_xlim(-1.5, 101.5)
        axes.grid(axis="x", visible=True)
        axes.grid(axis="y", visible=False)
        axes.set_yticks(range(len(shares)), names)
        axes.tick_params(axis="y", length=0)
        axes.set_title(measure.title, loc="left")
        axes.set_xlabel(f"Share of variance (%), {first['evaluator']}")
        for y, (row, value) in enumerate(zip(shares.to_dict("records"), values, strict=True)):
            color = style.GREY if row["factor"] == INTERACTIONS else _COLOR
            axes.plot([row["low"], row["high"]], [y, y], color=color, linewidth=1.3, zorder=3)
            axes.plot(
                row["share"], y, linestyle="none", marker="o", markersize=5, markeredgecolor=color, zorder=4,
                markerfacecolor="white" if row["factor"] == INTERACTIONS else color,
            )  # fmt: skip
            axes.annotate(
                value, (1, y), xycoords=axes.get_yaxis_transform(), xytext=(8, 0), textcoords="offset points",
                ha="left", va="center", color="#333333", annotation_clip=False,
            )  # fmt: skip
        style.add_footer(figure, text)
    return figure


def _name(row: dict) -> str:
    """The factor and, under it, its levels."""
    lines = [row["factor"]] + [row["levels"]] * bool(pd.notna(row["levels"]))
    return "\n".join(textwrap.fill(line, _LONGEST_LINE) for line in lines)


def _percent(row: dict) -> str:
    return f"{row['share']:.1f} % ({row['low']:.1f} to {row['high']:.1f})"
