"""Simulated studies with what MPO must be compared with, and studies that are hard to draw as pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from simulated_study import N_PARAMS_DENSE, N_PARAMS_MPO, Configuration, awkward_studies, simulated_runs

from analysis.results.comparisons import compare
from analysis.results.summary import summarise
from analysis.runs.study_runs import Claims, Contrast, StudyRuns

CONTRASTS = (("mpo-tuned", "dense"), ("mpo-tuned", "mpo"), ("mpo", "low_rank"))
MARGINS = {"val_loss": 0.02, "val_acc": 0.005}


def with_controls() -> list[Configuration]:
    """Dense, MPO of both starts, and three kinds of controls, each as large as an MPO or a little smaller."""
    found = [Configuration("dense", N_PARAMS_DENSE, 1.575, family="dense")]
    for chi, size in N_PARAMS_MPO.items():
        found.append(Configuration("mpo", size, 1.55 + 1.9 / chi, chi=chi))
        found.append(
            Configuration(
                "mpo-tuned", size, 1.50 + 2.4 / chi, start="dense", chi=chi, steps=500, budget_hash="0ddba11e"
            )
        )
        for family, loss in (("low_rank", 1.60 + 1.8 / chi), ("monarch", 1.56 + 2.2 / chi)):
            found.append(Configuration(family, size - 37 * chi, loss, family=family, extra={"as_chi": chi}))
        found.append(Configuration(f"narrow-{chi}", size - 11 * chi, 1.59 + 2.1 / chi, "dense", d_model=3 * chi + 16))
    return found


def studies() -> dict[str, list[Configuration]]:
    """The awkward ones, and those with controls: as they are; of long names, and with what happens to seeds; many;
    with trials of which every seed failed, and such alone."""
    controls = with_controls()
    long = [replace(c, arm=f"an-arm-of-a-rather-long-name-{c.arm}") for c in controls]
    long[5] = replace(long[5], seeds=(0, 1))
    long[8] = replace(long[8], failed=(3,))
    long[9] = replace(long[9], seeds=(7, 8, 9))
    rates = [replace(c, learning_rate=rate) for c in controls[1:] for rate in (3e-4, 1e-3, 3e-3)]
    lost = [replace(c, seeds=(), failed=(0, 1)) if c.chi == 16 or c.family == "monarch" else c for c in controls]
    all_lost = [controls[0], *(replace(c, seeds=(), failed=(0, 1)) for c in controls[1:4])]
    return awkward_studies() | {
        "controls": controls, "long": long, "many controls": [controls[0], *rates], "lost": lost, "all lost": all_lost,
    }  # fmt: skip


def compared(
    found: Sequence[Configuration], margins: dict[str, float] = MARGINS, contrasts: Sequence[tuple[str, str]] = (),
    **settings,
) -> tuple[StudyRuns, pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Runs, their summary and their comparisons; of the contrasts, those whose arms the study has."""
    runs, _ = simulated_runs(found, n_evaluations=2, **settings)
    runs = replace(runs, claims=Claims(margins, tuple(Contrast(runs.name, *pair) for pair in contrasts)))
    summary = summarise(runs)
    return runs, summary, compare(runs, summary).pairs
