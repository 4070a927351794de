"""The report's second page: an interactive frontier, and all configurations as lines through their parameters."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import plotly.offline

from analysis import run_schema as schema
from analysis.figures import style
from analysis.results.numbers import format_count, percent
from analysis.results.summary import MIN_SEEDS, VAL_LOSS, Measure
from analysis.runs.studies import part_names
from analysis.runs.study_runs import StudyRuns
from analysis.runs.urls import without_credentials
from analysis.statistics.nondominated import step_line

SCRIPT = "scripts/plotly.min.js"
"""Plotly's code, beside the page that uses it, so that the page fetches nothing from elsewhere."""
LOCAL_SERVER = "http://127.0.0.1:5000"
"""Where `mpo-study ui DIR` serves MLflow."""

_SYMBOLS = {
    "D": "diamond", "o": "circle", "s": "square", "P": "cross", "X": "x", "*": "star", "h": "hexagon", "p": "pentagon",
    "^": "triangle-up", "v": "triangle-down", "<": "triangle-left", ">": "triangle-right", "d": "diamond-tall",
    "8": "octagon", "H": "hexagon2",
}  # fmt: skip
_FACTORS = (
    *("family", "start", "chi", "as_chi", "n_sites", "factorisation", "init", "refinement", "lr_rule", "decay"),
    *("gauge", "forward", "precision", "d_model", "learning_rate", "embedding_learning_rate", "steps"),
    *("optimiser", "schedule", "heal", "options", "bonds", "sweep", "rate_width"),
)
_LOGARITHMIC = ("learning_rate", "embedding_learning_rate", "n_params")
_FONT = "system-ui, -apple-system, Segoe UI, Roboto, Noto Sans, sans-serif"


def plotly_script() -> str:
    """Contents of `SCRIPT`."""
    return plotly.offline.get_plotlyjs()


def frontier_chart(runs: StudyRuns, points: pd.DataFrame, measure: Measure) -> str:
    """HTML of the frontier: pointing at a configuration shows its description, a click opens its run in MLflow.

    Args:
        points: `figures.data.frontier_points` of the measure.
    """
    figure = go.Figure()
    frontier = points[points["on_frontier"]]
    if len(frontier):
        x, y = step_line(frontier["n_params"], frontier["mean"], 1.25 * float(points["n_params"].max()))
        figure.add_scatter(
            x=x, y=y, mode="lines", line={"color": style.GREY, "width": 1}, name="frontier", hoverinfo="skip"
        )
    described = points.merge(runs.trials[["trial", "run_id", "study"]], on="trial", validate="one_to_one")
    for group, group_style in style.group_styles(points["group"]).items():
        own = described[described["group"] == group]
        symbols = [
            _SYMBOLS[group_style.marker] + ("" if on_frontier else "-open") for on_frontier in own["on_frontier"]
        ]
        figure.add_scatter(
            x=own["n_params"],
            y=own["mean"],
            error_y={"type": "data", "array": own["half_width"].fillna(0), "thickness": 1, "width": 3},
            mode="markers",
            marker={"symbol": symbols, "size": 10, "color": group_style.color, "line": {"width": 1.5}},
            name=escape(group),
            text=[_hover(row, measure) for row in own.to_dict("records")],
            customdata=[run_link(runs, *of_run) for of_run in zip(own["run_id"], own["study"], strict=True)],
            hovertemplate="%{text}<extra></extra>",
        )
    figure.update_layout(
        xaxis={"title": "Trainable parameters", "type": "log"} | _size_ticks(points["n_params"]),
        yaxis={"title": measure.axis_label},
        legend={"orientation": "h", "y": -0.2},
        hovermode="closest",
    )
    return _html(figure, f"explore_{measure.name}")


