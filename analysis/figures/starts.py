"""Trained from scratch against compressed from a trained dense model and fine-tuned: the same shape, both starts."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis import run_schema as schema
from analysis.figures import labels, marks, panels, style
from analysis.results.summary import MEASURES, MIN_SEEDS, half_width_key, interval_statement, n_statement

SCRATCH, TEACHER = "scratch", "teacher"
SHAPE = ("family", "chi", "n_sites", "factorisation")
COLUMNS = (
    *("measure", *SHAPE, "start", "trial", "label", "group", "n_params", "n_seeds", "n_failed", "train_tokens"),
    *("total_tokens", "n_others", "mean", "half_width"),
)
_LINES = {SCRATCH: (0, (5, 3)), TEACHER: (0, (1, 1.5))}


def start_points(summary: pd.DataFrame) -> pd.DataFrame:
    """The configurations that exist in both starts, and the dense models they are to be seen beside.

    A shape is family, χ (of a control: that of the MPO it is as large as), sites and factorisation. Of several trials
    of one shape and start, which differ in other things, the first with all its seeds stands for them, not the best.
    Trials stopped early are left out. Dense rows have no chi: the reference, and the first that was fine-tuned, if any.
    No rows at all where no shape exists in both starts.

    Columns: measure, family, chi, n_sites, factorisation, start, trial, label, group, n_params, n_seeds, n_failed,
    train_tokens, total_tokens (the teacher's included), n_others (trials of the shape and start that are not shown),
    mean, half_width (in the measure's unit; NaN below MIN_SEEDS).
    """
    done = summary[(summary["n_seeds"] > 0) & summary["stopped"].isna()].copy()
    done["chi"] = done["chi"].fillna(done["as_chi"])
    done["few"] = (done["n_seeds"] < MIN_SEEDS) | (done["n_failed"] > 0)
    compressed = done[(done["family"] != "dense") & done["chi"].notna()].sort_values(["few", "trial"], kind="stable")
    keys = [*SHAPE, "start"]
    compressed["n_others"] = compressed.groupby(keys, dropna=False)["trial"].transform("size") - 1
    first = compressed.drop_duplicates(keys)
    both = first.groupby(list(SHAPE), dropna=False)["start"].transform("nunique") == 2
    shown = first[both].sort_values(["family", "n_params", "chi", "n_sites", "start"], kind="stable")
    if shown.empty:
        return pd.DataFrame(columns=list(COLUMNS))
    tuned = done[(done["family"] == "dense") & (done["start"] == TEACHER)].sort_values(["few", "trial"], kind="stable")
    dense = pd.concat((done[done["is_reference"]], tuned.head(1))).assign(n_others=0)
    shown = pd.concat((shown, dense), ignore_index=True)
    return pd.concat(
        [
            shown.assign(
                measure=measure.name,
                mean=measure.scale * shown[schema.mean_key(measure.key)],
                half_width=measure.scale * shown[half_width_key(measure.key)],
            )[list(COLUMNS)]
            for measure in MEASURES
        ],
        ignore_index=True,
    )


def starts_figure(points: pd.DataFrame, note: str = "") -> Figure:
    """Loss and accuracy of each shape in both starts, joined by a line, against trainable parameters.

    Args:
        points: `start_points`; at least one row.
        note: sentence added under the figure.
    """
    with style.context():
        figure, axes = panels.new_panels(len(MEASURES))
        left_out = 0
        for measure, panel in zip(MEASURES, axes, strict=True):
            own = points[points["measure"] == measure.name]
            half = own["half_width"].fillna(0)
            panels.scale_sizes(panel, own["n_params"])
            panels.scale_values(panel, pd.concat([own["mean"] - half, own["mean"] + half]))
            panel.set_ylabel(measure.axis_label)
            _draw_dense(panel, own[own["family"] == "dense"])
            left_out += _draw_pairs(panel, own[own["family"] != "dense"])
        panels.settle(figure, axes, _legend(points), _foot(points, left_out, note), columns=2)
    return figure


def _draw_dense(axes: Axes, dense: pd.DataFrame) -> None:
    for row in dense.to_dict("records"):
        if row["start"] == SCRATCH and row["n_seeds"] >= MIN_SEEDS:
            low, high = row["mean"] - row["half_width"], row["mean"] + row["half_width"]
            axes.axhspan(low, high, color=style.BAND, linewidth=0, zorder=0.5)
        axes.axhline(row["mean"], color="#444444", linewidth=0.9, linestyle=_LINES[row["start"]], zorder=1)


def _draw_pairs(axes: Axes, points: pd.DataFrame) -> int:
    """Draw the points of one panel, and a label for each pair; the number of labels for which there was no room."""
    looks = style.group_styles(points["group"])
    drawn = points.assign(x=panels.side_by_side(axes, points["n_params"], points["group"]))
    drawn = drawn.assign(low=drawn["mean"] - drawn["half_width"], high=drawn["mean"] + drawn["half_width"])
    named, joins = [], []
    for _, pair in drawn.groupby(list(SHAPE), dropna=False, sort=False):
        axes.plot(pair["x"], pair["mean"], color=style.GREY, linewidth=0.7, zorder=2, gid="pair")
        ends = pair[["x", "mean"]].to_numpy(dtype=float)
        joins.append(labels.boxes_along(axes, ends[:1], ends[1:], 0.5))
        top = pair.sort_values("mean", kind="stable").iloc[-1]
        named.append(labels.Label(top["x"], top["mean"], _name(points, top), looks[top["group"]].color))
    for row in drawn.to_dict("records"):
        look, whole = looks[row["group"]], row["n_failed"] == 0
        marks.point(axes, (row["x"], row["mean"]), (row["low"], row["high"]), look, row["n_seeds"], filled=whole)
    hard = marks.obstacles(axes, *(drawn[key].to_numpy() for key in ("x", "mean", "low", "high")))
    return labels.place_labels(axes, named, hard, np.vstack(joins))


def _name(points: pd.DataFrame, row: pd.Series) -> str:
    """χ, and what else tells shapes apart."""
    name = f"χ={row['chi']}" if row["family"] == "mpo" else f"as χ={row['chi']}"
    if points.groupby("family")["n_sites"].nunique(dropna=False).max() > 1 and pd.notna(row["n_sites"]):
        name += f", L={row['n_sites']}"
    if points.groupby("family")["factorisation"].nunique(dropna=False).max() > 1 and pd.notna(row["factorisation"]):
        name += f", {row['factorisation']}"
    return name


def _legend(points: pd.DataFrame) -> list[Line2D | Patch]:
    """Every group and dense model with the tokens it was trained on."""
    compressed = points[points["family"] != "dense"]
    handles: list[Line2D | Patch] = list(marks.group_points(compressed, "n_seeds"))
    for handle in handles:
        own = compressed[compressed["group"] == handle.get_label()]
        handle.set_label(f"{handle.get_label()}: {_tokens(own)}")
    for row in points[points["family"] == "dense"].drop_duplicates("trial").to_dict("records"):
        own = points[points["trial"] == row["trial"]]
        line = Line2D([], [], color="#444444", linewidth=0.9, linestyle=_LINES[row["start"]])
        line.set_label(f"{row['group']}: {_tokens(own)}")
        handles.append(line)
        if row["start"] == SCRATCH and row["n_seeds"] >= MIN_SEEDS:
            handles.append(Patch(color=style.BAND, linewidth=0, label="95 % t interval of dense"))
    if ((compressed["n_failed"] > 0) & (compressed["n_seeds"] >= MIN_SEEDS)).any():
        handles.append(marks.failed_point())
    if (compressed["n_seeds"] < MIN_SEEDS).any():
        handles.append(marks.few_point())
    return handles


def _tokens(own: pd.DataFrame) -> str:
    """`20.5M tokens, 16.4M of them the teacher's`."""
    total, teacher = own["total_tokens"], own["total_tokens"] - own["train_tokens"]
    if total.isna().any() or teacher.isna().any():
        return "tokens unknown"
    of_teacher = f", {_span(teacher)} of them the teacher's" if teacher.max() > 0 else ""
    return f"{_span(total)} tokens{of_teacher}"


def _span(counts: pd.Series) -> str:
    low, high = (style.format_count(float(f"{float(count):.3g}")) for count in (counts.min(), counts.max()))
    return low if low == high else f"{low} to {high}"


def _foot(points: pd.DataFrame, left_out: int, note: str) -> str:
    compressed = points[points["family"] != "dense"]
    counts = points.drop_duplicates("trial")["n_seeds"]
    others = int(compressed.drop_duplicates("trial")["n_others"].sum())
    unequal = compressed.groupby(list(SHAPE), dropna=False)["total_tokens"].nunique(dropna=False).max() > 1
    return style.footer(
        f"Means over complete seeds, {n_statement(counts)}; {interval_statement('bars', counts)}; final step, whole "
        "validation split.",
        "A line joins the two starts of one shape, drawn side by side at its parameters.",
        "The two were trained on different numbers of tokens." if unequal else "",
        f"Of several trials of one shape and start the first is shown, not the best; {others} are not."
        if others
        else "",
        f"{left_out} label{'s' * (left_out > 1)} left out for lack of room." if left_out else "",
        note,
    )
