"""The figures of a report, each with its frames and its text for readers who cannot see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import data
from analysis.figures.bonds import bond_rows, bonds_figure
from analysis.figures.curves import learning_curves_figure
from analysis.figures.families import families_figure, family_points
from analysis.figures.forest import forest_figure, forest_pairs
from analysis.figures.frontier import frontier_figure
from analysis.figures.importance import importance_figure
from analysis.figures.rank_intervals import rank_figure, rank_rows
from analysis.figures.rel_errors import rel_error_figure
from analysis.figures.retained import retained_figure
from analysis.results.findings import Findings
from analysis.results.importance import factor_importance
from analysis.results.pairs import DECLARED, EQUAL_PARAMETERS, REFERENCE
from analysis.results.retained import retained_points
from analysis.results.summary import MEASURES, VAL_LOSS, Measure
from analysis.run_schema import bond_key, parse_bond_key
from analysis.runs.curves import load_curves


@dataclass(frozen=True)
class Drawing:
    """A figure, its text for readers who cannot see it, and its frames by the names of their CSVs."""

    name: str
    figure: Figure
    title: str
    alt: str
    shows: dict[str, pd.DataFrame]


def drawings(findings: Findings) -> list[Drawing]:
    """The figures for which this study has data, in the order of the report."""
    n = len(findings.runs.budgets)
    note = f"Runs of {n} budgets are shown together." if n > 1 else ""
    return [
        *(_frontier(findings, measure, note) for measure in MEASURES),
        *_forests(findings),
        *_families(findings),
        *_retained(findings),
        *_learning_curves(findings, note),
        *_rel_errors(findings),
        *_bonds(findings),
        *_importance(findings),
        *_ranks(findings),
    ]


def _frontier(findings: Findings, measure: Measure, note: str) -> Drawing:
    summary, uncertainty = findings.summary, findings.uncertainties[measure.name]
    points = data.frontier_points(summary, measure, uncertainty.chances)
    seeds = data.seed_points(summary, findings.runs.seeds, measure)
    name = f"frontier_{measure.name}"
    on_frontier = points[points["on_frontier"]]
    on = ", ".join(on_frontier["label"] + " (" + on_frontier["group"] + ")")
    return Drawing(
        name,
        frontier_figure(points, seeds, uncertainty, measure, note),
        f"{measure.title} against parameters",
        f"{measure.title} of {len(points)} configurations against their trainable parameters on a logarithmic "
        f"axis, with 95 % t intervals and a 95 % band of the frontier. On the frontier: {on or 'none'}.",
        {name: points, f"{name}_seeds": seeds, f"{name}_band": uncertainty.band},
    )


def _forests(findings: Findings) -> Iterator[Drawing]:
    for relation, name, against in (
        (REFERENCE, "forest_dense", "dense"),
        (EQUAL_PARAMETERS, "forest_controls", "controls of equal parameters"),
        (DECLARED, "forest_declared", "the other rivals that the study file declares"),
    ):
        own = findings.compared[findings.compared["relation"] == relation]
        if len(own):
            pairs = forest_pairs(findings.compared, relation)
            n_pairs = len(own.drop_duplicates(["trial", "against"]))
            yield Drawing(
                name,
                forest_figure(pairs, n_pairs),
                f"Difference to {against}",
                f"{n_pairs} differences to {against}, in validation loss and accuracy, one row each, with 95 % "
                "intervals beside the line of no difference"
                + (" and that of the margin." if relation == REFERENCE else "."),
                {name: pairs},
            )


def _families(findings: Findings) -> Iterator[Drawing]:
    points = family_points(findings.compared, findings.summary)
    if len(points):
        yield Drawing(
            "families",
            families_figure(points),
            "Families at equal parameters",
            f"Means of validation loss and accuracy with 95 % t intervals of {points['group'].nunique()} families, "
            f"side by side at {points['size'].nunique()} sizes.",
            {"families": points},
        )


def _retained(findings: Findings) -> Iterator[Drawing]:
    summary, compared = findings.summary, findings.compared
    across = set(compared.loc[(compared["relation"] == REFERENCE) & ~compared["same_budget"].astype(bool), "trial"])
    points = retained_points(findings.runs, summary, across)
    if len(points):
        dense = summary.loc[summary["is_reference"], "n_params"].item()
        note = f"{len(across)} have another budget than dense, as the study file declares." if across else ""
        yield Drawing(
            "retained",
            retained_figure(points, int(dense), note),
            "Retained accuracy",
            f"Accuracy of {len(points)} configurations in per cent of the dense model's, against their parameters on a "
            "logarithmic axis, with 95 % Fieller intervals and a line at 100 %.",
            {"retained": points},
        )


def _learning_curves(findings: Findings, note: str) -> Iterator[Drawing]:
    summary = findings.summary
    shown = data.curve_trials(summary)
    if shown.empty:  # nothing was trained
        return
    curves = load_curves(findings.runs, shown["trial"].tolist())
    means = data.curve_means(shown, curves)
    yield Drawing(
        "learning_curves",
        learning_curves_figure(means, curves, f"{data.curves_left_out(summary)} {note}".strip()),
        "Learning curves",
        f"Validation loss of {len(shown)} configurations against the training tokens of each run, one panel per "
        "family.",
        {"learning_curves": means, "learning_curves_seeds": curves},
    )


def _rel_errors(findings: Findings) -> Iterator[Drawing]:
    for trial in findings.summary.loc[findings.summary["is_reference"], "trial"]:
        errors = data.rel_error_means(findings.runs.rel_errors, trial)
        if len(errors):
            yield Drawing(
                "rel_error",
                rel_error_figure(errors),
                "Reconstruction error of the dense weights",
                f"Relative error of TT-SVD at {errors['chi'].nunique()} caps χ, for {errors['kind'].nunique()} kinds "
                "of layers, before and after training, on logarithmic axes.",
                {"rel_error": errors},
            )


def _bonds(findings: Findings) -> Iterator[Drawing]:
    every, summary = findings.runs.bonds, findings.summary
    for trial in sorted(set(every["trial"].tolist())):
        own = every[every["trial"] == trial]
        keys = [bond_key(*place) for place in own[["layer", "number"]].drop_duplicates().itertuples(index=False)]
        curves = load_curves(findings.runs, [trial], keys)
        long = curves.melt(["trial", "seed", "step"], keys, "key", "bond").dropna()
        long[["layer", "number"]] = long["key"].map(parse_bond_key).tolist()
        rows = bond_rows(long)
        known = summary[summary["trial"] == trial]
        name = f"bonds_trial_{trial}"
        yield Drawing(
            name,
            bonds_figure(rows, int(known["steps"].item())),
            f"Bonds of {known['label'].item()} ({known['group'].item()}) during the training",
            f"{rows['order'].nunique()} bonds at {rows['step'].nunique()} steps, from {rows['bond'].min():.3g} to "
            f"{rows['bond'].max():.3g}.",
            {name: rows},
        )


def _importance(findings: Findings) -> Iterator[Drawing]:
    shares = factor_importance(findings.summary, findings.runs.seeds, VAL_LOSS, np.random.default_rng(0))
    if len(shares):
        yield Drawing(
            "importance",
            importance_figure(shares, VAL_LOSS),
            "Importance of each factor",
            f"Share of the variance of {VAL_LOSS.title.lower()} between MPO configurations by factor, from "
            f"{shares['factor'].iloc[0]} ({shares['share'].iloc[0]:.0f} %) down, with the range of redrawn means.",
            {"importance": shares},
        )


def _ranks(findings: Findings) -> Iterator[Drawing]:
    rows = rank_rows(findings.summary, findings.runs.seeds, VAL_LOSS, np.random.default_rng(0))
    if len(rows):
        yield Drawing(
            "ranks",
            rank_figure(rows, VAL_LOSS),
            "Ranks",
            f"Rank by {VAL_LOSS.title.lower()} of {len(rows)} configurations with 95 % intervals, the best on top: "
            f"{rows['label'].iloc[0]} ({rows['group'].iloc[0]}).",
            {"ranks": rows},
        )