def parallel_chart(runs: StudyRuns, summary: pd.DataFrame) -> str:
    """HTML of parallel coordinates: a line per configuration through each varying factor, its size and its loss."""
    shown = summary[summary["n_seeds"] > 0]
    columns = [factor for factor in _FACTORS if shown[factor].nunique(dropna=False) > 1]
    loss = shown[schema.mean_key(VAL_LOSS.key)]
    dimensions = [_dimension(shown[column], column) for column in (*columns, "n_params")]
    dimensions.append({"label": f"{VAL_LOSS.short} ({VAL_LOSS.unit})", "values": loss.tolist()})
    line = {"color": loss.tolist(), "colorscale": "Cividis", "showscale": True}
    figure = go.Figure(
        go.Parcoords(dimensions=dimensions, line=line | {"colorbar": {"title": {"text": VAL_LOSS.short}}})
    )
    return _html(figure, "explore_parallel")


def run_link(runs: StudyRuns, run_id: str, study: str) -> str:
    """Address of a run in MLflow's pages: on its server, or on that of `mpo-study ui` if there is only a database.

    Args:
        study: as in `runs.trials`; each of several joined studies has its own server.
    """
    addresses = dict(zip(part_names(runs.parts), (part.address for part in runs.parts), strict=True))
    uri = addresses.get(study, runs.address).tracking_uri
    server = uri.rstrip("/") if uri.startswith(("http://", "https://")) else LOCAL_SERVER
    return f"{without_credentials(server)}/#/runs/{run_id}"


def _hover(row: dict[Any, Any], measure: Measure) -> str:
    interval = f" ± {row['half_width']:.4g}" if row["n_seeds"] >= MIN_SEEDS else " (no interval)"
    seeds = "seed" if row["n_seeds"] == 1 else "seeds"
    lines = [
        f"<b>{escape(row['label'])}</b> ({escape(row['group'])})",
        f"arm {escape(row['arm'])}, trial {row['trial']}, {row['n_seeds']} {seeds}",
        f"{measure.title.lower()}: {row['mean']:.5g}{interval} {measure.unit}",
        f"{row['n_params']:,} parameters ({row['percent_of_dense']:.1f} % of dense)",
    ]
    if not math.isnan(row["probability"]):
        lines.append(f"P(on frontier): {percent(row['probability'])}")
    return "<br>".join([*lines, f"run {escape(row['run_id'])}"])


def _dimension(values: pd.Series, name: str) -> dict[str, Any]:
    """An axis. Words, and numbers with missing values (a dense model has no χ), become evenly spaced ticks."""
    if pd.api.types.is_numeric_dtype(values) and values.notna().all():
        numbers = values.astype("float64")
        if name not in _LOGARITHMIC or numbers.min() <= 0:
            return {"label": name, "values": numbers.tolist()}
        ticks, written = _log_ticks(numbers)
        return {
            "label": name,
            "values": np.log10(numbers).tolist(),
            "tickvals": np.log10(ticks).tolist(),
            "ticktext": written,
        }
    kinds = [*sorted(values.dropna().unique()), *([None] if values.isna().any() else [])]
    place = {kind: index for index, kind in enumerate(kinds)}
    return {
        "label": name,
        "values": [place[None if pd.isna(value) else value] for value in values],
        "tickvals": list(range(len(kinds))),
        "ticktext": ["–" if kind is None else escape(str(kind)) for kind in kinds],
    }


def _size_ticks(sizes: pd.Series) -> dict[str, list]:
    ticks, written = _log_ticks(sizes.astype("float64"))
    return {"tickvals": ticks, "ticktext": written}


def _log_ticks(values: pd.Series) -> tuple[list[float], list[str]]:
    ticks = style.log_ticks(values.min() / 1.25, values.max() * 1.25)[0]
    return ticks, [format_count(tick) if tick >= 1 else f"{tick:g}" for tick in ticks]


def _html(figure: go.Figure, name: str) -> str:
    figure.update_layout(
        template="plotly_white", font={"family": _FONT, "size": 13}, margin={"t": 40, "r": 40}, height=520
    )
    return plotly.io.to_html(
        figure,
        include_plotlyjs=False,
        full_html=False,
        div_id=name,
        config={"responsive": True, "displaylogo": False, "modeBarButtonsToRemove": ["sendChartToCloud"]},
        post_script=_OPEN_RUN,
    )


_OPEN_RUN = (
    "document.getElementById('{plot_id}').on('plotly_click', function (event) {"
    "var link = event.points[0].customdata; if (link) { window.open(link, '_blank', 'noopener'); } });"
)
