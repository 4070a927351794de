"""Cost of a report on 10,000 runs: reading them from MLflow, statistics and frontier, and each part of the frontier.

"Statistics and frontier" is `Findings.of`: all that the report and the command compute before they draw or print. These
are means and intervals, all comparisons with the dense model and with controls of equal parameters (declared or not),
and the sentences. They are also probabilities, band, hypervolume and size needed of both frontiers.

The study is invented. It has a dense model, MPOs from scratch, and as many controls: low rank and narrower dense
models. Losses fall with the logarithm of the parameters.
"""

from __future__ import annotations

import json
import math
import time

import numpy as np

from analysis import run_schema as schema
from analysis.results.findings import Findings
from analysis.runs.run_records import RunRecord
from analysis.runs.study_runs import StudyAddress, StudyRuns, study_runs
from benchmarks import analysis_load, frontier
from benchmarks.measurement import Row, rate, run_alone, within

SECTION = "analysis"
N_TRIALS, N_SEEDS = 2_000, 5
LIMIT = 3.0
"""Seconds."""
TIMES = 5
UUID = "0" * 32
LABELS = {"mpo": "MPO", "low_rank": "low rank"}
N_PARAMS_DENSE = 808_448


def rows() -> list[Row]:
    return [*analysis_load.rows(), *findings(), *frontier.rows()]


def findings() -> list[Row]:
    """The whole study, against the limit and against a study with a quarter of its trials. Each is first in turn."""
    sizes = (N_TRIALS // 4, N_TRIALS)
    studies = {size: study_of(size) for size in sizes}
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(TIMES):
        for size in sizes[:: 1 if number % 2 else -1]:  # large first: costs paid only once count
            begun = time.perf_counter()
            found = Findings.of(studies[size])
            seconds[size].append(time.perf_counter() - begun)
            if len(found.summary) != size:
                raise RuntimeError("a trial got lost")
    own, fewer = seconds[N_TRIALS], seconds[sizes[0]]
    what = f"statistics and frontier of {N_TRIALS:,} trials × {N_SEEDS} seeds"
    grown = rate(SECTION, what, own, f"{sizes[0]:,} trials", fewer)
    exponent = math.log(grown.ratio) / math.log(N_TRIALS / sizes[0])
    return [
        within(SECTION, what, own, LIMIT, note=f"the very first took {own[0]:.2f} s"),
        grown._replace(note=f"time ∝ trials^{exponent:.2f}"),
    ]


def study_of(n_trials: int, n_seeds: int = N_SEEDS) -> StudyRuns:
    """A finished study with a dense reference, MPOs, controls, and declared contrasts."""
    rng = np.random.default_rng(0)
    families = ["dense", *np.resize(["mpo", "low_rank", "mpo", "dense"], n_trials - 1)]
    sizes = [N_PARAMS_DENSE, *np.sort((10 ** rng.uniform(4.3, 5.8, n_trials - 1)).astype(int))]
    effects = rng.normal(0, 0.01, n_seeds)
    trial_runs, seed_runs = [], []
    for trial, (family, n_params) in enumerate(zip(families, sizes, strict=True)):
        params = params_of(trial, str(family))
        counts: dict[str, float] = {"n_params": int(n_params), "n_params_compressed": int(n_params) - 9_000}
        counts["n_params_dense"] = N_PARAMS_DENSE
        trial_runs.append(record(schema.KIND_TRIAL, schema.run_key(UUID, trial), params, counts))
        trial_runs[-1].tags[schema.VALIDATION_FRACTION] = "0.1"
        losses = 1.6 - 0.3 * np.log10(n_params / N_PARAMS_DENSE) + effects + rng.normal(0, 0.01, n_seeds)
        for seed, loss in enumerate(losses):
            metrics = counts | {field.key: 1_000 for field in schema.FINALS}
            metrics |= {f"{when}/val_loss": float(loss) for when in ("final", "best")}
            metrics |= {f"{when}/val_acc": 0.98 - 0.285 * float(loss) for when in ("final", "best")}
            own = params | {"seed": str(seed)}
            seed_runs.append(record(schema.KIND_SEED, schema.run_key(UUID, trial, seed), own, metrics))
            seed_runs[-1].tags.update(dict.fromkeys(schema.RAN_ON, "1"))
    declared = {
        "margins": {"val_loss": 0.02, "val_acc": 0.005},
        "contrasts": [{"arm": "mpo", "against": "dense"}, {"arm": "mpo", "against": "low_rank"}],
    }
    summary = record(schema.KIND_SUMMARY, f"{UUID}/{schema.KIND_SUMMARY}", {}, {})
    summary.tags[schema.CLAIMS] = json.dumps(declared)
    return study_runs(StudyAddress("nowhere", "large"), trial_runs, seed_runs, [summary])


def params_of(trial: int, family: str) -> dict[str, str]:
    """The params that every run must have. Each family has an arm, and so have the narrower dense models."""
    arm = "narrow" if family == "dense" and trial else family
    width = 128 if arm != "narrow" else 8 + trial % 120
    values = {field.key: {int: "2", float: "0.1", str: "text"}[field.dtype] for field in schema.PARAMS}
    absent = {"seed", "n_sites", "refinement", "chi", "as_chi"}
    values |= {"trial": str(trial), "arm": arm, "family": family, "d_model": str(width)}
    values |= {"family_label": LABELS.get(family, family), "start": "scratch"}
    values |= {"learning_rate": f"{3e-4 * 1.1 ** (trial % 31):.3g}", "budget_hash": "b7d1f00d"}
    cap = {"mpo": "chi", "low_rank": "as_chi"}.get(family)
    return {key: value for key, value in values.items() if key not in absent} | (
        {cap: str(2 + trial // 40)} if cap else {}
    )


def record(kind: str, key: str, params: dict[str, str], metrics: dict[str, float]) -> RunRecord:
    tags = {schema.STUDY_NAME: "large", schema.STUDY_UUID: UUID, schema.SCHEMA: str(schema.SCHEMA_VERSION)}
    return RunRecord(key, "FINISHED", 1, params, metrics, tags | {schema.KIND: kind, schema.KEY: key})


if __name__ == "__main__":
    run_alone(rows)
