"""What the tests of a whole study share: small studies, and what their ledger and their MLflow hold."""

from __future__ import annotations

import io
import lzma
import os
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from analysis import run_schema as schema
from study.commands.opening import open_ledger, study_corpus
from study.commands.run import Outcome, run_study
from study.ledger.checksums import SUM, checksum
from study.ledger.database import open_database
from study.ledger.directory import StudyDirectory
from study.ledger.growth import Growth
from study.ledger.ledger import Ledger
from study.ledger.snapshot import read_ledger
from study.spec.study_file import load_config
from study.spec.trial import SeedResult, now
from study.training.checkpoints import pack_tensors, unpack_tensors
from study.training.train import Training

DENSE = {"name": "dense", "family": "dense"}
MPO = {"name": "mpo", "family": "mpo", "chi": [2, 4]}
TUNED = {"name": "tuned", "family": "mpo", "chi": 2, "start": "dense", "steps": 4}
SEARCHED = {
    "name": "found",
    "family": "mpo",
    "chi": {"low": 1, "high": 40},
    "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
}

LLAMA = {
    "architecture": "huggingface",
    "config": "llama",
    "context": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""The model of a study file: a tiny LLaMA from scratch."""
OF_SOME = {
    *("kept", "predicted_loss", "held_out_loss", "n_params_end"),
    *("decode_ms", "prefill_ms", "dense_decode_ms", "dense_prefill_ms"),
    *("final/ema_val_loss", "final/ema_val_acc"),
}
USUAL_FINALS = {field.key for field in schema.FINALS} - OF_SOME
"""The metrics of every complete seed; the others are of trials with `keep`, of timed ones, or of averaged weights."""

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONUNBUFFERED": "1"}


def write_study(folder: Path, name: str = "tiny", **changes) -> Path:
    """A study file, and its text beside it; keywords replace its keys, those of a mapping one by one."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ("tensor", "train", "bond", "site", "core", "chi", "network", "operator")
    chosen = np.random.default_rng(0).integers(len(words), size=400)
    (folder / "text.txt").write_text(" ".join(words[index] for index in chosen), encoding="utf-8")
    study = {
        "name": name,
        "corpus": {"path": "text.txt"},
        "model": {"d_model": 8, "n_heads": 2, "n_layers": 1, "context": 8},
        "protocol": {
            "steps": 6,
            "warmup_steps": 2,
            "batch_size": 2,
            "learning_rate": 0.01,
            "eval_every": 2,
            "sampled_eval_batches": 2,
            "sampled_eval_batch_size": 2,
        },
        "seeds": 2,
        "arms": [DENSE, MPO, TUNED],
    }
    for key, value in changes.items():
        study[key] = study[key] | value if isinstance(value, dict) and key in study else value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def write_search(folder: Path, sampler: str = "random", trials: int = 5, **changes) -> Path:
    """A study file with one listed dense trial, and a search over χ and the learning rate."""
    search = {"sampler": sampler, "trials": trials} | ({"population_size": 4} if sampler.startswith("nsga") else {})
    changes = {"arms": [DENSE, SEARCHED]} | changes | {"search": search | changes.get("search", {})}
    return write_study(folder, name=f"search-{sampler}", **changes)


def ledger_at(file: Path, directory: Path, *overrides: str, extend: bool = False) -> Ledger:
    """The study's ledger, as `run` opens it."""
    config = load_config(file, overrides)
    directory.mkdir(parents=True, exist_ok=True)
    return open_ledger(config, study_corpus(config), StudyDirectory(directory), Growth(extend=extend))


def run_at(file: Path, directory: Path, *overrides: str, tracking: str | None = "off", **options) -> Outcome:
    """Run a study in this process, one unit after another; what it prints goes nowhere."""
    console = Console(file=io.StringIO(), width=80)
    config = load_config(file, overrides)
    return run_study(config, StudyDirectory(directory), console, executor="inline", tracking=tracking, **options)


def printed_by_run(file: Path, directory: Path, **options) -> tuple[Outcome, str]:
    """As `run_at`, with what was printed."""
    console = Console(file=io.StringIO(), width=200)
    outcome = run_study(load_config(file), StudyDirectory(directory), console, executor="inline", **options)
    return outcome, console.file.getvalue()


def made_up(trial: int, seed: int, loss: float = 1.0, failure: str | None = None) -> SeedResult:
    """A result that nobody trained, for what only looks at results."""
    if failure is not None:
        return SeedResult(trial, seed, "failed", started=now(), ended=now(), failure=failure)
    final = {field.key: 1.0 for field in schema.FINALS} | {"final/val_loss": loss, "final/val_acc": 1 / (1 + loss)}
    ran_on = dict.fromkeys(schema.RAN_ON, "nothing")
    return SeedResult(trial, seed, "complete", started=now(), ended=now(), final=final, ran_on=ran_on)


def sign_results(directory: Path) -> None:
    """Give the results in a ledger, which a test has changed, the checksums of their present content."""
    with closing(sqlite3.connect(directory / "ledger.db")) as connection, connection:
        connection.row_factory = sqlite3.Row
        for row in connection.execute("SELECT * FROM mpo_result").fetchall():
            key = (checksum("mpo_result", dict(row)), row["trial"], row["seed"])
            connection.execute(f"UPDATE mpo_result SET {SUM} = ? WHERE trial = ? AND seed = ?", key)


def results_at(directory: Path, name: str = "tiny") -> dict[tuple[int, int], SeedResult]:
    """Results on record, by trial and seed."""
    return {(r.trial, r.seed): r for r in read_ledger(StudyDirectory(directory).ledger_url, name).results}


def substance(directory: Path, name: str = "tiny") -> dict[tuple[str, int], dict]:
    """What a study's results say, by what was trained and the seed: all of it but times and names of files."""
    snapshot = read_ledger(StudyDirectory(directory).ledger_url, name)
    specs = {trial.number: trial.spec.model_dump_json() for trial in snapshot.trials}
    found = {}
    for result in snapshot.results:
        final = {key: value for key, value in result.final.items() if key != "train_seconds"}
        found[specs[result.trial], result.seed] = {
            "state": result.state,
            "final": final,
            "curve": result.curve,
            "rel_errors": result.rel_errors,
            "failure": result.failure,
        }
    return found


def optuna_states(ledger_url: str) -> list[tuple[str, list[float] | None]]:
    """State and values of every trial in Optuna's own tables, in the order of their numbers."""
    import sqlalchemy as sa

    engine = open_database(ledger_url)
    with engine.connect() as connection:
        trials = connection.execute(sa.text("SELECT trial_id, state FROM trials ORDER BY number")).all()
        values = connection.execute(sa.text("SELECT trial_id, value FROM trial_values ORDER BY objective")).all()
    engine.dispose()
    return [(state, [value for of, value in values if of == trial] or None) for trial, state in trials]


def changed_export(exported: Path, to: Path, change: Callable[[sqlite3.Connection], object]) -> Path:
    """An exported file with its database changed."""
    database = to.with_suffix(".db")
    database.write_bytes(lzma.decompress(exported.read_bytes()))
    with closing(sqlite3.connect(database)) as connection, connection:
        change(connection)
    to.write_bytes(lzma.compress(database.read_bytes(), preset=0))
    database.unlink()
    return to


# The command line -----------------------------------------------------------------------------------------------------


def start_cli(*arguments: str | Path, cwd: Path, **options) -> subprocess.Popen:
    """`mpo-study` in a process group of its own; `nothing_left_running` ends what a test leaves behind."""
    command = [sys.executable, "-m", "study", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | ENVIRONMENT,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
    started.append(process)
    return process


started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_left_running():
    """What a failed test has started ends with it."""
    yield
    while started:
        with started.pop() as process:
            if process.poll() is None:
                process.kill()


def cli(*arguments: str | Path, cwd: Path, timeout: float = 300) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `mpo-study`."""
    process = start_cli(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


# MLflow ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory) -> Path:
    """An empty MLflow database: to make one takes seconds, to copy it none."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's dependencies' own
        mlflow_client(path).search_experiments()
    return path


@pytest.fixture
def database(mlflow_template, tmp_path) -> Path:
    """An MLflow database of a test's own."""
    return Path(shutil.copy(mlflow_template, tmp_path / "mlflow.db"))


def mlflow_client(path: Path):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{path}")


def runs_in(path: Path, name: str = "tiny") -> dict[str, list]:
    """MLflow's active runs of an experiment, by key: more than one under a key is a fault."""
    client = mlflow_client(path)
    experiment = client.get_experiment_by_name(name)
    found: dict[str, list] = {}
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        found.setdefault(run.data.tags[schema.KEY], []).append(run)
    return found


def contents(path: Path, name: str = "tiny") -> dict[str, list]:
    """All that MLflow holds of each run of an experiment."""
    client = mlflow_client(path)
    return {
        key: [
            (
                run.info.run_id,
                run.info.run_name,
                run.info.status,
                run.info.start_time,
                run.info.end_time,
                run.data.params,
                run.data.tags,
                {
                    metric: [
                        (point.step, point.value, point.timestamp)
                        for point in client.get_metric_history(run.info.run_id, metric)
                    ]
                    for metric in run.data.metrics
                },
            )
            for run in runs
        ]
        for key, runs in runs_in(path, name).items()
    }


def undisturbed_and_resumed(spec, seed: int, corpus, n_steps: int, **options) -> tuple[Training, Training]:
    """Two trainings to the last step: one at once, and one from a written checkpoint after n_steps."""
    undisturbed, interrupted, resumed = (Training(spec, seed, corpus, **options) for _ in range(3))
    undisturbed.run()
    for _ in range(n_steps):
        if interrupted.evaluation_is_due:
            interrupted.curve.append(interrupted._evaluation())
        interrupted.optimiser_step()
    resumed.restore(*unpack_tensors(pack_tensors(*interrupted.state())))
    resumed.run()
    return undisturbed, resumed
