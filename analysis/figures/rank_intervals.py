"""The rank of each configuration, and how well the seeds determine it."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.figures import labels, style
from analysis.figures.dots import Dot, dots_figure
from analysis.results.numbers import format_count
from analysis.results.selection import common_seeds, seeds_stated, select
from analysis.results.summary import Measure
from analysis.statistics.ranking import rank_agreement, rank_intervals, reliability

MAX_ROWS = 40
"""Maximum number of configurations shown: the best."""
COLUMNS = (
    *("trial", "label", "group", "n_params", "rank", "low", "high"),
    *("n_seeds", "n_ranked", "kendall_tau", "reliability", "left_out"),
)
_DRAWN_RANKS = 4_000_000
_ON_SHARED = "; both on the seeds that most share"
_LONGEST_LABEL = 2.3


def rank_rows(
    summary: pd.DataFrame,
    seeds: pd.DataFrame,
    measure: Measure,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """One row for each of the MAX_ROWS best configurations: its rank among all, with a 95 % interval.

    Args:
        summary: `summary.summarise`.
        seeds: `StudyRuns.seeds`.
        rng: draws the means (`ranking.rank_intervals`).
    Returns:
        trial, label, group, n_params; rank (1 is the best), low, high. The same in each row: n_seeds (`3`, or
        `3 to 5`), n_ranked (how many were ranked), left_out (a sentence on trials that were not ranked). Also the same
        in each row, on the seeds of `selection.common_seeds`: kendall_tau (mean of Kendall's τ_b over pairs of seeds),
        reliability (share of the variance of the means that is not noise). Sorted by rank. Empty for fewer than two
        configurations.
    """
    selected = select(summary, seeds, measure.key)
    ranked, values, shared = selected.trials, selected.values, common_seeds(selected.values)
    if len(ranked) < 2:
        return pd.DataFrame(columns=list(COLUMNS))
    n_draws = int(np.clip(_DRAWN_RANKS // len(ranked), 1000, 10_000))
    found = rank_intervals(values, measure.direction, rng, n_draws=n_draws)
    rows = ranked[["trial", "label", "group", "n_params"]].assign(
        rank=found.rank,
        low=found.low,
        high=found.high,
        n_seeds=seeds_stated(values),
        n_ranked=len(ranked),
        kendall_tau=rank_agreement(shared) if shared.size else np.nan,
        reliability=reliability(shared) if shared.size else np.nan,
        left_out=selected.left_out,
    )
    return rows.sort_values(["rank", "trial"], kind="stable", ignore_index=True).head(MAX_ROWS)


def rank_figure(rows: pd.DataFrame, measure: Measure) -> Figure:
    """A dot with its interval for each configuration, the best on top; its size at the right.

    Args:
        rows: `rank_rows` of the measure; at least one row.
    """
    first = rows.iloc[0]
    n_ranked = int(first["n_ranked"])
    that_share, on_shared = (" that all share", "") if first["n_seeds"].isdecimal() else ("", _ON_SHARED)
    text = style.caption(
        f"Ranks of mean {measure.title.lower()} at the last step over the whole validation split, n = "
        f"{first['n_seeds']} seeds{that_share}; bars: 95 % intervals of each rank by itself, from draws of the "
        "means with the noise pooled over configurations: too short for the noisiest.",
        f"Kendall's τ between two seeds: {_number(first['kendall_tau'])} on average; share of the variance of the "
        f"means that is not noise: {_number(first['reliability'])}{on_shared}.",
        f"The best {len(rows)} of {n_ranked} configurations." if len(rows) < n_ranked else "",
        first["left_out"],
    )
    styles = style.group_styles(rows["group"])
    with style.context():
        probe = style.new_figure(1)
        names = [_shortened(probe, label) for label in labels.told_apart(rows["label"], rows["group"])]
        dots = [
            Dot(name, row["low"], row["rank"], row["high"], format_count(float(f"{row['n_params']:.3g}")),
                styles[row["group"]])
            for name, row in zip(names, rows.to_dict("records"), strict=True)
        ]  # fmt: skip
        handles = [
            Line2D([], [], color=own.color, marker=own.marker, markersize=4.2, linewidth=1.1, label=group)
            for group, own in styles.items()
        ]
        figure, axes = dots_figure(dots, "", "parameters", text, handles)
        farthest = max(rows["high"].max(), rows["rank"].max())
        axes.set_xlim(min(0.5, 1 - 0.025 * farthest), farthest + 0.5)
        ticks = MaxNLocator(10, integer=True).tick_values(1, farthest)
        axes.set_xticks([tick for tick in sorted({1, *ticks}) if 1 <= tick <= farthest])
        best = "lowest" if measure.direction == "minimize" else "highest"
        axes.set_xlabel(f"Rank by {measure.title.lower()} (1: {best})")
    return figure


def _shortened(figure: Figure, label: str) -> str:
    """The label, cut off if it does not fit."""
    if labels.text_size(figure, label)[0] <= 72 * _LONGEST_LABEL:
        return label
    while labels.text_size(figure, f"{label}…")[0] > 72 * _LONGEST_LABEL:
        label = label[:-1]
    return f"{label}…"


def _number(value: float) -> str:
    if np.isnan(value):
        return "undefined"
    return "above 0.99" if 0.995 <= value < 1 else f"{value:.2f}".replace("-", "−")
