"""Studies according to `analysis.run_schema` with plausible numbers, written to MLflow or kept in memory."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import run_schema as schema
from analysis.runs.study_runs import RunRecord, StudyAddress, StudyRuns, study_runs

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from mlflow.entities import Metric, Param
    from mlflow.store.tracking import sqlalchemy_store  # noqa: F401  # deprecated calls of its own at import
    from mlflow.tracking import MlflowClient

UUID = "6f1c2a52-6a77-4d0e-9a3f-6d1f6a0f4f0e"
LABELS = {"mpo": "MPO", "low_rank": "low rank", "monarch": "Monarch"}
N_PARAMS_DENSE = 808_448
N_PARAMS_MPO = {4: 42_336, 8: 79_168, 16: 177_408, 32: 472_192}
TOKENS_PER_STEP = 8192
RAN_ON = {
    schema.DEVICE: "cpu", schema.THREADS: "1", schema.TORCH: "2.13.0", schema.STACKED: "1", schema.PROGRAM: "1a2b",
}  # fmt: skip
_BLOCK = (
    *("attention.query", "attention.key", "attention.value", "attention.output"),
    *("feed_forward.up", "feed_forward.down"),
)
LAYERS = (*(f"blocks.{block}.{name}" for block in range(4) for name in _BLOCK), "lm_head")


@dataclass(frozen=True)
class Configuration:
    """One trial: what is written of it and the loss its seeds scatter around."""

    arm: str
    n_params: int
    val_loss: float
    family: str = "mpo"
    start: str = "scratch"
    chi: int | None = None
    d_model: int = 128
    steps: int = 2000
    learning_rate: float = 3e-4
    budget_hash: str = "b7d1f00d"
    n_params_dense: int = N_PARAMS_DENSE
    seeds: Sequence[int] = (0, 1, 2)
    failed: Sequence[int] = ()
    unfinished: Sequence[int] = ()
    duplicate_of: int | None = None
    skipped: str | None = None
    stopped: str | None = None
    validation_fraction: str = "0.1"
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> dict[str, Any]:
        """Params of the schema but trial and seed; None where one has no meaning."""
        sites = self.family != "dense"  # of a control those of the MPO it is as large as
        return {
            "arm": self.arm, "family": self.family, "start": self.start,
            "family_label": LABELS.get(self.family, self.family),
            "chi": self.chi,
            "n_sites": 3 if sites else None, "factorisation": "balanced" if sites else None,
            "init": "variance" if self.start == "scratch" else None, "tuning_trials": 1,
            "learning_rate": self.learning_rate, "steps": self.steps, "warmup_steps": 100, "batch_size": 32,
            "context": 256, "vocab_size": 65, "d_model": self.d_model, "n_heads": 4, "n_layers": 4,
            "d_ff": 4 * self.d_model, "weight_decay": 0.1, "precision": "float32", "budget_hash": self.budget_hash,
            "corpus_sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        } | self.extra  # fmt: skip


def configurations() -> list[Configuration]:
    """A dozen, of the four families the report tells apart, with what happens to runs: one of each."""
    scratch = {4: 2.02, 8: 1.86, 16: 1.745, 32: 1.655}
    tuned = {4: 2.13, 8: 1.80, 16: 1.665, 32: 1.590}
    found = [Configuration("dense", N_PARAMS_DENSE, 1.575, family="dense")]
    found += [
        Configuration(f"narrow-{d_model}", n_params, loss, "dense", d_model=d_model)
        for d_model, n_params, loss in ((28, 43_904, 2.09), (44, 103_224, 1.84))
    ]
    found += [Configuration("mpo", N_PARAMS_MPO[chi], loss, chi=chi) for chi, loss in scratch.items()]
    found += [
        Configuration("mpo-tuned", N_PARAMS_MPO[chi], loss, start="dense", chi=chi, steps=500, budget_hash="0ddba11e")
        for chi, loss in tuned.items()
    ]
    found[3] = replace(found[3], failed=(3,))
    found[4] = replace(found[4], unfinished=(3,))
    found.append(replace(found[5], duplicate_of=5))
    return found


def awkward_studies() -> dict[str, list[Configuration]]:
    """Studies that are hard to draw, by what is hard about them."""
    usual = [replace(c, failed=(), unfinished=()) for c in configurations()[:-1]]
    rng = np.random.default_rng(3)
    crowded = [usual[0]]
    for start in ("scratch", "dense"):
        for chi, n_params in N_PARAMS_MPO.items():
            for n_sites in (2, 3):
                for learning_rate in (3e-4, 1e-3, 3e-3):
                    loss = 1.56 + 0.5 * (4 / chi) ** 0.6 + 0.02 * rng.normal() - 0.05 * (start != "scratch")
                    size = n_params if n_sites == 3 else int(1.17 * n_params)
                    crowded.append(
                        Configuration(
                            "mpo",
                            size,
                            loss,
                            start=start,
                            chi=chi,
                            learning_rate=learning_rate,
                            extra={"n_sites": n_sites},
                        )
                    )
    others = [
        ("lowrank", "scratch", 120_000, 1.8), ("lowrank", "scratch", 70_000, 1.95), ("pruned", "dense", 70_000, 1.92),
    ]  # fmt: skip
    return {
        "usual": usual,
        "crowded": crowded,
        "close": [replace(c, val_loss=1.7 + 0.004 * rng.normal()) for c in usual],
        "equal": [replace(c, val_loss=1.7, n_params=80_000) for c in usual],
        "one seed": [replace(c, seeds=(0,)) for c in usual],
        "one to five seeds": [replace(c, seeds=range(1 + i % 5)) for i, c in enumerate(usual)],
        "no dense model": usual[3:] + [
            Configuration(f"{family}-{size}", size, loss, family=family, start=start)
            for family, start, size, loss in others
        ],
        "one configuration": [Configuration("mpo", 79_168, 1.8, chi=8)],
        "one outlier": [*usual, Configuration("mpo", 300_000, 9.0, chi=20)],
    }  # fmt: skip


@dataclass(frozen=True)
class SimulatedRun:
    """What is written of one run; seed None for a trial; metrics are (key, value, step)."""

    trial: int
    seed: int | None
    status: str
    params: dict[str, str]
    metrics: list[tuple[str, float, int]]
    tags: dict[str, str]


def simulate(
    found: Sequence[Configuration], experiment: str = "tiny", uuid: str = UUID, n_evaluations: int = 20,
    noise: float = 0.006,
) -> Iterator[SimulatedRun]:  # fmt: skip
    """Each trial, followed by its seeds; `noise` is the standard deviation of the final loss over seeds."""
    rng = np.random.default_rng(20)
    for trial, configuration in enumerate(found):
        params = {"trial": trial, **configuration.params}
        counts = [
            ("n_params", configuration.n_params, 0),
            ("n_params_compressed", int(configuration.n_params * 0.9), 0),
            ("n_params_dense", configuration.n_params_dense, 0),
        ]
        common = {schema.STUDY_NAME: experiment, schema.STUDY_UUID: uuid, schema.SCHEMA: str(schema.SCHEMA_VERSION)}
        if configuration.duplicate_of is not None:
            common[schema.DUPLICATE_OF] = str(configuration.duplicate_of)

        def run(seed, status, metrics, tags=(), trial=trial, params=params, common=common) -> SimulatedRun:
            kind = schema.KIND_TRIAL if seed is None else schema.KIND_SEED
            own = {schema.KIND: kind, schema.KEY: schema.run_key(uuid, trial, seed)}
            written = {key: str(value) for key, value in (params | {"seed": seed}).items() if value is not None}
            tags = common | own | dict(tags)
            in_order = sorted(metrics, key=lambda metric: metric[2])
            digest = schema.digest(written, {key: value for key, value, _ in in_order}, tags)
            return SimulatedRun(trial, seed, status, written, metrics, tags | {schema.DIGEST: digest})

        tags = {
            schema.SKIPPED: configuration.skipped,
            schema.STOPPED: configuration.stopped,
            schema.VALIDATION_FRACTION: configuration.validation_fraction,
        }
        status = "KILLED" if configuration.skipped else "RUNNING" if configuration.unfinished else "FINISHED"
        yield run(None, status, counts, {key: value for key, value in tags.items() if value is not None})
        for seed in configuration.seeds:
            final_loss = configuration.val_loss + noise * rng.normal()
            metrics = counts + _seed_metrics(configuration, final_loss, n_evaluations, rng)
            yield run(seed, "FINISHED", metrics, RAN_ON)
        for seed in configuration.failed:
            why = {schema.FAILURE: "validation loss is not finite", schema.FAILURE_STEP: "120"}
            yield run(seed, "FAILED", counts, why)
        for seed in configuration.unfinished:
            yield run(seed, "RUNNING", counts)


def write_study(folder: Path, found: Sequence[Configuration], experiment: str = "tiny", **settings: Any) -> str:
    """Write what `simulate` yields to `folder`/mlflow.db as a study's driver would; the tracking URI."""
    database = folder / "mlflow.db"
    if not database.exists():
        database.write_bytes(_empty_database())
    tracking_uri = f"sqlite:///{database}"
    client = MlflowClient(tracking_uri=tracking_uri)
    known = client.get_experiment_by_name(experiment)
    experiment_id = known.experiment_id if known else client.create_experiment(experiment)
    parents: dict[int, str] = {}
    for run in simulate(found, experiment, **settings):
        tags = run.tags if run.seed is None else run.tags | {schema.PARENT: parents[run.trial]}
        run_id = client.create_run(experiment_id, tags=tags, run_name=run.params["arm"]).info.run_id
        if run.seed is None:
            parents[run.trial] = run_id
        client.log_batch(
            run_id,
            metrics=[Metric(key, value, 1_790_000_000_000, step) for key, value, step in run.metrics],
            params=[Param(key, value) for key, value in run.params.items()],
        )
        if run.status != "RUNNING":
            client.set_terminated(run_id, run.status)
    return tracking_uri


