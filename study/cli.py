"""The command `mpo-study`: plan, run, refine, status, export, import, ui, sync, sample."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import optuna
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from study.config import StudyConfig
from study.directory import DEFAULT_TRACKING_URI, StudyDirectory
from study.errors import StudyError
from study.growth import Growth, parse_more
from study.plan import as_json as plan_as_json
from study.plan import plan as make_plan
from study.run import TRACKING_OFF, Outcome, run_study, study_corpus
from study.run import sync as sync_study
from study.sample import sample as draw_sample
from study.status import StudyStatus, study_status
from study.status import as_json as status_as_json
from study.study_file import load_config
from study.tracking.connection import hide_password, is_database, runs_page
from study.trial import TrialSpec

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run studies of compressed transformers: many trials, many seeds, nothing lost.",
)
console = Console()

StudyFile = Annotated[Path, typer.Argument(metavar="FILE", help="The study file (YAML).")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The study's folder, which `run` made.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the study file, e.g. protocol.steps=100."),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|URL", help="For checkpoints and weights; unless given, the last run's, at first DIR/storage."
    ),
]


class Executor(StrEnum):
    ray = "ray"
    inline = "inline"


class Where(StrEnum):
    frontier = "frontier"


ExecutorOption = Annotated[Executor, typer.Option(help="Ray Tune, or this process.")]
AddressOption = Annotated[
    str | None, typer.Option(help="A Ray cluster; $RAY_ADDRESS unless given, else a Ray of its own.")
]
TrackingOption = Annotated[
    str | None,
    typer.Option(metavar="URI|off", help="MLflow; unless given, the last run's URI, at first a database in DIR."),
]
AsJSON = Annotated[bool, typer.Option("--json", help="For machines: JSON on standard output.")]
ParquetFile = Annotated[Path, typer.Argument(metavar="FILE", help="The Parquet file.")]


@app.command()
def plan(
    file: StudyFile,
    as_json: AsJSON = False,
    overrides: Overrides = [],  # noqa: B006 (typer reads the default, nobody writes it)
) -> None:
    """Show every trial with its parameters, FLOPs and time on this machine; train nothing."""
    config = load_config(file, overrides)
    planned = make_plan(config, study_corpus(config))
    slots = max(1, int((os.cpu_count() or 1) / config.execution.cpus))
    if as_json:
        sys.stdout.write(plan_as_json(config, planned, slots) + "\n")
        return
    table = _table(
        f"{config.name}: {planned.n_seeds} seeds for each trial; FLOPs and time are one seed's",
        left=("arm", "what"),
        right=("rate", "steps", "parameters", "of dense", "TFLOP", "time"),
    )
    for trial in planned.trials:
        spec, shape = trial.spec, trial.shape
        table.add_row(
            spec.arm,
            _what(spec),
            f"{spec.protocol.learning_rate:g}",
            f"{spec.protocol.steps:,}",
            f"{shape.n_params:,}",
            f"{shape.n_params / shape.n_params_dense:.1%}",
            f"{shape.flops / 1e12:.3g}",
            _duration(trial.seconds),
        )
    console.print(table)
    if planned.n_searched:
        console.print(f"and {planned.n_searched} trials that sampler {config.sampler.name} will choose")
    if planned.trials:
        console.print(
            f"{len(planned.trials) * planned.n_seeds} runs listed: {planned.unit_seconds / 3600:.3g} hours one after "
            f"another, about {_duration(planned.unit_seconds / slots)} on this machine, {slots} at a time "
            f"(at {min(planned.rates) / 1e9:.0f} to {max(planned.rates) / 1e9:.0f} GFLOP/s each, measured on the CPU "
            "just now)."
        )


@app.command()
def run(
    file: StudyFile,
    directory: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="The study's folder; results/NAME unless given.")
    ] = None,
    storage: StorageOption = None,
    executor: ExecutorOption = Executor.ray,
    address: AddressOption = None,
    tracking: TrackingOption = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Train again what failed, except for seeds that diverged.")
    ] = False,
    trials: Annotated[
        str | None, typer.Option(metavar="+N", help="Let the study grow by so many searched trials, once.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="+N", help="Let every trial of the study have so many more seeds, once.")
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Let the study grow by the trials and seeds that its file now has more.")
    ] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run a study; run it again to resume it. A complete study is left as it is."""
    config = load_config(file, overrides)
    folder = StudyDirectory(directory if directory is not None else Path("results") / config.name)
    growth = Growth(parse_more("--trials", trials), parse_more("--seeds", seeds), extend=extend)
    _run(
        config,
        folder,
        storage_url=storage,
        executor=executor.value,
        address=address,
        tracking=tracking,
        retry_failed=retry_failed,
        growth=growth,
    )


