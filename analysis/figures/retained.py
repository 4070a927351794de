"""Share of the dense model's accuracy that a configuration retains, against its parameters."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures import labels, marks, panels, style
from analysis.results.summary import MIN_SEEDS, n_statement
from analysis.statistics.nondominated import frontier_mask

_LABELLED = 20
"""Up to this number of configurations, each gets a label; beyond it, only the best of their size or smaller."""
_DENSE_LINE = {"color": "#444444", "linewidth": 0.9, "linestyle": (0, (5, 3))}


def retained_figure(points: pd.DataFrame, n_dense: int, note: str = "") -> Figure:
    """Retained accuracy with its interval against trainable parameters; the dense model is the line at 100 %.

    Args:
        points: `retained_points`; at least one row.
        n_dense: parameters of the dense reference.
        note: sentence added under the figure, such as which configurations have another budget.
    """
    with style.context():
        figure, (axes,) = panels.new_panels(1)
        panels.scale_sizes(axes, pd.concat([points["n_params"].astype("float64"), pd.Series([float(n_dense)])]))
        values = pd.concat([points[key] for key in ("ratio", "low", "high")] + [pd.Series([100.0])])
        panels.scale_values(axes, values)
        axes.set_ylabel("Accuracy relative to dense (%)")
        axes.axhline(100, zorder=1, **_DENSE_LINE)
        looks = style.group_styles(points["group"])
        drawn = points.assign(
            x=panels.side_by_side(axes, points["n_params"], points["group"]),
            label=labels.told_apart(points["label"], points["group"]),
        )
        for row in drawn.to_dict("records"):
            whole = row["n_failed"] == 0
            marks.point(
                axes, (row["x"], row["ratio"]), (row["low"], row["high"]), looks[row["group"]], row["n"], filled=whole
            )
        hard = marks.obstacles(axes, *(drawn[key].to_numpy() for key in ("x", "ratio", "low", "high")))
        ends = np.array(axes.get_xlim())
        soft = labels.boxes_along(axes, np.array([[ends[0], 100]]), np.array([[ends[1], 100]]), 0.5)
        left_out = labels.place_labels(axes, _labels(drawn, looks), hard, soft)
        panels.settle(figure, [axes], _legend(points), _caption(drawn, left_out, note))
    return figure


def _labels(drawn: pd.DataFrame, looks: dict[str, style.GroupStyle]) -> list[labels.Label]:
    whole = drawn[(drawn["n"] >= MIN_SEEDS) & (drawn["n_failed"] == 0)]
    best = whole[frontier_mask(whole["n_params"].astype("float64"), whole["ratio"], ("minimize", "maximize"))]
    important = drawn["trial"].isin(best["trial"])
    shown = drawn.assign(important=important).sort_values(
        ["important", "n_params", "trial"], ascending=[False, True, True], kind="stable"
    )
    if len(drawn) > _LABELLED:
        shown = shown[shown["important"]]
    return [
        labels.Label(
            row["x"], row["ratio"] if np.isnan(row["high"]) else row["high"], row["label"],
            looks[row["group"]].color if row["n"] >= MIN_SEEDS else style.FEW,
            bool(row["important"]),
        )
        for row in shown.to_dict("records")
    ]  # fmt: skip


def _legend(points: pd.DataFrame) -> list[Line2D]:
    handles = marks.group_points(points, "n")
    handles.append(Line2D([], [], label="dense = 100 %", **_DENSE_LINE))
    if ((points["n_failed"] > 0) & (points["n"] >= MIN_SEEDS)).any():
        handles.append(marks.failed_point())
    if (points["n"] < MIN_SEEDS).any():
        handles.append(marks.few_point())
    return handles


def _caption(points: pd.DataFrame, left_out: int, note: str) -> str:
    enough = (points["n"] >= MIN_SEEDS) & (points["n_failed"] == 0)
    open_ended = int(points.loc[enough, "low"].isna().sum())
    return style.caption(
        f"Mean accuracy over mean accuracy of dense, on the seeds both have, {n_statement(points['n'])}; final step, "
        "whole validation split.",
        "Bars: Fieller's 95 % intervals of the ratio, paired by seed." if enough.any() else "",
        f"{open_ended} without bar: the seeds do not bound the ratio." if open_ended else "",
        panels.moved_statement(points),
        "Only the best of their size or smaller are labelled." if len(points) > _LABELLED else "",
        f"{left_out} label{'s' * (left_out > 1)} left out for lack of room." if left_out else "",
        note,
    )
