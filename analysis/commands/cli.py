"""mpo-analysis: from the runs of a study to its report."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from analysis.commands.streams import lasting_streams
from analysis.errors import AnalysisError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.runs.study_runs import StudyRuns

_PRINTED = ["compared", "against", "difference", "verdict"]
"""Columns of a comparison that a terminal has room for; the others, and accuracy, are on the report's page."""

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

Study = Annotated[Path | None, typer.Argument(metavar="DIR", help="Study directory, as written by `mpo-study run`.")]
Studies = Annotated[
    list[Path] | None, typer.Argument(metavar="DIR...", help="Study directories, as written by `mpo-study run`.")
]
TrackingURI = Annotated[str | None, typer.Option(help="MLflow tracking URI, instead of DIR.", metavar="URI")]
Experiment = Annotated[str | None, typer.Option(help="MLflow experiment, instead of DIR.", metavar="NAME")]
CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="FOLDER",
        help="Cache of the runs of finished studies. Default: DIR/cache. You may remove it.",
    ),
]


@contextmanager
def _one_line_for_errors() -> Iterator[None]:
    """A user's error gives one line and exit code 2. MLflow's settings are made before its first import."""
    # A server that cannot be reached is reported within seconds, not minutes.
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("DO_NOT_TRACK", "true"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
    ):
        os.environ.setdefault(name, value)
    try:
        yield
    except AnalysisError as error:
        typer.echo(f"mpo-analysis: {error}", err=True)
        raise typer.Exit(2) from None


@app.callback()
def _commands() -> None:
    """Analyse the runs that `mpo-study` wrote to MLflow."""


@app.command()
@_one_line_for_errors()
def report(
    studies: Studies = None,
    tracking_uri: TrackingURI = None,
    experiment: Experiment = None,
    cache: CacheFolder = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the report. Default: DIR/report.", metavar="OUT")
    ] = None,
    is_published: Annotated[
        bool,
        typer.Option("--publish", help="Also copy figures and tables to the experiment's summary run in MLflow."),
    ] = False,
    is_light: Annotated[
        bool,
        typer.Option("--light", help="For a repository: figures only as SVG, no interactive page, no MLflow address."),
    ] = False,
) -> None:
    """Write a report: a page, figures with their data, tables.

    Name the study by its directory, or by --tracking-uri and --experiment (then --out is needed). Several directories
    give one report on all of them, if their runs may be compared (then --out is needed too). A new report replaces the
    files of the last one and leaves other files alone.
    """
    from analysis.report.answers import answers
    from analysis.report.publish import publish
    from analysis.report.report import INDEX, write_report

    if is_published and len(studies or []) > 1:
        raise AnalysisError("a report on several studies cannot be published; publish a report on each study")
    runs, out = _read(studies or [], tracking_uri, experiment, cache, out, "report")
    findings = write_report(runs, out, light=is_light)
    console = Console(markup=False, emoji=False)  # names are free text
    for answer in answers(findings)[1:]:  # the user knows what was run
        shown, title = answer.rows, answer.question
        if "verdict" in shown:
            # Many like comparisons are counted, and a count has no difference.
            columns = [column for column in _PRINTED if column in shown]
            shown, title = shown.loc[shown["measure"].str.startswith("loss"), columns], f"{title} (validation loss)"
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        for column in shown.columns:
            table.add_column(column, no_wrap=column in (*_PRINTED[2:], "parameters"))
        for row in shown.itertuples(index=False):
            table.add_row(*row)
        console.print(table)
    console.print(
        f"{len(runs.trials)} trials, {len(runs.seeds)} complete seeds, {len(runs.failures)} failed, "
        f"{len(runs.unfinished)} unfinished"
    )
    console.print(f"wrote {out / INDEX}, with figures/ and tables/ beside it", soft_wrap=True, highlight=False)
    if is_published:
        n = publish(runs, out)
        console.print(f"published: {n} files on the experiment's summary run in MLflow", soft_wrap=True)


@app.command()
@_one_line_for_errors()
def figure(
    name: Annotated[Literal["frontier", "curves"], typer.Argument(metavar="NAME", help="frontier or curves.")],
    studies: Studies = None,
    tracking_uri: TrackingURI = None,
    experiment: Experiment = None,
    cache: CacheFolder = None,
    measure: Annotated[
        str, typer.Option(help="What the frontier shows: loss, accuracy, or a metric such as bits_per_byte.")
    ] = "loss",
    size: Annotated[
        str, typer.Option(help="What it is drawn against: parameters, bytes, flops, decode_ms or prefill_ms.")
    ] = "parameters",
    arms: Annotated[
        list[str] | None, typer.Option("--arm", metavar="ARM", help="Show this arm only; may be repeated.")
    ] = None,
    width: Annotated[str, typer.Option(help="Width, such as 3.3in, 84mm or 8.4cm.")] = "6.75in",
    look: Annotated[
        Literal["screen", "paper"],
        typer.Option("--style", help="paper: letters with serifs, as in most papers."),
    ] = "screen",
    form: Annotated[
        Literal["pdf", "svg", "png"] | None, typer.Option("--format", help="Default: that of FILE's ending, or pdf.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Default: NAME.FORMAT in the current folder.")
    ] = None,
) -> None:
    """Draw one figure for a paper. Its caption is written beside it, as .txt."""
    from analysis.figures import style
    from analysis.report.notebook import Study

    if name == "curves" and (measure, size) != ("loss", "parameters"):
        raise AnalysisError("curves are those of the validation loss: --measure and --size belong to the frontier")
    runs, _ = _read(studies or [], tracking_uri, experiment, cache, out or Path(), "figure")
    study, options = Study(runs), {"width": _inches(width), "look": look}
    if name == "frontier":
        drawn = study.plot_frontier(measure, size, arms, **options)
    else:
        drawn = study.plot_curves(arms, **options)
    file = (out / name if out is not None and out.is_dir() else out) or Path(name)
    ending = file.suffix.removeprefix(".").lower()
    if form is not None and ending in style.FORMATS and ending != form:
        raise AnalysisError(f"--out {file} and --format {form} contradict each other")
    form = form or (ending if ending in style.FORMATS else "pdf")
    stem = file.with_suffix("") if ending == form else file
    file = stem.with_name(f"{stem.name}.{form}")
    try:
        style.save(drawn, stem, (form,))
    except OSError as error:
        raise AnalysisError(f"cannot write {file}: {error.strerror or error}") from None
    Console(markup=False).print(f"wrote {file}, and its caption {stem.with_name(f'{stem.name}.txt')}", soft_wrap=True)


