"""The command `mpo-study`: plan, run, status, ui, sync, sample."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import Annotated

import optuna
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from study.config import StudyConfig
from study.directory import DEFAULT_TRACKING_URI, StudyDirectory
from study.errors import StudyError
from study.ledger import Trial, read_ledger
from study.plan import plan as make_plan
from study.run import TRACKING_OFF, Outcome, run_study, study_corpus
from study.run import sync as sync_study
from study.sample import sample as draw_sample
from study.search_space import listed_specs
from study.study_file import load_config
from study.tally import n_runs_left, search_ended
from study.tracking.connection import runs_page
from study.trial import TrialSpec
from study.urls import hide_password, is_database

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


@app.command()
def plan(file: StudyFile, overrides: Overrides = []) -> None:  # noqa: B006 (typer reads the default, nobody writes it)
    """Show every trial with its parameters, FLOPs and time on this machine; train nothing."""
    config = load_config(file, overrides)
    planned = make_plan(config, study_corpus(config))
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
        slots = max(1, int((os.cpu_count() or 1) / config.execution.cpus))
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
    executor: Annotated[Executor, typer.Option(help="Ray Tune, or this process.")] = Executor.ray,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster; $RAY_ADDRESS unless given, else a Ray of its own.")
    ] = None,
    tracking: Annotated[
        str | None,
        typer.Option(metavar="URI|off", help="MLflow; unless given, the last run's URI, at first a database in DIR."),
    ] = None,
    ledger: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A PostgreSQL database for the ledger; unless given, the last run's, at first DIR/ledger.db.",
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Train again what failed, except for seeds that diverged.")
    ] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run a study; run it again to resume it. A complete study is left as it is."""
    config = load_config(file, overrides)
    folder = StudyDirectory(directory if directory is not None else Path("results") / config.name, ledger)
    try:
        outcome = run_study(
            config,
            folder,
            console,
            storage_url=storage,
            executor=executor.value,
            address=address,
            tracking=tracking,
            retry_failed=retry_failed,
        )
    except KeyboardInterrupt:
        console.print(f"stopped; what is done is kept. To go on: the same command again ({_show(folder)})")
        raise typer.Exit(130) from None
    _print_outcome(outcome, config, folder)
    nothing_succeeded = outcome.n_failed > 0 and outcome.n_complete == 0
    trouble = outcome.aborted or outcome.tracking_trouble or outcome.backup_trouble
    if trouble is not None or outcome.n_missing or nothing_succeeded:
        raise typer.Exit(1)


@app.command()
def status(directory: Folder) -> None:
    """Show what a study has done and what is left."""
    folder = StudyDirectory(directory)
    config = folder.load_config()
    snapshot = read_ledger(folder.ledger_url, config.name)
    n_seeds = len(config.seed_list)
    table = _table(
        f"{config.name}: {n_seeds} seeds for each trial",
        left=("trial", "arm", "what"),
        right=("parameters", "complete", "failed", "val loss"),
    )
    for trial in snapshot.trials:
        results = [result for result in snapshot.results if result.trial == trial.number]
        losses = [result.final["final/val_loss"] for result in results if result.state == "complete"]
        note = _note(trial)
        table.add_row(
            str(trial.number),
            trial.spec.arm,
            _what(trial.spec) + note,
            f"{trial.shape.n_params:,}",
            str(len(losses)),
            str(len(results) - len(losses)),
            f"{fmean(losses):.4f}" if losses else "–",
        )
    console.print(table)
    results = {(result.trial, result.seed) for result in snapshot.results}
    left = n_runs_left(config, len(listed_specs(config)), snapshot.trials, results)
    ended = search_ended(config, snapshot.trials)
    if ended is not None:
        console.print(ended, markup=False, highlight=False)
    console.print(f"{len(snapshot.results)} runs over, {left} left" if left else "complete")


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
    """Write to MLflow whatever of the ledger it lacks: after a run without it, or to repair or move an experiment.

    The figures of DIR/report, where `mpo-analysis report` has written it, go to the experiment's summary run.
    """
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
    pruned = f", {outcome.n_pruned} pruned" if outcome.n_pruned else ""
    stopped = f", {outcome.n_stopped} stopped early" if outcome.n_stopped else ""
    console.print(
        f"{config.name}: {outcome.n_trials} trials{pruned}{stopped}, {outcome.n_complete} runs complete{failed}"
    )
    if outcome.search_ended is not None:
        console.print(outcome.search_ended, markup=False, highlight=False)
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
    if outcome.backup_trouble is not None:
        console.print(
            f"the last backup of the study's databases failed: {outcome.backup_trouble}; once that is mended: the same "
            "command again",
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


def _note(trial: Trial) -> str:
    """What became of a trial that has not all its seeds trained."""
    if trial.duplicate_of is not None:
        return f" (repeats trial {trial.duplicate_of})"
    if trial.pruned is not None:
        return f" (pruned: {trial.pruned.reason})"
    return f" (stopped: {trial.stop.reason})" if trial.stop is not None else ""


def _show(folder: StudyDirectory) -> str:
    return str(folder.path)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
