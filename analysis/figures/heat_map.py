"""Difference to the dense reference over the cap χ and the number of sites L."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.figures import labels, style
from analysis.results.importance import factor_name, varying
from analysis.results.selection import OTHER_BUDGET, is_sound, left_out_statement
from analysis.results.summary import MIN_SEEDS, MPO_SCRATCH, MPO_TUNED, Measure, sole_reference
from analysis.statistics.contrasts import contrasts

COLUMNS = (*("start", "chi", "n_sites", "trial", "difference", "half_width", "n_seeds", "setting", "left_out"),)
_TITLES = {"scratch": MPO_SCRATCH, "teacher": MPO_TUNED}
_WORSE, _BETTER = "#d55e00", "#0072b2"
_LIGHTEST = 0.15
"""How far from the pure colour a cell stays, so that black text on it is read."""
_FEW = "#6b6b6b"
_CELL_HEIGHT, _WIDEST = 0.47, 1.1
_LEFT, _GAP, _TITLE, _BELOW = 0.42, 0.5, 0.26, 0.46
_BAR = 0.95
"""Inches at the right for the colour bar."""


def heat_map_cells(
    summary: pd.DataFrame, seeds: pd.DataFrame, measure: Measure, budgets: Collection[str] = ()
) -> pd.DataFrame:
    """One row per cell: the mean difference of an MPO trial to the dense reference on the seeds both have.

    Trials of one start that differ in more than χ and L (learning rate, initialisation, ...) are never mixed, and none
    is chosen by its result: shown is the setting of all other factors that fills the most cells, of several the one
    whose first trial came first. half_width is that of the 95 % t interval of the paired differences.

    Args:
        summary: `summary.summarise`.
        seeds: `StudyRuns.seeds`.
        budgets: budget hashes that may be compared with the reference beside its own, since the study declares so.
    Returns:
        Columns: start, chi, n_sites, trial; difference and half_width in the measure's unit (points for %), NaN
        half_width for fewer than 3 seeds; n_seeds, of both. setting: the other factors of the panel, where they vary;
        left_out: a sentence on the trials that are not shown. Sorted by start, L and χ. Empty where there is no
        sole reference all of whose seeds ended well, and of every start that has not two χ and two L.
    """
    nothing = pd.DataFrame(columns=list(COLUMNS))
    references = sole_reference(summary)
    references = references[is_sound(references)]
    if references.empty:
        return nothing
    reference = references.iloc[0]
    mpo = summary[(summary["family"] == "mpo") & summary["n_sites"].notna()]
    of_budget = mpo[mpo["budget_hash"].isin([reference["budget_hash"], *budgets])]
    values = {trial: group.set_index("seed")[measure.key] for trial, group in seeds.groupby("trial")}
    own = values[reference["trial"]]
    rows = []
    for row in of_budget[is_sound(of_budget)].to_dict("records"):
        seed_values = values.get(row["trial"], own[:0])
        shared = own.index.intersection(seed_values.index)
        if len(shared):
            result = contrasts([seed_values[shared]], own[shared])
            difference, half_width = measure.scale * result.difference[0], measure.scale * result.pair.half_width[0]
            rows.append(row | {"difference": difference, "half_width": half_width, "n_seeds": result.n})
    if not rows:
        return nothing
    measured = pd.DataFrame(rows).astype({key: mpo[key].dtype for key in mpo.columns})
    panels = [panel for start in _TITLES if len(panel := _panel(measured[measured["start"] == start]))]
    if not panels:
        return nothing
    cells = pd.concat(panels)
    cells["left_out"] = left_out_statement(
        {
            OTHER_BUDGET: len(mpo) - len(of_budget),
            "with a failed seed or given up": int((~is_sound(of_budget)).sum()),
            "without a seed of the reference": int(is_sound(of_budget).sum()) - len(measured),
            "of other settings": len(measured) - len(cells),
        }
    )
    return cells[list(COLUMNS)].reset_index(drop=True)


def _panel(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials of the setting that fills the most cells, with it as text; none if no setting spans two χ and L."""
    others = varying(trials, without=("chi", "n_sites", "start", "teacher"))
    settings = trials.groupby(others, dropna=False, sort=False) if others else [((), trials)]
    best = trials.iloc[:0]
    for _, group in sorted(settings, key=lambda item: item[1]["trial"].min()):
        cells = group.sort_values("trial").drop_duplicates(["chi", "n_sites"])
        if cells["chi"].nunique() > 1 and cells["n_sites"].nunique() > 1 and len(cells) > len(best):
            best = cells
    if best.empty:
        return best
    chosen = {key: best[key].iloc[0] for key in others}
    said = ", ".join(f"{factor_name(key)} {_text(value)}" for key, value in chosen.items())
    return best.assign(setting=said).sort_values(["n_sites", "chi"])