@app.command()
def refine(
    directory: Folder,
    seeds: Annotated[str, typer.Option(metavar="+N", help="How many seeds more each of these trials gets.")],
    on: Annotated[
        Where, typer.Option(help="Trials whose place on the frontier of n_params and val_loss is undecided.")
    ] = Where.frontier,
    storage: StorageOption = None,
    executor: ExecutorOption = Executor.ray,
    address: AddressOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Add seeds to a finished study where they count, and run them: where the frontier is undecided."""
    folder = StudyDirectory(directory)
    _run(
        folder.load_config(),
        folder,
        storage_url=storage,
        executor=executor.value,
        address=address,
        tracking=tracking,
        growth=Growth(refine=parse_more("--seeds", seeds)),
    )


def _run(config: StudyConfig, folder: StudyDirectory, **options: Any) -> None:
    try:
        outcome = run_study(config, folder, console, **options)
    except KeyboardInterrupt:
        console.print(f"stopped; what is done is kept. To go on: the same command again ({_show(folder)})")
        raise typer.Exit(130) from None
    _print_outcome(outcome, config, folder)
    nothing_succeeded = outcome.n_failed > 0 and outcome.n_complete == 0
    if outcome.aborted is not None or outcome.tracking_trouble is not None or outcome.n_missing or nothing_succeeded:
        raise typer.Exit(1)


@app.command()
def status(directory: Folder, as_json: AsJSON = False) -> None:
    """Show what a study has done, what failed and why, its frontier so far, and what is left."""
    folder = StudyDirectory(directory)
    now = study_status(folder)
    if as_json:
        sys.stdout.write(status_as_json(now) + "\n")
        return
    table = _table(
        f"{now.name}: {len(now.seeds)} seeds for each trial",
        left=("trial", "arm", "what"),
        right=("parameters", "complete", "failed", "left", "val loss"),
    )
    for row in now.trials:
        trial = row.trial
        repeats = f" (repeats trial {trial.duplicate_of})" if trial.duplicate_of is not None else ""
        table.add_row(
            str(trial.number),
            trial.spec.arm,
            _what(trial.spec) + repeats,
            f"{trial.shape.n_params:,}",
            str(len(row.complete)),
            str(len(row.failed)),
            str(len(row.missing)),
            (f"{row.val_loss:.4f}" if row.val_loss is not None else "–") + (" *" if row.on_frontier else "  "),
        )
    console.print(table)
    if now.frontier:
        console.print("* on the frontier so far: no trial has a lower mean loss with no more parameters")
    if now.n_unasked:
        console.print(f"and {now.n_unasked} trials that are still to come")
    for result in now.failures:
        step = f" (step {result.failure_step})" if result.failure_step is not None else ""
        console.print(f"failed: trial {result.trial} seed {result.seed}{step}: {result.failure}", markup=False)
    again = f"mpo-study run {folder.study_file} --dir {_show(folder)}"
    if any(result.failure_step is None for result in now.failures):
        console.print(f"to try again what did not diverge: {again} --retry-failed", markup=False, soft_wrap=True)
    where = _show(folder)
    then = f"report: mpo-analysis report {where}"
    if folder.tracking_uri() is None:
        then = f"to write its runs to MLflow: mpo-study sync {where}"
    console.print(_what_is_left(now, again, then), markup=False, highlight=False, soft_wrap=True)


def _what_is_left(now: StudyStatus, again: str, then: str) -> str:
    if not now.n_missing:
        return f"complete; {then}"
    over = f"{now.n_complete + now.n_failed} runs over, {now.n_missing} left"
    work = f", {_duration(now.run_seconds_left)} one after another" if now.run_seconds_left is not None else ""
    if now.driver is None:
        return f"{over}{work}; nobody is at them. To go on: {again}"
    who = f"process {now.driver.get('pid', 'unknown')} on {now.driver.get('host', 'some host')}"
    left = f"about {_duration(now.seconds_left)} left" if now.seconds_left is not None else "time left not known yet"
    return f"{over}{work}; {who} is at them: {left}"


@app.command(name="export")
def export_(directory: Folder, file: ParquetFile) -> None:
    """Write the whole ledger of a study to one Parquet file, from which `import` makes the study again."""
    from study.exchange import export_study  # Parquet's reader and writer take a while to come up

    folder = StudyDirectory(directory)
    n_runs = export_study(folder, file, lambda line: console.print(line, markup=False, soft_wrap=True))
    console.print(f"{file}: {n_runs} runs. To make a study of it: mpo-study import {file} DIR", markup=False)


@app.command(name="import")
def import_(file: ParquetFile, directory: Folder, storage: StorageOption = None) -> None:
    """Make a study's folder of what `export` wrote; its checkpoints and weights are not in it."""
    from study.exchange import import_study

    folder = StudyDirectory(directory)
    name = import_study(file, folder, storage)
    shown = _show(folder)
    console.print(
        f"{shown}: study {name}. To write its runs to MLflow: mpo-study sync {shown}; "
        f"to see what is left of it: mpo-study status {shown}",
        markup=False,
        soft_wrap=True,
    )


@app.command()
def ui(
    directory: Folder,
    port: Annotated[int, typer.Option(help="On 127.0.0.1.", min=1, max=65535)] = 5000,
) -> None:
    """Open the study's MLflow UI on 127.0.0.1."""
    folder = StudyDirectory(directory)
    config = folder.load_config()
    recorded = folder.tracking_uri()
    if recorded is None:
        raise StudyError(f"{_show(folder)}: no runs in MLflow yet; write them: mpo-study sync {_show(folder)}")
    uri = folder.resolve_tracking_uri(recorded)
    if not is_database(uri):
        console.print(f"this study's runs are at {hide_password(uri)}: open that in a browser", markup=False)
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise StudyError(f"--port {port}: cannot listen there: {error.strerror}; give another port") from None
    page = runs_page(uri, config.name)
    console.print(f"MLflow: http://127.0.0.1:{port}{page}", highlight=False, soft_wrap=True)
    console.print("(Ctrl-C ends it)")
    sys.stdout.flush()
    settings = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_BACKEND_STORE_URI": uri,  # not as an argument: it may hold a password, and every user sees those
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--default-artifact-root", folder.artifacts]
    os.execve(sys.executable, command, os.environ | settings)  # what ends this process then ends the server


@app.command()
def sync(
    directory: Folder,
    tracking: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow; what the last run used unless given.")
    ] = None,
    storage: StorageOption = None,
) -> None:
    """Write to MLflow whatever of the ledger it lacks: after a run without it, or to repair or move an experiment."""
    folder = StudyDirectory(directory)
    config = folder.load_config()
    if tracking == TRACKING_OFF:
        raise StudyError("--tracking off: sync writes to MLflow, it needs a tracking URI")
    n_trials = sync_study(config, folder, storage, tracking, lambda line: console.print(line, markup=False))
    console.print(f"MLflow has all {n_trials} trials of {config.name}. To browse them: mpo-study ui {_show(folder)}")


