"""A final metric against the size of a configuration, with the frontier of the means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation

from analysis.figures import labels, style
from analysis.results.numbers import counted, percent
from analysis.results.sizes import PARAMETERS, Size
from analysis.results.summary import MIN_SEEDS, NO_FRONTIER, Measure, n_statement
from analysis.results.uncertainty import FrontierUncertainty
from analysis.statistics.nondominated import frontier_mask, step_line

_MARKER_SIZE, _FAINT_SIZE = 5.2, 4.0
_AXES_HEIGHT, _ABOVE = 2.6, 0.45
"""Height in inches of the axes, and of the space above them."""
_FAINT = 0.5
"""Share of white in a faint color."""
_NARROW = 5.0
"""Up to this width in inches the legend begins at the figure's edge."""
_FEWEST_WITH_OUTLIERS = 5
_BAND = "#dbe9f6"
_WORTH_SAYING = 0.05
"""Minimum probability that is written in the label of a configuration off the frontier."""
_SEEDS_BESIDE = 3.7
"""Points between a mean and the dots of its seeds, which it would hide; other configurations may be close by."""


def frontier_figure(
    points: pd.DataFrame,
    seeds: pd.DataFrame,
    uncertainty: FrontierUncertainty,
    measure: Measure,
    note: str = "",
    *,
    size: Size = PARAMETERS,
    width: float = style.WIDTH,
    look: style.Look = "screen",
) -> Figure:
    """Mean of a measure against a size, with the frontier of the means, its probabilities and its band.

    Args:
        points: `data.frontier_points` of the measure; at least one row.
        seeds: `data.seed_points` of the measure.
        uncertainty: uncertainty of the same frontier; its frames may be empty.
        note: sentence added under the figure.
        size: that of `points` and of the band.
        width: in inches.
    """
    band = uncertainty.band
    enough = points.loc[points["n_seeds"] >= MIN_SEEDS, "n_seeds"]
    statement = (
        f"Means over complete seeds, {n_statement(enough)}; bars: 95 % t intervals of the mean; dots: single seeds, "
        "beside their mean."
        if len(enough)
        else f"No configuration has {MIN_SEEDS} complete seeds: no intervals and no frontier."
    )
    if len(enough) and not points["on_frontier"].any():
        statement += f" No frontier: {NO_FRONTIER}."
    uncertain = (
        f"In brackets: probability that a configuration truly is on the frontier, from {uncertainty.rests_on}; off the "
        f"frontier of the means, only from {percent(_WORTH_SAYING)} up. "
        "Band: 95 %, pointwise, for the frontier of the true means; the observed one tends to look too good."
        if len(band)
        else ""
    )
    with style.context(look):
        figure = style.new_figure(_ABOVE + _AXES_HEIGHT + 1, width, look)
        axes = figure.add_axes((0, 0, 1, 1))
        points = points.assign(
            x=points[size.name].astype("float64"),
            label=labels.told_apart(points["short"].fillna(""), points["group"]),
            faint=points["short"].isna(),  # without bars, and without the dots of their seeds
        )
        has_dots = bool(((points["n_seeds"] > 1) & ~points["faint"]).any())
        _lay_out(figure, axes, below=1)
        outside = _scale_axes(axes, points, seeds, band, measure, size)
        points = points[~outside]
        legend = _legend(points, measure, has_band=len(band) > 0, has_dots=has_dots)
        _draw_band(axes, band)
        _draw_reference(axes, points)
        hard, soft = _draw_points(axes, points, seeds)
        key = labels.place_labels_or_letters(axes, _point_labels(points), hard, soft)
        shown = [("the frontier", points["on_frontier"]), ("dense", points["is_reference"])]
        named = " and ".join(word for word, which in shown if which.any())
        only = f"Labelled: {named or 'none'}; the others are faint, without bars." if points["faint"].any() else ""
        text = style.caption(statement, uncertain, only, key, _outside_stated(int(outside.sum()), measure), note)
        _add_legend(figure, axes, legend)
        figure.set_label(text)
    return figure


