"""Families compared at equal parameters: MPO and its controls, size by size."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import run_schema as schema
from analysis.figures import marks, style
from analysis.figures.rows import Row, lay_out, set_limits
from analysis.results.pairs import EQUAL_PARAMETERS
from analysis.results.summary import MEASURES, MIN_SEEDS, group_order, half_width_key, interval_statement, n_statement

COLUMNS = (
    *("measure", "size", "trial", "label", "group", "n_params", "n_seeds", "n_failed", "total_tokens"),
    *("mean", "half_width"),
)
MAX_ROWS = 40
"""Maximum number of configurations shown; those of the largest size are shown in any case."""


def family_points(comparisons: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """Every MPO that has a control of equal parameters, and these controls, sorted by size and group.

    Args:
        comparisons: `comparisons.compare`; its rows of the relation "equal parameters" are the pairs.
        summary: summary of the same study.
    Returns:
        Columns: measure, size (parameters of the MPO; a control is listed at each size for which it is a control),
        trial, label, group, n_params, n_seeds, n_failed, total_tokens, mean, half_width (in the measure's unit; NaN
        below MIN_SEEDS).
    """
    rows = {row["trial"]: row for row in summary.to_dict("records")}
    members: set[tuple[int, int]] = set()
    own = comparisons[comparisons["relation"] == EQUAL_PARAMETERS]
    for trial, against in zip(own["trial"], own["against"], strict=True):
        size = int(rows[trial]["n_params"])
        members |= {(size, trial), (size, against)}
    rank = {group: index for index, group in enumerate(_order(summary["group"]))}
    ordered = sorted(members, key=lambda member: (member[0], rank[rows[member[1]]["group"]], member[1]))
    points = [
        {
            **{key: rows[trial][key] for key in COLUMNS[2:-2]},
            "measure": measure.name,
            "size": size,
            "mean": measure.scale * rows[trial][schema.mean_key(measure.key)],
            "half_width": measure.scale * rows[trial][half_width_key(measure.key)],
        }
        for measure in MEASURES
        for size, trial in ordered
    ]
    return pd.DataFrame(points, columns=list(COLUMNS))


def _order(groups: pd.Series) -> list[str]:
    """MPO groups first, then those they are compared with."""
    return sorted(group_order(groups), key=lambda group: not group.startswith("MPO"))


def families_figure(points: pd.DataFrame) -> Figure:
    """Means with their own intervals, grouped by size, one panel per measure.

    Args:
        points: `family_points`; at least one row.
    """
    shown, n_sizes = _largest(points), points["size"].nunique()
    looks = style.group_styles(shown["group"])
    once = shown[shown["measure"] == MEASURES[0].name]
    budgets = once.groupby("size")["total_tokens"].nunique().max() > 1
    with style.context():
        rows = []
        for size, block in once.groupby("size"):
            rows.append(Row(f"{size:,} parameters", heading=True))
            for row in block.to_dict("records"):
                tokens = "?" if pd.isna(row["total_tokens"]) else f"{int(row['total_tokens']):,}"
                cells = (f"{row['n_params']:,}", *([tokens] if budgets else []))
                few = f", n={row['n_seeds']}" if row["n_seeds"] < once["n_seeds"].max() else ""
                rows.append(Row(f"{row['group']}, {row['label']}{few}", cells, (), look=looks[row["group"]]))
        sheet = lay_out(
            rows,
            titles=[measure.title for measure in MEASURES],
            subtitles=[
                (f"{'lower' if measure.direction == 'minimize' else 'higher'} is better", "") for measure in MEASURES
            ],
            axis_labels=[f"Mean ({measure.unit})" for measure in MEASURES],
            heads=["parameters", *(["total tokens"] if budgets else [])],
            beside_head="",
            legend=_legend(once),
            caption=_caption(once, n_sizes),
        )
        y = [middle for row, middle in zip(rows, sheet.y, strict=True) if not row.heading]
        for measure, axes in zip(MEASURES, sheet.panels, strict=True):
            own = shown[shown["measure"] == measure.name].sort_values("size", kind="stable")
            half = own["half_width"].fillna(0)
            low, high = (own["mean"] - half).min(), (own["mean"] + half).max()
            if np.isnan(low):  # no configuration has a complete seed
                low, high = 0.0, 1.0
            space = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
            set_limits(axes, low - space, high + space)
            for row, middle in zip(own.to_dict("records"), y, strict=True):
                ends = (row["mean"] - row["half_width"], row["mean"] + row["half_width"])
                look, whole = looks[row["group"]], row["n_failed"] == 0
                marks.point(axes, (row["mean"], middle), ends, look, row["n_seeds"], along="x", filled=whole)
    return sheet.figure


def _largest(points: pd.DataFrame) -> pd.DataFrame:
    """The points of the largest sizes that have together at most MAX_ROWS configurations."""
    counts = points[points["measure"] == MEASURES[0].name].groupby("size").size().sort_index(ascending=False)
    fits = counts.index[np.maximum(counts.cumsum() <= MAX_ROWS, np.arange(len(counts)) == 0)]
    return points[points["size"].isin(fits)]


def _legend(once: pd.DataFrame) -> list[Line2D]:
    handles = []
    if ((once["n_failed"] > 0) & (once["n_seeds"] >= MIN_SEEDS)).any():
        handles.append(marks.failed_point())
    if (once["n_seeds"] < MIN_SEEDS).any():
        handles.append(marks.few_point())
    return handles


def _caption(once: pd.DataFrame, n_sizes: int) -> str:
    counts = once["n_seeds"]
    left_out = n_sizes - once["size"].nunique()
    return style.caption(
        f"Means over complete seeds, {n_statement(counts)}; {interval_statement('bars', counts)}, each mean's own; "
        "final step, whole validation split.",
        "Only the test of a difference says whether two differ: overlapping intervals do not make them equal.",
        f"Shown: the {n_sizes - left_out} largest of {n_sizes} sizes." if left_out else "",
    )
