"""Bonds that change during the training: one row for each bond of each layer, over the steps."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from analysis.figures import style
from analysis.results.summary import n_statement

MAX_ROWS = 60
"""With more rows than this, the figure shows means over the blocks of the model."""
_ROW = 0.13


def bond_rows(bonds: pd.DataFrame) -> pd.DataFrame:
    """The mean over seeds of each bond from each of its steps on: row, order, step, bond, n_seeds.

    Args:
        bonds: seed, layer, number, step, bond: the value of a bond from that step on, for each seed.
    """
    steps = np.sort(bonds["step"].unique())
    wide = bonds.pivot(index=["layer", "number", "seed"], columns="step", values="bond").reindex(columns=steps)
    long = wide.ffill(axis=1).melt(ignore_index=False, var_name="step", value_name="bond").dropna().reset_index()
    several = long.groupby("layer")["number"].transform("nunique") > 1
    long["row"] = long["layer"] + np.where(several, ", bond " + (long["number"] + 1).astype(str), "")
    places = {row: place for place, row in enumerate(long["row"].unique())}
    if len(places) > MAX_ROWS:
        long["row"] = long["row"].str.replace(r"(^|\.)\d+(?=\.)", r"\1*", regex=True)
        places = {row: place for place, row in enumerate(long["row"].unique())}
    means = long.groupby(["row", "step"]).agg(bond=("bond", "mean"), n_seeds=("seed", "nunique")).reset_index()
    means["order"] = means["row"].map(places)
    return means.sort_values(["order", "step"], ignore_index=True)[["row", "order", "step", "bond", "n_seeds"]]


def bonds_figure(rows: pd.DataFrame, last_step: int) -> Figure:
    """Each bond by its colour over the steps, and as a number at the end.

    Args:
        rows: `bond_rows`. last_step: steps of the training.
    """
    steps = np.sort(rows["step"].unique())
    wide = rows.pivot(index="order", columns="step", values="bond").reindex(columns=steps)
    names = rows.drop_duplicates("order").sort_values("order")["row"].tolist()
    text = style.caption(
        f"Bonds of the MPO layers, means over seeds; {n_statement(rows['n_seeds'])}. A row has the colour of its bond "
        "from each change on; the number is the bond at the end."
    )
    with style.context():
        height = max(1.0, _ROW * len(names))
        figure = style.new_figure(height + 0.75)
        axes = style.add_axes(figure, 1.9, 0.42, style.WIDTH - 2.4, height)
        edges = np.append(steps, max(last_step, steps[-1] + 1))
        low, high = max(1.0, float(np.nanmin(wide))), max(2.0, float(np.nanmax(wide)))
        axes.pcolormesh(
            edges, np.arange(len(names) + 1), wide.to_numpy(), cmap="viridis", norm=LogNorm(low, high), rasterized=True
        )
        axes.set_ylim(len(names), 0)
        axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=6)
        axes.tick_params(axis="y", length=0)
        for place, bond in enumerate(wide[steps[-1]]):
            axes.text(edges[-1], place + 0.5, f" {bond:.3g}", va="center", ha="left", fontsize=6)
        axes.set_xlabel("Step")
        axes.set_title("Bond of each layer", loc="left")
        figure.set_label(text)
    return figure
