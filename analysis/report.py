"""One folder that says what a study found: index.html, figures with the data they show, tables."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import jinja2
from markupsafe import Markup

from analysis import interactive, style, tables
from analysis import run_schema as schema
from analysis.drawings import drawings
from analysis.errors import AnalysisError
from analysis.figures import data
from analysis.findings import Findings
from analysis.runs import StudyRuns
from analysis.summary import MEASURES, MIN_SEEDS, VAL_LOSS, n_statement

INDEX, EXPLORE = "index.html", "explore.html"
PARTS = ("figures", "tables", "scripts")
WRITTEN = "report.json"
"""List of the files in a report's folder that a report wrote, and that the next one may replace or remove."""


def write_report(runs: StudyRuns, out: Path) -> Findings:
    """Write the report of a study to the folder `out`, and return what it shows.

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
    findings = Findings.of(runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=out) as new:
            _write_all(findings, Path(new))
            _move_in(Path(new), out, before)
    except OSError as error:
        raise AnalysisError(f"cannot write the report to {out}: {error.strerror or error}") from error
    return findings


def _write_all(findings: Findings, folder: Path) -> None:
    runs, summary = findings.runs, findings.summary
    for part in PARTS:
        (folder / part).mkdir()
    made = drawings(findings)
    for drawing in made:
        style.save(drawing.figure, folder / "figures" / drawing.name)
        for name, frame in drawing.shows.items():
            frame.to_csv(folder / "figures" / f"{name}.csv", index=False, lineterminator="\n")
    written = {
        table.name: table
        for table in (
            tables.trials_table(summary),
            tables.frontier_table(summary, findings.uncertainties),
            tables.comparisons_table(findings.compared),
            tables.size_needed_table(findings.uncertainties),
            tables.hypervolume_table(findings.uncertainties),
            tables.budgets_table(summary),
            tables.arms_table(summary),
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
    _write_explore(findings, environment, folder)
    page = environment.get_template("report.html").render(
        runs=runs,
        summary=summary,
        answers=findings.answers,
        declared=bool(findings.compared["declared"].any()),
        drawings=made,
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


def _write_explore(findings: Findings, environment: jinja2.Environment, folder: Path) -> None:
    runs, summary = findings.runs, findings.summary
    charts = []
    for measure in MEASURES:
        points = data.frontier_points(summary, measure, findings.uncertainties[measure.name].support)
        charts.append(
            {
                "title": f"{measure.title} against parameters",
                "text": "Filled: on the frontier of the means. Bars: 95 % t intervals. Point at a configuration to see "
                "what it is; a click opens its run in MLflow, where that is running.",
                "html": Markup(interactive.frontier_chart(runs, points, measure)),
            }
        )
    charts.append(
        {
            "title": "All configurations",
            "text": "A line is a configuration; drag along an axis to pick some out, drag its name to move it.",
            "html": Markup(interactive.parallel_chart(runs, summary)),
        }
    )
    page = environment.get_template("explore.html").render(runs=runs, charts=charts, script=interactive.SCRIPT)
    (folder / EXPLORE).write_text(page, encoding="utf-8")
    (folder / interactive.SCRIPT).write_text(interactive.plotly_script(), encoding="utf-8")


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
        inside = all(Path(name).parts[0] in (*PARTS, INDEX, EXPLORE) and ".." not in Path(name).parts for name in names)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise AnalysisError(f"{listed} is not the list of a report's files; choose another folder") from error
    if not inside:
        raise AnalysisError(f"{listed} names files outside a report; choose another folder")
    return names
