"""The paper's Figure 2 beside this study: reconstruction errors of TT-SVD, published and measured, against χ."""

from __future__ import annotations

import math
import re

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import labels, style
from analysis.figures.data import EXACT
from analysis.paper import published
from analysis.paper.drawn import MEASURED, PUBLISHED, draw_measured, measured_here
from analysis.paper.rel_errors import LARGEST, MEAN, errors_of, of_seeds
from analysis.paper.trials import PaperTrials
from analysis.paper.values import over_seeds
from analysis.run_schema import MIN_SEEDS
from analysis.runs.study_runs import StudyRuns

_COLUMNS = ("when", "layers", "chi", "n_layers", "published", "measured", "low", "high", "n_seeds")
_OVERALL = {MEAN: "o", LARGEST: "^"}
_PANELS = (("init", True, "All layers, random weights"), ("init", False, "Random weights"),
           ("trained", False, "Trained weights"))  # fmt: skip
_LEFT, _GAP, _PANEL_HEIGHT = 0.55, 0.1, 2.05


def published_rel_errors(runs: StudyRuns, trials: PaperTrials) -> pd.DataFrame:
    """Points of the figure, one row per line and χ.

    Columns: when ("init", "trained"); layers: a row of Table 2, averaged over its layers, or the mean or the largest
    over all layers; chi; n_layers; published: from Table 3, only for all layers with random weights; measured: mean
    over seeds, with the limits of its 95 % t interval; n_seeds.
    """
    printed = {
        (name, model.chi): number
        for model in published.MODELS
        for name, number in ((MEAN, model.mean_rel_error), (LARGEST, model.max_rel_error))
    }
    rows = []
    for when in ("init", "trained"):
        errors = errors_of(runs, trials.dense, when)
        for name in (*_OVERALL, *(layer.name for layer in published.LAYERS)):
            own = errors if name in _OVERALL else errors[errors["kind"] == name]
            asked = {chi for _, chi in printed if chi is not None} if name in _OVERALL and when == "init" else set()
            for chi in sorted(asked | set(own["chi"])):
                value = over_seeds(of_seeds(own, chi, name))
                number = printed.get((name, chi)) if when == "init" else None
                n_layers = own.loc[own["chi"] == chi, "layer"].nunique()
                shown = math.nan if number is None else number
                rows.append((when, name, chi, n_layers, shown, value.value, value.low, value.high, value.n))
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def published_rel_error_figure(points: pd.DataFrame, note: str = "") -> Figure:
    """Errors over all layers (hollow: published, filled: measured), then by kind of layer, before and after training.

    Args:
        points: `published_rel_errors`; a point that is not measured is drawn only as published.
        note: sentence added under the figure.
    """
    counts = points.loc[points["n_seeds"] > 0, "n_seeds"]
    text = style.caption(
        "Relative Frobenius errors of TT-SVD with Table 2's factorisations. Hollow: Table 3 as published, uncertainty "
        "not reported.",
        *measured_here(counts, "Filled: the dense model's layers in this study, means over layers, then seeds", "bars"),
        note,
    )
    values = points[["published", "measured"]].to_numpy(dtype=np.float64)
    values = values[values > EXACT]
    low, high = values.min() / 1.15, max(1.0, values.max()) * 1.15
    panels = [panel for panel in _PANELS if len(_of_panel(points, panel[0], panel[1]))]
    with style.context():
        figure = style.new_figure(_PANEL_HEIGHT + 0.67)
        # The layers' symbols come from us, unlike other names, so that they may be parsed as math.
        with mpl.rc_context({"text.parse_math": True}):
            names = [max((_short(name) for name in _of_panel(points, when, overall)["layers"]), key=len)
                     for when, overall, _ in panels]  # fmt: skip
            beside = [(labels.text_size(figure, name)[0] + 18) / 72 for name in names]
            width = min(2.4, (style.WIDTH - _LEFT - sum(beside) - _GAP * len(panels)) / len(panels))
            left = _LEFT
            for (when, overall, title), room in zip(panels, beside, strict=True):
                axes = style.add_axes(figure, left, 0.42, width, _PANEL_HEIGHT)
                axes.set_yscale("log")
                axes.set_ylim(low, high)
                style.set_log_ticks(axes.yaxis, low, high, lambda tick: f"{tick:g}")
                _draw_panel(axes, _of_panel(points, when, overall), overall)
                axes.set_title(title, loc="left")
                axes.tick_params(labelleft=left == _LEFT)
                if left == _LEFT:
                    axes.set_ylabel("Relative error ‖W − Ŵ‖ / ‖W‖")
                left += width + room + _GAP
        figure.set_label(text)
    return figure


def _of_panel(points: pd.DataFrame, when: str, overall: bool) -> pd.DataFrame:
    return points[(points["when"] == when) & (points["layers"].isin(list(_OVERALL)) == overall)]


def _draw_panel(axes: Axes, points: pd.DataFrame, overall: bool) -> None:
    style.set_chi_axis(axes, points["chi"].unique(), room=1.2)
    ends = []
    for index, name in enumerate(points["layers"].unique()):
        line = points[points["layers"] == name].sort_values("chi")
        marker = _OVERALL[name] if overall else "sDvX"[index]
        color = MEASURED if overall else style.LINE_COLORS[(0, 2, 3, 5)[index]]
        measured = line[line["measured"] > EXACT]
        if len(measured):
            drawn = color if measured["n_seeds"].min() >= MIN_SEEDS else style.GREY
            size = 3.4 if overall else (3.4, 5.2, 3.0, 3.4)[index]
            draw_measured(axes, measured, "chi", color=drawn, marker=marker, markersize=size, zorder=3)
            last = measured.iloc[-1]
            ends.append(labels.Label(last["chi"], last["measured"], _short(name), drawn))
        known = line.dropna(subset="published")
        if len(known):
            axes.plot(
                known["chi"], known["published"], color=PUBLISHED, linestyle=":", linewidth=1.0, marker=marker,
                markersize=4.2, markerfacecolor="white", zorder=4,
            )  # fmt: skip
            last = known.iloc[-1]
            ends.append(labels.Label(last["chi"], last["published"], _short(name), PUBLISHED))
    labels.label_line_ends(axes, ends)
    if points["published"].notna().any():
        axes.text(0.05, 0.04, "as published", transform=axes.transAxes, color=style.ink(PUBLISHED))


def _short(name: str) -> str:
    """`W_Q, W_K` as the one symbol W with both indices; `mean over layers` as `mean`."""
    if name in _OVERALL:
        return name.split()[0]
    return "$W_{" + ",".join(re.findall(r"W_(\w+)", name)) + "}$"
