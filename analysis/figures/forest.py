"""Differences between pairs of configurations, with the margin of non-inferiority."""

from __future__ import annotations

from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures import marks, style
from analysis.figures.rows import Row, lay_out, set_limits
from analysis.results.comparisons import BETTER, FAILED, UNDECIDED, WORSE
from analysis.results.numbers import format_count
from analysis.results.pairs import REFERENCE
from analysis.results.summary import MEASURES, MIN_SEEDS, Measure, group_order, n_statement

MAX_ROWS = 20
"""Maximum number of pairs in one forest."""

_ADJUSTED = {True: "as one family over both measures", False: "by Benjamini–Hochberg"}
_MARGIN = "#b03a00"
_NO_BREAK = "\u00a0"
_MARGIN_LINE: dict[str, Any] = {"linewidth": 1.1, "linestyle": (0, (2, 1)), "zorder": 2, "gid": "margin"}
_BUDGETS = {"total_tokens": "total tokens", "tuning_trials": "tuning trials"}
"""Parts of a budget that are written beside a pair if they differ, with the headings of their columns."""
_BEYOND = 3.0
"""An axis ends at this multiple of the reach of four of five intervals; an interval that goes beyond gets an arrow."""


def forest_pairs(comparisons: pd.DataFrame, relation: str) -> pd.DataFrame:
    """The rows of `comparisons.compare` of one relation that its forest shows, sorted by group, size and rival.

    It shows at most MAX_ROWS pairs: those that the study file declares come first, then the largest in parameters.
    Columns: those of `compare`.
    """
    own = comparisons[comparisons["relation"] == relation]
    pairs = own.drop_duplicates(["trial", "against"]).sort_values(
        ["declared", "n_params", "trial", "against"], ascending=[False, False, True, True], kind="stable"
    )
    shown = own.merge(pairs.head(MAX_ROWS)[["trial", "against"]], on=["trial", "against"])
    rank = {group: index for index, group in enumerate(group_order(own["group"]))}
    order = {measure.name: index for index, measure in enumerate(MEASURES)}
    keys = shown.assign(rank=shown["group"].map(rank), order=shown["measure"].map(order))
    keys = keys.sort_values(["rank", "n_params", "trial", "against_n_params", "against", "order"], kind="stable")
    return keys.drop(columns=["rank", "order"]).reset_index(drop=True)


def forest_figure(pairs: pd.DataFrame, n_pairs: int | None = None) -> Figure:
    """Differences in loss and in accuracy, one row per pair, one panel per measure.

    Args:
        pairs: `forest_pairs`; at least one row.
        n_pairs: number of pairs of this relation, including those left out.
    """
    first = pairs.drop_duplicates(["trial", "against"])
    measures = [measure for measure in MEASURES if measure.name in set(pairs["measure"])]
    with style.context():
        rows = _rows(pairs, first, measures)
        some = [any(row.cells and row.cells[column] for row in rows) for column in range(len(_BUDGETS))]
        sheet = lay_out(
            [replace(row, cells=tuple(compress(row.cells, some))) for row in rows],
            titles=[measure.title for measure in measures],
            subtitles=[
                ("← better", "worse →") if measure.direction == "minimize" else ("← worse", "better →")
                for measure in measures
            ],
            axis_labels=[f"Difference ({measure.difference_unit})" for measure in measures],
            heads=list(compress(_BUDGETS.values(), some)),
            beside_head="verdict",
            legend=_legend(pairs, measures),
            caption=_caption(pairs, first, n_pairs),
        )
        y = [middle for row, middle in zip(rows, sheet.y, strict=True) if not row.heading]
        for measure, axes in zip(measures, sheet.panels, strict=True):
            _draw(axes, _of(pairs, first, measure), measure, y)
    return sheet.figure