_UNITS = {"in": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72.27}
"""Inches of a unit; a point is TeX's."""


def _inches(width: str) -> float:
    number, unit = width[:-2], width[-2:]
    try:
        return float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise AnalysisError(f"--width must be a number and in, cm, mm or pt, such as 3.3in, but is {width!r}") from None


@app.command()
@_one_line_for_errors()
def paper(
    study: Study = None,
    tracking_uri: TrackingURI = None,
    experiment: Experiment = None,
    cache: CacheFolder = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the tables. Default: DIR/paper.", metavar="OUT")
    ] = None,
) -> None:
    """Set the paper's Tables 2 to 4 and Figures 2 to 4 beside its own definitions and this study's runs.

    Only runs of the paper's own model under its own protocol are used. The output names missing runs.
    """
    from analysis.paper.trials import missing, remarks
    from analysis.paper.write import write_comparison

    runs, out = _read([study] if study else [], tracking_uri, experiment, cache, out, "paper")
    written = write_comparison(runs, out)
    console = Console(markup=False, emoji=False)  # names are free text
    for place, shown in written.comparison.shown.groupby("place", sort=False):
        console.print(_beside_each_other(str(place), shown, written.comparison.data.loc[shown.index]))
    lacking = missing(written.trials)
    for line in (
        "follows: whether the published number can follow from its own definition",
        *remarks(written.trials),
        *([f"left open: {lacking}"] if lacking else []),
        f"wrote {out / 'comparison.csv'}, with the reasons; beside it as .md and .tex",
        "and published, published_rel_error and published_curves, each as .svg, .pdf, .png, .csv and .txt",
    ):
        console.print(line, soft_wrap=True, highlight=False)


def _beside_each_other(title: str, shown: pd.DataFrame, data: pd.DataFrame) -> Table:
    """A part of the comparison for the terminal: the numbers of a model or layer below its name."""
    short = {"cannot be told": "open", "nothing published": "–"}
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("")
    for column in ("published", "here", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("follows")
    name = None
    for text, row in zip(shown.to_dict("records"), data.to_dict("records"), strict=True):
        if row["row"] != name:
            name = row["row"]
            table.add_row(name)
        quantity = f"{row['quantity']} ({row['unit']})" if row["unit"] else row["quantity"]
        follows = short.get(row["follows"], row["follows"])
        table.add_row(Padding(quantity, (0, 0, 0, 1)), text["published"], text["here"], text["difference"], follows)
    return table


def _read(
    studies: list[Path],
    tracking_uri: str | None,
    experiment: str | None,
    cache: Path | None,
    out: Path | None,
    folder: str,
) -> tuple[StudyRuns, Path]:
    """The runs, and the folder to write to. Default: a folder inside the study's."""
    from analysis.runs.load import load_study, resolve_study
    from analysis.runs.studies import join_studies
    from analysis.runs.study_runs import StudyAddress

    if studies and (tracking_uri or experiment):
        raise AnalysisError("give either DIR, or --tracking-uri and --experiment, not both")
    if not studies and not (tracking_uri and experiment):
        raise AnalysisError("give a study directory, or both --tracking-uri and --experiment")
    if out is None and len(studies) != 1:
        raise AnalysisError(f"give the folder for the {folder} with --out")
    if cache is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AnalysisError(f"--cache {cache}: {error.strerror or error}") from error
    if not studies:
        assert out is not None
        address = StudyAddress(str(tracking_uri), str(experiment))
        place = hashlib.sha256(f"{tracking_uri} {experiment}".encode()).hexdigest()[:16]
        return load_study(address, cache=cache / place if cache else None), out
    found = []
    for path, address in [(path, resolve_study(path)) for path in studies]:
        found.append(load_study(address, cache=cache / str(address.uuid) if cache else path / "cache"))
    return join_studies(found), out or studies[0] / folder


def main() -> None:
    """Entry point of `mpo-analysis`."""
    with lasting_streams("mpo-analysis"):
        app(prog_name="mpo-analysis")