@app.command()
def sample(
    directory: Folder,
    trial: Annotated[int | None, typer.Option(help="Of the run; the one with the lowest loss unless given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the run.")] = None,
    prompt: Annotated[str, typer.Option(help="What the model continues.")] = "\n",
    tokens: Annotated[int, typer.Option(help="Characters to draw.", min=1)] = 400,
    temperature: Annotated[float, typer.Option(help="0: always the most likely character.", min=0)] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the so many most likely ones alone.", min=1)] = None,
    draw: Annotated[int, typer.Option(help="Another number, another text.", min=0)] = 0,
) -> None:
    """Draw text from a trained model whose weights were kept."""
    run_, text = draw_sample(
        StudyDirectory(directory),
        prompt=prompt,
        n_new=tokens,
        trial=trial,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        draw=draw,
    )
    Console(stderr=True).print(f"trial {run_.trial} seed {run_.seed}: val loss {run_.final['final/val_loss']:.4f}")
    sys.stdout.write(text + "\n")


def main() -> None:
    """Entry point: a user's error is one line and exit code 2."""
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except StudyError as error:
        Console(stderr=True).print(f"mpo-study: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _print_outcome(outcome: Outcome, config: StudyConfig, folder: StudyDirectory) -> None:
    failed = f", {outcome.n_failed} failed" if outcome.n_failed else ""
    console.print(f"{config.name}: {outcome.n_trials} trials, {outcome.n_complete} runs complete{failed}")
    if outcome.aborted is not None:
        console.print(
            f"stopped early with {outcome.n_missing} runs missing: {outcome.aborted}; mend it, then "
            "give the same command again",
            style="red",
            markup=False,
            highlight=False,
        )
    if outcome.tracking_trouble is not None:
        console.print(
            f"MLflow lacks some runs: {outcome.tracking_trouble}; once that is mended: mpo-study sync {_show(folder)}",
            style="red",
            markup=False,
            highlight=False,
        )
    uri = folder.tracking_uri()
    if uri is None:
        console.print(f"tracking is off; to write the runs to MLflow: mpo-study sync {_show(folder)}")
    else:
        where = folder.mlflow_database if uri == DEFAULT_TRACKING_URI else hide_password(uri)
        console.print(f"MLflow:  {where}  (browse: mpo-study ui {_show(folder)})", highlight=False, markup=False)
        console.print(f"report:  mpo-analysis report {_show(folder)}", highlight=False)


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _what(spec: TrialSpec) -> str:
    if spec.family == "dense":
        return f"d_model={spec.model.d_model}"
    sites = f" L={spec.n_sites}" if spec.n_sites is not None else ""
    return f"χ={spec.chi} {spec.factorisation}{sites}, {f'from {spec.teacher}' if spec.teacher else spec.init}"


def _show(folder: StudyDirectory) -> str:
    return str(folder.path)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
