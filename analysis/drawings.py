"""The figures of a report, each with the frames it shows and its words for those who cannot see it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import data
from analysis.figures.curves import learning_curves_figure
from analysis.figures.frontier import frontier_figure
from analysis.figures.rel_errors import rel_error_figure
from analysis.findings import Findings
from analysis.load import load_curves
from analysis.summary import MEASURES


@dataclass(frozen=True)
class Drawing:
    """A figure, what it says to those who cannot see it, and the frames it shows by the names of their CSVs."""

    name: str
    figure: Figure
    title: str
    alt: str
    shows: dict[str, pd.DataFrame]


def drawings(findings: Findings) -> list[Drawing]:
    """The figures that this study has something to show in, in the order of the report."""
    runs, summary = findings.runs, findings.summary
    note = f"Runs of {len(runs.budgets)} budgets are shown together." if len(runs.budgets) > 1 else ""
    made = []
    for measure in MEASURES:
        uncertainty = findings.uncertainties[measure.name]
        points = data.frontier_points(summary, measure, uncertainty.support)
        seeds = data.seed_points(summary, runs.seeds, measure)
        name = f"frontier_{measure.name}"
        on_frontier = points[points["on_frontier"]]
        on = ", ".join(on_frontier["label"] + " (" + on_frontier["group"] + ")")
        made.append(
            Drawing(
                name,
                frontier_figure(points, seeds, uncertainty, measure, note),
                f"{measure.title} against parameters",
                f"{measure.title} of {len(points)} configurations against their trainable parameters on a logarithmic "
                f"axis, with 95 % t intervals and a 95 % band of the frontier. On the frontier: {on or 'none'}.",
                {name: points, f"{name}_seeds": seeds, f"{name}_band": uncertainty.band},
            )
        )
    shown = data.curve_trials(summary)
    curves = load_curves(runs, shown["trial"].tolist())
    means = data.curve_means(shown, curves)
    complete = int(((summary["n_seeds"] > 0) & summary["stopped"].isna()).sum())
    thinned = (
        f"{len(shown)} of {complete} configurations: those on the frontier of their own panel."
        if len(shown) < complete else ""
    )  # fmt: skip
    made.append(
        Drawing(
            "learning_curves",
            learning_curves_figure(means, curves, f"{thinned} {note}".strip()),
            "Learning curves",
            f"Validation loss of {len(shown)} configurations against the training tokens of each run, one panel per "
            "family.",
            {"learning_curves": means, "learning_curves_seeds": curves},
        )
    )
    for trial in summary.loc[summary["is_reference"], "trial"]:
        errors = data.rel_error_means(runs.rel_errors, trial)
        if len(errors):
            made.append(
                Drawing(
                    "rel_error",
                    rel_error_figure(errors),
                    "Reconstruction error of the dense weights",
                    f"Relative error of TT-SVD at {errors['chi'].nunique()} caps χ, for {errors['kind'].nunique()} "
                    "kinds of layers, before and after training, on logarithmic axes.",
                    {"rel_error": errors},
                )
            )
    return made