@cache
def _empty_database() -> bytes:
    """MLflow takes seconds to make one."""
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "mlflow.db"
        MlflowClient(tracking_uri=f"sqlite:///{database}").search_experiments()
        return database.read_bytes()


def simulated_runs(
    found: Sequence[Configuration], keys: Sequence[str] = ("val_loss", "tokens"), **settings: Any
) -> tuple[StudyRuns, pd.DataFrame]:
    """The same runs without MLflow, and their curves as `analysis.runs.load.load_curves` gives them for `keys`."""
    simulated = list(simulate(found, **settings))
    records = [
        RunRecord(
            f"{run.trial}-{run.seed}", run.status, None, run.params, {key: value for key, value, _ in run.metrics},
            run.tags,
        )
        for run in simulated
    ]  # fmt: skip
    runs = study_runs(
        StudyAddress("nowhere", "tiny"),
        [record for record, run in zip(records, simulated, strict=True) if run.seed is None],
        [record for record, run in zip(records, simulated, strict=True) if run.seed is not None],
    )
    rows = [
        {"trial": run.trial, "seed": run.seed, "step": step, "key": key, "value": value}
        for run in simulated
        for key, value, step in run.metrics
        if key in keys and run.status == "FINISHED"
    ]
    long = pd.DataFrame(rows, columns=["trial", "seed", "step", "key", "value"])
    return runs, long.pivot(index=["trial", "seed", "step"], columns="key", values="value").reset_index()