def _of(pairs: pd.DataFrame, first: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """The pairs' rows of one measure, in the order of `first`."""
    own = pairs[pairs["measure"] == measure.name].set_index(["trial", "against"])
    return own.loc[list(zip(first["trial"], first["against"], strict=True))].reset_index()


def _rows(pairs: pd.DataFrame, first: pd.DataFrame, measures: list[Measure]) -> list[Row]:
    """A heading for each group, and a row for each pair."""
    styles = style.group_styles(pairs["group"])
    verdicts = [_of(pairs, first, measure)["verdict"].tolist() for measure in measures]
    rivals = first.groupby("group")["against_group"].unique()
    to_one = first["relation"].eq(REFERENCE).all() and not first.duplicated(["trial", "against_group"]).any()
    some_declared = first["declared"].any() and not first["declared"].all()
    rows, heading = [], ""
    for index, row in enumerate(first.to_dict("records")):
        if row["group"] != heading:
            heading = row["group"]
            against = f" − {rivals[heading][0]}" if len(rivals[heading]) == 1 else ""
            rows.append(Row(heading + against, (), (), True, styles[heading]))
        text = row["label"] if to_one else f"{row['label']} −{_NO_BREAK}{row['against_label']}"
        if len(rivals[heading]) > 1:
            text += f" ({row['against_group']})"
        text = text.replace("lr ", f"lr{_NO_BREAK}") + (" *" if some_declared and row["declared"] else "")
        if row["n"] < first["n"].max():
            text += f", n={row['n']}"
        budgets = tuple(_both(row[name], row[f"against_{name}"]) for name in _BUDGETS)
        rows.append(Row(text, budgets, tuple(own[index] for own in verdicts)))
    return rows


def _both(count: float, against: float) -> str:
    """Two counts if they differ; else an empty text."""
    if pd.Series((count, against)).nunique(dropna=False) == 1:
        return ""
    shown = ("?" if pd.isna(each) else format_count(float(f"{float(each):.3g}")) for each in (count, against))
    return " vs ".join(shown)


def _draw(axes: Axes, own: pd.DataFrame, measure: Measure, y: list[float]) -> None:
    look = style.group_styles(own["group"])
    low, high = _limits(own)
    set_limits(axes, low, high)
    axes.axvline(0, color="black", linewidth=0.7, zorder=1)
    worse = 1 if measure.direction == "minimize" else -1
    margins = own["margin"].unique()
    if len(margins) == 1 and margins[0] > 0:
        axes.axvline(worse * margins[0], color=_MARGIN, **_MARGIN_LINE)
    for row, middle in zip(own.to_dict("records"), y, strict=True):
        if row["margin"] > 0 and len(margins) > 1:
            span = [middle - 0.095, middle + 0.095]
            axes.plot([worse * row["margin"]] * 2, span, color=_MARGIN, **_MARGIN_LINE)
        difference, half = row["difference"], row["half_width"]
        if np.isnan(difference):  # one of them has no seed, or a paired test no shared one
            continue
        enough = row["n"] >= MIN_SEEDS
        if not low <= difference <= high:
            at = low if difference < low else high
            axes.annotate(
                f"{difference:+.3g}".replace("-", "−"), (at, middle), (9 if at == low else -9, 0), fontsize=7,
                textcoords="offset points", va="center", ha="left" if at == low else "right", zorder=6,
                color="#333333", bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
            )  # fmt: skip
        else:
            ends = (np.maximum(difference - half, low), np.minimum(difference + half, high))
            whole = row["verdict"] != FAILED
            at = difference, middle
            marks.point(axes, at, ends, look[row["group"]], row["n"], along="x", filled=whole, thick=True)
        if np.isfinite(row["low"]) and row["low"] < high and row["high"] > low:
            span = np.clip((row["low"], row["high"]), low, high)
            color = look[row["group"]].color
            axes.plot(span, [middle, middle], color=color, linewidth=0.7, zorder=2.5, gid="simultaneous")
        reach = half if enough and np.isfinite(half) else 0
        for end, beyond, shape in ((low, difference - reach < low, "<"), (high, difference + reach > high, ">")):
            if beyond:
                color = look[row["group"]].color if enough else style.FEW
                axes.plot([end], [middle], marker=shape, markersize=3.4, color=color, clip_on=False, gid="beyond")


def _limits(own: pd.DataFrame) -> tuple[float, float]:
    """Limits of the axis of one measure; zero, the margin and most intervals are inside."""
    margin = own["margin"].fillna(0).max()
    drawn = own.dropna(subset=["difference"])
    difference, half = drawn["difference"], drawn["half_width"].fillna(0)
    reach = (_BEYOND * (difference.abs() + half).quantile(0.8) if len(drawn) else 0) or margin or 1.0
    low = max(np.minimum(difference - half, drawn["low"].fillna(0)).min(), -reach) if len(drawn) else 0
    high = min(np.maximum(difference + half, drawn["high"].fillna(0)).max(), reach) if len(drawn) else 0
    low, high = min(low, -1.5 * margin, 0), max(high, 1.5 * margin, 0)
    space = 0.06 * (high - low) or 0.1
    return low - space, high + space


def _legend(pairs: pd.DataFrame, measures: list[Measure]) -> list[Line2D]:
    handles = []
    if (pairs["n"] >= MIN_SEEDS).any():
        handles.append(Line2D([], [], color="#333333", linewidth=marks.THICK, label="95 % interval of each difference"))
    if pairs["low"].notna().any():
        text = "95 % for all declared together: without zero if decided"
        handles.append(Line2D([], [], color="#333333", linewidth=0.7, label=text))
    margins = []
    for measure in measures:
        values = sorted(pairs.loc[(pairs["measure"] == measure.name) & (pairs["margin"] > 0), "margin"].unique())
        margins += [f"{' or '.join(f'{value:g}' for value in values)} {measure.difference_unit}"] if values else []
    if margins:
        text = f"margin: worse by {', '.join(margins)}"
        handles.append(Line2D([], [], color=_MARGIN, linewidth=1.1, linestyle=(0, (2, 1)), label=text))
    if (pairs["verdict"] == FAILED).any():
        handles.append(marks.failed_point())
    if (pairs["n"] < MIN_SEEDS).any():
        handles.append(marks.few_point())
    return handles


def _caption(pairs: pd.DataFrame, first: pd.DataFrame, n_pairs: int | None) -> str:
    left_out = (n_pairs or len(first)) - len(first)
    some_declared = first["declared"].any() and not first["declared"].all()
    adjusted = f"declared pairs {_ADJUSTED[True]}, the others {_ADJUSTED[False]}"
    if not some_declared:
        adjusted = _ADJUSTED[bool(first["declared"].all())]
    return style.caption(
        f"Configuration minus rival, {n_statement(first['n'])}; final step, whole validation split.",
        f"Better and worse: p adjusted {adjusted}." if pairs["verdict"].isin([BETTER, WORSE, UNDECIDED]).any() else "",
        "Not inferior: worse by less than the margin, from a group's largest χ to the first failure."
        if (pairs["margin"] > 0).any()
        else "",
        "Arrows: the interval goes beyond the axis." if _beyond(pairs) else "",
        "* Declared in the study file." if some_declared else "",
        f"Shown: {len(first)} of {len(first) + left_out} pairs, those declared first, then the largest in parameters."
        if left_out
        else "",
    )


def _beyond(pairs: pd.DataFrame) -> bool:
    """Whether `_limits` cut anything off."""
    for _, own in pairs.groupby("measure"):
        low, high = _limits(own)
        half = own["half_width"].where(own["n"] >= MIN_SEEDS).fillna(0)
        if (own["difference"] - half < low).any() or (own["difference"] + half > high).any():
            return True
    return False
