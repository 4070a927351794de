"""One folder that says what a study found: index.html, figures with the data they show, tables."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from analysis import run_schema as schema
from analysis import style, tables
from analysis.errors import AnalysisError
from analysis.figures import data
from analysis.figures.curves import learning_curves_figure
from analysis.figures.frontier import frontier_figure
from analysis.figures.rel_errors import rel_error_figure
from analysis.load import load_curves
from analysis.runs import StudyRuns
from analysis.summary import MEASURES, MIN_SEEDS, VAL_LOSS, n_statement, summarise

INDEX = "index.html"
WRITTEN = "report.json"
"""List of the files in a report's folder that a report wrote, and that the next one may replace or remove."""


@dataclass(frozen=True)
class Drawing:
    """A figure, what it says to those who cannot see it, and the frames it shows by the names of their CSVs."""

    name: str
    figure: Figure
    title: str
    alt: str
    shows: dict[str, pd.DataFrame]


def write_report(runs: StudyRuns, out: Path) -> pd.DataFrame:
    """Write the report of a study to the folder `out`, and return the summary it shows.

    Everything is made in a folder beside `out` first, and then moved in file by file, index.html last. Files of an
    earlier report that this one has no more are removed; files of others are not touched.

    Raises:
        AnalysisError: no seed is complete, `out` cannot be written, or a file there was not written by a report.
    """
    if runs.seeds.empty:
        raise AnalysisError(
            f"study {runs.name!r} has no complete seed yet: {len(runs.unfinished)} unfinished, {len(runs.failures)} "
            "failed; nothing to report on"
        )
    before = _written_before(out)
    if (out / INDEX).exists() and INDEX not in before:
        raise _foreign(out / INDEX)
    summary = summarise(runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=out) as new:
            _write_all(runs, summary, Path(new))
            _move_in(Path(new), out, before)
    except OSError as error:
        raise AnalysisError(f"cannot write the report to {out}: {error.strerror or error}") from error
    return summary


def _write_all(runs: StudyRuns, summary: pd.DataFrame, folder: Path) -> None:
    (folder / "figures").mkdir()
    (folder / "tables").mkdir()
    drawings = _drawings(runs, summary)
    for drawing in drawings:
        style.save(drawing.figure, folder / "figures" / drawing.name)
        for name, frame in drawing.shows.items():
            frame.to_csv(folder / "figures" / f"{name}.csv", index=False, lineterminator="\n")
    written = {
        table.name: table
        for table in (
            tables.trials_table(summary),
            tables.frontier_table(summary),
            tables.budgets_table(summary),
            tables.failures_table(runs),
            tables.unfinished_table(runs),
            tables.stopped_table(runs),
            tables.pruned_table(runs),
        )
    }
    for table in written.values():
        if table.name not in ("stopped", "pruned") or len(table.data):  # in most studies nothing can be
            tables.write(table, folder / "tables")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html").render(
        runs=runs,
        summary=summary,
        drawings=drawings,
        tables=written,
        min_seeds=MIN_SEEDS,
        few=summary[(summary["n_seeds"] < MIN_SEEDS) & summary["stopped"].isna()],
        n_stated=n_statement(summary.loc[summary["n_seeds"] > 0, "n_seeds"]),
        corpora=sorted(summary["corpus_sha256"].unique()),
        measured=[schema.FIELDS["final", measure.key].label for measure in MEASURES],
        sampled=schema.FIELDS["final", "final/val_loss_sampled"].label,
        curve=schema.FIELDS["curve", VAL_LOSS.name].label,
    )
    (folder / INDEX).write_text(page, encoding="utf-8")


def _drawings(runs: StudyRuns, summary: pd.DataFrame) -> list[Drawing]:
    note = f"Runs of {len(runs.budgets)} budgets are shown together." if len(runs.budgets) > 1 else ""
    drawings = []
    for measure in MEASURES:
        points, seeds = data.frontier_points(summary, measure), data.seed_points(summary, runs.seeds, measure)
        name = f"frontier_{measure.name}"
        on_frontier = points[points["on_frontier"]]
        on = ", ".join(on_frontier["label"] + " (" + on_frontier["group"] + ")")
        drawings.append(
            Drawing(
                name,
                frontier_figure(points, seeds, measure, note),
                f"{measure.title} against parameters",
                f"{measure.title} of {len(points)} configurations against their trainable parameters on a logarithmic "
                f"axis, with 95 % t intervals. On the frontier: {on or 'none'}.",
                {name: points, f"{name}_seeds": seeds},
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
    drawings.append(
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
            drawings.append(
                Drawing(
                    "rel_error",
                    rel_error_figure(errors),
                    "Reconstruction error of the dense weights",
                    f"Relative error of TT-SVD at {errors['chi'].nunique()} caps χ, for {errors['kind'].nunique()} "
                    "kinds of layers, before and after training, on logarithmic axes.",
                    {"rel_error": errors},
                )
            )
    return drawings


def _foreign(path: Path) -> AnalysisError:
    return AnalysisError(f"{path} exists and was not written by a report; choose another folder")


def _move_in(new: Path, out: Path, before: list[str]) -> None:
    made = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
    for name in made:
        if (out / name).exists() and name not in before:
            raise _foreign(out / name)
    # Until all is in place the list names both reports' files, so that a broken-off one can be replaced too.
    _list_written(new, out, sorted({*made, *before}))
    for name in [*(name for name in made if name != INDEX), INDEX]:
        (out / name).parent.mkdir(exist_ok=True)
        os.replace(new / name, out / name)
    for name in before:
        if name not in made:
            (out / name).unlink(missing_ok=True)
    _list_written(new, out, made)


def _list_written(new: Path, out: Path, names: list[str]) -> None:
    (new / WRITTEN).write_text(json.dumps({"written": names}, indent=1) + "\n", encoding="utf-8")
    os.replace(new / WRITTEN, out / WRITTEN)


def _written_before(out: Path) -> list[str]:
    listed = out / WRITTEN
    if not listed.exists():
        return []
    try:
        names = json.loads(listed.read_text(encoding="utf-8"))["written"]
        inside = all(
            Path(name).parts[0] in ("figures", "tables", INDEX) and ".." not in Path(name).parts for name in names
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise AnalysisError(f"{listed} is not the list of a report's files; choose another folder") from error
    if not inside:
        raise AnalysisError(f"{listed} names files outside a report; choose another folder")
    return names
