"""The comparison with the paper as a folder of tables and figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import style
from analysis.paper.comparison import CURVES, comparison_table, paper_comparison
from analysis.paper.published_curves_figure import published_curves, published_curves_figure
from analysis.paper.published_figure import published_figure, published_points
from analysis.paper.published_rel_errors_figure import published_rel_error_figure, published_rel_errors
from analysis.paper.trials import PaperTrials, paper_trials, remarks
from analysis.report import tables
from analysis.report.folder import OutputFolder
from analysis.runs.curves import load_curves
from analysis.runs.study_runs import StudyRuns

FIGURES = ("published", "published_rel_error", "published_curves")
FOLDER = OutputFolder(
    "comparison",
    main="comparison.md",
    listed="paper.json",
    names=(
        *(f"{table}.{form}" for table in ("comparison", "models") for form in ("csv", "md", "tex")),
        *(f"{figure}.{form}" for figure in FIGURES for form in ("csv", "txt", *style.FORMATS)),
    ),
)


@dataclass(frozen=True)
class Written:
    """Result of writing: the comparison, the trials on which it was measured, and the names of the files."""

    comparison: tables.Table
    trials: PaperTrials
    names: list[str]


def write_comparison(runs: StudyRuns, out: Path, *, light: bool = False) -> Written:
    """Write the comparison, the trials taken and three figures to the folder `out`.

    Files of an earlier comparison are replaced; files of others are not touched.

    Args:
        light: figures as SVG only.

    Raises:
        AnalysisError: a curve cannot be read, `out` cannot be written, or a file there was not written by a comparison.
    """
    FOLDER.check(out)
    trials = paper_trials(runs)
    curves = load_curves(runs, trials.from_scratch, CURVES)
    comparison = comparison_table(paper_comparison(runs, trials, curves))
    models = tables.Table("models", trials.frame, trials.frame.astype("object").fillna("–").astype("str"))
    drawings = _drawings(runs, trials, curves, comparison.data)

    def make(folder: Path) -> None:
        for table in (comparison, models):
            tables.write(table, folder)
        for name, (figure, frame) in drawings.items():
            frame.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
            style.save(figure, folder / name, style.LIGHT_FORMATS if light else style.FORMATS)

    return Written(comparison, trials, FOLDER.write(out, make))


def _drawings(
    runs: StudyRuns, trials: PaperTrials, curves: pd.DataFrame, comparison: pd.DataFrame
) -> dict[str, tuple[Figure, pd.DataFrame]]:
    note = "models.csv says which trials these are, and what they lack." if remarks(trials) else ""
    points, errors, ends = (
        published_points(comparison),
        published_rel_errors(runs, trials),
        published_curves(curves, trials),
    )
    return {
        "published": (published_figure(points, note), points),
        "published_rel_error": (published_rel_error_figure(errors, note), errors),
        "published_curves": (published_curves_figure(ends, note), ends),
    }