def _add_legend(figure: Figure, axes: Axes, handles: list[Line2D | Patch]) -> None:
    """Put the legend under the axes, in as many columns as the figure has room for."""
    width = figure.get_figwidth()
    for n_columns in (3, 2, 1):
        below = 0.46 + 0.155 * -(-len(handles) // n_columns)
        _lay_out(figure, axes, below)
        legend = figure.legend(
            handles=handles, loc="upper left", ncols=n_columns, borderaxespad=0, handlelength=1.6, labelspacing=0.35,
            columnspacing=1.8 if width > _NARROW else 0.8,
            bbox_to_anchor=(0.55 / width if width > _NARROW else 0.02, (below - 0.38) / figure.get_figheight()),
        )  # fmt: skip
        if legend.get_window_extent().x1 <= width * figure.dpi:
            return
        legend.remove()
    figure.add_artist(legend)


def _lay_out(figure: Figure, axes: Axes, below: float) -> None:
    """Leave `below` inches under the axes. Their own size stays the same, so that labels keep their places."""
    width, height = figure.get_figwidth(), _ABOVE + _AXES_HEIGHT + below
    figure.set_size_inches(width, height)
    axes.set_position((0.62 / width, below / height, (width - 0.8) / width, _AXES_HEIGHT / height))


def _scale_axes(
    axes: Axes, points: pd.DataFrame, seeds: pd.DataFrame, band: pd.DataFrame, measure: Measure, size: Size
) -> pd.Series:
    """Scale both axes; returns which configurations are outside, because their means are far too bad."""
    sizes = points["x"]
    low, high = sizes.min() / 1.25, sizes.max() * 1.25
    if high / low < 4:
        middle = np.sqrt(low * high)
        low, high = middle / 2, middle * 2
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    room = 72 * axes.get_position().width * labels.figure_of(axes).get_figwidth()
    style.set_log_ticks(axes.xaxis, low, high, size.shown, room)
    half = points["half_width"].fillna(0).mask(points["faint"], 0)
    shown = seeds.loc[~seeds["trial"].isin(points.loc[points["faint"], "trial"]), "value"]
    drawn = [points["mean"] - half, points["mean"] + half, shown, band["low"], band["high"]]
    values = pd.concat([part.astype("float64") for part in drawn if len(part)])
    best, worst = (values.min(), values.max()) if measure.direction == "minimize" else (values.max(), values.min())
    worst = _worst_shown(points, band, best, worst)
    outside = (points["mean"] - worst) * (worst - best) > 0
    margin = 0.07 * abs(worst - best) or 0.05 * abs(worst) or 1.0
    axes.set_ylim(min(best, worst) - margin, max(best, worst) + margin)
    axes.set_xlabel(size.axis_label)
    axes.set_ylabel(measure.axis_label)

    reference = points.loc[points["is_reference"], "x"]
    if size == PARAMETERS:
        percent = float((points["percent_of_dense"] / sizes).iloc[0])
    elif len(reference):
        percent = 100 / float(reference.iloc[0])
    else:
        return outside
    top = axes.twiny()
    top.grid(False)
    top.set_xscale("log")
    top.set_xlim(low * percent, high * percent)
    style.set_log_ticks(top.xaxis, low * percent, high * percent, lambda tick: f"{tick:g} %", room)
    top.set_xlabel(f"Share of the dense model's {size.word}")
    top.spines["top"].set_visible(True)
    axes.set_zorder(top.get_zorder() + 1)
    axes.patch.set_visible(False)
    return outside


def _worst_shown(points: pd.DataFrame, band: pd.DataFrame, best: float, worst: float) -> float:
    """The end of the axis on the bad side: far outliers are outside, since they would flatten all else.

    An outlier is worse than everything on the frontier, the reference and the band, and beyond the upper fence of
    Tukey's box plot.
    """
    if len(points) < _FEWEST_WITH_OUTLIERS:
        return worst
    sign = 1 if worst > best else -1
    half = points["half_width"].fillna(0)
    important = points["on_frontier"] | points["is_reference"]
    ends = sign * pd.concat([(points["mean"] + sign * half)[important], band["low"], band["high"]]).astype("float64")
    low, high = np.quantile(sign * points["mean"], (0.25, 0.75))
    fence = max([high + 1.5 * (high - low), *ends])
    inside = (sign * points["mean"])[sign * points["mean"] <= fence]
    return sign * min(sign * worst, max([inside.max(), *ends]))


def _outside_stated(n: int, measure: Measure) -> str:
    where = "above" if measure.direction == "minimize" else "below"
    return f"{counted(n, 'configuration')} far {where} the axis {'are' if n > 1 else 'is'} not shown." if n else ""


def _draw_band(axes: Axes, band: pd.DataFrame) -> None:
    """Draw the band in steps: between two sizes the limits of the smaller one hold."""
    if len(band):
        edges = np.append(band.iloc[:, 0].to_numpy(dtype=float), axes.get_xlim()[1])
        low, high = (np.append(band[limit], band[limit].iloc[-1]).astype(float) for limit in ("low", "high"))
        axes.fill_between(edges, low, high, step="post", color=_BAND, linewidth=0, zorder=0.6)


def _draw_reference(axes: Axes, points: pd.DataFrame) -> None:
    for row in points[points["is_reference"]].to_dict("records"):
        if row["n_seeds"] >= MIN_SEEDS:
            low, high = row["mean"] - row["half_width"], row["mean"] + row["half_width"]
            axes.axhspan(low, high, color=style.BAND, linewidth=0, zorder=0.5)
        axes.axhline(row["mean"], color="#444444", linewidth=0.9, linestyle=(0, (5, 3)), zorder=1)


def _draw_points(axes: Axes, points: pd.DataFrame, seeds: pd.DataFrame) -> tuple[labels.Boxes, labels.Boxes]:
    """Draw seeds, intervals, means and the step line; return the boxes that labels must not and should not touch."""
    seeds = seeds[seeds["trial"].isin(points.loc[(points["n_seeds"] > 1) & ~points["faint"], "trial"])]
    seeds_x = seeds["trial"].map(dict(zip(points["trial"], points["x"], strict=True))).to_numpy(dtype=float)
    x_end = axes.get_xlim()[1]
    styles = style.group_styles(points["group"])
    colors = dict(zip(points["trial"], _point_colors(points), strict=True))
    beside = ScaledTranslation(_SEEDS_BESIDE / 72, 0, labels.figure_of(axes).dpi_scale_trans)
    axes.scatter(
        seeds_x,
        seeds["value"],
        s=3.5,
        linewidth=0,
        zorder=2,
        transform=axes.transData + beside,
        c=[style.tint(colors[trial], 0.35) for trial in seeds["trial"]],
    )
    frontier = points[points["on_frontier"]]
    steps_x, steps_y = step_line(frontier["x"], frontier["mean"], x_end)
    axes.plot(steps_x, steps_y, color=style.GREY, linewidth=0.9, zorder=1.5, solid_joinstyle="miter")
    for row, color in zip(points.to_dict("records"), _point_colors(points), strict=True):
        if row["n_seeds"] >= MIN_SEEDS and not row["faint"]:
            axes.errorbar(
                row["x"],
                row["mean"],
                yerr=row["half_width"],
                color=color,
                linewidth=0.9,
                zorder=3,
                capsize=1.8,
                capthick=0.9,
            )
        axes.plot(
            row["x"],
            row["mean"],
            linestyle="none",
            marker=styles[row["group"]].marker,
            markersize=_FAINT_SIZE if row["faint"] else _MARKER_SIZE,
            markerfacecolor=color if row["on_frontier"] else "white",
            markeredgecolor=color,
            markeredgewidth=1.0,
            zorder=5 if row["on_frontier"] else 4,
        )

    x, mean = points["x"].to_numpy(dtype=float), points["mean"].to_numpy()
    half = points["half_width"].fillna(0).mask(points["faint"], 0).to_numpy()
    bars = labels.boxes_along(axes, np.column_stack((x, mean - half)), np.column_stack((x, mean + half)), 1.5)
    hard = np.vstack((labels.boxes_around(axes, x, mean, 0.6 * _MARKER_SIZE), bars))
    corners = np.column_stack((steps_x, steps_y))
    lines = [labels.boxes_along(axes, corners[:-1], corners[1:], 0.5)]
    for y in points.loc[points["is_reference"], "mean"]:
        ends = np.array(axes.get_xlim())
        lines.append(labels.boxes_along(axes, np.array([[ends[0], y]]), np.array([[ends[1], y]]), 0.5))
    dots = labels.boxes_around(axes, seeds_x, seeds["value"].to_numpy(), 1.2)
    return np.vstack((hard, *lines)), dots + np.array((_SEEDS_BESIDE, 0, _SEEDS_BESIDE, 0))


def _point_colors(points: pd.DataFrame) -> list[str]:
    styles = style.group_styles(points["group"])
    colors = [
        styles[group].color if n_seeds >= MIN_SEEDS else style.FEW
        for group, n_seeds in zip(points["group"], points["n_seeds"], strict=True)
    ]
    return [style.tint(color, _FAINT) if faint else color for color, faint in zip(colors, points["faint"], strict=True)]


def _point_labels(points: pd.DataFrame) -> list[labels.Label]:
    """Labels of the points, those of the frontier first, because the first ones get the best places."""
    labelled = points.assign(color=_point_colors(points), important=points["on_frontier"] | points["is_reference"])
    ordered = labelled[~labelled["faint"]].sort_values(
        ["on_frontier", "is_reference", "x", "mean"], ascending=[False, False, True, True], kind="stable"
    )
    return [
        labels.Label(row["x"], row["mean"], _labelled(row), row["color"], bool(row["important"]), _in_key(row))
        for row in ordered.to_dict("records")
    ]


def _labelled(row: dict[Any, Any]) -> str:
    """The label, with the probability if the configuration is on the frontier of the means or nearly so."""
    share = row["probability"]
    is_worth_it = pd.notna(share) and (row["on_frontier"] or share >= _WORTH_SAYING)
    return f"{row['label']} ({percent(share)})" if is_worth_it else row["label"]


def _in_key(row: dict[Any, Any]) -> str:
    """The label where no colour says what it is: with its group."""
    group, text = row["group"], _labelled(row | {"label": row["short"]})
    return text if text.startswith(group) else f"{group}, {text}"


def _legend(points: pd.DataFrame, measure: Measure, has_band: bool, has_dots: bool) -> list[Line2D | Patch]:
    def marker(shape: str, color: str, filled: bool, label: str) -> Line2D:
        return Line2D(
            [],
            [],
            linestyle="none",
            marker=shape,
            markersize=_MARKER_SIZE,
            markeredgecolor=color,
            markerfacecolor=color if filled else "white",
            label=label,
        )

    enough = points["n_seeds"] >= MIN_SEEDS
    handles: list[Line2D | Patch] = []
    for group, group_style in style.group_styles(points["group"]).items():
        shown = bool(enough[points["group"] == group].any())
        handles.append(marker(group_style.marker, group_style.color if shown else style.FEW, shown, group))
    if points["on_frontier"].any():
        handles.append(Line2D([], [], color=style.GREY, linewidth=0.9, label="frontier of the means (filled)"))
    if has_band:
        handles.append(Patch(color=_BAND, linewidth=0, label="95 % band of the frontier"))
    if (enough & ~points["on_frontier"]).any():
        # A hollow one that nothing on the frontier dominates is not sound.
        shown = points[enough]
        best = frontier_mask(shown["x"], shown["mean"], ("minimize", measure.direction))
        not_sound = ", with a failed seed or stopped early" if (best & ~shown["on_frontier"]).any() else ""
        handles.append(marker("o", style.GREY, False, f"hollow: dominated{not_sound}"))
    if not enough.all():
        handles.append(marker("o", style.FEW, False, f"grey: fewer than {MIN_SEEDS} seeds"))
    if has_dots:
        handles.append(Line2D([], [], linestyle="none", marker="o", markersize=2, color=style.FEW, label="one seed"))
    for row in points[points["is_reference"]].to_dict("records"):
        handles.append(Line2D([], [], color="#444444", linewidth=0.9, linestyle=(0, (5, 3)), label="mean of dense"))
        if row["n_seeds"] >= MIN_SEEDS:
            handles.append(Patch(color=style.BAND, linewidth=0, label="95 % t interval of dense"))
    return handles
