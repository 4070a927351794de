"""One folder with the results of a study: index.html, figures with their data, and tables."""

from __future__ import annotations

from pathlib import Path

import jinja2
from markupsafe import Markup

from analysis.errors import AnalysisError
from analysis.figures import data, style
from analysis.figures.drawings import drawings
from analysis.report import interactive, tables
from analysis.report.answers import answers
from analysis.report.folder import OutputFolder
from analysis.results.findings import Findings
from analysis.results.summary import MEASURES, MIN_SEEDS, NO_FRONTIER, n_statement
from analysis.runs.studies import environments
from analysis.runs.study_runs import StudyRuns

INDEX, EXPLORE = "index.html", "explore.html"
PARTS = ("figures", "tables", "scripts")
RARE = ("stopped", "skipped", "arms_compared", "average")
"""Tables that most studies have no rows for; such a table is not written."""
FOLDER = OutputFolder("report", INDEX, "report.json", (INDEX, EXPLORE), PARTS)


def write_report(runs: StudyRuns, out: Path, *, light: bool = False) -> Findings:
    """Write the report of a study to the folder `out`, and return the findings that it shows.

    Files that only an earlier report has are removed; files of others are not touched.

    Args:
        light: figures as SVG only, no interactive page with its script, and no trace of the MLflow that was read. Such
            a report is the same wherever the ledger's runs were written to.

    Raises:
        AnalysisError: no seed is complete, `out` cannot be written, or a file there was not written by a report.
    """
    if runs.seeds.empty:
        raise AnalysisError(
            f"study {runs.name!r} has no complete seed yet: {len(runs.unfinished)} unfinished, {len(runs.failures)} "
            "failed; nothing to report on"
        )
    FOLDER.check(out)  # before the statistics, which are slow
    findings = Findings.of(runs)
    FOLDER.write(out, lambda folder: _write_all(findings, folder, light))
    return findings


def _write_all(findings: Findings, folder: Path, light: bool) -> None:
    runs, summary = findings.runs, findings.summary
    formats = style.LIGHT_FORMATS if light else style.FORMATS
    for part in PARTS[:2] if light else PARTS:
        (folder / part).mkdir()
    made = drawings(findings)
    for drawing in made:
        style.save(drawing.figure, folder / "figures" / drawing.name, formats)
        for name, frame in drawing.shows.items():
            frame.to_csv(folder / "figures" / f"{name}.csv", index=False, lineterminator="\n")
    listed = summary.drop(columns="run_id") if light else summary  # in a repository, no MLflow knows these ids
    written = {
        table.name: table
        for table in (
            tables.trials_table(listed),
            tables.frontier_table(listed, findings.uncertainties),
            tables.comparisons_table(findings.compared),
            tables.arms_compared_table(findings.arms),
            tables.size_needed_table(findings.uncertainties),
            tables.hypervolume_table(findings.uncertainties),
            tables.budgets_table(summary),
            tables.arms_table(summary),
            tables.average_table(runs, summary),
            *tables.run_tables(runs),
        )
    }
    for table in written.values():
        if table.name not in RARE or len(table.data):
            tables.write(table, folder / "tables")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    if not light:
        _write_explore(findings, environment, folder)
    page = environment.get_template("report.html").render(
        runs=runs,
        summary=summary,
        source=None if light else runs.data_source,
        answers=answers(findings),
        declared=bool(findings.compared["declared"].any()),
        drawings=made,
        formats=formats,
        explore=None if light else EXPLORE,
        tables=written,
        min_seeds=MIN_SEEDS,
        no_frontier=NO_FRONTIER,
        few=summary[(summary["n_seeds"] < MIN_SEEDS) & summary["stopped"].isna()],
        n_stated=n_statement(summary.loc[summary["n_seeds"] > 0, "n_seeds"]),
        environments=environments(runs),
        models=sorted(summary["model"].unique()),
        tokenizers=sorted(summary["tokenizer"].unique()),
        corpora=sorted(summary["corpus_sha256"].unique()),
        measured=[measure.title.lower() for measure in MEASURES],
    )
    (folder / INDEX).write_text(page, encoding="utf-8")


def _write_explore(findings: Findings, environment: jinja2.Environment, folder: Path) -> None:
    runs, summary = findings.runs, findings.summary
    charts = []
    for measure in MEASURES:
        points = data.frontier_points(summary, measure, findings.uncertainties[measure.name].chances)
        charts.append(
            {
                "title": f"{measure.title} against parameters",
                "text": "Filled: on the frontier of the means. Bars: 95 % t intervals. Point at a configuration to see "
                "what it is; a click opens its run in MLflow, if MLflow is running.",
                "html": Markup(interactive.frontier_chart(runs, points, measure)),
            }
        )
    charts.append(
        {
            "title": "All configurations",
            "text": "Each line is a configuration. Drag along an axis to select some; drag its name to move it.",
            "html": Markup(interactive.parallel_chart(runs, summary)),
        }
    )
    page = environment.get_template("explore.html").render(runs=runs, charts=charts, script=interactive.SCRIPT)
    (folder / EXPLORE).write_text(page, encoding="utf-8")
    (folder / interactive.SCRIPT).write_text(interactive.plotly_script(), encoding="utf-8")
