"""The frame behind each figure: it is drawn, and saved beside the figure as CSV."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from analysis import run_schema as schema
from analysis.results.sizes import PARAMETERS, Size
from analysis.results.summary import (
    DENSE,
    LARGER_DENSE,
    MIN_SEEDS,
    SMALLER_DENSE,
    VAL_LOSS,
    Measure,
    frontier_key,
    half_width_key,
    labels_of,
    sole_reference,
)
from analysis.statistics.intervals import mean_interval
from analysis.statistics.nondominated import frontier_mask

EXACT = 1e-5
"""A relative error below this is rounding of an exact factorisation, and is not drawn on a logarithmic axis."""
MAX_LABELLED = 10
"""Maximum number of points of a frontier that are all labelled."""
MAX_CURVES = 6
"""Maximum number of learning curves in one panel."""


def frontier_points(
    summary: pd.DataFrame, measure: Measure, chances: pd.DataFrame, size: Size = PARAMETERS
) -> pd.DataFrame:
    """One row per trial with a complete seed: identity, n_params, n_seeds, mean and half_width in the measure's unit,
    on_frontier, is_reference (if it is the sole one), probability and near_probability. The last two are NaN if the
    trial is not in `chances` (see `uncertainty.FrontierUncertainty`). Another size has a column of its own.

    short: what distinguishes the trials that a figure labels. With at most MAX_LABELLED trials these are all. Of more,
    they are those on the frontier and the reference; the others have no short label."""
    identity = ["trial", "arm", "group", "label", "n_params", "percent_of_dense", "n_seeds"]
    own = [size.name] if size.name not in identity else []
    points = summary.loc[summary["n_seeds"] > 0, [*identity, *own]].copy()
    points["is_reference"] = points["trial"].isin(sole_reference(summary)["trial"])
    points["mean"] = measure.scale * summary[schema.mean_key(measure.key)]
    points["half_width"] = measure.scale * summary[half_width_key(measure.key)]
    points["on_frontier"] = summary[frontier_key(measure)]
    is_labelled = points["on_frontier"] | points["is_reference"] | (len(points) <= MAX_LABELLED)
    points["short"] = labels_of(summary.loc[points.index[is_labelled]]).reindex(points.index)
    shares = chances.set_index("trial").astype("float64").reindex(points["trial"])
    return pd.concat((points.reset_index(drop=True), shares.reset_index(drop=True)), axis=1)


def seed_points(summary: pd.DataFrame, seeds: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """One row per complete seed: trial, group, label, n_params, seed, value in the measure's unit."""
    named = summary[["trial", "group", "label", "n_params"]]
    values = seeds[["trial", "seed"]].assign(value=measure.scale * seeds[measure.key])
    return named.merge(values, on="trial", validate="one_to_many")


def panel_of(group: str) -> str:
    """The panel in which a group's learning curves are drawn: all dense models share one."""
    return DENSE if group in (SMALLER_DENSE, LARGER_DENSE) else group


def curve_trials(summary: pd.DataFrame) -> pd.DataFrame:
    """The trials whose learning curves are shown, with their panel. Trials that were stopped early are left out.

    A panel with at most MAX_CURVES trials shows all. Any other shows those on the frontier of the panel's own loss,
    evenly thinned to MAX_CURVES. The sole reference is always shown.
    """
    complete = _with_curves(summary)
    chosen: list[int] = []
    for _, panel in complete.groupby("panel"):
        if len(panel) > MAX_CURVES:
            best = frontier_mask(panel["n_params"].astype("float64"), panel[schema.mean_key(VAL_LOSS.key)])
            reference = panel[panel["is_reference"]]
            others = panel[best & ~panel["is_reference"]].sort_values("n_params")
            evenly = np.linspace(0, len(others) - 1, min(len(others), MAX_CURVES - len(reference))).round().astype(int)
            panel = pd.concat((reference, others.iloc[evenly]))
        chosen += panel["trial"].tolist()
    shown = complete[complete["trial"].isin(chosen)]
    return shown.assign(label=labels_of(shown))


def curves_left_out(summary: pd.DataFrame) -> str:
    """A sentence on which configurations `curve_trials` shows; empty if it shows all."""
    complete, shown = _with_curves(summary), curve_trials(summary)
    if len(shown) == len(complete):
        return ""
    crowded = complete.groupby("panel")["trial"].transform("size") > MAX_CURVES
    dense = ", the dense reference among them" if complete.loc[crowded, "is_reference"].any() else ""
    return (
        f"{len(shown)} of {len(complete)} configurations: a panel with more than {MAX_CURVES} shows at most "
        f"{MAX_CURVES}, picked evenly along its own frontier{dense}."
    )


def _with_curves(summary: pd.DataFrame) -> pd.DataFrame:
    complete = summary[(summary["n_seeds"] > 0) & summary["stopped"].isna() & (summary["steps"] > 0)]
    is_reference = complete["trial"].isin(sole_reference(summary)["trial"])
    return complete.assign(panel=complete["group"].map(panel_of), is_reference=is_reference)


def curve_means(shown: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Means of validation loss over the complete seeds of each trial, at each evaluation that all its seeds have.

    Columns: trial, panel, group, label, n_params, is_reference, step, tokens (of this run), n_seeds, mean, half_width.
    """
    frames = []
    for row in shown.to_dict("records"):
        own = curves[curves["trial"] == row["trial"]]
        losses = own.pivot(index="step", columns="seed", values="val_loss").dropna()
        interval = mean_interval(losses.to_numpy())
        frames.append(
            pd.DataFrame(
                {
                    **{key: row[key] for key in ("trial", "panel", "group", "label", "n_params", "is_reference")},
                    "step": losses.index,
                    "tokens": own.groupby("step")["tokens"].first().loc[losses.index].to_numpy(),
                    "n_seeds": interval.n,
                    "mean": interval.mean,
                    "half_width": interval.half_width if interval.n >= MIN_SEEDS else float("nan"),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def rel_error_means(rel_errors: pd.DataFrame, trial: int) -> pd.DataFrame:
    """Relative error of TT-SVD for each kind of layer of one dense trial, averaged over the blocks of the model.

    The interval is over seeds. Columns: when, kind, chi, n_layers, n_seeds, mean, half_width.
    """
    own = rel_errors[(rel_errors["trial"] == trial) & rel_errors["when"].isin(["init", "trained"])]
    own = own.assign(kind=own["layer"].map(layer_kinds(list(own["layer"].unique()))))
    rows = []
    for (when, kind, chi), group in own.groupby(["when", "kind", "chi"]):
        interval = mean_interval(group.groupby("seed")["rel_error"].mean().to_numpy())
        half_width = float(interval.half_width) if interval.n >= MIN_SEEDS else float("nan")
        rows.append((when, kind, chi, group["layer"].nunique(), interval.n, float(interval.mean), half_width))
    return pd.DataFrame(rows, columns=["when", "kind", "chi", "n_layers", "n_seeds", "mean", "half_width"])


def layer_kinds(layers: list[str]) -> dict[str, str]:
    """The kind of each layer: its module name without the block's number, shortened if kinds stay distinct."""
    patterns = {layer: re.sub(r"\.\d+\.", ".*.", layer, count=1) for layer in layers}
    last = {pattern: pattern.rsplit(".", 1)[-1] for pattern in patterns.values()}
    names = list(last.values())
    return {layer: last[pattern] if names.count(last[pattern]) == 1 else pattern for layer, pattern in patterns.items()}