def _text(value: str | float | None) -> str:
    return "none" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class _Panel:
    title: str
    cells: pd.DataFrame
    chis: list[int]
    sites: list[int]


def heat_map_figure(cells: pd.DataFrame, measure: Measure, note: str = "") -> Figure:
    """Each cell's difference ± half width and n, on a colour scale centred on dense.

    Args:
        cells: `heat_map_cells` of the measure; at least one row.
        note: sentence added under the figure.
    """
    decimals = _decimals(cells)
    with style.context():
        probe = style.new_figure(1)
        texts = [_cell_text(row, decimals) for row in cells.to_dict("records")]
        needed = max(labels.text_size(probe, text)[0] for text in texts) / 72 * 7 / 7.5 + 0.08
        panels = _panels(cells, int((style.WIDTH - _LEFT - _BAR) / needed))
        text = style.footer(*_sentences(cells, measure), note)
        foot = style.footer_height(text)
        widest = max(len(panel.chis) for panel in panels)
        beside = len(panels) == 2 and sum(len(panel.chis) * needed + _LEFT for panel in panels) <= style.WIDTH - _BAR
        per_row = 2 if beside else 1
        width = min(_WIDEST, (style.WIDTH - _BAR - _LEFT * per_row) / (widest * per_row))
        rows = [panels[start : start + per_row] for start in range(0, len(panels), per_row)]
        heights = [max(len(panel.sites) for panel in row) * _CELL_HEIGHT + _TITLE + _BELOW for row in rows]
        total = foot + sum(heights)
        figure = style.new_figure(total)
        colors = _color_scale(cells, measure)
        top = total
        for row, height in zip(rows, heights, strict=True):
            for column, panel in enumerate(row):
                left = _LEFT + column * (_LEFT + widest * width)
                own_height = len(panel.sites) * _CELL_HEIGHT
                axes = figure.add_axes(
                    (
                        left / style.WIDTH,
                        (top - _TITLE - own_height) / total,
                        len(panel.chis) * width / style.WIDTH,
                        own_height / total,
                    )
                )
                _draw_panel(axes, panel, colors, decimals)
            top -= height
        if (cells["n_seeds"] >= MIN_SEEDS).any():
            bar_height = min(1.6, heights[0] - _TITLE - _BELOW + 0.3)
            right = _LEFT + (per_row - 1) * (_LEFT + widest * width) + widest * width + 0.15
            bar = figure.add_axes(
                (right / style.WIDTH, (total - _TITLE - bar_height) / total, 0.11 / style.WIDTH, bar_height / total)
            )
            _draw_bar(bar, colors, measure)
        style.add_footer(figure, text)
    return figure