def _seed_metrics(
    configuration: Configuration, final_loss: float, n_evaluations: int, rng: np.random.Generator
) -> list[tuple[str, float, int]]:
    steps = np.linspace(0, configuration.steps, n_evaluations + 1).astype(int)
    start = np.log(65) if configuration.start == "scratch" else final_loss + 0.9
    decay = (np.exp(-6 * steps / configuration.steps) - np.exp(-6)) / (1 - np.exp(-6))
    loss = final_loss + (start - final_loss) * decay + 0.01 * decay * rng.normal(size=steps.size)
    accuracy = 0.98 - 0.285 * loss + 0.001 * rng.normal()
    tokens = steps * TOKENS_PER_STEP
    curves = {
        "val_loss": loss, "val_acc": accuracy, "val_loss_sampled": loss + 0.01 * rng.normal(size=steps.size),
        "val_acc_sampled": accuracy, "train_loss": loss - 0.05, "tokens": tokens,
        "learning_rate": configuration.learning_rate * np.cos(steps / configuration.steps * np.pi / 2),
    }  # fmt: skip
    metrics = [
        (key, float(value), int(step))
        for key, values in curves.items()
        for value, step in zip(values, steps, strict=True)
    ]
    best = int(np.argmin(loss))
    start_tokens = 2000 * TOKENS_PER_STEP if configuration.start != "scratch" else 0
    finals = {
        f"final/{key}": curves[key][-1]
        for key in ("val_loss", "val_acc", "val_loss_sampled", "val_acc_sampled", "train_loss")
    }
    finals |= {
        "best/val_loss": loss[best],
        "best/val_acc": accuracy.max(),
        "best/step": steps[best],
        "train_seconds": 60 + 5 * rng.random(),
        "train_tokens": tokens[-1],
        "total_tokens": tokens[-1] + start_tokens,
    }
    metrics += [(key, float(value), int(steps[-1])) for key, value in finals.items()]
    if configuration.family == "dense":
        metrics += _rel_error_metrics(rng)
    return metrics


def _rel_error_metrics(rng: np.random.Generator) -> list[tuple[str, float, int]]:
    metrics = []
    for when, scale in (("init", 1.0), ("trained", 0.72)):
        for chi in N_PARAMS_MPO:
            for layer in LAYERS:
                hardness = {"up": 0.006, "down": 0.0055, "lm_head": 0.03}.get(layer.split(".")[-1], 0.0143)
                value = np.exp(-(hardness * chi) * (1.6 if when == "trained" else 1.0)) * scale
                metrics.append((schema.rel_error_key(when, chi, layer), float(value * (1 + 0.01 * rng.normal())), 0))
    return metrics
