"""Share of the differences between MPO trials that is due to each factor."""

from __future__ import annotations

import textwrap

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import style
from analysis.figures.dots import Dot, dots_figure
from analysis.results.importance import FANOVA, INTERACTIONS
from analysis.results.summary import Measure

_LONGEST_LINE = 36
_COLOR = "#0072b2"


def importance_figure(shares: pd.DataFrame, measure: Measure) -> Figure:
    """A dot for each factor, with the range of the redraws; below them a hollow dot for the interactions.

    Args:
        shares: `importance.factor_importance` of the measure; at least one row.
    """
    first = shares.iloc[0]
    forest = first["evaluator"] == FANOVA
    rest = "interactions and what the forest smooths away" if forest else INTERACTIONS
    seeds = f"{first['n_seeds']} {'shared seeds' if first['n_seeds'].isdecimal() else 'seeds'}"
    text = style.caption(
        f"Means of {first['n_trials']} MPO trials over n = {seeds}, {measure.title.lower()} at "
        "the last step over the whole validation split; dots: shares of their variance by main effect; hollow: "
        f"{rest}; bars: 2.5 to 97.5 % of the shares over redrawn means, with the noise pooled over trials.",
        "The noise of the seeds is taken out of every share"
        + (
            ", but a forest's bars include the range without this; it gives small effects less than their share."
            if forest
            else "."
        ),
        first["left_out"],
    )
    look = style.GroupStyle(_COLOR, "o")
    dots = [
        Dot(
            _name(row), row["low"], row["share"], row["high"],
            f"{row['share']:.1f} % ({row['low']:.1f} to {row['high']:.1f})",
            style.GroupStyle(style.GREY, "o") if row["factor"] == INTERACTIONS else look, row["factor"] != INTERACTIONS,
        )
        for row in shares.to_dict("records")
    ]  # fmt: skip
    with style.context():
        figure, axes = dots_figure(dots, measure.title, "", text)
        axes.set_xlim(-1.5, 101.5)
        axes.set_xlabel(f"Share of variance (%), {first['evaluator']}")
    return figure


def _name(row: dict) -> str:
    """The factor and, under it, its levels."""
    lines = [row["factor"]] + [row["levels"]] * bool(pd.notna(row["levels"]))
    return "\n".join(textwrap.fill(line, _LONGEST_LINE) for line in lines)