def _panels(cells: pd.DataFrame, most: int) -> list[_Panel]:
    """One per start, or several where its χ are too many for one row of cells."""
    panels = []
    for start, own in cells.groupby("start", sort=False):
        chis, sites = sorted(own["chi"].unique()), sorted(own["n_sites"].unique())
        for part in np.array_split(chis, -(-len(chis) // most)):
            title = _TITLES[str(start)] + ("" if part[0] == chis[0] else ", continued")
            panels.append(_Panel(title, own[own["chi"].isin(part)], part.tolist(), sites))
    return panels


def _sentences(cells: pd.DataFrame, measure: Measure) -> list[str]:
    unit = measure.difference_unit
    enough = bool((cells["n_seeds"] >= MIN_SEEDS).any())
    said = [
        f"MPO minus dense in {measure.title.lower()} ({unit}) at the last step over the whole validation split, mean "
        "over the n seeds that a cell shares with dense"
        + ("; ±: 95 % t interval of the paired differences." if enough else f"; no intervals below n = {MIN_SEEDS}.")
    ]
    if enough and (cells["n_seeds"] < MIN_SEEDS).any():
        said.append(f"Grey, without colour: fewer than {MIN_SEEDS} seeds.")
    if cells.groupby("start")[["chi", "n_sites"]].nunique().prod(axis=1).sum() > len(cells):
        said.append("–: no trial.")
    settings = cells[cells["setting"] != ""].drop_duplicates("start")
    for row in settings.to_dict("records"):
        said.append(f"Of several settings of {_TITLES[row['start']]} the one that fills most cells: {row['setting']}.")
    return [*said, cells["left_out"].iloc[0]]


def _decimals(cells: pd.DataFrame) -> int:
    """Two digits of the narrowest interval but at most three; without intervals, of the smallest range of values."""
    typical = cells["half_width"].median()
    if not typical > 0:
        typical = np.ptp(cells["difference"]) / 10 or 0.1
    return int(np.clip(1 - np.floor(np.log10(typical)), 0, 3))


def _cell_text(row: dict, decimals: int) -> str:
    difference = f"{row['difference']:+.{decimals}f}".replace("-", "−")
    if float(f"{row['difference']:.{decimals}f}") == 0:
        difference = difference[1:]
    interval = "" if np.isnan(row["half_width"]) else f"± {row['half_width']:.{decimals}f}\n"
    return f"{difference}\n{interval}n = {row['n_seeds']}"


@dataclass(frozen=True)
class _Colors:
    scale: LinearSegmentedColormap
    norm: Normalize

    def of(self, difference: float) -> tuple[float, float, float, float]:
        return self.scale(float(self.norm(difference)))


def _color_scale(cells: pd.DataFrame, measure: Measure) -> _Colors:
    low, high = (_BETTER, _WORSE) if measure.direction == "minimize" else (_WORSE, _BETTER)
    scale = LinearSegmentedColormap.from_list(
        "difference", [style.tint(low, _LIGHTEST), "#ffffff", style.tint(high, _LIGHTEST)], N=255
    )
    enough = cells.loc[cells["n_seeds"] >= MIN_SEEDS, "difference"].abs().max()
    limit = enough if enough > 0 else cells["difference"].abs().max() or 1.0
    return _Colors(scale, Normalize(-limit, limit))


def _draw_panel(axes: Axes, panel: _Panel, colors: _Colors, decimals: int) -> None:
    axes.set_xlim(-0.5, len(panel.chis) - 0.5)
    axes.set_ylim(-0.5, len(panel.sites) - 0.5)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(range(len(panel.chis)), [str(chi) for chi in panel.chis])
    axes.set_yticks(range(len(panel.sites)), [str(site) for site in panel.sites])
    axes.set_xlabel("Bond-dimension cap χ")
    axes.set_ylabel("Sites L")
    axes.set_title(panel.title, loc="left")
    filled = {(row["chi"], row["n_sites"]): row for row in panel.cells.to_dict("records")}
    for x, chi in enumerate(panel.chis):
        for y, site in enumerate(panel.sites):
            row = filled.get((chi, site))
            if row is None:
                axes.text(x, y, "–", ha="center", va="center", color=_FEW)
                continue
            few = row["n_seeds"] < MIN_SEEDS
            axes.add_patch(
                Rectangle(
                    (x - 0.48, y - 0.48), 0.96, 0.96, facecolor="white" if few else colors.of(row["difference"]),
                    edgecolor=_FEW if few else style.BAND, linewidth=0.6, linestyle="--" if few else "-",
                )
            )  # fmt: skip
            axes.text(
                x, y, _cell_text(row, decimals), ha="center", va="center", fontsize=7, linespacing=1.15,
                color=_FEW if few else "black",
            )  # fmt: skip


def _draw_bar(axes: Axes, colors: _Colors, measure: Measure) -> None:
    edges = np.linspace(colors.norm.vmin or 0, colors.norm.vmax or 0, 65)
    middles = (edges[:-1] + edges[1:]) / 2
    axes.pcolormesh([0, 1], edges, middles[:, None], cmap=colors.scale, norm=colors.norm, rasterized=False)
    axes.grid(False)
    axes.set_xticks([])
    axes.yaxis.tick_right()
    ticks = np.array([edges[0], 0, edges[-1]])
    axes.set_yticks(ticks, [f"{tick:+.2g}".replace("-", "−") if tick else "dense" for tick in ticks])
    for spine in axes.spines.values():
        spine.set_visible(False)
    up_is_worse = measure.direction == "minimize"
    axes.set_title("worse" if up_is_worse else "better", fontsize=7, color="#333333", pad=3)
    axes.set_xlabel("better" if up_is_worse else "worse", fontsize=7, color="#333333", labelpad=3)
