"""The command `mpo-study`: plan, run, refine, winners, status, export, import, ui, sync, sample."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import optuna
import typer
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from analysis.commands.streams import lasting_streams
from analysis.runs.urls import hide_password
from study.commands.options import (
    AddressOption,
    AsJSON,
    Executor,
    ExecutorOption,
    Export,
    Folder,
    LedgerOption,
    Overrides,
    StorageOption,
    StudyFile,
    TrackingOption,
    Where,
)
from study.commands.progress import say
from study.commands.show import say_not_compared, show_outcome, show_plan, show_status
from study.commands.status import as_json as status_as_json
from study.commands.status import study_status
from study.commands.winners import parse_seeds, write_winners
from study.errors import StudyError
from study.ledger.directory import DEFAULT_TRACKING_URI, StudyDirectory
from study.ledger.growth import Growth, parse_more
from study.ledger.urls import is_database
from study.spec.config import StudyConfig
from study.spec.search_space import listed_specs
from study.spec.study_file import load_config
from study.tracking.background import is_left_writing
from study.tracking.connection import move_artifacts, runs_page, shown
from study.tracking.server import serve

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run studies of compressed transformers over many trials and seeds.",
)
console = Console(
    width=None if sys.stdout is not None and sys.stdout.isatty() else 140, markup=False, emoji=False
)  # wide lines suit a log file


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"mpo-study {version('mpo-study')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def plan(
    file: StudyFile,
    as_json: AsJSON = False,
    overrides: Overrides = [],  # noqa: B006 (typer only reads the default)
) -> None:
    """Show every trial with its parameters, FLOPs and time on this machine, without training."""
    from study.commands.memory import unit_memory
    from study.commands.opening import study_corpus
    from study.commands.plan import (
        as_json as plan_as_json,
    )  # imported late, here and below: PyTorch takes seconds to import
    from study.commands.plan import plan as make_plan

    config = load_config(file, overrides)
    corpus = study_corpus(config)
    memory = unit_memory(config, corpus.vocab_size)
    warning = None if memory is None else memory.warning(is_cluster=False)
    if warning is not None and not as_json:  # before models are timed, which needs that memory too
        say(console, warning)
    planned = make_plan(config, corpus)
    slots = max(1, int((os.cpu_count() or 1) / config.execution.cpus))
    if as_json:
        sys.stdout.write(plan_as_json(config, planned, slots, memory) + "\n")
        return
    show_plan(console, config, planned, slots, memory)


@app.command()
def run(
    file: StudyFile,
    directory: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="The study's folder. Default: results/NAME.")
    ] = None,
    storage: StorageOption = None,
    executor: ExecutorOption = Executor.ray,
    address: AddressOption = None,
    tracking: TrackingOption = None,
    ledger: LedgerOption = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Train failed runs again, except those that diverged.")
    ] = False,
    trials: Annotated[str | None, typer.Option(metavar="+N", help="Add N searched trials to the study, once.")] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="+N", help="Add N seeds to every trial, once."),
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Add the trials and seeds that are in the file but not yet in the study.")
    ] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run a study. The same command resumes it; a complete study does not change."""
    config = load_config(file, overrides)
    folder = StudyDirectory(directory if directory is not None else Path("results") / config.name, ledger)
    growth = Growth(parse_more("--trials", trials), parse_more("--seeds", seeds), extend=extend)
    if extend and growth.command:
        raise StudyError(
            f"--extend and {growth.command}: not allowed in one command; give one, then the other in a second run"
        )
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
    seeds: Annotated[
        str | None, typer.Option(metavar="+N", help="With `--on frontier`: add N seeds to each selected trial.")
    ] = None,
    on: Annotated[
        Where,
        typer.Option(
            help="`frontier` selects trials that are on or near the frontier of n_params and val_loss. `contrasts` "
            "selects the trials of declared contrasts that are undecided, and adds seeds up to the next look."
        ),
    ] = Where.frontier,
    storage: StorageOption = None,
    executor: ExecutorOption = Executor.ray,
    address: AddressOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Add seeds to trials near the frontier, or to those of undecided contrasts, and run them."""
    folder = StudyDirectory(directory)
    if on == Where.contrasts and seeds is not None:
        raise StudyError("--seeds: not with --on contrasts, whose numbers of seeds are in the study file, claims.looks")
    if on == Where.frontier and seeds is None:
        raise StudyError("--seeds: needed with --on frontier, for example --seeds +5")
    _run(
        folder.load_config(),
        folder,
        storage_url=storage,
        executor=executor.value,
        address=address,
        tracking=tracking,
        growth=Growth(refine=parse_more("--seeds", seeds), contrasts=on == Where.contrasts),
    )


@app.command()
def winners(
    directory: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The study file to write.")],
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N|LIST",
            help="The new study's seeds: 0 to N - 1, or a list such as 100,101,102. "
            "Default: as many as the old study has, at least 5; the smallest numbers that it did not use.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new study. Default: the name of FILE.")] = None,
) -> None:
    """Write a study file that measures the winners of a finished study again, on fresh seeds."""
    new = write_winners(StudyDirectory(directory), file, parse_seeds(seeds), name, partial(say, console))
    say_not_compared(partial(say, console), new)
    n_runs = len(listed_specs(new)) * len(new.seed_list)
    say(console, f"{file}: {len(new.arms)} arms, {n_runs} runs. To see the cost: mpo-study plan {file}")


def _run(config: StudyConfig, folder: StudyDirectory, **options: Any) -> None:
    from study.commands.run import run_study

    try:
        outcome = run_study(config, folder, console, **options)
    except KeyboardInterrupt:  # or SIGTERM
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C could only cut off the next line
        say(console, f"stopped; finished runs are kept. To continue, give the same command again ({folder.path})")
        _end(130)
    show_outcome(console, outcome, config, folder)
    nothing_succeeded = outcome.n_failed > 0 and outcome.n_complete == 0
    trouble = outcome.aborted or outcome.tracking_trouble or outcome.backup_trouble
    _end(int(trouble is not None or outcome.n_missing > 0 or nothing_succeeded))


def _end(code: int) -> NoReturn:
    """Exit with this code, even if a writer hangs in a call of MLflow, for which the interpreter might wait."""
    if is_left_writing():
        sys.stdout.flush()
        os._exit(code)
    raise typer.Exit(code)


@app.command()
def status(directory: Folder, as_json: AsJSON = False) -> None:
    """Show the trials of a study, its failures, its frontier so far, and the number of missing runs."""
    folder = StudyDirectory(directory)
    now = study_status(folder)
    if as_json:
        sys.stdout.write(status_as_json(now) + "\n")
        return
    show_status(console, now, folder)


@app.command(name="export")
def export_(directory: Folder, file: Export) -> None:
    """Write the ledger of a study to one compressed file."""
    from study.commands.exchange import export_study

    folder = StudyDirectory(directory)
    n_runs = export_study(folder, file, partial(say, console))
    say(console, f"{file}: {n_runs} runs. To create a study from it: mpo-study import {file} DIR")


@app.command(name="import")
def import_(file: Export, directory: Folder, storage: StorageOption = None) -> None:
    """Create a study's folder from a file that `export` wrote. It has no checkpoints and no weights."""
    from study.commands.exchange import import_study

    folder = StudyDirectory(directory)
    name = import_study(file, folder, storage)
    shown = folder.path
    say(
        console,
        f"{shown}: study {name}. To write its runs to MLflow: mpo-study sync {shown}; "
        f"to see its status: mpo-study status {shown}",
    )


