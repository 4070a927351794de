"""mpo-analysis: from the runs of a study to its report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from analysis.errors import AnalysisError

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """Analyse the runs that `mpo-study` wrote to MLflow."""


@app.command()
def report(
    study: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Study directory, as written by `mpo-study run`.")
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow tracking URI, instead of DIR.", metavar="URI")
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="MLflow experiment, instead of DIR.", metavar="NAME")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the report; by default DIR/report.", metavar="OUT")
    ] = None,
) -> None:
    """Write a report: a page, figures with the data they show, tables.

    Name the study by its directory, or by --tracking-uri and --experiment (then --out is needed). A report written
    again replaces the files of the last one and leaves others alone.
    """
    # MLflow reads these when it is first imported; a server that is away is said to be so within seconds, not minutes.
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("DO_NOT_TRACK", "true"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
    ):
        os.environ.setdefault(name, value)
    try:
        _report(study, tracking_uri, experiment, out)
    except AnalysisError as error:
        typer.echo(f"mpo-analysis: {error}", err=True)
        raise typer.Exit(2) from None


def _report(study: Path | None, tracking_uri: str | None, experiment: str | None, out: Path | None) -> None:
    from analysis.load import load_study, resolve_study
    from analysis.report import INDEX, write_report
    from analysis.runs import StudyAddress
    from analysis.summary import MIN_SEEDS
    from analysis.tables import frontier_table

    if study is not None and (tracking_uri or experiment):
        raise AnalysisError("give either DIR, or --tracking-uri and --experiment, not both")
    if study is not None:
        address = resolve_study(study)
        out = out or study / "report"
    elif tracking_uri and experiment:
        address = StudyAddress(tracking_uri, experiment)
    else:
        raise AnalysisError("give a study directory, or both --tracking-uri and --experiment")
    if out is None:
        raise AnalysisError("give the folder for the report with --out")

    runs = load_study(address)
    summary = write_report(runs, out)
    console = Console()
    rows = frontier_table(summary).shown
    if len(rows):
        table = Table(title="On a frontier", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        shown = ("configuration", "family", "parameters", "val loss (nats)", "val accuracy (%)")
        for column in shown[:2]:
            table.add_column(column)
        for column in shown[2:]:
            table.add_column(column.replace(" (", "\n("), justify="right", no_wrap=True)
        for row in rows[list(shown)].itertuples(index=False):
            table.add_row(*row)
        console.print(table)
    else:
        console.print(f"no trial has {MIN_SEEDS} complete seeds, so there is no frontier")
    console.print(
        f"{len(runs.trials)} trials, {len(runs.seeds)} complete seeds, {len(runs.failures)} failed, "
        f"{len(runs.unfinished)} unfinished"
    )
    console.print(f"wrote {out / INDEX}, with figures/ and tables/ beside it", soft_wrap=True, highlight=False)


def main() -> None:
    """Entry point of `mpo-analysis`."""
    app(prog_name="mpo-analysis")
