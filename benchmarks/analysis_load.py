"""Time to read a study of 10,000 runs from MLflow, the first time and from the cache.

The study is a real SQLite database of MLflow. Its rows are inserted into the tables as MLflow's store does, because
`log_batch` would take many minutes. Each reading is checked against what was written.
"""

from __future__ import annotations

import math
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy
from mlflow.store.tracking.dbmodels import models
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from analysis import run_schema as schema
from analysis.runs.curves import load_curves
from analysis.runs.load import load_study
from analysis.runs.study_runs import StudyAddress, StudyRuns
from benchmarks.measurement import Row, rate, run_alone, within

SECTION = "analysis"
FIRST, AGAIN = "the first time", "from the cache"
FIRST_LIMIT, AGAIN_LIMIT = 20.0, 1.0
"""Seconds for params and final metrics."""
FINALS, CURVES = "params and final metrics", "curves"
SMALLER = 4
"""The larger study has this many times the runs of the smaller one."""
STUDY = "large"
N_EVALUATIONS = 20
N_CURVES = 40
"""Trials whose learning curves are read: about as many as a figure can show."""
BEGUN = 1_790_000_000_000
ROWS_AT_ONCE = 50_000
LATEST = models.SqlLatestMetric


def rows(n_trials: int = 2_000, n_seeds: int = 5, times: int = 3) -> list[Row]:
    """Reading params, final metrics and some curves of this study and a smaller one, the first time and from the cache.

    Raises:
        RuntimeError: what was read is not what was written.
    """
    sizes = (n_trials // SMALLER, n_trials)
    seconds: dict[tuple[int, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        uris = {size: f"sqlite:///{folder}/{size}.db" for size in sizes}
        finals = {size: write_study(uri, size, n_seeds) for size, uri in uris.items()}
        mebibytes = Path(folder, f"{n_trials}.db").stat().st_size / 2**20
        for number in range(times):
            for size in sizes[:: -1 if number % 2 else 1]:
                for way in (FIRST, AGAIN):
                    begun = time.perf_counter()
                    runs = load_study(StudyAddress(uris[size], STUDY), cache=Path(folder, f"cache{size}-{number}"))
                    loaded = time.perf_counter()
                    curves = load_curves(runs, list(range(N_CURVES)))
                    seconds.setdefault((size, way, FINALS), []).append(loaded - begun)
                    seconds.setdefault((size, way, CURVES), []).append(time.perf_counter() - loaded)
                    check(runs, curves, finals[size])
    of = f"{n_trials:,} trials × {n_seeds} seeds"
    found = []
    for way, limit in ((FIRST, FIRST_LIMIT), (AGAIN, AGAIN_LIMIT)):
        own, fewer = seconds[n_trials, way, FINALS], seconds[sizes[0], way, FINALS]
        curves = seconds[n_trials, way, CURVES]
        found.append(within(SECTION, f"{FINALS} of {of}, {way}", own, limit, note=f"a database of {mebibytes:.0f} MiB"))
        found.append(rate(SECTION, f"{CURVES} of {N_CURVES} trials of them, {way}", curves, FINALS, own))
        grown = rate(SECTION, f"{FINALS} of {of}, {way}", own, f"{sizes[0]:,} trials", fewer)
        exponent = math.log(grown.ratio) / math.log(n_trials / sizes[0])
        found.append(grown._replace(note=f"time ∝ runs^{exponent:.2f}"))
    return found


def check(runs: StudyRuns, curves: pd.DataFrame, finals: np.ndarray) -> None:
    if not np.array_equal(runs.seeds["final/val_loss"].to_numpy(), finals.ravel()):
        raise RuntimeError("what was read is not what was written")
    if len(curves) != N_CURVES * finals.shape[1] * N_EVALUATIONS:
        raise RuntimeError("some learning curves are missing")


def write_study(uri: str, n_trials: int, n_seeds: int) -> np.ndarray:
    """Write a finished study as the tracker leaves it, and return its final losses, (n_trials, n_seeds)."""
    store = SqlAlchemyStore(uri, "mlartifacts")
    experiment_id = int(store.create_experiment(STUDY))
    finals = np.random.default_rng(0).normal(1.7, 0.1, (n_trials, n_seeds))
    study_uuid = uuid.uuid4().hex
    # The other tables refer to runs, so runs come first.
    tables = {table: [] for table in (models.SqlRun, models.SqlTag, models.SqlParam, models.SqlMetric, LATEST)}

    def flush() -> None:
        with store.engine.begin() as connection:
            for table, rows in tables.items():
                connection.execute(sqlalchemy.insert(table), rows)
                rows.clear()

    for table, row in rows_of(study_uuid, experiment_id, finals):
        tables[table].append(row)
        if len(tables[table]) == ROWS_AT_ONCE:
            flush()
    flush()
    store.engine.dispose()
    return finals


def rows_of(study_uuid: str, experiment_id: int, finals: np.ndarray) -> Iterator[tuple[type, dict[str, Any]]]:
    common = {schema.STUDY_NAME: STUDY, schema.STUDY_UUID: study_uuid, schema.SCHEMA: str(schema.SCHEMA_VERSION)}

    def run_of(
        kind: str, key: str, own: dict[str, str], started: int, params: dict[str, str], metrics: dict[str, float]
    ) -> Iterator[tuple[type, dict[str, Any]]]:
        run_id = uuid.uuid4().hex
        yield (
            models.SqlRun,
            {
                "run_uuid": run_id, "name": key, "status": "FINISHED", "start_time": started, "end_time": started + 1,
                "lifecycle_stage": "active", "experiment_id": experiment_id, "user_id": "", "source_type": "LOCAL",
                "artifact_uri": f"mlartifacts/{run_id}/artifacts",
            },
        )  # fmt: skip
        tags = common | {schema.KIND: kind, schema.KEY: key} | own
        for tag, value in (tags | {schema.DIGEST: schema.digest(params, metrics, tags)}).items():
            yield models.SqlTag, {"key": tag, "value": value, "run_uuid": run_id}

    revision = f"{uuid.uuid4().hex}/{1 + len(finals) + finals.size}"
    yield from run_of(schema.KIND_SUMMARY, f"{study_uuid}/summary", {schema.REVISION: revision}, BEGUN, {}, {})
    for trial, losses in enumerate(finals):
        family = {schema.FAMILY: "mpo", schema.ARM: "mpo"}
        parent = None
        for seed in (None, *range(len(losses))):
            kind, own = schema.KIND_TRIAL, family | {schema.VALIDATION_FRACTION: "0.1"}
            params: dict[str, str] = params_of(trial)
            metrics: dict[str, float] = {
                "n_params": 10_000 + 10 * trial, "n_params_compressed": 9_000, "n_params_dense": 808_448,
            }  # fmt: skip
            curves: dict[str, float] = {}
            if seed is not None:
                kind, own = schema.KIND_SEED, family | dict.fromkeys(schema.RAN_ON, "1")
                params |= {"seed": str(seed)}
                metrics |= {field.key: int(1000 * losses[seed]) for field in schema.FINALS}
                metrics |= {"final/val_loss": losses[seed], "final/val_acc": 0.4}
                curves = dict.fromkeys((curve.key for curve in schema.CURVES), losses[seed])
            key = schema.run_key(study_uuid, trial, seed)
            rows = list(run_of(kind, key, own, BEGUN + 10 * trial, params, metrics | curves))
            run_id = rows[0][1]["run_uuid"]
            parent = parent or run_id
            yield from rows
            if seed is not None:
                yield models.SqlTag, {"key": schema.PARENT, "value": parent, "run_uuid": run_id}
            for key, value in params.items():
                yield models.SqlParam, {"key": key, "value": value, "run_uuid": run_id}
            for key, value in metrics.items():
                yield from metric_of(run_id, key, [value], is_curve=False)
            for key, last in curves.items():
                yield from metric_of(run_id, key, np.linspace(4, last, N_EVALUATIONS), is_curve=True)


def params_of(trial: int) -> dict[str, str]:
    """Params of an MPO, with the schema's types."""
    absent = ("seed", "as_chi", "refinement")
    values = {field.key: {int: "2", float: "0.0003", str: "text"}[field.dtype] for field in schema.PARAMS}
    values |= {"trial": str(trial), "arm": "mpo", "family": "mpo", "family_label": "MPO", "start": "scratch"}
    values["chi"] = str(2 + trial)
    return {key: value for key, value in values.items() if key not in absent}


def metric_of(run_id: str, key: str, values: Any, is_curve: bool) -> Iterator[tuple[type, dict[str, Any]]]:
    row: dict[str, Any] = {}
    for number, value in enumerate(values):
        row = {
            "key": key, "value": float(value), "timestamp": BEGUN, "step": 100 * number, "is_nan": False,
            "run_uuid": run_id,
        }  # fmt: skip
        if not is_curve or key in ("val_loss", "tokens"):  # only the history of curves is read here
            yield models.SqlMetric, row
    yield LATEST, row


if __name__ == "__main__":
    run_alone(rows)