@app.command()
def ui(
    directory: Folder,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 5000,
) -> None:
    """Open the study's MLflow UI on 127.0.0.1."""
    folder = StudyDirectory(directory)
    config = folder.load_config()
    recorded = folder.tracking_uri()
    if recorded is None:
        raise StudyError(f"{folder.path}: no runs in MLflow yet; to write them: mpo-study sync {folder.path}")
    uri = folder.resolve_tracking_uri(recorded)
    if not is_database(uri):
        console.print(f"this study's runs are at {hide_password(uri)}; open that address in a browser", markup=False)
        return
    page = runs_page(uri, config.name)
    try:
        move_artifacts(uri, config.name, folder.artifacts, is_own=recorded == DEFAULT_TRACKING_URI)
    except SQLAlchemyError as error:
        say(
            console,
            f"artifacts will not open, because their addresses cannot be updated: {shown(error, uri)}",
        )

    def on_ready() -> None:
        console.print(f"MLflow: http://127.0.0.1:{port}{page}", highlight=False, soft_wrap=True)
        console.print("(Ctrl-C ends it)")
        sys.stdout.flush()

    serve(uri, folder.artifacts, port, on_ready)


@app.command()
def sync(
    directory: Folder,
    tracking: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow tracking URI. Default: as in the last run.")
    ] = None,
    storage: StorageOption = None,
) -> None:
    """Write to MLflow everything that is missing there or differs from the ledger."""
    from study.commands.run import TRACKING_OFF
    from study.commands.sync import sync as sync_study

    folder = StudyDirectory(directory)
    config = folder.load_config()
    if tracking == TRACKING_OFF:
        raise StudyError("--tracking off: sync writes to MLflow, so it needs a tracking URI")
    n_trials = sync_study(config, folder, storage, tracking, partial(say, console))
    console.print(f"MLflow has all {n_trials} trials of {config.name}. To view them: mpo-study ui {folder.path}")


@app.command()
def sample(
    directory: Folder,
    trial: Annotated[
        int | None, typer.Option(help="Number of the trial. Default: the trial with the lowest loss.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run. Default: the seed with the lowest loss.")] = None,
    prompt: Annotated[str, typer.Option(help="Text that the model continues.")] = "\n",
    tokens: Annotated[int, typer.Option(help="Number of tokens to draw.", min=1)] = 400,
    temperature: Annotated[float, typer.Option(help="Temperature. 0: always take the most likely token.", min=0)] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the K most likely tokens only. Default: all.", min=1)
    ] = None,
    draw: Annotated[int, typer.Option(help="Random seed.", min=0)] = 0,
) -> None:
    """Draw text from a trained model whose weights were kept."""
    from study.commands.sample import sample as draw_sample

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
    """Entry point: an error that the user can correct prints one line for each defect and exits with code 2."""
    with lasting_streams("mpo-study"):
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        try:
            app()
        except StudyError as error:
            for line in str(error).splitlines():
                say(Console(stderr=True), f"mpo-study: {line}", is_trouble=True)
            sys.exit(2)
